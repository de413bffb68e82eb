"""BM25 over one user's history beside other libraries: build, query, and the first query after a
new record, by the number of records.

    python benchmarks/retrieval.py [--runs 15] [--words 20] [--seed 0] [--json] [--plot FILE.svg]

    hydra-llm   `BM25().retrieve`, as the pipeline calls it: order, kept index, scores, ten records
    bm25s       as hydra-llm used it before: its scores with Okapi's word weights; a new record
                builds the index anew, from kept words
    rank-bm25   BM25Okapi; a new record builds the index anew, from kept words
    tantivy     an index in memory; a new record is added, committed and searched. k1 is 1.2 and
                cannot be set, so its rankings are not compared

`pip install bm25s rank-bm25 tantivy`; those that are missing are left out. Texts have words by
Zipf's law. Times are CPU milliseconds of all threads, medians of runs in turn; wall-clock medians
are in the JSON. `same` is the share of queries whose ten best are hydra-llm's in its order (scores
that differ by less than 1e-9 count as equal, of equals the later record is first). Exits with 1 if
a limit is missed.
"""

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from measure import Limit, finish, options

from hydra_llm.retrieve import BM25
from hydra_llm.text import search_words
from hydra_llm.types import Query, Record

SIZES = (50, 200, 1_000, 5_000)
TOP, QUERIES, VOCABULARY = 10, 50, 30_000
LIMIT_MS, LIMIT_SIZE = 1.0, 1_000
OPERATIONS = ("build", "query", "append")
Ranking = list[tuple[int, float]]
"""The best records, by number, and their scores."""


class Engine(Protocol):
    """A library with one history."""

    def build(self, texts: Sequence[str]) -> None: ...

    def query(self, text: str) -> Ranking: ...

    def append(self, text: str) -> None: ...


class Hydra:
    """The retriever of the pipeline."""

    def build(self, texts: Sequence[str]) -> None:
        self.retriever, self.records = BM25(), list[Record]()
        for text in texts:
            self.append(text)
        self.query("")

    def query(self, text: str) -> Ranking:
        found = self.retriever.retrieve(Query("u", "q", text), self.records, TOP)
        return [(item.record.position, item.score) for item in found]

    def append(self, text: str) -> None:
        place = len(self.records)
        self.records.append(Record("u", str(place), text, "", position=place))


class Rebuilt:
    """A library without an incremental index."""

    def build(self, texts: Sequence[str]) -> None:
        self.tokens = [search_words(text) for text in texts]
        self.index = self.indexed()

    def indexed(self) -> Any:
        raise NotImplementedError

    def query(self, text: str) -> Ranking:
        scores = self.index.get_scores(search_words(text))
        best = np.lexsort((-np.arange(len(scores)), -np.round(scores, 9)))[:TOP]
        return [(int(place), float(scores[place])) for place in best]

    def append(self, text: str) -> None:
        self.tokens.append(search_words(text))
        self.index = self.indexed()


class BM25S(Rebuilt):
    def indexed(self) -> Any:
        import bm25s

        index = bm25s.BM25(k1=1.5, b=0.75, method="atire", idf_method="lucene", dtype="float64")
        index.index(self.tokens, show_progress=False)
        holders, total = np.diff(index.scores["indptr"]), len(self.tokens)
        weights = np.log(total - holders + 0.5) - np.log(holders + 0.5)
        weights = np.where(weights < 0, max(0.0, 0.25 * weights.mean()), weights)
        lucene = np.log1p((total - holders + 0.5) / (holders + 0.5))
        index.scores["data"] *= np.repeat(weights / lucene, holders)
        return index


class RankBM25(Rebuilt):
    def indexed(self) -> Any:
        from rank_bm25 import BM25Okapi

        return BM25Okapi(self.tokens)


class Tantivy:
    def build(self, texts: Sequence[str]) -> None:
        import tantivy

        self.tantivy, schema = tantivy, tantivy.SchemaBuilder()
        schema.add_text_field("text", stored=False, tokenizer_name="whitespace")
        schema.add_integer_field("place", stored=True)
        self.schema, self.count = schema.build(), 0
        self.index = tantivy.Index(self.schema)
        self.writer = self.index.writer(num_threads=1)
        for text in texts:
            self._add(text)
        self._commit()

    def _add(self, text: str) -> None:
        self.writer.add_document(self.tantivy.Document(text=text, place=self.count))
        self.count += 1

    def _commit(self) -> None:
        self.writer.commit()
        self.index.reload()

    def query(self, text: str) -> Ranking:
        terms, should = self.tantivy.Query.term_query, self.tantivy.Occur.Should
        words = [(should, terms(self.schema, "text", word)) for word in search_words(text)]
        searcher = self.index.searcher()
        hits = searcher.search(self.tantivy.Query.boolean_query(words), TOP).hits
        return [(searcher.doc(at)["place"][0], score) for score, at in hits]

    def append(self, text: str) -> None:
        self._add(text)
        self._commit()


ENGINES: dict[str, type[Any]] = {
    "hydra-llm": Hydra,
    "bm25s": BM25S,
    "rank-bm25": RankBM25,
    "tantivy": Tantivy,
}


