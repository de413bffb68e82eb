"""Every exception that hydra-llm raises on purpose.

    HydraError                    exit code 1
    ├── UserFault                 the caller can correct it: exit code 2
    │   ├── DataError             a file, line or field of a data set
    │   ├── SettingsError         an unknown name, a value out of range
    │   ├── UnknownUser           in neither the bundle nor the data set
    │   ├── MissingExtra          an optional library is not installed; also an ImportError
    │   └── BundleError           damaged, of a newer format, or made for another task
    ├── StoreError                the gateway's database; nothing was kept
    │   └── StaleVersion, NoSuchUser, ConflictingFeedback    (store/change.py)
    └── LLMError                  a failed call; recorded, never scored 0
        ├── PartlyFailed          some of its texts arrived and are kept    (llm/base.py)
        ├── LLMRefused            it will fail again as it is
        └── BudgetExceeded        the run stops cleanly, and can be resumed
            ├── BatchPending      exit code 3: the same command goes on later
            └── BatchRefused      exit code 2: the endpoint takes no such batch

Each message is one line that names the place and, where there is one, the fix.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'bm25'?)`, or '' if no known name is near."""
    by_form = {other.lower().replace("_", "-"): other for other in known}
    near = difflib.get_close_matches(name.lower().replace("_", "-"), by_form, 1)
    return f" (did you mean '{by_form[near[0]]}'?)" if near else ""


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROLS |= dict.fromkeys(map(ord, "\t\n\r\x0b\x0c\x85"), " ")


class HydraError(Exception):
    """The root: everything that this package raises on purpose."""

    exit_code = 1  # of the command


class UserFault(HydraError):
    """Something that the caller can correct."""

    exit_code = 2


class DataError(UserFault):
    """A data set that cannot be read: names file, line and field where they are known."""

    def __init__(
        self, message: str, file: Path | str | None = None, line: int | None = None, field: str = ""
    ):
        self.file, self.line, self.field = file, line, field or None
        place = ":".join(str(part) for part in (file, line) if part is not None)
        parts = (place and f"{place}:", field and f"field '{field}':", message)
        # A file may hold anything: one line, and nothing that a terminal takes for a command.
        super().__init__(" ".join(filter(None, parts)).translate(_CONTROLS))


class SettingsError(UserFault):
    """An unknown name or a value out of its range."""


class UnknownUser(UserFault):
    """A user whom neither the bundle nor the data set knows."""


class MissingExtra(UserFault, ImportError):
    """An optional library is not installed: names the extra that brings it."""


class BundleError(UserFault):
    """A bundle that is damaged, of a newer format, or made for another task or encoder."""


class StoreError(HydraError):
    """The gateway's database cannot be reached, has failed, or is not as expected."""

    exit_code = 2


class LLMError(HydraError):
    """A call to the LLM that failed after its retries; it is recorded, never scored 0."""

    lasting = False  # whether it fails the same way each time, whatever the endpoint does


class LLMRefused(LLMError):
    """A call that will fail again as it is: wrong key, unknown model, malformed or too long.

    `fits`: for a prompt that was too long, the share of it that fits; a shorter one may be tried.
    """

    exit_code = 2

    def __init__(self, message: str, *, fits: float | None = None):
        super().__init__(message)
        self.fits = fits
        self.lasting = fits is not None


class BudgetExceeded(LLMError):
    """The next call would exceed the budget; what was done so far is kept."""


class BatchPending(BudgetExceeded):
    """A batch has not been answered yet: the same command takes it up later."""

    exit_code = 3


class BatchRefused(BudgetExceeded):
    """The endpoint refuses a batch as a whole; the same calls may pass one by one."""

    exit_code = 2
