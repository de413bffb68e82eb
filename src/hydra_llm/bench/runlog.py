"""A run's folder: what was run, one line per sample, results. Only whole lines count, so that a
kill loses at most a line.

Knows no methods and no LLM.
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

FORMAT = 4
NOTED = ("commit",)
"""Entries of a manifest that are told and not compared."""
LATE = ("weights", "trained_on", "users", "queries")
"""Entries that are known when the run has learned; the others stand, and are compared, before it
begins to.
"""


def commit() -> str | None:
    """The commit of the source tree that this code runs from, with + where files differ from it;
    None for an installed package.
    """
    folder = Path(__file__).parent
    told = [
        "git",
        "-C",
        str(folder),
        "describe",
        "--always",
        "--abbrev=12",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        return (
            subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip() or None
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """What the figures of a run depend on beside its settings."""
    return {
        "hydra_llm": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


@dataclass(frozen=True)
class Sample:
    """One query answered by one method."""

    method: str
    user: str
    query: str
    """The query's id."""
    gold: str
    answer: str | None
    """The parsed answer; None if it could not be read."""
    error: str = ""
    """Why there is no answer at all; such a sample is not scored."""
    calls: int = 0
    """LLM calls that this answer takes, cached ones included."""
    tokens: int = 0
    """Of prompts and answers together."""
    completion_tokens: int = 0
    """Of the answers alone."""
    llm_seconds: float = 0.0
    """Seconds that the LLM took, as measured when it was asked."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds per stage of this run."""
    notes: tuple[str, ...] = ()
    seed: int = 0
    """Of the learned parts; methods that learn nothing are run for the first seed alone. Of
    `random`: which sample answers.
    """
    probability: float | None = None
    """What the adapter gives its pick; None where none chose."""
    agreement: float | None = None
    """The share of the LLM's samples that the most frequent answer has; None where there was one
    sample, or none.
    """

    learned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What training cost before this answer, as `StageCost.to_json`, of a method that learns while
    it answers: by number of records and user, `8:ada`; for all users under an empty name.
    """

    @property
    def key(self) -> "Key":
        return self.method, self.user, self.query, self.seed


Key = tuple[str, str, str, int]
"""Method, user, query, seed."""


def _flat(entries: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested entries by dotted names, `settings.temperature`: the one that differs can be named."""
    out: dict[str, Any] = {}
    for name, value in entries.items():
        out |= (
            _flat(value, f"{before}{name}.")
            if isinstance(value, Mapping) and value
            else {f"{before}{name}": value}
        )
    return out


