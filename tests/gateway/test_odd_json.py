"""JSON that is hard to keep: halves of surrogate pairs, which UTF-8 cannot hold, and numbers that
no JSON has. What is stored is told again, exported and deleted.
"""

import json
from typing import Any

import pytest

from hydra_llm.cli.main import run
from hydra_llm.store.store import Store
from hydra_llm.text import json_text

from .conftest import records_of, running

pytestmark = pytest.mark.anyio
HALF = "\\ud83d half of an emoji"  # as it stands in JSON


def read_strictly(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    text.encode()  # it can be written
    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize(
    ("value", "same"),
    [
        ({"a": [1, "é", None, True], "1": 0.5}, {"a": [1, "é", None, True], "1": 0.5}),
        (
            {"a": float("nan"), "b": ({"c": float("-inf")}, 1.5)},
            {"a": None, "b": [{"c": None}, 1.5]},
        ),
        (["\ud83d é", 1e400], ["\ud83d é", None]),
        ("\udc00", "\udc00"),
    ],
)
def test_json_text_can_be_written_and_read(value: Any, same: Any, ascii: bool) -> None:
    assert read_strictly(json_text(value, ascii=ascii)) == same


def test_other_values_are_the_defaults(store: Store) -> None:
    assert (
        json_text({"a": b"x", "n": float("nan")}, default=bytes.decode) == '{"a": "x", "n": null}'
    )


async def test_halves_of_pairs_are_kept_and_exported(
    either: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    body = f'{{"model": "m", "user": "ada", "input": "{HALF}", "metadata": {{"a": "{HALF}"}}}}'
    async with running(either) as world:
        world.upstream.rule = lambda body, index: "\ud83d said"
        sent = {"content": body, "headers": {"content-type": "application/json"}}
        reply = await world.http.post("/v1/responses", **sent)
        assert reply.status_code == 200
        assert reply.json()["store"] is True
        id = reply.json()["id"]
        kept = read_strictly((await world.http.get(f"/v1/responses/{id}")).text)
        assert kept["metadata"]["a"] == "\ud83d half of an emoji"
        export = await world.http.get("/v1/users/ada/export")
        assert export.status_code == 200
        assert HALF in json.dumps(read_strictly(export.text))
        assert run(["users", "export", "ada", "--store", either.url.render_as_string(False)]) == 0
        assert HALF in json.dumps(read_strictly(capsys.readouterr().out))
        assert (await world.http.delete("/v1/users/ada")).status_code == 200


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/chat/completions", "/v1/messages"])
async def test_numbers_that_no_json_has_are_refused(store: Store, path: str, number: str) -> None:
    asked = '"input": "x", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]'
    body = f'{{"model": "m", "user": "ada", {asked}, "top_p": {number}}}'
    async with running(store) as world:
        headers = {"content-type": "application/json"}
        reply = await world.http.post(path, content=body, headers=headers)
        assert reply.status_code == 400
        assert f"{number} is no number" in reply.text
        assert world.upstream.bodies == []


async def test_what_the_upstream_says_is_kept_without_them(either: Store) -> None:
    either.add_records("ada", records_of("ada"))
    async with running(either) as world:
        complete = world.upstream.complete

        async def odd(body: Any) -> Any:
            answer = await complete(body)
            answer["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": -1e999}]}
            return answer

        world.upstream.complete = odd  # type: ignore[method-assign]
        sent = {"model": "m", "user": "ada", "input": "a storm", "top_logprobs": 1}
        reply = await world.http.post("/v1/responses", json=sent)
        assert read_strictly(reply.text)["store"] is True
        chat = await world.ask("a storm")
        read_strictly(chat.text)
        read_strictly((await world.http.get("/v1/users/ada/export")).text)
