"""hydra-llm personalizes any black-box LLM (HYDRA, Zhuang et al., NeurIPS 2024).

A public name is imported at its first use (PEP 562): `import hydra_llm` loads no torch and takes
milliseconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra_llm.config import Settings, load_settings
    from hydra_llm.errors import HydraError, LLMError, UserFault
    from hydra_llm.llm.base import ChatLLM
    from hydra_llm.personalizer import Personalizer
    from hydra_llm.reasons import Reasons
    from hydra_llm.tasks.base import Task
    from hydra_llm.training.api import afit, alearn, fit, learn
    from hydra_llm.types import Answer, Candidate, Generation, Query, Record, Usage

__version__ = "0.1.0"

__all__ = ["Answer", "Candidate", "ChatLLM", "Generation", "HydraError", "LLMError"]
__all__ += ["Personalizer", "Query", "Reasons", "Record", "Settings", "Task", "Usage", "UserFault"]
__all__ += ["afit", "alearn", "fit", "learn", "load_settings"]

# No module may have one of these names: importing it would replace the name by the module.
_HOMES = {
    "hydra_llm.config": ("Settings", "load_settings"),
    "hydra_llm.errors": ("HydraError", "LLMError", "UserFault"),
    "hydra_llm.training.api": ("afit", "alearn", "fit", "learn"),
    "hydra_llm.llm.base": ("ChatLLM",),
    "hydra_llm.personalizer": ("Personalizer",),
    "hydra_llm.reasons": ("Reasons",),
    "hydra_llm.tasks.base": ("Task",),
    "hydra_llm.types": ("Answer", "Candidate", "Generation", "Query", "Record", "Usage"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hydra_llm' has no attribute '{name}'")
    from hydra_llm.extras import one_line_imports

    with one_line_imports(f"hydra_llm.{name}"):
        value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