def main() -> None:
    parser = options(__doc__, runs=15)
    parser.add_argument("--words", type=int, default=20, help="words of a text")
    parser.add_argument("--plot", type=Path, help="an SVG of the growth curves")
    args = parser.parse_args()
    names = installed()
    rows = [row for size in SIZES for row in measured(names, size, args)]
    if args.plot:
        plot(rows, args.plot)
    lines = [
        f"{'records':>8} {'':<10} {'build':>9} {'query':>9} {'append':>9} {'kB':>8} {'same':>6}"
    ]
    lines += [line(row) for row in rows]
    own = next(r for r in rows if (r["engine"], r["records"]) == ("hydra-llm", LIMIT_SIZE))
    limit = f"first query after a new record, {LIMIT_SIZE:,} records, ms"
    finish(args, {"rows": rows}, lines, [Limit(limit, own["append"]["cpu_ms"], LIMIT_MS)])


def installed() -> list[str]:
    names = []
    for name, engine in ENGINES.items():
        with suppress(ImportError):
            engine().build(["a b", "c"])
            names.append(name)
    return names


def measured(names: Sequence[str], size: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each engine at one size; the engines run in turn."""
    draw = texts(args.words, args.seed)
    history, new = draw(size), draw(args.runs * (len(OPERATIONS) + 1))
    asked = draw(QUERIES)
    engines = {name: ENGINES[name]() for name in names}
    times: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {operation: [] for operation in OPERATIONS} for name in names
    }
    slow = max(3, args.runs // 3)
    for _ in range(slow):
        for name, engine in engines.items():
            times[name]["build"].append(timed(lambda e=engine: e.build(history)))
    rankings = {name: [engine.query(text) for text in asked] for name, engine in engines.items()}
    for run in range(args.runs):
        for name, engine in engines.items():
            ask = asked[run % QUERIES]
            times[name]["query"].append(timed(lambda e=engine, q=ask: e.query(q)))
    for run in range(slow):
        for name, engine in engines.items():
            text, ask = new[run], asked[run % QUERIES]
            append = timed(lambda e=engine, t=text, q=ask: (e.append(t), e.query(q)))
            times[name]["append"].append(append)
    return [
        {
            "records": size,
            "engine": name,
            **{operation: figures(own) for operation, own in times[name].items()},
            "kilobytes": kilobytes(ENGINES[name], history) if name != "tantivy" else None,
            "same": same(rankings["hydra-llm"], rankings[name]) if name != "tantivy" else None,
        }
        for name in names
    ]


def texts(words: int, seed: int) -> Callable[[int], list[str]]:
    """Draws texts by Zipf's law."""
    rng = np.random.default_rng(seed)
    shares = np.cumsum(1 / np.arange(1, VOCABULARY + 1))

    def draw(count: int) -> list[str]:
        drawn = np.searchsorted(shares, rng.random((count, words)) * shares[-1])
        return [" ".join(f"w{number}" for number in row) for row in drawn]

    return draw


def timed(job: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of CPU and of the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    job()
    return 1000 * (time.process_time() - cpu), 1000 * (time.perf_counter() - wall)


def figures(runs: Sequence[tuple[float, float]]) -> dict[str, float]:
    cpu, wall = zip(*runs, strict=True)
    low, _, high = statistics.quantiles(cpu, n=4, method="inclusive")
    return {
        "cpu_ms": statistics.median(cpu),
        "quartile_1_ms": low,
        "quartile_3_ms": high,
        "wall_ms": statistics.median(wall),
    }


def kilobytes(engine: type[Any], history: Sequence[str]) -> float:
    """What a built index adds to Python's memory, its texts or words included."""
    tracemalloc.start()
    kept = engine()
    kept.build(history)
    size = tracemalloc.get_traced_memory()[0] / 1000
    tracemalloc.stop()
    return size


def same(own: Sequence[Ranking], other: Sequence[Ranking]) -> float:
    """The share of equal rankings."""
    equal = [
        [place for place, _ in ours] == [place for place, _ in theirs]
        or max(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)) < 1e-9
        for ours, theirs in zip(own, other, strict=True)
    ]
    return sum(equal) / len(equal)


def line(row: dict[str, Any]) -> str:
    times = " ".join(f"{row[name]['cpu_ms']:9.3f}" for name in OPERATIONS)
    size = f"{row['kilobytes']:8.0f}" if row["kilobytes"] is not None else f"{'':8}"
    share = f"{row['same']:6.2f}" if row["same"] is not None else ""
    return f"{row['records']:>8,} {row['engine']:<10} {times} {size} {share}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A log-log panel for each operation."""
    import altair as alt

    titles = {"build": "build", "query": "query", "append": "first query after a new record"}
    values = [
        {
            "records": row["records"],
            "ms": row[name]["cpu_ms"],
            "library": row["engine"],
            "of": title,
        }
        for row in rows
        for name, title in titles.items()
    ]
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_line(point=True)
        .encode(
            x=alt.X("records:Q").scale(type="log").title("records"),
            y=alt.Y("ms:Q").scale(type="log").title("CPU ms"),
            color=alt.Color("name:N").title(None),
            column=alt.Column("of:N", sort=list(titles.values())).title(None),
        )
        .properties(width=220, height=200)
    )
    chart.save(str(path))


if __name__ == "__main__":
    main()
