"""Completions of texts and embeddings where the LLM is in this process: by its chat, and by the
encoder that compares users' records. An endpoint's own are passed on (forward.py).
"""

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync

from hydra_llm.errors import MissingExtra
from hydra_llm.gateway.batching import MicroBatcher
from hydra_llm.gateway.chunks import DONE, event
from hydra_llm.gateway.deployment import Deployment, open_features
from hydra_llm.gateway.pieces import chunks_in
from hydra_llm.gateway.routed import RoutedRequest
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.llm.wire import text_of
from hydra_llm.model.feature_cache import FeatureCache

if TYPE_CHECKING:
    import numpy as np

Body = Mapping[str, Any]
PREFIX = "cmpl-"
RAW: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "logprobs": (),
}
"""What only a model of plain texts can do → values that ask for nothing."""
MAX_INPUTS = 2048
AT_ONCE = 8  # texts that are encoded while other users wait


def to_chat(body: Body) -> dict[str, Any]:
    """The chat request of a text's completion: the text is a user's message. `ApiError` 400: it has
    what a chat model cannot do.
    """
    prompt = body.get("prompt")
    [text] = prompt if isinstance(prompt, list) and len(prompt) == 1 else [prompt]
    if not isinstance(text, str):
        raise ApiError(400, "prompt: must be one text, not several or tokens", param="prompt")
    for name, harmless in RAW.items():
        if body.get(name) not in (None, *harmless):
            raise ApiError(400, f"{name} cannot be used: this is a chat model", param=name)
    chat = {name: value for name, value in body.items() if name not in (*RAW, "prompt")}
    messages = [{"role": "user", "content": text}]
    return {**chat, "messages": messages, "personalization": {"enabled": False}}


class TextWire:
    """Writes completions of texts."""

    async def whole(self, completion: Body, routed: RoutedRequest) -> Body:
        return _as_text(completion, "message", routed)

    async def stream(
        self, pieces: AsyncIterator[bytes], routed: RoutedRequest
    ) -> AsyncIterator[bytes]:
        async for chunk in chunks_in(pieces):
            if isinstance(chunk, bytes):
                yield chunk
            elif "error" in chunk:
                yield event(chunk)
                return
            else:
                yield event(_as_text(chunk, "delta", routed))
        yield DONE


def _as_text(chat: Body, part: str, routed: RoutedRequest) -> Body:
    choices = [
        {
            "index": choice["index"],
            "text": text_of(choice[part]),
            "logprobs": None,
            "finish_reason": choice["finish_reason"],
        }
        for choice in chat["choices"]
    ]
    id = PREFIX + routed.id.removeprefix("req_")
    return {**chat, "id": id, "object": "text_completion", "choices": choices}


# ---- embeddings


class Embedder:
    """Embeds texts by the encoder of the bundle, or of the settings where there is none."""

    def __init__(self) -> None:
        self._own: FeatureCache | None = None

    async def embed(self, deployment: Deployment, body: Body, user: str, longest: int) -> Body:
        """A list of embeddings. `ApiError`: an input that cannot be embedded, or no encoder."""
        texts, form = _inputs(body, longest), body.get("encoding_format") or "float"
        if form not in ("float", "base64"):
            message = "encoding_format: must be float or base64"
            raise ApiError(400, message, param="encoding_format")
        features = deployment.features or await self._open(deployment)
        batcher: MicroBatcher = deployment.batcher
        vectors: list[Any] = []
        for start in range(0, len(texts), AT_ONCE):
            part = texts[start : start + AT_ONCE]
            vectors += list(
                await batcher.run(partial(features.texts, part, keep=False), user=user, idle=True)
            )
        width = len(vectors[0])
        if body.get("dimensions") not in (None, width):
            message = f"dimensions: the encoder's vectors have {width}"
            raise ApiError(400, message, param="dimensions")
        data = [
            {"object": "embedding", "index": place, "embedding": _written(vector, form == "base64")}
            for place, vector in enumerate(vectors)
        ]
        model = deployment.pipeline.settings.encoder
        return {"object": "list", "data": data, "model": model, "usage": None}

    async def _open(self, deployment: Deployment) -> FeatureCache:
        if self._own is None:
            try:
                settings = deployment.pipeline.settings
                self._own = await run_sync(open_features, settings, "/v1/embeddings")
            except MissingExtra as error:
                raise ApiError(404, str(error), code="no_encoder") from None
        return self._own


def _inputs(body: Body, longest: int) -> Sequence[str]:
    given = body.get("input")
    texts: list[Any] = given if isinstance(given, list) else [given]
    usable = all(isinstance(text, str) and text.strip() for text in texts)
    if not 0 < len(texts) <= MAX_INPUTS or not usable:
        message = f"input: must be a text, or 1 to {MAX_INPUTS} texts, none blank; no tokens"
        raise ApiError(400, message, param="input")
    if any(len(text) > longest for text in texts):
        raise ApiError(413, f"input: a text is longer than {longest} characters", param="input")
    return texts


def _written(vector: "np.ndarray", in_base64: bool) -> Any:
    """Numbers, or the base64 of little-endian float32, as OpenAI's SDK asks for."""
    raw = vector.astype("<f4").tobytes()
    return base64.b64encode(raw).decode() if in_base64 else vector.tolist()
