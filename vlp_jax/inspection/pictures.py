"""PNG files of the results of `vlp_jax.inspection`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from vlp_jax.inspection.heat_maps import overlay
from vlp_jax.observe import charts
from vlp_jax.observe.palette import INK, PALE, SERIES
from vlp_jax.observe.sheet import FONT, GAP, TOP, Image, Sheet, picture_grid

_CROSS = "#d55e00"  # orange of Okabe and Ito: the colors of a map have no orange
_MARKERS = "os^*Pv"  # shapes tell groups apart where colors do not
_MOST_GROUPS = 12
LEGEND = "dark: least, yellow: most"  # of the colors of a map, for a subtitle


def draw_heat_maps(
    path: epath.PathLike,
    image: Image,
    maps: Sequence[Float[np.ndarray, "height width"]],
    captions: Sequence[str],
    *,
    title: str,
    subtitle: str,
) -> None:
    """Writes a PNG: the image, then each map in [0, 1] over it, with a cross at its peak.

    Raises ValueError for no map, or another number of captions.
    """
    if not len(maps) or len(maps) != len(captions):
        raise ValueError(f"{len(maps)} maps and {len(captions)} captions cannot be drawn")
    panels = [image, *(overlay(image, heat) for heat in maps)]
    peaks = [None, *(np.unravel_index(heat.argmax(), heat.shape) for heat in maps)]
    captions = ["the image", *captions]
    sheet, cells = picture_grid(panels, captions, title, subtitle, across=5, side=1.5)
    for axes, peak in zip(cells, peaks):
        if peak is not None:
            y, x = peak
            axes.plot(x, y, marker="x", markersize=8, color="white", markeredgewidth=3.2)
            axes.plot(x, y, marker="x", markersize=7, color=_CROSS, markeredgewidth=1.6)
    sheet.save(path)


def draw_attention(
    path: epath.PathLike,
    image: Image,
    maps: Float[np.ndarray, "layers heads rows columns"],
    *,
    title: str,
    subtitle: str,
    captions: Sequence[str] | None = None,
) -> None:
    """Writes a PNG of attention to the patches, a row for each layer and a column for each head.

    Each map is drawn between its own least and largest weight. `captions` stand under all maps,
    layer by layer; the default is layer, head and the largest weight.
    """
    if maps.ndim != 4:
        raise ValueError(f"maps are [layers, heads, rows, columns], not {list(maps.shape)}")
    captions = captions or [
        f"layer {layer + 1}, head {head + 1}: up to {heat.max():.3f}"
        for layer, of_layer in enumerate(maps)
        for head, heat in enumerate(of_layer)
    ]
    panels = [overlay(image, _scaled(heat)) for heat in maps.reshape(-1, *maps.shape[2:])]
    layout = {"across": maps.shape[1], "side": 1.45}
    picture_grid(panels, captions, title, subtitle, **layout)[0].save(path)


def draw_relevance(
    path: epath.PathLike,
    image: Image,
    heat: Float[np.ndarray, "rows columns"],
    words: Sequence[str],
    scores: Float[np.ndarray, " words"],
    *,
    title: str,
    subtitle: str,
) -> None:
    """Writes a PNG: the image, the relevance of its patches over it, and a bar for each token.

    Relevance (>= 0) is drawn as a share of its largest value, scores as shares of their sum. Raises
    ValueError for no word, or another number of scores.
    """
    if not len(words) or len(words) != len(scores):
        raise ValueError(f"{len(words)} words and {len(scores)} scores cannot be drawn")
    # Inches: a row for each word beside the two pictures.
    side, height = 1.7, max(0.19 * len(words), 0.6)
    sheet = Sheet(7.2, TOP + max(side, height) + 0.42, title, subtitle)
    panels = (("the image", image), ("relevance of its patches", overlay(image, _scaled(heat))))
    for place, (name, panel) in enumerate(panels):
        left = GAP + place * (side + GAP)
        sheet.picture(panel, left, TOP, side)
        sheet.text(left, TOP + side + 0.15, name, FONT)
    left = 2 * (side + GAP) + 1.25
    axes = sheet.axes(left, TOP, sheet.width - left - 0.55, height)
    shares = np.asarray(scores, float) / max(float(np.sum(scores)), 1e-12)
    # The same word may occur twice, so bars are named by their places first.
    charts.bars(axes, dict(enumerate(shares)), [f"{share:.0%}" for share in shares], FONT)
    labels = [word if len(word) <= 18 else f"{word[:17]}…" for word in words]
    axes.set_yticks(range(len(words)), labels, parse_math=False)
    axes.set_xlabel("share of the relevance of all tokens")
    sheet.save(path)


def draw_neighbours(
    path: epath.PathLike,
    queries: Sequence[Image | str],
    neighbours: Sequence[Sequence[Image]],
    captions: Sequence[Sequence[str]],
    *,
    title: str,
    subtitle: str,
) -> None:
    """Writes a PNG with a row for each query, an image or a text, and its neighbours beside it.

    Neighbours and captions come best first. Raises ValueError for no query, or other numbers.
    """
    if not len(queries) or not len(queries) == len(neighbours) == len(captions):
        raise ValueError(f"{len(queries)} queries and {len(neighbours)} rows cannot be drawn")
    panels, texts = [], []  # row by row, the query first
    for query, found, names in zip(queries, neighbours, captions):
        panels += [query, *found]
        texts += ["" if isinstance(query, str) else "the query", *names]
    across = 1 + max(map(len, neighbours))
    picture_grid(panels, texts, title, subtitle, across=across, side=1.05)[0].save(path)


def draw_projection(
    path: epath.PathLike,
    points: Float[np.ndarray, "n 2"],
    groups: Sequence[str],
    *,
    title: str,
    subtitle: str,
    colors: Mapping[str, str] | None = None,
) -> None:
    """Writes a PNG with a point for each embedding; groups differ in color and in shape.

    Of more than 12 groups the smallest are drawn as "others". Raises ValueError for no point, or
    another number of groups.
    """
    if not len(points) or len(points) != len(groups):
        raise ValueError(f"{len(points)} points and {len(groups)} groups cannot be drawn")
    names, counts = np.unique(np.asarray(groups), return_counts=True)
    # One place is needed for "others".
    many = len(names) > _MOST_GROUPS
    kept = sorted(names[np.argsort(-counts, kind="stable")][: _MOST_GROUPS - many])
    kept += ["others"] if many else []
    member = np.array([name if name in kept else "others" for name in groups])
    sheet = Sheet(6.2, 4.9, title, subtitle)
    axes = sheet.axes(0.19, 0.74, 4.59, 4.02)
    for number, name in enumerate(kept):
        chosen = points[member == name]
        axes.scatter(
            *chosen.T,
            s=16,
            marker=_MARKERS[(number + number // len(SERIES)) % len(_MARKERS)],
            color=(colors or {}).get(name, SERIES[number % len(SERIES)]),
            edgecolors=INK,
            linewidths=0.3,
            alpha=0.85,
            label=f"{name} ({len(chosen):,})",
        )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=PALE, linewidth=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=FONT + 0.5)
    sheet.save(path)


def _scaled(heat: np.ndarray) -> np.ndarray:
    """Scales a map to [0, 1] by its own least and largest value."""
    low, high = float(heat.min()), float(heat.max())
    return (heat - low) / (high - low) if high > low else np.zeros_like(heat)
