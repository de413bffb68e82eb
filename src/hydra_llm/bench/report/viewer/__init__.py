"""The run viewer: one static page with the samples of runs, without server and network.

`page.js` lists them by an index (who, which query, gain, the beginning of texts) and reads what a
sample's view shows from a JSON block of its query, parsed when it is opened. Texts are untrusted:
JSON has no `<`, the script makes text nodes only, and the policy admits no other script. The page
quotes the data set.
"""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from hydra_llm.bench.details import Details, Key, read_details, shortened
from hydra_llm.bench.method import base_name
from hydra_llm.bench.report.tables import Run
from hydra_llm.bench.results import worth
from hydra_llm.bench.runlog import Sample
from hydra_llm.errors import SettingsError

HERE = Path(__file__).parent
LISTED = 160  # characters of a text in the list, which search looks through
SHOWN = ("answer", "error", "calls", "tokens", "llm_seconds", "notes", "probability", "agreement")


def page(runs: Sequence[Run], methods: Sequence[str] = (), limit: int | None = None) -> str:
    """The samples of runs on the same data as the text of an HTML file: of all methods or of these,
    of all queries or the first `limit`. SettingsError: other data, an unknown method.
    """
    if len({run.manifest.get("data") for run in runs}) > 1:
        names = " and ".join(str(run.folder) for run in runs)
        raise SettingsError(f"{names} answer other data sets: view them one by one")
    chosen = list(dict.fromkeys(name for run in runs for name in run.by_method))
    if unknown := [name for name in methods if name not in chosen]:
        known = ", ".join(chosen)
        raise SettingsError(f"no run has a method '{unknown[0]}': take some of {known}")
    chosen = [name for name in chosen if not methods or name in methods]
    index, blocks = _content(runs, chosen, limit)
    style, script = (_read(f"page.{kind}") for kind in ("css", "js"))
    names = ", ".join(dict.fromkeys(run.task.name for run in runs))
    return Template(_read("page.html")).substitute(
        title=escape(f"Samples of {names}"),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        index=_json(index),
        details="\n".join(
            f'<script type="application/json" id="q{place}">{_json(block)}</script>'
            for place, block in enumerate(blocks)
        ),
    )


def _content(
    runs: Sequence[Run], methods: Sequence[str], limit: int | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The index, and a block for each query, by its place in the index."""
    queries = _by_query(runs, methods, limit)
    users = list(dict.fromkeys(user for user, _ in queries))
    places = {name: place for place, name in enumerate(users)}
    details = [read_details(run.folder) for run in runs]
    rows: list[list[Any]] = []
    listed: list[list[Any]] = []
    blocks = []
    for place, ((user, query), own) in enumerate(queries.items()):
        known = (details[number].get(sample.key, {}) for number, sample in own)
        asked = next(filter(None, known), {})
        gold, input = own[0][1].gold, asked.get("input", "")
        listed.append([places[user], query, _begin(input), _begin(gold)])
        seen = [_sample(runs[n], sample, details[n]) for n, sample in own]
        for (number, sample), shown in zip(own, seen, strict=True):
            shown["place"] = len(rows)
            where = number, methods.index(sample.method), place
            state = "failed" if sample.error else "unparsable" if sample.answer is None else ""
            rows.append([*where, sample.seed, shown["gain"], state, _begin(sample.answer or "")])
        texts = _Texts()
        block = {"input": input, "time": asked.get("time", ""), "gold": gold, "samples": seen}
        blocks.append({**shortened(block, texts.refer), "texts": texts.all})
    index = {
        "runs": [{"name": name} for name in _names(runs)],
        "methods": methods,
        "users": users,
        "queries": listed,
        "samples": rows,
        "first": _first(runs, methods),
    }
    return shortened(index, lambda text: text), blocks


def _by_query(
    runs: Sequence[Run], methods: Sequence[str], limit: int | None
) -> dict[tuple[str, str], list[tuple[int, Sample]]]:
    """User and query → its samples, each with the number of its run."""
    queries: dict[tuple[str, str], list[tuple[int, Sample]]] = {}
    for number, run in enumerate(runs):
        for method in filter(run.by_method.__contains__, methods):
            for sample in run.of(method):
                queries.setdefault((sample.user, sample.query), []).append((number, sample))
    return {key: queries[key] for key in list(queries)[:limit]}


def _sample(run: Run, sample: Sample, details: Mapping[Key, Details]) -> dict[str, Any]:
    """What the view of a sample shows; candidates have their gains."""
    gain = None if sample.error else worth(run.task, sample)
    shown = {name: getattr(sample, name) for name in SHOWN}
    shown |= {"gain": gain, "fold": sample.fold}
    own = details.get(sample.key)
    if own is None:
        return shown

    def worth_of(candidate: Mapping[str, Any]) -> float:
        answer = candidate["answer"]
        return float(answer == sample.gold) if sample.choice else run.task.gain(answer, sample.gold)

    candidates = [{**each, "gain": worth_of(each)} for each in own.get("candidates", ())]
    return shown | {"details": {**own, "candidates": candidates}}


class _Texts:
    """The long texts of a block, each once."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._places: dict[str, int] = {}

    def refer(self, text: str) -> dict[str, int]:
        if text not in self._places:
            self._places[text] = len(self.all)
            self.all.append(text)
        return {"$": self._places[text]}


def _names(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its folder's, numbered where two are equal."""
    names = [run.folder.resolve().name for run in runs]
    equal = len(set(names)) < len(names)
    return [f"{number} {name}" if equal else name for number, name in enumerate(names, 1)]


def _first(runs: Sequence[Run], methods: Sequence[str]) -> list[str]:
    """What the list shows first, as `RUN/METHOD`, and what that is compared with; of two runs one
    method of both, HYDRA if there is one.
    """
    common = [name for name in methods if all(name in run.by_method for run in runs)]
    if len(runs) == 1 or not common:
        return ["", ""]
    place = methods.index(next((n for n in common if base_name(n) == "hydra"), common[0]))
    return [f"1/{place}", f"0/{place}"]


def _begin(text: str) -> str:
    return text if len(text) <= LISTED else f"{text[: LISTED - 1]}…"


def _json(value: Any) -> str:
    """JSON in which no text can end or begin an element of the page."""
    text = json.dumps(value, separators=(",", ":"))
    escapes: dict[str, str | int | None] = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
    return text.translate(str.maketrans(escapes))


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return f"sha256-{b64encode(sha256(text.encode('utf-8')).digest()).decode('ascii')}"
