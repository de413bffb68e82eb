"""docs/clients.md: its table is what `make clients` measured last, its code can be read."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield __import__("try_clients")
    for name in ("try_clients", "client_upstream"):
        sys.modules.pop(name, None)


def test_the_table_is_the_committed_result(tool) -> None:
    page = tool.PAGE.read_text(encoding="utf-8")
    clients = tool.sections(page)
    assert len(clients) == 18
    result = json.loads(tool.RESULTS.read_text(encoding="utf-8"))
    for client in clients:
        client.shown = result["clients"][client.name]
    assert tool.table(clients, result["versions"]) in page
    assert not tool.lost(clients)
    clients[0].shown = {**clients[0].shown, "user": False}
    assert tool.lost(clients) == ["curl: user"]


def test_the_code_can_be_read(tool) -> None:
    for client in tool.sections(tool.PAGE.read_text(encoding="utf-8")):
        for language, code in client.blocks:
            if language == "python":
                ast.parse(code)
            assert tool.ADDRESS in code
            assert re.search(r"\bada\b", code)


def test_the_fake_upstream_answers_as_a_schema_asks(tool) -> None:
    upstream = sys.modules["client_upstream"]
    schema = {
        "$defs": {"tea": {"enum": ["mint", "lime"]}},
        "properties": {
            "tea": {"$ref": "#/$defs/tea"},
            "cups": {"type": "integer"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
    }
    assert upstream.example(schema) == {"tea": "mint", "cups": 1, "note": upstream.TEXT}
