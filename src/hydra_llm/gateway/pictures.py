"""Pictures of records and requests as text, by a vision endpoint (setting `vision`).

A record's pictures are described when it comes. The description stands in its input as a line
`[picture] ...`; the picture itself is not kept. Descriptions are cached by the picture's SHA-256,
and are deleted with a record in which they stand. Only `data:` URLs are read, and URLs of the
hosts in `vision_hosts`, never from a private address and without redirects.
"""

import base64
import binascii
import hashlib
import ipaddress
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes, urlsplit
from weakref import WeakValueDictionary

import anyio
import httpx2
from anyio.to_thread import run_sync

from hydra_llm.errors import SettingsError
from hydra_llm.gateway.metered import MeteredUpstream
from hydra_llm.gateway.picture_cache import FILE, keep, kept, line_of
from hydra_llm.gateway.schemas import ApiError
from hydra_llm.gateway.settings import ServeSettings
from hydra_llm.gateway.spend import Ledger
from hydra_llm.gateway.telemetry import Telemetry
from hydra_llm.gateway.upstream import HttpUpstream, Transport, Upstream, UpstreamError
from hydra_llm.llm.concurrency import gathered
from hydra_llm.llm.endpoint import Endpoint, endpoint_of, without_userinfo
from hydra_llm.llm.wire import answer_of, text_of
from hydra_llm.text import fold, repair

ASKED = (
    "Describe this picture in at most three sentences, so that it can be found by a search: what it"
    " shows, and the text in it. Give the description alone."
)
LONGEST = 1000  # characters of a description
FETCH_SECONDS = 10.0  # as a whole
MOST = 16  # pictures of a record, or of a question
AT_ONCE = 4  # pictures, or records with some, that are described at the same time
DATA_URL = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
UNICAST = ipaddress.ip_network("2000::/3")  # all that is given out of IPv6's global addresses
PORTS = {"http": 80, "https": 443}
BEGINNINGS = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
}
FORMS = "PNG, JPEG, GIF or WebP"
T = TypeVar("T")
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Host and port → its addresses."""


class PictureError(ApiError):
    """A picture that cannot be described, with the place where it stands."""

    def __init__(self, place: str, fault: str):
        super().__init__(400, f"{place}: {fault}", param=place, code="invalid_picture")


async def addresses_of(host: str, port: int) -> list[str]:
    """By the system's resolver."""
    found = await anyio.getaddrinfo(host, port)
    return [str(address[0]) for *_, address in found]


@dataclass
class Pictures:
    """Describes pictures; asks the endpoint once for equal ones. Any task may call."""

    upstream: Upstream
    model: str
    settings: ServeSettings
    file: Path  # of the descriptions
    transport: Transport | None = None  # of fetches, for tests
    resolve: Resolve = addresses_of
    locks: WeakValueDictionary[bytes, anyio.Lock] = field(default_factory=WeakValueDictionary)

    async def in_words(
        self, place: str, content: str | Sequence[Any], lines: list[str] | None = None
    ) -> str:
        """A record's input as text; its pictures are described, and the descriptions kept, also
        where another one fails: `lines` gets what is kept. `ApiError`: a part that is neither text
        nor a picture, a picture that cannot be read, or a failed endpoint.
        """
        if isinstance(content, str):
            return content
        urls = picture_urls(place, content)
        if len(urls) > MOST:
            raise PictureError(place, f"there are {len(urls)} pictures: send at most {MOST}")
        lines = [] if lines is None else lines
        shown = await all_of([partial(self._line, place, url, lines) for url in urls])
        return "\n".join(filter(None, [_said(content), *shown]))

    async def of_question(self, content: Any) -> list[str]:
        """A line for each picture of a request's question that can be read; nothing is kept."""
        if not isinstance(content, list):
            return []
        urls = [url for part in content if (url := _url_of(part))]
        readable = [url for url in urls if DATA_URL.match(url) or self._is_listed(url)]
        return await all_of([partial(self._line, "messages", url) for url in readable[:MOST]])

    async def aclose(self) -> None:
        await self.upstream.aclose()

    async def _line(self, place: str, url: str, lines: list[str] | None = None) -> str:
        raw = await self._raw(place, url)
        kind = kind_of(raw)
        if not kind:
            raise PictureError(place, f"the picture is none: send {FORMS}")
        key = hashlib.sha256(f"{self.model}\n{ASKED}\n".encode() + raw).digest()
        async with self.locks.setdefault(key, anyio.Lock()):
            text = await run_sync(kept, self.file, key)
            if text is None:
                data = base64.b64encode(raw).decode()
                text = await self._ask(place, f"data:image/{kind};base64,{data}")
                if lines is not None:
                    lines.append(line_of(text))
                    await run_sync(keep, self.file, key, text)
        return line_of(text)

    async def _ask(self, place: str, url: str) -> str:
        picture = {"type": "image_url", "image_url": {"url": url}}
        parts = [{"type": "text", "text": ASKED}, picture]
        body = {"model": self.model, "messages": [{"role": "user", "content": parts}]}
        try:
            completion = await self.upstream.complete(body)
        except UpstreamError as error:
            fault = f"{place}: the vision endpoint failed: {error}"
            raise ApiError(502, fault, param=place, code="vision") from None
        text = as_search_text(answer_of(completion["choices"][0]["message"]))
        if not text:
            fault = f"{place}: the vision endpoint described nothing"
            raise ApiError(502, fault, param=place, code="vision")
        return text

    # ---- reading

    async def _raw(self, place: str, url: str) -> bytes:
        most = self.settings.max_picture_bytes
        if DATA_URL.match(url):
            raw = _of_data(place, url)
        elif self._is_listed(url):
            raw = b""
            with anyio.move_on_after(FETCH_SECONDS) as limit:
                raw = await self._fetched(place, url, most)
            if limit.cancelled_caught:
                fault = f"the picture was not there within {FETCH_SECONDS:g} seconds"
                raise PictureError(place, fault)
        else:
            fix = "send it as a data: URL, or list the host in `vision_hosts`"
            raise PictureError(place, f"the picture's URL is not fetched: {fix}")
        if len(raw) > most:
            raise PictureError(place, f"the picture has more than {most} bytes: send a smaller one")
        return raw

    def _is_listed(self, url: str) -> bool:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            return False
        name = parts.hostname or ""
        full = name if port in (None, PORTS.get(parts.scheme)) else f"{name}:{port}"
        return parts.scheme in PORTS and full in self.settings.vision_hosts

    async def _fetched(self, place: str, url: str, most: int) -> bytes:
        """What stands at a URL of a listed host. The address that was checked is the one asked. It
        is read as it comes: what is compressed may become larger than memory.
        """
        parts = urlsplit(url)
        host, port = str(parts.hostname), parts.port or PORTS[parts.scheme]
        try:
            found = await self.resolve(host, port)
        except OSError:
            found = []
        if not found:
            raise PictureError(place, f"the picture's host {host} has no address")
        if not all(map(is_public, found)):
            raise PictureError(place, f"the picture's host {host} has a private address")
        address = f"[{found[0]}]" if ":" in found[0] else found[0]
        target = parts._replace(netloc=f"{address}:{port}", fragment="").geturl()
        own: dict[str, Any] = {"transport": self.transport, "timeout": FETCH_SECONDS}
        raw, name = bytearray(), host if parts.port is None else f"{host}:{port}"
        headers = {"host": name, "accept-encoding": "identity"}
        try:
            async with (
                httpx2.AsyncClient(trust_env=False, follow_redirects=False, **own) as http,
                http.stream(
                    "GET", target, headers=headers, extensions={"sni_hostname": host}
                ) as response,
            ):
                if response.status_code != 200:
                    fault = f"HTTP {response.status_code}, and redirects are not followed"
                    raise PictureError(place, f"the picture cannot be fetched from {host}: {fault}")
                async for piece in response.aiter_raw():
                    raw += piece
                    if len(raw) > most:
                        break
        except httpx2.HTTPError as error:
            fault = type(error).__name__
            raise PictureError(
                place, f"the picture cannot be fetched from {host}: {fault}"
            ) from None
        return bytes(raw)


