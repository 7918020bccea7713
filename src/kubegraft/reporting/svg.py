"""A small SVG writer: marks on a canvas, in the colours of `templates/base.html`.

Colours are CSS (`var(--accent)`, `currentColor`), so that one drawing reads well in light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from markupsafe import Markup, escape

from kubegraft.reporting.html import printable

INK: Final = "currentColor"
MUTED: Final = "var(--muted)"
LINE: Final = "var(--line)"
ACCENT: Final = "var(--accent)"
SECOND: Final = "var(--second)"
THIRD: Final = "var(--third)"
_CHARACTER_WIDTH: Final = 0.56  # of the font size; a fair mean for sans-serif text


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map of `[low, high]` onto pixels from `start` to `end`; `end` may be the smaller (upwards)."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of `value`."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


class Canvas:
    """Collects marks; coordinates are in pixels from the upper left corner."""

    def __init__(self, width: float, height: float, title: str) -> None:
        """Start an empty drawing; `title` is what a screen reader says."""
        self.width, self.height = width, height
        self._title = title
        self._marks: list[Markup] = []

    def line(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        *,
        color: str = LINE,
        width: float = 1,
        dashes: str = "none",
    ) -> None:
        """Draw a straight line; `dashes` as in SVG, for example `4 4`."""
        style = f"stroke:{color};stroke-width:{width:g};stroke-dasharray:{dashes}"
        self._add("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], style=style)

    def polyline(self, points: Sequence[tuple[float, float]], *, color: str, dashes: str = "none") -> None:
        """Draw a line through all points."""
        style = f"fill:none;stroke:{color};stroke-width:2;stroke-linejoin:round;stroke-dasharray:{dashes}"
        self._add("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), style=style)

    def rect(
        self,
        corner: tuple[float, float],
        size: tuple[float, float],
        *,
        color: str,
        opacity: float = 1,
        radius: float = 0,
        tip: str = "",
    ) -> None:
        """Fill a rectangle; `tip` is shown when the mouse rests on it."""
        style = f"fill:{color};fill-opacity:{opacity:.3g}"
        self._add(
            "rect", tip, x=corner[0], y=corner[1], width=size[0], height=size[1], rx=radius, style=style
        )

    def circle(
        self, centre: tuple[float, float], radius: float, *, color: str, hollow: bool = False, tip: str = ""
    ) -> None:
        """Draw a dot, or a ring that hides what is below it."""
        style = f"fill:{'var(--card)' if hollow else color};stroke:{color};stroke-width:2"
        self._add("circle", tip, cx=centre[0], cy=centre[1], r=radius, style=style)

    def text(
        self,
        position: tuple[float, float],
        words: str,
        *,
        anchor: str = "start",
        size: float = 12,
        color: str = MUTED,
        max_width: float | None = None,
        weight: int = 400,
        angle: float = 0,
    ) -> None:
        """Write `words` with their baseline at `position`, cut to `max_width` pixels.

        Args:
            position: Where the text starts, is centred or ends, by `anchor`.
            words: Any text; it is escaped.
            anchor: `start`, `middle` or `end`.
            size: Font size in pixels.
            color: CSS colour.
            max_width: Longer text ends in an ellipsis and shows itself whole under the mouse.
            weight: CSS font weight.
            angle: Degrees, clockwise, around `position`.
        """
        x, y = position
        words = printable(words)
        shown = shortened(words, max_width, size)
        turn = {"transform": f"rotate({angle:g} {x:.1f} {y:.1f})"} if angle else {}
        style = f"font-size:{size:g}px;fill:{color};font-weight:{weight};text-anchor:{anchor}"
        tip = Markup("<title>{}</title>").format(words) if shown != words else Markup()
        body = tip + escape(shown)
        self._marks.append(
            Markup("<text{}>{}</text>").format(_attributes(x=x, y=y, **turn, style=style), body)
        )

    def markup(self) -> Markup:
        """Return the drawing as an `<svg>` element."""
        frame = Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" role="img"><title>{}</title>{}</svg>'
        )
        size = (f"{self.width:g}", f"{self.height:g}")
        return frame.format(*size, printable(self._title), Markup("\n").join(self._marks))

    def _add(self, tag: str, tip: str = "", **attributes: Any) -> None:
        inside = Markup("<title>{}</title>").format(printable(tip)) if tip else Markup()
        self._marks.append(Markup("<{0}{1}>{2}</{0}>").format(tag, _attributes(**attributes), inside))


def _attributes(**values: Any) -> Markup:
    shown = {
        name: f"{value:.1f}" if isinstance(value, float) else str(value) for name, value in values.items()
    }
    return Markup().join(Markup(' {}="{}"').format(name, value) for name, value in shown.items())


def text_width(words: str, size: float = 12) -> float:
    """Return about how many pixels `words` take."""
    return len(words) * size * _CHARACTER_WIDTH


def shortened(words: str, max_width: float | None, size: float = 12) -> str:
    """Return `words`, cut with an ellipsis if they are wider than `max_width` pixels."""
    if max_width is None or text_width(words, size) <= max_width:
        return words
    return words[: max(int(max_width / (size * _CHARACTER_WIDTH)) - 1, 1)] + "…"


def ticks(low: float, high: float, num_ticks: int = 5) -> list[float]:
    """Return round numbers in `[low, high]`, about `num_ticks` of them; `[low]` for an empty interval."""
    if high <= low:
        return [low]
    step = _round_step((high - low) / max(num_ticks, 1))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.7 * rough)
