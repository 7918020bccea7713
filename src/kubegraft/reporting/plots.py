"""The plots of the reports, as inline SVG: learning curves, confusion matrix, reliability diagram, bars."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from kubegraft.reporting import svg
from kubegraft.reporting.svg import ACCENT, INK, LINE, MUTED, SECOND, THIRD, Canvas, Scale

if TYPE_CHECKING:
    import numpy as np
    from markupsafe import Markup
    from numpy.typing import NDArray

    from kubegraft.evaluation.calibration import ReliabilityBin

MOST_MATRIX_CLASSES: Final = 60
MOST_BARS: Final = 80


@dataclass(frozen=True, slots=True)
class Curve:
    """What one training phase did to one metric.

    Attributes:
        name: Name of the phase, for people.
        train: Value after each epoch on the training split; not a number where it was not measured.
        validation: Value after each epoch on the validation split.
        start: Validation value before the first epoch, or None.
        best_epoch: Index of the epoch that was kept, -1 for the start, or None if it is not known.
        steps: Name of each epoch, for people; empty for their numbers.
    """

    name: str
    train: Sequence[float]
    validation: Sequence[float]
    start: float | None = None
    best_epoch: int | None = None
    steps: Sequence[str] = ()

    @property
    def values(self) -> list[float]:
        """All values that can be drawn."""
        start = [] if self.start is None else [self.start]
        return [value for value in (*start, *self.train, *self.validation) if math.isfinite(value)]


def learning_curves(curves: Sequence[Curve], metric: str, *, fraction: bool = False) -> Markup:
    """Draw a metric over the epochs of all phases, one after the other on one axis.

    Args:
        curves: The phases in the order they ran. A phase's width grows slower than its number of epochs, so
            that eight epochs beside a hundred can still be read.
        metric: Name of the metric, for people.
        fraction: Whether values are fractions, to be shown as percentages.
    """
    canvas = Canvas(500, 290, f"{metric} over epochs")
    curves = [curve for curve in curves if curve.values]
    values = [value for curve in curves for value in curve.values]
    if not values:
        canvas.text((250, 145), "No epoch was trained", anchor="middle", size=13)
        return canvas.markup()
    low, high = _padded(min(values), max(values), most=1.0 if fraction else math.inf)
    vertical = Scale(low, high, 240, 34)
    for tick in svg.ticks(low, high):
        canvas.line((50, vertical(tick)), (492, vertical(tick)))
        label = _percent_tick(tick) if fraction else f"{tick:.4g}"
        canvas.text((44, vertical(tick) + 4), label, anchor="end")
    for curve, (start, end) in zip(curves, _panels(curves, 50, 492), strict=True):
        _draw_phase(canvas, curve, vertical, start, end)
    _legend(canvas, 50, 283, [("validation", ACCENT, "none"), ("training", SECOND, "5 3")])
    return canvas.markup()


def _draw_phase(canvas: Canvas, curve: Curve, vertical: Scale, start: float, end: float) -> None:
    num_epochs = len(curve.validation)
    first = 0 if curve.start is not None else 1
    horizontal = Scale(first, max(num_epochs, first + 1), start + 8, end - 8)
    top, bottom = vertical.end, vertical.start
    if start > 50:
        canvas.line((start, top - 16), (start, bottom), color=MUTED, dashes="2 3")
    canvas.text((start + 8, top - 8), curve.name, size=12, color=INK, weight=600, max_width=end - start - 10)
    for tick in svg.ticks(first, max(num_epochs, 1), int((end - start) / 60) + 1):
        if tick == int(tick) and (end > 491 or horizontal(tick) < end - 18):
            canvas.text((horizontal(tick), bottom + 18), f"{tick:g}", anchor="middle")
    measured = [(index + 1, value) for index, value in enumerate(curve.train) if math.isfinite(value)]
    canvas.polyline([(horizontal(x), vertical(y)) for x, y in measured], color=SECOND, dashes="5 3")
    before = [] if curve.start is None else [(0, curve.start)]
    held_out = [*before, *((index + 1, value) for index, value in enumerate(curve.validation))]
    points = [(horizontal(x), vertical(y)) for x, y in held_out if math.isfinite(y)]
    canvas.polyline(points, color=ACCENT)
    kept = dict(held_out).get(-1 if curve.best_epoch is None else curve.best_epoch + 1)
    if curve.best_epoch is not None and kept is not None:
        best = (horizontal(curve.best_epoch + 1), vertical(kept))
        number = curve.best_epoch
        step = curve.steps[number] if 0 <= number < len(curve.steps) else f"epoch {number + 1}"
        canvas.circle(best, 5, color=ACCENT, hollow=True, tip=f"kept: {step}, {kept:.4g}")


def _panels(curves: Sequence[Curve], start: float, end: float) -> list[tuple[float, float]]:
    weights = [math.sqrt(max(len(curve.validation), 1)) for curve in curves]
    floor = 0.5 * max(weights)
    weights = [max(weight, floor) for weight in weights]
    edges = [start]
    for weight in weights:
        edges.append(edges[-1] + (end - start) * weight / sum(weights))
    return list(itertools.pairwise(edges))


def _padded(low: float, high: float, most: float) -> tuple[float, float]:
    margin = max((high - low) * 0.06, 1e-3)
    return max(low - margin, 0.0 if low >= 0 else -math.inf), min(high + margin, max(most, high))


def _percent_tick(fraction: float) -> str:
    return f"{100 * fraction:.4g} %"


def _legend(canvas: Canvas, x: float, y: float, entries: Sequence[tuple[str, str, str]]) -> None:
    for name, color, dashes in entries:
        canvas.line((x, y - 4), (x + 22, y - 4), color=color, width=2, dashes=dashes)
        canvas.text((x + 28, y), name)
        x += 44 + svg.text_width(name)
    canvas.circle((x + 4, y - 4), 4, color=ACCENT, hollow=True)
    canvas.text((x + 14, y), "kept")


def reliability_diagram(bins: Sequence[ReliabilityBin]) -> Markup:
    """Draw accuracy over confidence, the ideal diagonal, and below how many images each bin holds."""
    canvas = Canvas(440, 400, "accuracy over confidence")
    horizontal, vertical = Scale(0, 1, 52, 428), Scale(0, 1, 290, 14)
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        canvas.line((52, vertical(tick)), (428, vertical(tick)))
        canvas.text((46, vertical(tick) + 4), _percent_tick(tick), anchor="end")
        canvas.text((horizontal(tick), 376), _percent_tick(tick), anchor="middle")
    most = max((each.count for each in bins), default=1) or 1
    for each in bins:
        if each.count:
            _draw_bin(canvas, each, horizontal, vertical, most)
    canvas.line((52, 290), (428, 14), color=MUTED, width=1.5, dashes="5 4")
    canvas.line((52, 356), (428, 356))
    canvas.text((240, 396), "confidence", anchor="middle", color=INK)
    canvas.text((46, 330), "images", anchor="end")
    canvas.text((60, 30), "accuracy", color=INK)
    return canvas.markup()


def _draw_bin(canvas: Canvas, each: ReliabilityBin, horizontal: Scale, vertical: Scale, most: int) -> None:
    left, right = horizontal(each.low) + 1.5, horizontal(each.high) - 1.5
    width = max(right - left, 1)
    tip = f"{each.count} images: confidence {each.confidence:.1%}, accuracy {each.accuracy:.1%}"
    top, ideal = vertical(each.accuracy), vertical(each.confidence)
    honest = max(top, ideal)
    canvas.rect((left, honest), (width, vertical(0) - honest), color=ACCENT, opacity=0.8, tip=tip)
    gap = SECOND if each.confidence > each.accuracy else THIRD
    canvas.rect((left, min(top, ideal)), (width, abs(top - ideal)), color=gap, opacity=0.55, tip=tip)
    height = max(48 * each.count / most, 1)
    canvas.rect((left, 356 - height), (width, height), color=MUTED, opacity=0.6, radius=1, tip=tip)


def confusion_heat_map(matrix: NDArray[np.int64], classes: Sequence[str]) -> Markup | None:
    """Draw each true class's images as a row, by the class they were called.

    Args:
        matrix: `int64[classes, classes]`, rows are true classes.
        classes: Their names.

    Returns:
        None for more than 60 classes: a table of the most confused pairs says more.
    """
    count = len(classes)
    if count > MOST_MATRIX_CLASSES:
        return None
    size = max(12.0, min(46.0, 620 / count))
    font = min(12.0, size * 0.72)
    label = min(max(svg.text_width(name, font) for name in classes) + 8, 150)
    left, top = 26 + label, 24 + label * 0.75
    canvas = Canvas(left + count * size + 40, top + count * size + 6, "confusion matrix")
    canvas.text((left, 14), "called →", color=INK, weight=600)
    canvas.text((14, top + 2), "true →", color=INK, weight=600, anchor="end", angle=-90)
    for index, name in enumerate(classes):
        middle = (index + 0.5) * size
        row = (left - 7, top + middle + font * 0.35)
        canvas.text(row, name, anchor="end", size=font, max_width=label, color=INK)
        column = (left + middle + font * 0.35, top - 6)
        canvas.text(column, name, size=font, max_width=label * 0.9, color=INK, angle=-50)
    for row_index in range(count):
        for column_index in range(count):
            corner = (left + column_index * size, top + row_index * size)
            _draw_cell(canvas, matrix, classes, row_index, column_index, corner, size)
    return canvas.markup()


def _draw_cell(
    canvas: Canvas,
    matrix: NDArray[np.int64],
    classes: Sequence[str],
    row: int,
    column: int,
    corner: tuple[float, float],
    size: float,
) -> None:
    images, total = int(matrix[row, column]), int(matrix[row].sum())
    gap = 1.0 if size > 14 else 0.5
    inner = (corner[0] + gap / 2, corner[1] + gap / 2), (size - gap, size - gap)
    if not images:
        canvas.rect(*inner, color=LINE, opacity=0.45, radius=2)
        return
    share = images / total
    color = "rgb(var(--heat))" if row == column else "rgb(var(--heat-bad))"
    tip = f"{images} of {total} {classes[row]} called {classes[column]}"
    canvas.rect(*inner, color=LINE, opacity=0.45, radius=2)
    canvas.rect(*inner, color=color, opacity=0.18 + 0.82 * share, radius=2, tip=tip)
    if size >= 17:
        middle = (corner[0] + size / 2, corner[1] + size / 2 + 4)
        ink = "var(--card)" if share > 0.55 else INK
        canvas.text(middle, str(images), anchor="middle", size=min(12, size * 0.5), color=ink)


@dataclass(frozen=True, slots=True)
class Bar:
    """A fraction with its confidence interval, all in [0, 1]; `note` stands at the end of the bar."""

    name: str
    value: float
    low: float
    high: float
    note: str = ""


def horizontal_bars(bars: Sequence[Bar], axis: str) -> Markup:
    """Draw fractions as bars with whiskers, in the order given; the first 80 only.

    Args:
        bars: What to draw.
        axis: What the fraction is, for people.
    """
    shown = list(bars)[:MOST_BARS]
    label = min(max((svg.text_width(bar.name) for bar in shown), default=0) + 12, 200)
    bottom = 8 + 24.0 * len(shown)
    canvas = Canvas(900, bottom + 40, axis)
    horizontal = Scale(0, 1, label + 4, 780)
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        canvas.line((horizontal(tick), 4), (horizontal(tick), bottom))
        canvas.text((horizontal(tick), bottom + 16), _percent_tick(tick), anchor="middle")
    for index, bar in enumerate(shown):
        _draw_bar(canvas, bar, horizontal, y=8 + 24.0 * index, label=label)
    canvas.text(((horizontal(0) + horizontal(1)) / 2, bottom + 36), axis, anchor="middle", color=INK)
    return canvas.markup()


def _draw_bar(canvas: Canvas, bar: Bar, horizontal: Scale, *, y: float, label: float) -> None:
    middle = y + 9
    tip = f"{bar.name}: {bar.value:.1%}, interval {bar.low:.1%} to {bar.high:.1%}"
    canvas.text((label - 4, middle + 4), bar.name, anchor="end", color=INK, max_width=label - 8)
    width = horizontal(bar.value) - horizontal(0)
    canvas.rect((horizontal(0), y + 1), (width, 16), color=ACCENT, opacity=0.8, radius=3, tip=tip)
    low, high = horizontal(bar.low), horizontal(bar.high)
    canvas.line((low, middle), (high, middle), color=INK, width=1.4)
    for end in (low, high):
        canvas.line((end, middle - 4), (end, middle + 4), color=INK, width=1.4)
    canvas.text((790, middle + 4), bar.note)


def phase_curves(phases: Sequence[dict[str, Any]], metric: str) -> list[Curve]:
    """Return the curves of one metric from the contents of `history.json` files.

    The first phase starts from a random head, so its start is left out: it would flatten all that follows.
    A head that was solved for has no epochs; its curve goes over the weight decays that were tried.

    Args:
        phases: What the files of the head and of fine-tuning hold, in that order.
        metric: `accuracy` or `loss`.
    """
    return [
        Curve(
            name=_phase_name(phase),
            train=[_number(epoch.get(f"train_{metric}")) for epoch in phase["epochs"]],
            validation=[_number(epoch.get(f"validation_{metric}")) for epoch in phase["epochs"]],
            start=(phase.get("start") or {}).get(f"validation_{metric}") if number else None,
            best_epoch=phase.get("best_epoch"),
            steps=[f"weight decay {epoch['weight_decay']:g}" for epoch in phase["epochs"]]
            if _is_path(phase)
            else (),
        )
        for number, phase in enumerate(phases)
    ]


def _is_path(phase: dict[str, Any]) -> bool:
    return phase.get("solver") == "lbfgs"


def _phase_name(phase: dict[str, Any]) -> str:
    if _is_path(phase):
        return "head, decay falling"
    names = {"train_head": "head training", "head": "head training", "fine_tune": "fine-tuning"}
    return names.get(phase["phase"], str(phase["phase"]))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
