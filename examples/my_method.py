"""A method of one's own beside the built-in ones: of each answer, the user's most similar record.

    hydra-llm data import examples/agents/labels.csv --out data
    python examples/my_method.py bench run data --llm smollm2 --out run --methods rag@4,distinct@4
    python examples/my_method.py bench show run

The script is `hydra-llm` with one method more. A package registers its methods as entry points
instead: group `hydra_llm.methods`, docs/architecture.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hydra_llm.bench.method import METHODS, Answerer, Parts, method
from hydra_llm.cli.main import main
from hydra_llm.retrieve import Retriever
from hydra_llm.types import Query, Ranked, Record


@dataclass(frozen=True)
class Distinct:
    inner: Retriever

    def retrieve(self, query: Query, records: Sequence[Record], m: int) -> list[Ranked]:
        ranked = self.inner.retrieve(query, records, len(records))
        best = {own.record.output: own for own in reversed(ranked)}  # the best one stands last
        return sorted(best.values(), key=lambda own: own.rank)[:m]


@method("prompt", takes=("k",), source="examples/my_method.py", uses=())
def distinct(parts: Parts) -> Answerer:
    """K records with distinct answers in the prompt."""
    pipeline = parts.personalizer(samples=1, greedy_first=True)
    return replace(pipeline, retriever=Distinct(pipeline.retriever))


METHODS.add("distinct", distinct)
if __name__ == "__main__":
    main()
