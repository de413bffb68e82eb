"""A checkpoint of learning from very many users: what was learned from a sample of them, and the
heads that are fitted so far; a bundle without records, beside the one that is to be written.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Self

from hydra_llm.bundle import Bundle
from hydra_llm.errors import BundleError
from hydra_llm.training.learned import Learned

SECONDS = 60.0  # between two checkpoints, at least: one writes all heads
KEY = "checkpoint"  # of the report, under which the fingerprint stands


@dataclass
class SampleCheckpoint:
    """Where it lies, if anywhere, and what it must have been made from."""

    folder: Path | None
    fingerprint: str
    written: float = 0.0

    @classmethod
    def of(cls, learned: Learned, out: Path | str | None) -> Self:
        """Of a learning that begins; `out` is the bundle's folder."""
        bundle, hasher = learned.bundle, hashlib.sha256()
        made_from = [bundle.settings.stored(), dict(bundle.llm), bundle.task.to_json()]
        hasher.update(json.dumps([*made_from, bundle.features.encoder.digest]).encode())
        for user in learned.users:
            hasher.update(repr(bundle.records[user]).encode("utf-8", "replace"))
        folder = None if out is None else Path(f"{out}.users.checkpoint")
        return cls(folder, hasher.hexdigest())

    def resume(self, learned: Learned) -> bool:
        """Take over what an earlier run of the same command has done; False if there is none."""
        now = learned.bundle
        if self.folder is None or not self.folder.exists():
            return False
        try:
            then = Bundle.load(self.folder, here=now.settings)
        except BundleError:  # an older version's, or damaged: the work is done again
            return False
        if then.report.get(KEY) != self.fingerprint:
            return False
        same = then.features.encoder.digest == now.features.encoder.digest
        features = now.features if same else then.features
        report = {key: value for key, value in then.report.items() if key != KEY}
        heads = {name: dict(own) for name, own in then.heads.items()}  # the file will go
        bundle = replace(then, features=features, records=now.records, heads=heads)
        learned.bundle = replace(bundle, report=report, versions={})
        return True

    def write(self, learned: Learned) -> None:
        """Write what is done so far."""
        if self.folder is None:
            return
        bundle = learned.bundle
        report = {**bundle.report, KEY: self.fingerprint}
        replace(bundle, records={}, report=report, versions={}).save(self.folder)
        self.written = monotonic()

    def write_now_and_then(self, learned: Learned) -> None:
        """Write if the last time is long ago."""
        if monotonic() - self.written > SECONDS:
            self.write(learned)

    def remove(self) -> None:
        """The bundle itself is written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
