"""How the names of settings may be written."""

import difflib
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra_llm.errors import SettingsError

logger = logging.getLogger("hydra_llm.config")


@dataclass(frozen=True)
class Names:
    """How settings may be written: `group.name`, `name` or by a former name."""

    group_of: Mapping[str, str]
    renamed: Mapping[str, str]

    def resolve(self, name: str, hint: bool = False) -> str:
        """The flat name of a setting; SettingsError suggests the nearest names for an unknown one.
        `hint` logs the grouped spelling if another one was used.
        """
        group, dot, last = name.strip().lower().replace("-", "_").rpartition(".")
        current = self.renamed.get(last, last)
        if current not in self.group_of or (dot and group != self.group_of[current]):
            near = difflib.get_close_matches(last, [*self.group_of, *self.renamed], 3)
            nearest = " or ".join(dict.fromkeys(map(self.spelled, near)))
            fix = f"did you mean {nearest}?" if near else "see docs/settings.md"
            raise SettingsError(f"unknown setting '{name}': {fix}")
        if hint and self.spelled(current) != f"{group}.{last}":
            log_renamed(name, self.spelled(current))
        return current

    def spelled(self, name: str) -> str:
        """`retrieval.k` for `k`, or for a former name."""
        current = self.renamed.get(name, name)
        return f"{self.group_of[current]}.{current}"

    def flat(self, values: Mapping[str, Any], hint: bool = False) -> dict[str, Any]:
        """Settings under their flat names, without None; tables of groups are unpacked."""
        flat: dict[str, Any] = {}
        for name, value in values.items():
            if name in self.group_of.values() and isinstance(value, Mapping):
                table = {f"{name}.{key.removeprefix(f'{name}.')}": value[key] for key in value}
                flat |= self.flat(table, hint)
            elif value is not None:
                flat[self.resolve(name, hint)] = value
        return flat


@functools.cache
def log_renamed(old: str, new: str) -> None:
    """Log the current spelling of a setting or option, once per name."""
    logger.warning("'%s' is now written '%s'", old, new)
