"""Progress of choosing the strengths of regularisation."""

from hydra_llm.llm.concurrency import Progress


class Steps:
    """Reports how many bases were fitted: for each fold, one for each pair of ridges, then four (to
    choose the precision, to tune and to calibrate twice); the last one at the end.
    """

    def __init__(self, count: int, done: Progress | None):
        self.steps, self.total, self.done = 0, count, done

    def step(self) -> None:
        self.steps = min(self.steps + 1, self.total - 1)  # not every head is tuned
        if self.done is not None:
            self.done(self.steps, self.total)

    def finish(self) -> None:
        if self.done is not None:
            self.done(self.total, self.total)
