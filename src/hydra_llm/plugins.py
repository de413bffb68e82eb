"""The one door for plug-ins: built-in and installed ones are entry points of the same group."""

from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from hydra_llm.errors import SettingsError

T = TypeVar("T")  # what every plug-in of a group is, such as a factory


class Registry(Generic[T]):
    """The plug-ins of an entry-point group: name → object, imported when it is first loaded.

    A package registers its own under `[project.entry-points."GROUP"]` as `name = "module:object"`,
    as `builtin` does for those of hydra-llm; a built-in name cannot be replaced.
    """

    def __init__(
        self, group: str, builtin: Mapping[str, str], kind: str = "", needs: Sequence[str] = ()
    ):
        self.group, self.needs = group, needs  # attributes that every one of them has
        # What error messages call one of them: by default the group's last word, singular.
        self.kind = kind or group.rpartition(".")[2].removesuffix("s").replace("_", " ")
        self.builtin = {name: EntryPoint(name, path, group) for name, path in builtin.items()}

    def names(self) -> list[str]:
        """The built-in names in the order of registration, then the installed ones by name."""
        return [*self.builtin, *sorted(self._installed())]

    def load(self, name: str) -> T:
        """Import the object that is registered under `name`.

        Raises:
            SettingsError: an unknown name, or the plug-in does not import or is something else.
        """
        point = self.builtin.get(name) or self._installed().get(name)
        if point is None:
            known = ", ".join(self.names())
            raise SettingsError(f"unknown {self.kind} '{name}': take one of {known}")
        owner = f" of {point.dist.name}" if point.dist else ""
        place = f"the {self.kind} '{name}'{owner}"
        try:
            loaded: T = point.load()
        except (Exception, SystemExit) as error:  # a foreign module may raise anything
            if name in self.builtin:
                raise
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise SettingsError(f"{place} cannot be loaded from {point.value} ({cause})") from error
        if missing := [attribute for attribute in self.needs if not hasattr(loaded, attribute)]:
            raise SettingsError(f"{place} is no {self.kind}: {point.value} has no '{missing[0]}'")
        return loaded

    def _installed(self) -> dict[str, EntryPoint]:
        found = entry_points(group=self.group)
        return {point.name: point for point in found if point.name not in self.builtin}


HEADS: Registry[Any] = Registry(
    "hydra_llm.heads",
    {
        "mlp": "hydra_llm.model.heads.mlp:MLPHead",
        "linear": "hydra_llm.model.heads.linear:LinearHead",
        "lowrank": "hydra_llm.model.heads.lowrank:LowRankHead",
        "kernel": "hydra_llm.model.heads.kernel:KernelHead",
        "bias": "hydra_llm.model.heads.bias:BiasHead",
    },
    needs=("name", "convex", "create", "fit"),
)
"""Kinds of a user's head (`model.heads.HeadKind`), here for settings that know no torch."""
