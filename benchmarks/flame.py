"""A flame graph of where the gateway's processor time goes, as an SVG without scripts.

    py-spy record --pid PID --format raw --duration 20 -o stacks.txt
    python benchmarks/flame.py stacks.txt docs/images/flame.svg

The samples are those of a server under personal requests (`benchmarks/saturation.py` while it
measures). Waiting is left out, lines of one function are one box, and frames before a thread's own
work are cut. A box is as wide as its share of the samples; its title says it.
"""

import argparse
import html
import re
from dataclasses import dataclass, field
from pathlib import Path

THREADS = {
    "event loop: HTTP": "BaseEventLoop._run_once",
    "scoring thread: encoder and scorers": "MicroBatcher._do",
    "threads of the database": "WorkerThread.run",
}
WAITING = ("wait (threading", "EpollSelector.select", "Queue.get", "accept (socket", "poll (")
NOISE = ("torch/nn/modules/module", "contextlib.py", "asyncio/events.py", "starlette/_exception")
WIDTH, HEIGHT, LEAST, DEEPEST = 1200, 17, 0.004, 30


@dataclass
class Box:
    """A function, and what it has called."""

    name: str
    count: int = 0
    inner: "dict[str, Box]" = field(default_factory=dict)

    def add(self, names: list[str], count: int) -> None:
        """Add samples of a stack."""
        self.count += count
        if names:
            own = self.inner.setdefault(names[0], Box(names[0]))
            own.add(names[1:], count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stacks", type=Path)
    parser.add_argument("svg", type=Path)
    args = parser.parse_args()
    whole = Box("all")
    for line in args.stacks.read_text(encoding="utf-8").splitlines():
        stack, _, count = line.rpartition(" ")
        if names := read(stack.split(";")):
            whole.add(names, int(count))
    args.svg.write_text(drawn(boxes(whole, 0.0, 0, whole.count)), encoding="utf-8")


def read(frames: list[str]) -> list[str]:
    """The names of a stack from its thread on; empty for one that waits."""
    if any(mark in frames[-1] for mark in WAITING):
        return []
    for thread, begin in THREADS.items():
        place = next((i for i, frame in enumerate(frames) if begin in frame), None)
        if place is not None:
            own = [frame for frame in frames[place + 1 :] if not any(n in frame for n in NOISE)]
            return [thread, *map(short, own)]
    return []


def short(frame: str) -> str:
    """`function (module)` without lines and folders."""
    name, _, place = frame.rpartition(" (")
    parts = re.sub(r"(\.py)?(:\d+)?\)$", "", place).split("/")
    return f"{name.replace('<locals>.', '')} ({'.'.join(parts[-3:])})"


def boxes(box: Box, left: float, depth: int, whole: int) -> list[tuple[Box, float, int, float]]:
    """Each box with its left edge, depth and share."""
    rows = []
    for inner in sorted(box.inner.values(), key=lambda own: -own.count):
        share = inner.count / whole
        if share >= LEAST and depth < DEEPEST:
            rows += [(inner, left, depth, share), *boxes(inner, left, depth + 1, whole)]
        left += share
    return rows


def drawn(rows: list[tuple[Box, float, int, float]]) -> str:
    height = (1 + max(depth for _, _, depth, _ in rows)) * HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        ' font-family="sans-serif" font-size="11">'
    ]
    for box, left, depth, share in rows:
        x, y, width = left * WIDTH, depth * HEIGHT, share * WIDTH
        hue = 40 - min(depth, 15) * 2 if depth else 210
        text = f"{share:.1%} {box.name}"
        shown = text[: int(width / 6)] if width > 30 else ""
        lines.append(
            f'<g><title>{html.escape(text)}</title><rect x="{x:.1f}" y="{y}" width="{width:.1f}"'
            f' height="{HEIGHT - 1}" fill="hsl({hue},80%,72%)"/>'
            f'<text x="{x + 3:.1f}" y="{y + 12}">{html.escape(shown)}</text></g>'
        )
    return "\n".join([*lines, "</svg>\n"])


if __name__ == "__main__":
    main()
