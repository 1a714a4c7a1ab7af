"""Colors of pages and pictures by purpose, for a light and for a dark ground."""

from __future__ import annotations

from collections.abc import Mapping

# Every color but `line` is text somewhere, so each has a contrast of at least 4.5:1 (WCAG 2.1,
# 1.4.3) with `ground` and with `panel`. The hues of `series-N` come from Okabe and Ito, "Color
# universal design" (2008), which any kind of color vision tells apart; they are darkened or
# lightened until the contrast is reached.
LIGHT: Mapping[str, str] = {
    "ground": "#ffffff",
    "panel": "#f5f6f8",
    "ink": "#1b1f24",
    "pale": "#545d68",
    "line": "#d3d8de",
    "accent": "#0b5fa5",
    "good": "#0f6b33",
    "bad": "#a8200d",
    "series-0": "#0067a5",
    "series-1": "#ab4200",
    "series-2": "#00724f",
    "series-3": "#94368a",
    "series-4": "#735600",
    "series-5": "#46505a",
}
DARK: Mapping[str, str] = {
    "ground": "#0f1318",
    "panel": "#181d24",
    "ink": "#e7ecf2",
    "pale": "#a3adb8",
    "line": "#3a424c",
    "accent": "#74b9ff",
    "good": "#5bd37b",
    "bad": "#ff9586",
    "series-0": "#62adff",
    "series-1": "#ff9f5f",
    "series-2": "#4cc792",
    "series-3": "#e59bda",
    "series-4": "#e3b84a",
    "series-5": "#b1bbc6",
}
# Charts are drawn in the light colors; `report.charts` makes them classes that follow the page.
INK, PALE, LINE, GROUND = (LIGHT[name] for name in ("ink", "pale", "line", "ground"))
ACCENT, BAD = LIGHT["accent"], LIGHT["bad"]
SERIES = tuple(color for name, color in LIGHT.items() if name.startswith("series-"))


def declarations(palette: Mapping[str, str]) -> str:
    """CSS custom properties of a palette: `--ground: #ffffff; ...`."""
    return " ".join(f"--{name}: {color};" for name, color in palette.items())
