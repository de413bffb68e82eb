"""Every exception that hydra-llm raises on purpose.

    HydraError
    ├── UserFault            the caller can mend it: one line and the fix, exit code 2
    │   ├── DataError        a data set's file, line or field is broken
    │   ├── SettingsError    an unknown name or a value out of range
    │   ├── UnknownUser      the bundle or data set has no such user
    │   └── BundleError      a bundle is damaged, newer than this version, or does not fit
    ├── StoreError           the gateway's database failed or is not as expected; nothing was
                             acknowledged (store/store.py: Stale)
    └── LLMError             a call to the black box failed; it is recorded, never scored 0
        ├── PartlyFailed     some of its texts arrived and are kept (llm/base.py)
        ├── LLMRefused       it will fail again as it stands (401, 403, 404, 400)
        └── BudgetExceeded   the run's budget is spent; the run stops cleanly and resumes

Each message is one line that names the place and, where there is one, the fix.
"""

from pathlib import Path


class HydraError(Exception):
    """The root: everything that this package raises on purpose."""

    exit_code = 1


class UserFault(HydraError):
    """Something that the caller can fix; the command line prints one line and exits with 2."""

    exit_code = 2


class DataError(UserFault):
    """A data set that cannot be read: names file, line and field where they are known."""

    def __init__(
        self,
        message: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        field: str | None = None,
    ):
        self.file, self.line, self.field = file, line, field
        place = ":".join(str(part) for part in (file, line) if part is not None)
        named = f" field '{field}':" if field else ""
        super().__init__(f"{place}:{named} {message}" if place else f"{named} {message}".strip())


class SettingsError(UserFault):
    """An unknown name or a value out of its range."""


class UnknownUser(UserFault):
    """A user whom neither the bundle nor the data set knows."""


class BundleError(UserFault):
    """A bundle that is damaged, of a newer format, or made for another task or encoder."""


class StoreError(HydraError):
    """The gateway's database cannot be reached, failed, or is not what was expected of it."""

    exit_code = 2


class LLMError(HydraError):
    """A call to the LLM that failed after its retries."""


class LLMRefused(LLMError):
    """A call that fails again as it stands: wrong key, unknown model, malformed request, a prompt
    beyond the LLM's window.
    """

    exit_code = 2

    def __init__(self, message: str, *, fits: float | None = None):
        super().__init__(message)
        self.fits = fits
        """Where the prompt was too long: the share of it that would fit. A shorter prompt may be
        asked.
        """


class BudgetExceeded(LLMError):
    """The next call would pass the budget; what was done so far is kept."""
