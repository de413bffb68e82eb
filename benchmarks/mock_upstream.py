"""An OpenAI-compatible endpoint with a fixed latency, to measure what a gateway adds.

    python benchmarks/mock_upstream.py --port 9000 --latency 0.05

Plain ASGI, for low overhead. `n` gives as many choices; all answers differ.
"""

import argparse
import asyncio
import json
import random
from typing import Any

HEADERS = [(b"content-type", b"application/json")]
WORDS = (
    "quiet",
    "rain",
    "falls",
    "on",
    "the",
    "old",
    "harbour",
    "while",
    "a",
    "sailor",
    "reads",
    "letters",
    "from",
    "a",
    "war",
    "by",
    "night",
)


def completion(body: dict[str, Any]) -> bytes:
    count = body.get("n") or 1
    texts = [" ".join(random.sample(WORDS, 12)) for _ in range(count)]
    choices = [
        {"index": i, "message": {"role": "assistant", "content": t}, "finish_reason": "stop"}
        for i, t in enumerate(texts)
    ]
    usage = {"prompt_tokens": 50, "completion_tokens": 12 * count, "total_tokens": 50 + 12 * count}
    head = {
        "id": "chatcmpl-mock",
        "object": "chat.completion",
        "created": 1,
        "model": body.get("model", "mock"),
    }
    return json.dumps({**head, "choices": choices, "usage": usage}).encode()


def make_app(latency: float) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["path"].endswith("/models"):
            answer = json.dumps(
                {
                    "object": "list",
                    "data": [{"id": "mock", "object": "model", "created": 1, "owned_by": "mock"}],
                }
            ).encode()
        else:
            await asyncio.sleep(latency)
            answer = completion(json.loads(body))
        length = (b"content-length", str(len(answer)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, length]})
        await send({"type": "http.response.body", "body": answer})

    return app


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    args = parser.parse_args()
    uvicorn.run(
        make_app(args.latency),
        host="127.0.0.1",
        port=args.port,
        log_level="error",
        access_log=False,
    )


if __name__ == "__main__":
    main()
