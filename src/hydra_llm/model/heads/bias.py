"""Head `bias`: one number per user, and an example of how to add a head."""

from torch import Tensor

from hydra_llm.model.heads.additive import AdditiveHead


class BiasHead(AdditiveHead):
    """One number a that scales the shared score, s = (1 + a)·(θ₀·φ + b₀): a temperature per user.

    A constant would change no order and no listwise loss, so a multiplies what does differ between
    candidates. a > 0: the user is more like the training users than they are on average; a = −1:
    what others want says nothing about this one; a < −1: the opposite. The lower bound of heads.
    """

    name = "bias"

    def __init__(self, size: int):
        super().__init__(size, 1)

    def directions(self) -> tuple[Tensor, Tensor]:
        return self.shared[None], self.shared_bias[None]
