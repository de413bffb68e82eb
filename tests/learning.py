"""Learning without the choice of the regularization, for tests whose subject is what is done with
a bundle: the choice is most of what learning a small bundle costs.
"""

from functools import partial

from hydra_llm.training.api import learn
from hydra_llm.training.strengths import Strengths

ONE_STRENGTH = Strengths(ridges=(10.0,), side_ridges=(1.0,), precisions=(3.0,))
quick_learn = partial(learn, strengths=ONE_STRENGTH)
