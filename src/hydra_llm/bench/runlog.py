"""A run's folder: manifest, one line per sample, their details (`details.py`), results. Only whole
lines count, so that a killed run loses at most one. Knows no methods and no LLM.
"""

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra_llm import __version__
from hydra_llm.bench.details import Details, DetailsLog
from hydra_llm.errors import SettingsError
from hydra_llm.types import Usage

FORMAT = 5
NOT_COMPARED = ("commit",)  # entries in which two runs that continue each other may differ
LATE = ("weights", "trained_on", "users", "queries")  # entries known only after learning
Key = tuple[str, str, str, int]  # method, user, query, seed


def commit() -> str | None:
    """The commit of the source tree, with + if files differ; None if installed."""
    describe = ["describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return output.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass(frozen=True)
class Sample:
    """One query answered by one method."""

    method: str
    user: str
    query: str  # its id
    gold: str
    answer: str | None  # as parsed; None if it could not be parsed
    error: str = ""  # why there is no answer at all; such a sample is not scored
    calls: int = 0  # LLM calls for this answer, cached ones included
    tokens: int | None = 0  # of prompts and answers together; None if the LLM did not tell them
    completion_tokens: int | None = 0  # of the answers alone
    llm_seconds: float = 0.0  # of the LLM, as measured when it was called
    seconds: Mapping[str, float] = field(default_factory=dict)  # per stage of this run
    notes: tuple[str, ...] = ()
    seed: int = 0  # of the learned parts, or the sample's index if the method is `per_sample`
    probability: float | None = None  # the adapter's of its pick; None without an adapter
    agreement: float | None = None  # the mode's vote share; None for fewer than two samples
    fold: int | None = None  # in which the user was a new one; None in a run without folds
    choice: Mapping[str, float] = field(default_factory=dict)
    """Of a recorded choice: its metrics, see `bench.choices.figures`, and `earlier`: how many
    choices of the user came before; empty for any other query.
    """
    learned: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """`StageCost.to_json` of what a `Learner` learned before this answer, see its `pop_spent`."""

    @property
    def key(self) -> Key:
        return self.method, self.user, self.query, self.seed

    @property
    def usage(self) -> Usage:
        if self.tokens is None or self.completion_tokens is None:
            return Usage(untold=1)
        completion = self.completion_tokens
        return Usage(prompt_tokens=self.tokens - completion, completion_tokens=completion)


def by_method(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Method → its samples, in the order in which methods first appear."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.method, []).append(sample)
    return groups


class RunLog:
    """Appends samples to `samples.jsonl`; a stopped run continues where it was."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        """Open or make the folder; SettingsError if it holds another run, which is not changed."""
        self.folder, self.samples = folder, dict[Key, Sample]()
        self._manifest, self._file = folder / "manifest.json", folder / "samples.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            fault = "is a file, or lies in one: a run is a folder, take another --out"
            raise SettingsError(f"{folder}: {fault}") from None
        libraries = {name: version(name) for name in ("torch", "transformers")}
        versions = {"hydra_llm": __version__, "python": platform.python_version(), **libraries}
        new = as_read({"format": FORMAT, **versions, "commit": commit(), **manifest})
        old = self._read_manifest()
        bare = all(file == self._manifest for file in folder.iterdir())
        if old is None or (bare and "weights" not in old):  # it holds no result
            write_json(self._manifest, new)
        else:
            _refuse_newer(self._manifest, old)
            self._refuse_other({k: v for k, v in old.items() if k in new or k not in LATE}, new)
        if self._file.exists():
            samples, whole = _samples(self._file)
            if whole != self._file.stat().st_size:  # the line in which the run was killed
                with self._file.open("r+b") as file:
                    file.truncate(whole)
            # failed samples are tried again
            self.samples |= {sample.key: sample for sample in samples if not sample.error}
        self._details = DetailsLog(folder)

    def complete(self, late: Mapping[str, Any]) -> None:
        """Add what the run has learned; SettingsError if it learned something else before."""
        old, new = self._read_manifest() or {}, as_read(late)
        known = [name for name in new if name in old]
        self._refuse_other({name: old[name] for name in known}, {n: new[n] for n in known})
        if len(known) < len(new):
            write_json(self._manifest, {**old, **new})

    def _refuse_other(self, there: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        old, now = _flat(there), _flat(new)
        values = {key: (old.get(key), now.get(key)) for key in {**old, **now}}
        different = [f"{k}: {a!r} there, {b!r} asked" for k, (a, b) in values.items() if a != b]
        if different:
            listed = "; ".join(different)[:300]
            raise SettingsError(f"{self.folder} holds another run ({listed}): take another --out")

    def _read_manifest(self) -> dict[str, Any] | None:
        """The manifest in the folder; a broken one without any sample counts as none."""
        try:
            return _object(self._manifest)
        except FileNotFoundError:
            return None
        except ValueError as error:
            if not self._file.exists():
                return None
            fault = f"cannot be read ({error}): take another --out"
            raise SettingsError(f"{self._manifest} {fault}") from None

    def add(self, sample: Sample, details: Details | None = None) -> None:
        """Append a sample, and before it how its answer came about."""
        if details is not None:
            self._details.add(sample.key, details)
        self.samples[sample.key] = sample
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")

    def finish(
        self, results: Sequence[Mapping[str, Any]], learning: Sequence[Mapping[str, Any]] = ()
    ) -> Path:
        """Write `results.json`, whose path is returned, and `learning.json`, a row per seed."""
        if learning:
            write_json(self.folder / "learning.json", learning)
        write_json(self.folder / "results.json", results)
        return self.folder / "results.json"


def as_read(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as it is read back from a file; NaN becomes null."""
    copy: dict[str, Any] = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return copy


def _flat(entries: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What is compared of nested entries, by dotted names, as `settings.temperature`."""
    flat: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        elif prefix or name not in NOT_COMPARED:
            flat[prefix + name] = value
    return flat


def write_json(file: Path, content: Any) -> None:
    """Write JSON to a temporary file first, so that a kill leaves no half file."""
    temporary = file.with_suffix(".part")
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def query_ids(samples: Iterable[Sample]) -> dict[tuple[str, str], str]:
    """User and query → the query's id, after its user's where several users have a query of it."""
    queries = {(sample.user, sample.query) for sample in samples}
    shared = len({query for _, query in queries}) < len(queries)
    return {(user, query): f"{user}/{query}" if shared else query for user, query in queries}


def lamp_answers(like: str, own: Sequence[Sample]) -> dict[str, Any]:
    """One method's answers as LaMP's evaluation reads them: the first seed's, empty if failed or
    unparsable. `like`: the LaMP task; LaMP-2N and -2M are both LaMP_2.
    """
    ids = query_ids(own)
    first = [sample for sample in own if sample.seed == own[0].seed]
    golds = [{"id": ids[s.user, s.query], "output": s.answer or ""} for s in first]
    return {"task": like.replace("-", "_")[:6], "golds": golds}


def export_lamp(folder: Path, like: str, samples: Sequence[Sample]) -> Path:
    """Write each method's answers as `lamp_answers`, to `lamp/METHOD.json`."""
    out = folder / "lamp"
    out.mkdir(exist_ok=True)
    for method, own in by_method(samples).items():
        text = json.dumps(lamp_answers(like, own), ensure_ascii=False)
        (out / f"{method}.json").write_text(text, encoding="utf-8")
    return out


def read_learning(folder: Path) -> list[dict[str, Any]]:
    """Each seed's report of learning; empty for a run that has not ended, or learned nothing."""
    file = folder / "learning.json"
    try:
        rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    except (OSError, ValueError) as error:
        fix = "run the same `bench run` again, it writes it anew"
        raise SettingsError(f"{file} cannot be read ({error}): {fix}") from None
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def read_run(folder: Path) -> tuple[dict[str, Any], list[Sample]]:
    """The manifest and the samples of a run; of a sample that was tried again the last try.
    SettingsError: no run is there, it is damaged, or made by a newer version.
    """
    file, lines = folder / "manifest.json", folder / "samples.jsonl"
    try:
        manifest = _object(file)
    except (OSError, ValueError) as error:
        fix = "name the --out of `hydra-llm bench run`"
        raise SettingsError(f"{folder}: is no run ({error}): {fix}") from None
    if not isinstance(manifest.get("format"), int):
        raise SettingsError(f"{folder}: is no run (manifest.json is of something else)")
    _refuse_newer(file, manifest)
    try:
        samples = _samples(lines)[0] if lines.exists() else []
    except OSError as error:
        raise SettingsError(f"{lines}: cannot be read ({error.strerror})") from None
    return manifest, list({sample.key: sample for sample in samples}.values())


def _object(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def _refuse_newer(file: Path, manifest: Mapping[str, Any]) -> None:
    number = manifest.get("format")
    if isinstance(number, int) and number > FORMAT:
        fault = f"format {number} is made by a newer hydra-llm ({manifest.get('hydra_llm')})"
        raise SettingsError(f"{file}: {fault}: upgrade, or take another --out")


def _samples(file: Path) -> tuple[list[Sample], int]:
    """The samples of whole lines, and how many bytes those are."""
    text = file.read_bytes()
    whole = text.rfind(b"\n") + 1
    samples = []
    for number, line in enumerate(text[:whole].split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            samples.append(Sample(**{**entry, "notes": tuple(entry["notes"])}))
        except (ValueError, TypeError, KeyError) as error:
            fault = f"is no sample ({error}): remove the line, or take another --out"
            raise SettingsError(f"{file}:{number}: {fault}") from None
    return samples, whole
