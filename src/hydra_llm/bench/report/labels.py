"""Places for the labels of points, such that none covers a point or another label."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Side = Literal["left", "right"]
Box = tuple[float, float, float, float]  # left, top, right and bottom in pixels
HEIGHT = 13  # of a label in pixels
SIDES: tuple[tuple[int, Side], ...] = ((1, "left"), (-1, "right"))
UPWARD = sorted((step * HEIGHT / 2 for step in range(-60, 61)), key=abs)
"""Vertical distances that are tried, the nearest first."""


class Label(NamedTuple):
    """Where a label is, in pixels: its text begins (side left) or ends (right) at x, around y."""

    x: float
    y: float
    width: float
    side: Side
    moved: bool = False  # above or below its point's height

    @property
    def box(self) -> Box:
        left = self.x if self.side == "left" else self.x - self.width
        return left, self.y - HEIGHT / 2, left + self.width, self.y + HEIGHT / 2


def label_places(
    points: Sequence[tuple[float, float]], widths: Sequence[float], area: tuple[float, float]
) -> list[Label]:
    """Each point's label beside it, or at the nearest free height."""
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    labels = []
    for (x, y), width in zip(points, widths, strict=True):
        places = [(up, sign, side) for up in UPWARD for sign, side in SIDES]
        tries = [Label(x + 9 * sign, y + up, width, side, up != 0) for up, sign, side in places]
        labels.append(next((label for label in tries if _free(label.box, area, taken)), tries[0]))
        taken.append(labels[-1].box)
    return labels


def _free(box: Box, area: tuple[float, float], taken: Sequence[Box]) -> bool:
    inside = box[0] >= 0 and box[1] >= 0 and box[2] <= area[0] and box[3] <= area[1]
    return inside and not any(
        box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken
    )
