"""Numbers as text."""

from __future__ import annotations

import math
import re

# Names of scores in [0, 1] that are shares.
_SHARES = re.compile(
    r"(^|_)(top\d+|r\d+|recall|accuracy|chance|fraction|share|named|different)(_|$)|calibration"
)


def is_share(name: str) -> bool:
    """Whether a score of this name is shown in percent."""
    return bool(_SHARES.search(name.rpartition("/")[2]))


def percent(value: float, digits: int = 1) -> str:
    """Writes a share in percent: 0.956 -> "95.6 %"."""
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%" if math.isfinite(value) else str(value)


def score_text(name: str, value: float) -> str:
    """Writes a score."""
    return percent(value) if is_share(name) else plain(value)


def difference_text(name: str, value: float) -> str:
    """Writes a difference of two scores with its sign; shares in percentage points."""
    points = f"{100 * value:+.1f}\N{NO-BREAK SPACE}points"
    text = points if is_share(name) else f"{value:+.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def plain(value: float) -> str:
    """Writes a number with at most four significant digits and separated thousands."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def seconds_text(seconds: float) -> str:
    """Writes seconds: 75 -> "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"
