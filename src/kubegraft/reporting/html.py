"""HTML reports: one self-contained page each, with no script and nothing loaded from elsewhere.

Templates are in `templates/`; each extends `base.html`, which has the layout, the colours of light and dark,
and the macros of `parts.html`. Everything a template shows is escaped, file names above all.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, Final

from kubegraft import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

# Control characters, and the marks that turn the reading direction: a file name may hold any of them.
_UNPRINTABLE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def render(template: str, **context: Any) -> str:
    """Return the page that `template` makes of `context`.

    Args:
        template: File name in `templates/`, for example `dataset.html`.
        context: What the template names; a name that is missing is an error. Strings are escaped, except
            `markupsafe.Markup`, which `kubegraft.reporting.plots` returns.

    Returns:
        A whole HTML document that encodes to UTF-8, whatever bytes the file names were made of.
    """
    page = _environment().get_template(template).render(version=__version__, **context)
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def printable(text: str) -> str:
    r"""Return `text` with what can't be shown written out, so that a byte that is no UTF-8 reads `\xff`."""
    try:
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def percent(fraction: float | None, digits: int = 1) -> str:
    """Return a fraction in [0, 1] as a percentage with a no-break space, or a dash for None."""
    return "\u2013" if fraction is None else f"{100 * fraction:.{digits}f}\u00a0%"


def count(number: float) -> str:
    """Return a whole number with thin spaces between its thousands."""
    return f"{round(number):,}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """Return `1 h 02 min`, `3 min 05 s` or `4.2 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kubegraft.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, count=count, duration=duration)
    return environment


def _finalize(value: Any) -> Any:
    """Make plain strings printable; markup and numbers pass."""
    return printable(value) if type(value) is str else value
