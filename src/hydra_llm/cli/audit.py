"""`hydra-llm audit`: whether a bundle's shared base tells who was among its training users."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from hydra_llm.cli import console
from hydra_llm.cli.options import AsJson, LearnLLM
from hydra_llm.llm.none import NONE
from hydra_llm.llm.registry import check_spec

if TYPE_CHECKING:
    from hydra_llm.training.audit import Audit

ATTACKERS = {"loss": "one threshold on the loss", "ratio": "likelihood ratio (LiRA)"}


def audit(
    bundle: Annotated[Path, Argument(help="Folder of a learned bundle.")],
    data: Annotated[Path, Argument(help="The data set that it was learned from.")],
    scorer: Annotated[str, Option(help="adapter or reranker.")] = "adapter",
    users: Annotated[int, Option(min=2, help="Number of audited users, by lot.")] = 50,
    bases: Annotated[int, Option(min=8, help="Bases that are learned, a multiple of 4.")] = 64,
    llm: LearnLLM = NONE,
    seed: Annotated[int, Option(help="Seed of the halves and of the audited users.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Test whether the shared base tells who was in it: the base is learned again from halves of
    its training users. `--llm` is asked nothing: its answers come from cache or recording.
    """
    check_spec(llm)
    from hydra_llm.bundle import Bundle
    from hydra_llm.datasets.native import load
    from hydra_llm.training.audit import audit as run

    loaded, dataset = Bundle.load(bundle), load(data)
    options: dict[str, Any] = {"scorer": scorer, "users": users, "bases": bases, "seed": seed}
    with console.progress() as report:
        found = run(loaded, dataset, llm, **options, progress=report)
    for note in found.notes:
        console.say(note)
    privacy = loaded.report.get("privacy")
    if as_json:
        console.emit({"bundle": str(bundle), **found.to_json(), "privacy": privacy}, as_json)
        return
    console.emit(_rows(found))
    epsilon = "without differential privacy" if privacy is None else f"epsilon {privacy['epsilon']}"
    count = f"{found.users} of {found.training_users} training users, {found.bases} bases"
    console.say(f"{found.scorer}: {count}, {epsilon}; 0.5 is a guess by lot")


def _rows(found: "Audit") -> list[dict[str, str]]:
    return [
        {
            "attack": ATTACKERS[name],
            "AUC": str(own.auc),
            "true positives at 1 % false ones": str(own.true_positives),
        }
        for name, own in found.attacks.items()
    ]
