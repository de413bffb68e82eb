"""The encoder in fp32, bfloat16 and int8: sequences a second, and what becomes of scores and picks.

    python benchmarks/encoder.py DATA --bundles FOLDER --replays FOLDER [--parts speed,scores,picks]

speed    one batch of real texts (movie_rating, joined and cut) of 16 to 256 tokens, in turn; by
         processor time of one thread. Beside them ONNX Runtime (fp32, and int8 as it is served),
         torch's own dynamic quantization (one scale for all tokens of a batch) and, where it is
         installed, OpenVINO.
scores   bundles FOLDER/NAME of DATA/NAME, learned and fitted in fp32, opened in each precision:
         Spearman's correlation of all scores of their test users' queries with those of fp32
         (reranker: the retrieved records; adapter: every label, or the latest answers of the user's
         where answers are texts), the share of queries with the same pick, the gain of the picks
         and its paired difference to fp32, and the least cosine of a query's vectors. `bf16,
         batches` has each text encoded beside 31 others, as a busy server may: what differs from
         `bf16` differs between two servers of one precision; likewise of int8, which bundles that
         know texts by their vectors refuse.
picks    the committed benchmark, learned, fitted and answered in each precision.

FOLDER/PRECISION has what `HYDRA_ENCODER_PRECISION=PRECISION python benchmarks/replay.py DATA --only
NAME --work FOLDER/PRECISION` left there. Exits with 1 if the correlation of a precision is below
0.98.
"""

import gzip
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Limit, finish, options
from publish import BASELINE, report
from scipy.stats import spearmanr

from hydra_llm.bench.stats import paired
from hydra_llm.bundle import Bundle
from hydra_llm.config import load_settings
from hydra_llm.datasets.native import load
from hydra_llm.errors import SettingsError
from hydra_llm.history import before
from hydra_llm.model.encoder import Encoder, open_encoder
from hydra_llm.model.onnx_encoder import graph_of
from hydra_llm.select import all_labels
from hydra_llm.types import Candidate, Query

PRECISIONS = ("fp32", "bf16")
LENGTHS = (16, 64, 128, 256)
LEAST = 0.98
QUERIES, ANSWERS = 5, 8  # of a user, in `scores`
RESULTS = Path(__file__).with_name("results")
Row = dict[str, Any]


