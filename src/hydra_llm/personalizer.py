"""`Personalizer`: a learned bundle and an LLM, ready to answer. The library's main class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hydra_llm.bundle import Bundle
from hydra_llm.config import load_settings
from hydra_llm.llm.base import ChatLLM
from hydra_llm.llm.registry import open_llm
from hydra_llm.model.onnx_encoder import use_onnx
from hydra_llm.pipeline import UserPipeline
from hydra_llm.reasons import Reasons, Refit, why
from hydra_llm.types import Answer


@dataclass(frozen=True)
class Personalizer(UserPipeline):
    """Answers each user as that user would want, through any black-box LLM."""

    @classmethod
    def load(cls, bundle: Bundle | Path | str, llm: ChatLLM | str, **settings: object) -> Self:
        """The personalizer of a learned bundle; `settings` change how it answers.

        Raises:
            BundleError: the bundle is damaged, newer, or not there.
            SettingsError: an unknown LLM or setting, or one that learning has fixed.
        """
        here = load_settings(None, None, **settings)
        loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle, here=here)
        if loaded is not bundle:
            use_onnx(loaded.features)
        chosen = loaded.settings_with(**settings)
        opened = open_llm(llm, chosen) if isinstance(llm, str) else llm
        return cls.of(loaded.pipeline(chosen), opened, loaded.records, loaded.heads)

    def why(self, answer: Answer, refit: Refit | None = None) -> Reasons | None:
        """Why the adapter picked this answer (`reasons.why`); None where no adapter decided. With
        `refit`, of `training.leave_out.refit_of(bundle)`, the user's head is fitted again without
        the records that are taken out; else it stays as it is.
        """
        return why(self, answer, refit)
