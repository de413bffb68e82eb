"""A run's folder: manifest, one line per sample, results. Only whole lines count, so that a killed
run loses at most one line. Knows no methods and no LLM.
"""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra_llm import __version__
from hydra_llm.errors import SettingsError
from hydra_llm.types import Usage

FORMAT = 4
NOT_COMPARED = ("commit",)
"""Entries of a manifest in which two runs that continue each other may differ."""
LATE = ("weights", "trained_on", "users", "queries")
"""Entries that are known only after learning; the others are compared before it."""


def commit() -> str | None:
    """The commit of the source tree, with + if files differ; None if installed."""
    describe = ["describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.strip() or None


def versions() -> dict[str, str]:
    """What the figures of a run depend on beside its settings."""
    libraries = {name: version(name) for name in ("torch", "transformers")}
    return {"hydra_llm": __version__, "python": platform.python_version(), **libraries}


Key = tuple[str, str, str, int]
"""Method, user, query, seed."""


@dataclass(frozen=True)
class Sample:
    """One query answered by one method."""

    method: str
    user: str
    query: str
    """The query's id."""
    gold: str
    answer: str | None
    """The parsed answer; None if it could not be parsed."""
    error: str = ""
    """Why there is no answer at all; such a sample is not scored."""
    calls: int = 0
    """LLM calls for this answer, cached ones included."""
    tokens: int = 0
    """Of prompts and answers together."""
    completion_tokens: int = 0
    """Of the answers alone."""
    llm_seconds: float = 0.0
    """Seconds of the LLM, as measured when it was called."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds per stage of this run."""
    notes: tuple[str, ...] = ()
    seed: int = 0
    """Of the learned parts; the index of the sample for a method that answers per sample."""
    probability: float | None = None
    """The adapter's probability of its pick; None without an adapter."""
    agreement: float | None = None
    """The vote share of the most frequent answer; None for fewer than two samples."""
    learned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Learning costs before this answer of a method that learns while it answers, as
    `StageCost.to_json`, by `records:user` (`8:ada`); an empty key is for all users.
    """

    @property
    def key(self) -> Key:
        return self.method, self.user, self.query, self.seed

    @property
    def usage(self) -> Usage:
        """The tokens, as far as prices need them."""
        completion = self.completion_tokens
        return Usage(prompt_tokens=self.tokens - completion, completion_tokens=completion)


# ---- writing


class RunLog:
    """Appends samples to `samples.jsonl`; a stopped run continues where it was."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        """Open or make the folder.

        Raises:
            SettingsError: it holds another run, or one of a newer version; nothing was changed.
        """
        self.folder, self.samples = folder, dict[Key, Sample]()
        self._manifest, self._file = folder / "manifest.json", folder / "samples.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise SettingsError(
                f"{folder}: is a file, or lies in one: a run is a folder, take another --out"
            ) from None
        self._begin(_as_json({"format": FORMAT, **versions(), "commit": commit(), **manifest}))
        if self._file.exists():
            self._read()

    def complete(self, late: Mapping[str, Any]) -> None:
        """Add what the run has learned to the manifest.

        Raises:
            SettingsError: it learned something else before.
        """
        found, wanted = self._found() or {}, _as_json(late)
        known = [name for name in wanted if name in found]
        self._refuse_other(
            {name: found[name] for name in known}, {name: wanted[name] for name in known}
        )
        if len(known) < len(wanted):
            _write_whole(self._manifest, {**found, **wanted})

    def _begin(self, wanted: Mapping[str, Any]) -> None:
        """Check that the folder is of the same run; a manifest without results is replaced."""
        found = self._found()
        if found is None or (
            "weights" not in found and all(each == self._manifest for each in self.folder.iterdir())
        ):
            _write_whole(self._manifest, wanted)
            return
        _refuse_newer(self._manifest, found)
        early = {name: value for name, value in found.items() if name in wanted or name not in LATE}
        self._refuse_other(early, wanted)

    def _refuse_other(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        there, asked = _compared(found), _compared(wanted)
        different = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
        if different:
            listed = "; ".join(
                f"{key}: {there.get(key)!r} there, {asked.get(key)!r} asked" for key in different
            )
            raise SettingsError(
                f"{self.folder} holds another run ({listed[:300]}): take another --out"
            )

    def _found(self) -> dict[str, Any] | None:
        """The manifest in the folder; a broken one without any sample counts as none."""
        try:
            return _object(self._manifest)
        except FileNotFoundError:
            return None
        except ValueError as error:
            if not self._file.exists():
                return None
            raise SettingsError(
                f"{self._manifest} cannot be read ({error}): take another --out"
            ) from None

    def _read(self) -> None:
        samples, whole = _samples(self._file)
        if whole != self._file.stat().st_size:  # the line in which the run was killed
            with self._file.open("r+b") as file:
                file.truncate(whole)
        # failed samples are tried again
        self.samples |= {sample.key: sample for sample in samples if not sample.error}

    def add(self, sample: Sample) -> None:
        self.samples[sample.key] = sample
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")

    def finish(
        self, results: Sequence[Mapping[str, Any]], learning: Sequence[Mapping[str, Any]] = ()
    ) -> Path:
        """Write `results.json`, whose path is returned, and `learning.json`, a row per seed."""
        if learning:
            (self.folder / "learning.json").write_text(_indented(list(learning)), encoding="utf-8")
        file = self.folder / "results.json"
        file.write_text(_indented(list(results)), encoding="utf-8")
        return file


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as it is read back from a file."""
    found: dict[str, Any] = json.loads(json.dumps(value))
    return found


def _compared(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return _flat({key: value for key, value in manifest.items() if key not in NOT_COMPARED})


def _flat(entries: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested entries by dotted names, as `settings.temperature`."""
    out: dict[str, Any] = {}
    for name, value in entries.items():
        nested = isinstance(value, Mapping) and value
        out |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return out


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write_whole(file: Path, content: Mapping[str, Any]) -> None:
    """Write to a temporary file first, so that a kill leaves no half file."""
    temporary = file.with_suffix(".part")
    temporary.write_text(_indented(content), encoding="utf-8")
    temporary.replace(file)


def export_lamp(folder: Path, like: str, samples: Sequence[Sample]) -> Path:
    """Write each method's answers as LaMP's evaluation reads them, to `lamp/METHOD.json`; a failed
    or unparsable answer is empty. Of several seeds it writes the first.

    `like` is the LaMP task's name; LaMP-2N and LaMP-2M are both LaMP_2.
    """
    out = folder / "lamp"
    out.mkdir(exist_ok=True)
    for method in dict.fromkeys(sample.method for sample in samples):
        own = [sample for sample in samples if sample.method == method]
        golds = [
            {"id": sample.query, "output": sample.answer or ""}
            for sample in own
            if sample.seed == own[0].seed
        ]
        content = {"task": like.replace("-", "_")[:6], "golds": golds}
        text = json.dumps(content, ensure_ascii=False)
        (out / f"{method}.json").write_text(text, encoding="utf-8")
    return out


# ---- reading


def read_learning(folder: Path) -> list[dict[str, Any]]:
    """Each seed's report of learning; empty for a run that has not ended, or learned nothing."""
    file = folder / "learning.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{file} cannot be read ({error}): run the same `bench run` again, it writes it anew"
        ) from None
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def read_run(folder: Path) -> tuple[dict[str, Any], list[Sample]]:
    """The manifest and the samples of a run; of a sample that was tried again the last try. Changes
    nothing.

    Raises:
        SettingsError: no run is there, it is damaged, or made by a newer version.
    """
    file = folder / "manifest.json"
    try:
        manifest = _object(file)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{folder}: is no run ({error}): name the --out of `hydra-llm bench run`"
        ) from None
    if not isinstance(manifest.get("format"), int):
        raise SettingsError(f"{folder}: is no run (manifest.json is of something else)")
    _refuse_newer(file, manifest)
    samples = folder / "samples.jsonl"
    found = _samples(samples)[0] if samples.exists() else []
    return manifest, list({sample.key: sample for sample in found}.values())


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError if it holds none."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _refuse_newer(file: Path, manifest: Mapping[str, Any]) -> None:
    number = manifest.get("format")
    if isinstance(number, int) and number > FORMAT:
        raise SettingsError(
            f"{file}: format {number} is made by a newer hydra-llm ({manifest.get('hydra_llm')}):"
            " upgrade, or take another --out"
        )


def _samples(file: Path) -> tuple[list[Sample], int]:
    """The samples of whole lines, and how many bytes those are."""
    text = file.read_bytes()
    whole = text.rfind(b"\n") + 1
    lines = text[:whole].split(b"\n")[:-1]
    return [_parse(file, line, number) for number, line in enumerate(lines, 1)], whole


def _parse(file: Path, line: bytes, number: int) -> Sample:
    try:
        entry = json.loads(line)
        return Sample(**{**entry, "notes": tuple(entry["notes"])})
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(
            f"{file}:{number}: is no sample ({error}): remove the line, or take another --out"
        ) from None