def main() -> None:
    parser = options(__doc__, runs=5)
    parser.add_argument("data", type=Path)
    parser.add_argument("--bundles", type=Path, help="for the part scores")
    parser.add_argument("--replays", type=Path, help="for the part picks")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS), help="tokens")
    parser.add_argument("--sets", nargs="*", help="of the bundles; default: all")
    parser.add_argument("--users", type=int, help="new users of a bundle; default: all")
    parser.add_argument("--precisions", nargs="*", default=list(SERVED), help="of the part scores")
    parser.add_argument("--parts", default="speed,scores,picks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    replayed = sorted(args.replays.glob("fp32/*/run/results.json")) if args.replays else []
    names = [path.parts[-3] for path in replayed]
    parts: dict[str, Callable[[], list[Row]]] = {
        "speed": lambda: measure_speed(args.data, args.runs, args.batch, args.lengths),
        "scores": lambda: [
            row
            for place in sorted(args.bundles.iterdir())
            if not args.sets or place.name in args.sets
            for row in compare_scores(place, args.data / place.name, args.users, args.precisions)
        ],
        "picks": lambda: [row for name in names for row in compare_picks(name, args.replays)],
    }
    result = {name: parts[name]() for name in args.parts.split(",")}
    lines = [
        " ".join(f"{k} {v}" for k, v in row.items()) for part in result.values() for row in part
    ]
    limits = [
        Limit(f"Spearman, {row['data']}, {row['scorer']}, {row['precision']}", value, LEAST, True)
        for row in result.get("scores", ())
        if (value := row["spearman"]) is not None and row["against"] == "fp32"
    ]
    finish(args, result, lines, limits)


# ---- speed


def measure_speed(data: Path, runs: int, batch: int, lengths: list[int]) -> list[Row]:
    with gzip.open(data / "movie_rating" / "history.jsonl.gz", "rt", encoding="utf-8") as lines:
        inputs = [
            json.loads(line)["input"] for _, line in zip(range(8 * batch), lines, strict=False)
        ]
    texts = [" ".join(inputs[i::batch]) for i in range(batch)]
    rows = []
    for length in lengths:
        jobs: dict[str, Callable[[], object]] = {}
        plain = open_encoder("minilm", max_length=length)
        encoders = {name: plain.at(name) for name in PRECISIONS}  # type: ignore[arg-type]
        encoders["torch dynamic int8"] = dynamic(plain)
        for name, encoder in encoders.items():
            jobs[name] = lambda own=encoder: own.encode(texts, batch=batch)  # type: ignore[misc]
        for own in (plain, plain.at("int8")):
            graph = graph_of(own)
            assert graph is not None
            name = f"ONNX Runtime {own.precision}"
            jobs[name] = lambda own=own, graph=graph: graph(own.padded(own._clean(texts)))  # type: ignore[misc]
        jobs |= openvino_jobs(plain, texts)
        for name, times in cpu_in_turn(jobs, runs).items():
            cuts = [batch / own for own in statistics.quantiles(times, n=4, method="inclusive")]
            row = {"tokens": length, "encoder": name, "per_s": cuts[1]}
            rows.append({**row, "quartile_1": cuts[2], "quartile_3": cuts[0]})
    return rows


def dynamic(plain: Encoder) -> Encoder:
    """Torch's own dynamic quantization, which it calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(plain.model, {torch.nn.Linear})
    return Encoder(quantized, plain.tokenizer, "minilm", "mean", plain.max_length).eval()


def openvino_jobs(plain: Encoder, texts: list[str]) -> dict[str, Callable[[], object]]:
    """The same model in OpenVINO, one thread, in fp32 and bfloat16; empty without it."""
    if find_spec("openvino") is None:
        return {}
    openvino: Any = import_module("openvino")
    ids = torch.tensor([encoding.ids for encoding in plain._tokenize(texts)])  # of one length
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    converted = openvino.convert_model(plain.model, example_input=inputs)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    jobs: dict[str, Callable[[], object]] = {}
    for hint, name in (("f32", "OpenVINO fp32"), ("bf16", "OpenVINO bf16")):
        options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1}
        compiled = openvino.Core().compile_model(converted, "CPU", options)
        jobs[name] = lambda own=compiled: own(arrays)  # type: ignore[misc]
    return jobs


def cpu_in_turn(jobs: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Processor seconds of each run; the jobs run alternately, once to warm up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(runs + 1):
        for name, job in jobs.items():
            begin = time.process_time()
            job()
            if number:
                times[name].append(time.process_time() - begin)
    return times


# ---- scores

SERVED = {"fp32": 1, "bf16": 1, "bf16, batches": 32, "int8": 1, "int8, batches": 32}
"""Precision → texts that are encoded at once."""
OTHER = {"bf16": "fp32", "bf16, batches": "bf16", "int8": "fp32", "int8, batches": "int8"}
"""Precision → the one that it is compared with."""


@dataclass
class Scored:
    """What a scorer gives: for each query its candidates' scores, the pick and its gain."""

    scores: list[list[float]] = field(default_factory=list)
    picks: list[int] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)


def compare_scores(place: Path, data: Path, users: int | None, wanted: list[str]) -> list[Row]:
    """Rows of a bundle's scorers and precisions."""
    dataset = load(data)
    found: dict[str, dict[str, Scored]] = {}
    vectors: dict[str, np.ndarray] = {}
    for name, batch in SERVED.items():
        if name not in ("fp32", *wanted):
            continue
        with tempfile.TemporaryDirectory() as cache:
            here = load_settings(encoder_precision=name.partition(",")[0], cache=Path(cache))
            try:
                bundle = Bundle.load(place, here=here)
            except SettingsError:  # it refuses int8
                continue
            new = [user for user in bundle.records if user not in bundle.trained_on][:users]
            queries = [query for user in new for query in dataset.queries(user)[:QUERIES]]
            texts = [query.input for query in queries] if batch > 1 else []
            texts += [t for user in new for r in bundle.records[user] for t in (r.input, r.output)]
            bundle.features.texts(list(dict.fromkeys(texts)))
            found[name] = scores_of(bundle, queries)
            vectors[name] = bundle.features.texts([q.input for q in queries[:64]])
            bundle.features.close()
    who = [query.user for query in queries]
    return [
        {
            "data": place.name,
            "scorer": scorer,
            "precision": name,
            "against": other,
            **comparison(found[name][scorer], found[other][scorer], who),
            "least_cosine": float((vectors[other] * vectors[name]).sum(1).min()),
        }
        for scorer in found["fp32"]
        for name, other in OTHER.items()
        if name in found and other in found
    ]


def comparison(one: Scored, other: Scored, users: list[str]) -> Row:
    pooled = [np.concatenate(own.scores) for own in (one, other)]
    same = float(np.mean(np.equal(one.picks, other.picks)))
    row: Row = {"queries": len(one.picks), "spearman": float(spearmanr(*pooled)[0]), "same": same}
    if one.gains:
        difference = paired(np.array(one.gains), np.array(other.gains), users)
        row |= {"gain": float(np.mean(one.gains)), "gain_of_other": float(np.mean(other.gains))}
        row["difference"] = [difference.difference, difference.low, difference.high]
    return row


def scores_of(bundle: Bundle, queries: list[Query]) -> dict[str, Scored]:
    """By scorer; candidates in a fixed order."""
    pipeline, found, task = bundle.pipeline(), dict[str, Scored](), bundle.task
    for query in queries:
        visible = before(bundle.records[query.user], query)
        context = pipeline.context(query, visible, bundle.heads_of(query.user))
        if bundle.reranker and bundle.use_reranker:
            ranked = pipeline.rerank(context, pipeline.retrieve(context))
            by_rank = sorted(ranked, key=lambda item: item.rank)
            if len(by_rank) > 1:
                own = found.setdefault("reranker", Scored())
                own.scores.append([r.usefulness or 0.0 for r in by_rank])
                own.picks.append(int(np.argmax(own.scores[-1])))
        if bundle.adapter:
            answers = list(dict.fromkeys(record.output for record in visible))[-ANSWERS:]
            texts = [Candidate(answer, answer) for answer in answers]
            offered = all_labels(task, []) if task.labels else texts
            chosen = pipeline.select(context, offered)
            own = found.setdefault("adapter", Scored())
            own.scores.append([c.score or 0.0 for c in chosen.candidates])
            own.picks.append(chosen.chosen)
            pick = chosen.candidates[chosen.chosen].answer
            own.gains.append(task.gain(pick, query.gold or ""))
    return found


# ---- picks


def compare_picks(result: str, replays: Path) -> list[Row]:
    """Metrics of the methods with learned parts, in each precision; `published`: the committed.
    Left out: methods whose prompts have other records in one of them, so that no answer of the LLM
    is recorded.
    """
    published = json.loads((RESULTS / result / "report.json").read_text(encoding="utf-8"))
    commands = json.loads((RESULTS / result / "commands.json").read_text(encoding="utf-8"))
    reports = {"published": published}
    for precision in PRECISIONS:
        run = replays / precision / result / "run"
        if (run / "results.json").exists():
            reports[precision] = report(run, commands.get("against", BASELINE))
    failed = {m["method"] for own in reports.values() for m in own["methods"] if m["failed"]}
    rows = []
    for name, own in reports.items():
        for method in own["methods"]:
            learned = method["method"].startswith(("hydra", "scorer-only"))
            if learned and method["method"] not in failed:
                metrics = {key: value[0] for key, value in method["metrics"].items()}
                known = {"result": result, "precision": name, "method": method["method"]}
                rows.append({**known, **metrics})
    return rows


if __name__ == "__main__":
    main()
