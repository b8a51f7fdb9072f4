"""Line charts as geometry: the template draws them as SVG, and as a table for readers who cannot see them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 480
HEIGHT: Final = 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 24
_BUCKETS: Final = 200
_TICKS: Final = 4
_TABLE_ROWS: Final = 12
_LARGEST: Final = 1e100
"""Beyond it a value is as good as infinite, and sums of values are not finite."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart before it is laid out."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Drawn:
    """One line of a chart, laid out."""

    label: str
    style: int
    """Number of its colour and dashes."""
    points: str
    last: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark of an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything that the template needs."""

    key: str
    title: str
    about: str
    lines: list[Drawn]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    rows: list[tuple[str, list[str]]]
    """The table: steps, and each line's value there."""

    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM


def line_chart(key: str, title: str, about: str, lines: Sequence[Line]) -> Chart | None:
    """Lays out lines over steps.

    Args:
        key: Unique on its page.
        title: Name of what is shown.
        about: One sentence that says what it means.
        lines: Values that are not finite are left out, and so are lines without any.

    Returns:
        The chart, or None if nothing is to be drawn.
    """
    kept = {index: points for index, line in enumerate(lines) if (points := _finite(line))}
    if not kept:
        return None
    every = [point for points in kept.values() for point in points]
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    y_ticks = _ticks(min(y for _, y in every), max(y for _, y in every))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x_at(x: float) -> float:
        return round(_LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - _LEFT - _RIGHT), 1)

    def y_at(y: float) -> float:
        return round(HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM), 1)

    drawn = [
        Drawn(
            lines[index].label,
            index % 6,
            " ".join(f"{x_at(x)},{y_at(y)}" for x, y in _thinned(points)),
            number(points[-1][1]),
        )
        for index, points in kept.items()
    ]
    x_ticks = [Tick(x_at(x), f"{x:g}") for x in sorted({x_low, round((x_low + x_high) / 2), x_high})]
    return Chart(
        key, title, about, drawn, x_ticks, [Tick(y_at(y), number(y)) for y in y_ticks], _table(list(kept.values()))
    )


def number(value: float | None) -> str:
    """A number as people read it: four digits."""
    return "" if value is None else f"{value:.4g}"


def _finite(line: Line) -> list[tuple[float, float]]:
    # Not strict: a step whose value is being added this moment is left for the next page.
    return [(x, y) for x, y in zip(line.steps, line.values, strict=False) if math.isfinite(x) and abs(y) < _LARGEST]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most two points a bucket, its lowest and its highest: a spike stays a spike."""
    size = math.ceil(len(points) / _BUCKETS)
    if size <= 2:
        return points
    thinned = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        thinned += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return thinned


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    largest = max(abs(low), abs(high))
    if high - low <= 1e-12 * max(1e-12, largest):
        low, high = (low - largest / 10, high + largest / 10) if largest > 1e-100 else (0.0, 1.0)
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, max(last, first + 1) + 1)]


def _table(lines: list[list[tuple[float, float]]]) -> list[tuple[str, list[str]]]:
    by_step = [dict(points) for points in lines]
    steps = sorted(set().union(*by_step))
    stride = max(1, math.ceil(len(steps) / _TABLE_ROWS))
    shown = sorted({*steps[::stride], steps[-1]})
    return [(f"{step:g}", [number(values.get(step)) for values in by_step]) for step in shown]