class RunLog:
    """Appends samples to `samples.jsonl`; a run that was stopped goes on where it was."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        """Open the folder, or make it.

        Raises:
            SettingsError: it holds another run, or one of a newer version; nothing was changed.
        """
        self.folder, self.samples = folder, dict[Key, Sample]()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise SettingsError(
                f"{folder}: is a file, or lies in one: a run is a folder, take another --out"
            ) from None
        self._agree({"format": FORMAT, **versions(), "commit": commit(), **manifest})
        self._file = folder / "samples.jsonl"
        if self._file.exists():
            self._read()

    def complete(self, late: Mapping[str, Any]) -> None:
        """Add what the run has learned to the manifest.

        Raises:
            SettingsError: it learned something else before.
        """
        file = self.folder / "manifest.json"
        found = self._found(file) or {}
        wanted = json.loads(json.dumps(late))
        there = [name for name in wanted if name in found]
        self._refuse_other(
            {name: found[name] for name in there}, {name: wanted[name] for name in there}
        )
        if len(there) < len(wanted):
            _write_whole(file, {**found, **wanted})

    def _agree(self, manifest: Mapping[str, Any]) -> None:
        """The folder is of the same run, or empty: a manifest beside which nothing was made yet, as
        a wrong LLM leaves it, binds nobody.
        """
        file = self.folder / "manifest.json"
        wanted = json.loads(json.dumps(manifest))
        found = self._found(file)
        if found is not None and (
            "weights" in found or any(each != file for each in self.folder.iterdir())
        ):
            _refuse_newer(file, found)
            self._refuse_other(
                {
                    name: value
                    for name, value in found.items()
                    if name in wanted or name not in LATE
                },
                wanted,
            )
        else:
            _write_whole(file, wanted)

    def _refuse_other(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        there, asked = (
            _flat({key: value for key, value in each.items() if key not in NOTED})
            for each in (found, wanted)
        )
        different = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
        if different:
            told = "; ".join(
                f"{key}: {there.get(key)!r} there, {asked.get(key)!r} asked" for key in different
            )
            raise SettingsError(
                f"{self.folder} holds another run ({told[:300]}): take another --out"
            )

    def _found(self, file: Path) -> dict[str, Any] | None:
        """The manifest that is there; half of one without any sample is none."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("no JSON object")
            return found
        except FileNotFoundError:
            return None
        except ValueError as error:
            if (self.folder / "samples.jsonl").exists():
                raise SettingsError(
                    f"{file} cannot be read ({error}): take another --out"
                ) from None
            return None

    def _read(self) -> None:
        samples, whole = _samples(self._file)
        if whole != self._file.stat().st_size:  # the line in which the run was killed
            with self._file.open("r+b") as file:
                file.truncate(whole)
        self.samples |= {
            sample.key: sample for sample in samples if not sample.error
        }  # what failed is tried again

    def add(self, sample: Sample) -> None:
        self.samples[sample.key] = sample
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(sample), ensure_ascii=False) + "\n")

    def finish(
        self, results: Sequence[Mapping[str, Any]], learning: Sequence[Mapping[str, Any]] = ()
    ) -> Path:
        """Write `results.json`, a row per method, and `learning.json`, what each seed's learning
        did; returns the first's path.
        """
        if learning:
            self._write("learning.json", learning)
        return self._write("results.json", results)

    def _write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        file = self.folder / name
        file.write_text(
            json.dumps(list(rows), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return file


def _write_whole(file: Path, content: Mapping[str, Any]) -> None:
    """A kill leaves no half of it."""
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(file)


def export_lamp(folder: Path, like: str, samples: Sequence[Sample]) -> Path:
    """Write each method's answers as LaMP's evaluation reads them, `lamp/METHOD.json`; an answer
    that failed or was unreadable is empty.

    `like` is the LaMP task's name, LaMP-2N and LaMP-2M being its LaMP_2. Of several seeds it writes
    the first.
    """
    place = folder / "lamp"
    place.mkdir(exist_ok=True)
    for method in dict.fromkeys(sample.method for sample in samples):
        own = [sample for sample in samples if sample.method == method]
        golds = [
            {"id": sample.query, "output": sample.answer or ""}
            for sample in own
            if sample.seed == own[0].seed
        ]
        content = {"task": like.replace("-", "_")[:6], "golds": golds}
        (place / f"{method}.json").write_text(
            json.dumps(content, ensure_ascii=False), encoding="utf-8"
        )
    return place


def read_learning(folder: Path) -> list[dict[str, Any]]:
    """What each seed's learning told; nothing for a run that has not ended, or learned nothing."""
    file = folder / "learning.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{file} cannot be read ({error}): run the same `bench run` again, it writes it anew"
        ) from None
    return [told for told in found if isinstance(told, dict)] if isinstance(found, list) else []


def read_run(folder: Path) -> tuple[dict[str, Any], list[Sample]]:
    """The manifest of a run and its samples; of a sample that failed and was tried again the last
    try. Changes nothing.

    Raises:
        SettingsError: no run is there, it is damaged, or made by a newer version.
    """
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{folder}: is no run ({error}): name the --out of `hydra-llm bench run`"
        ) from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise SettingsError(f"{folder}: is no run (manifest.json is of something else)")
    _refuse_newer(file, manifest)
    samples = folder / "samples.jsonl"
    found = _samples(samples)[0] if samples.exists() else []
    return manifest, list({sample.key: sample for sample in found}.values())


def _refuse_newer(file: Path, manifest: Mapping[str, Any]) -> None:
    if isinstance(manifest.get("format"), int) and manifest["format"] > FORMAT:
        newer = (
            f"format {manifest['format']} is made by a newer hydra-llm"
            f" ({manifest.get('hydra_llm')})"
        )
        raise SettingsError(f"{file}: {newer}: upgrade, or take another --out")


def _samples(file: Path) -> tuple[list[Sample], int]:
    """The samples of whole lines, and how many bytes those are."""
    text = file.read_bytes()
    whole = text.rfind(b"\n") + 1
    return [
        _parse(file, line, number) for number, line in enumerate(text[:whole].split(b"\n")[:-1], 1)
    ], whole


def _parse(file: Path, line: bytes, number: int) -> Sample:
    try:
        entry = json.loads(line)
        return Sample(**{**entry, "notes": tuple(entry["notes"])})
    except (ValueError, TypeError, KeyError) as error:
        raise SettingsError(
            f"{file}:{number}: is no sample ({error}): remove the line, or take another --out"
        ) from None
