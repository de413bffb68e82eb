"""The registry of plug-ins: built-in and installed ones are entry points of the same group."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from hydra_llm.errors import SettingsError, did_you_mean
from hydra_llm.extras import one_line_imports

T = TypeVar("T")  # what every plug-in of a group is, such as a factory


class Registry(Generic[T]):
    """The plug-ins of an entry-point group: name → object, imported when it is first loaded.

    A package registers its own under `[project.entry-points."GROUP"]` as `name = "module:object"`,
    as `builtin` does for those of hydra-llm. A name that is registered twice cannot be loaded.
    """

    def __init__(
        self, group: str, builtin: Mapping[str, str], kind: str = "", needs: Sequence[str] = ()
    ):
        self.group, self.needs = group, needs  # attributes that every one of them has
        # What error messages call one of them: by default the group's last word, singular.
        self.kind = kind or group.rpartition(".")[2].removesuffix("s").replace("_", " ")
        self.builtin = {name: EntryPoint(name, path, group) for name, path in builtin.items()}
        self.hint = f"or install the package that registers it in the entry-point group {group}"
        self.added: dict[str, T] = {}  # by `add`

    def add(self, name: str, plugin: T) -> None:
        """Register an object for this process, as a script does that has no package. SettingsError:
        the name is taken.
        """
        if name in self.names():
            fault = f"is taken in the group {self.group}: take another name"
            raise SettingsError(f"the {self.kind} '{name}' {fault}")
        self.added[name] = plugin

    def names(self) -> list[str]:
        """The built-in names in the order of registration, then the installed ones by name, then
        those that were added.
        """
        installed = {point.name for point in entry_points(group=self.group)}
        return [*self.builtin, *sorted(installed - self.builtin.keys()), *self.added]

    def load(self, name: str) -> T:
        """Import the object that is registered under `name`. Raises SettingsError: it is unknown,
        registered twice, not importable, something else, or names itself otherwise.
        """
        if name in self.added:
            return self.added[name]
        point = self._registered(name)
        place = f"the {self.kind} '{name}'" + (f" of {point.dist.name}" if point.dist else "")
        try:
            with one_line_imports(place):
                loaded: T = point.load()
        except (Exception, SystemExit) as error:  # a foreign module may raise anything
            if name in self.builtin:
                raise
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise SettingsError(f"{place} cannot be loaded from {point.value} ({cause})") from error
        self._check(loaded, point, place)
        return loaded

    def unknown(self, name: str, known: str = "") -> str:
        """What is wrong with a name that is not registered; `known` lists those that are."""
        near = did_you_mean(name.partition("@")[0].partition(":")[0], self.names())
        known = known or f"take one of {', '.join(self.names())}"
        return f"unknown {self.kind} '{name}'{near}: {known}, {self.hint}"

    def _registered(self, name: str) -> EntryPoint:
        """The only entry point of this name."""
        installed = self._shadowing if name in self.builtin else entry_points(group=self.group)
        points = [p for p in (*self.builtin.values(), *installed) if p.name == name]
        if not points:
            raise SettingsError(self.unknown(name))
        if len(points) > 1:
            packages = (point.dist.name if point.dist else "hydra-llm" for point in points)
            twice = f"the {self.kind} '{name}' is registered by {' and by '.join(sorted(packages))}"
            raise SettingsError(f"{twice} in the entry-point group {self.group}: uninstall one")
        return points[0]

    def _check(self, loaded: object, point: EntryPoint, place: str) -> None:
        """Raise SettingsError if the object lacks what the group needs, or has another name."""
        if missing := [attribute for attribute in self.needs if not hasattr(loaded, attribute)]:
            raise SettingsError(f"{place} is no {self.kind}: {point.value} has no '{missing[0]}'")
        if "name" in self.needs:
            own = getattr(loaded, "name", point.name)
            if own != point.name:  # bundles store this name, and it would not be found again
                raise SettingsError(f"{place} calls itself '{own}': register it under that name")

    @cached_property
    def _shadowing(self) -> list[EntryPoint]:
        """Installed ones with a built-in name. Read once: built-in parts are loaded often."""
        return [point for point in entry_points(group=self.group) if point.name in self.builtin]


RETRIEVERS: Registry[Any] = Registry(
    "hydra_llm.retrievers",
    {
        "bm25": "hydra_llm.retrieve:BM25",
        "dense": "hydra_llm.retrieve:Dense",
        "hybrid": "hydra_llm.retrieve:Hybrid",
        "recent": "hydra_llm.retrieve:Recent",
        "random": "hydra_llm.retrieve:Random",
        "nothing": "hydra_llm.retrieve:Nothing",
    },
    needs=("__call__",),
)
"""Called as `factory(embed=..., seed=..., text=...)`; one whose `needs_encoder` is true gets an
encoder in the gateway too. Here for settings that load no part.
"""
PROMPTS: Mapping[str, str] = {
    "zero-shot": "nothing",
    "icl-random": "random",
    "recent": "recent",
    "rag": "",
    "rag-dense": "dense",
}
"""Prompts by the names of the benchmark's methods: the retriever of their records, of `rag` that of
the settings. All but `zero-shot` carry the number of records, as `rag@4`. Likewise for settings.
"""


def read_prompts(names: str) -> list[tuple[str, int]]:
    """`zero-shot,rag@1` as retrievers and numbers of records; ValueError says how to write it."""
    found = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        plain, _, count = name.partition("@")
        numbered = count.isdecimal() and int(count) > 0
        if plain not in PROMPTS or not (numbered if plain != "zero-shot" else name == plain):
            known = ", ".join(own + "@K" * (own != "zero-shot") for own in PROMPTS)
            raise ValueError(f"unknown prompt '{name}': take some of {known}")
        found.append((PROMPTS[plain], int(count or 0)))
    return found


DETECTORS: Registry[Any] = Registry(
    "hydra_llm.detectors",
    {own: f"hydra_llm.masking:{own}" for own in ("email", "phone", "card", "iban", "name")},
    needs=("__call__",),
)
"""Of personal data, called as `detector(text)`: the spans of a text that are (masking.py)."""
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