def open_pictures(
    settings: ServeSettings, cache: Path, ledger: Ledger, telemetry: Telemetry
) -> Pictures | None:
    """By the settings; None without `vision`. SettingsError: no endpoint, or one without a key."""
    spec = settings.vision
    if not spec:
        return None
    if not spec.startswith("openai:"):
        fix = "write openai:MODEL, or openai:MODEL@URL"
        raise SettingsError(f"serve.vision {without_userinfo(spec)}: is no vision endpoint: {fix}")
    model, url = endpoint_of(spec.removeprefix("openai:"))
    endpoint = HttpUpstream(Endpoint.of(spec, url), timeout=settings.upstream_timeout)
    return Pictures(MeteredUpstream(endpoint, ledger, telemetry), model, settings, cache / FILE)


async def all_of(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Results of these, `AT_ONCE` at the same time; the first `ApiError` is raised."""
    slots = anyio.Semaphore(AT_ONCE)

    async def one(call: Callable[[], Awaitable[T]]) -> T | ApiError:
        async with slots:
            try:
                return await call()
            except ApiError as error:
                return error

    results: list[T] = []
    for result in await gathered([partial(one, call) for call in calls]):
        if isinstance(result, ApiError):
            raise result
        results.append(result)
    return results


def picture_urls(place: str, content: Sequence[Any]) -> list[str]:
    """The URLs of a record's pictures. `PictureError`: a part is neither text nor a picture."""
    urls = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image_url":
            if not (url := _url_of(part)):
                raise PictureError(place, "a part of type image_url has no image_url.url")
            urls.append(url)
        elif kind != "text" or not isinstance(part.get("text"), str):
            fault = "a part is neither {'type': 'text', 'text': ...} nor a picture (image_url)"
            raise PictureError(place, fault)
    return urls


def _said(content: Sequence[Any]) -> str:
    return text_of({"content": content}).strip()


def _url_of(part: Any) -> str:
    """The URL of a picture's part, '' of any other."""
    if not isinstance(part, Mapping) or part.get("type") != "image_url":
        return ""
    named = part.get("image_url")
    url = named.get("url") if isinstance(named, Mapping) else named
    return url if isinstance(url, str) else ""


def _of_data(place: str, url: str) -> bytes:
    head, _, body = url.partition(",")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(unquote_to_bytes(body), validate=True)
    except binascii.Error:
        raise PictureError(place, "the picture's data: URL is not valid base64") from None


def as_search_text(text: str) -> str:
    """A description in one line. Retrieval compares what stands between blanks: there are no marks
    at the ends of words.
    """
    plain = re.sub(r"[.!?;:]+ ", " - ", fold(repair(text))[:LONGEST])
    return re.sub(r"[.,;:!?]+( |$)", r"\1", plain).strip()


def kind_of(raw: bytes) -> str:
    """png, jpeg, gif or webp, by how the bytes begin; '' of anything else."""
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        return "webp"
    return next((kind for mark, kind in BEGINNINGS.items() if raw.startswith(mark)), "")


def is_public(address: str) -> bool:
    """Whether an address is of the public internet, and no other address is written in it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (ip not in UNICAST or ip.sixtofour or ip.teredo):
        return False
    return ip.is_global and not ip.is_multicast
