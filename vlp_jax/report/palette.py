"""Colors of the page, light and dark, by what they are for."""

from __future__ import annotations

from collections.abc import Mapping

# `series-N` tell curves apart, also as text: each is at least 4.5:1 (WCAG 2.1, 1.4.3) on `ground`
# and on `panel`. Their hues are those of Okabe and Ito, "Color universal design" (2008), darkened
# or lightened until they are.
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
SERIES = 6


def declarations(palette: Mapping[str, str]) -> str:
    """CSS custom properties: `--ground: #ffffff; ...`."""
    return " ".join(f"--{name}: {color};" for name, color in palette.items())


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colors "#rrggbb", in [1, 21] (WCAG 2.1, definition)."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(color: str) -> float:
    channels = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
