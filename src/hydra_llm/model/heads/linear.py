"""Head `linear`: the user's own weight vector and bias."""

from hydra_llm.model.heads.additive import AdditiveHead


class LinearHead(AdditiveHead):
    """A weight vector and a bias per user, V + 1 numbers: for long histories.

    The bias has an effect under the binary loss only: it moves all candidates of a group alike.
    Online updates leave it out.
    """

    name = "linear"
    own_bias = True

    def directions(self) -> None:
        return None
