"""PNG files of what `vlp_jax.inspection` finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlp_jax.inspection.overlay import overlay
from vlp_jax.observe.plots import CURVE_COLORS, INK, PALE, WRONG, new_figure, save_figure
from vlp_jax.observe.text_layout import LINE_SPACING, Colored, TextFitter

Image = UInt8[np.ndarray, "height width 3"]

_GAP, _TOP, _LEAST_WIDTH = 0.12, 0.62, 5.0  # inches
_FONT = 7.0  # points
_MARKERS = "os^*Pv"  # a shape each, so that colors are not all that tells groups apart
_MOST_GROUPS = 12
LEGEND = "dark: least, yellow: most"  # what the colors of a map mean, for a subtitle


def draw_heat_maps(
    path: epath.PathLike,
    image: Image,
    maps: Sequence[Float[np.ndarray, "height width"]],
    captions: Sequence[str],
    *,
    title: str,
    subtitle: str,
) -> None:
    """Writes a PNG: the image, then each map over it, with a cross at its peak.

    Args:
      path: the PNG; its directory is made.
      maps: in [0, 1], as `heat_map` gives them.
      captions: what stands under each.

    Raises:
      ValueError: no map, or another number of captions.
    """
    if not len(maps) or len(maps) != len(captions):
        raise ValueError(f"{len(maps)} maps and {len(captions)} captions cannot be drawn")
    panels = [image, *(overlay(image, heat) for heat in maps)]
    peaks = [None, *(np.unravel_index(heat.argmax(), heat.shape) for heat in maps)]
    figure, cells = _grid(panels, ["the image", *captions], title, subtitle, across=5, side=1.5)
    for axes, peak in zip(cells, peaks):
        if peak is not None:
            y, x = peak
            axes.plot(x, y, marker="x", markersize=8, color="white", markeredgewidth=3.2)
            axes.plot(x, y, marker="x", markersize=7, color=WRONG, markeredgewidth=1.6)
    save_figure(figure, path)


def draw_attention(
    path: epath.PathLike,
    image: Image,
    maps: Float[np.ndarray, "layers heads rows columns"],
    *,
    title: str,
    subtitle: str,
    captions: Sequence[str] | None = None,
) -> None:
    """Writes a PNG with a row for each layer and a column for each head: where it looks.

    Each map is drawn between its own least and largest weight; the latter stands beneath it.

    Args:
      path: the PNG; its directory is made.
      maps: weights of the patches.
      captions: of all maps, layer by layer; default: layer, head and the largest weight.

    Raises:
      ValueError: the maps have another number of dimensions.
    """
    if maps.ndim != 4:
        raise ValueError(f"maps are [layers, heads, rows, columns], not {list(maps.shape)}")
    captions = captions or [
        f"layer {layer + 1}, head {head + 1}: up to {heat.max():.3f}"
        for layer, of_layer in enumerate(maps)
        for head, heat in enumerate(of_layer)
    ]
    panels = [overlay(image, _scaled(heat)) for heat in maps.reshape(-1, *maps.shape[2:])]
    figure, _ = _grid(panels, captions, title, subtitle, across=maps.shape[1], side=1.45)
    save_figure(figure, path)


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

    Args:
      path: the PNG; its directory is made.
      heat: at least 0; it is drawn as a share of its largest value.
      words, scores: of the text's tokens; scores are drawn as shares of their sum.

    Raises:
      ValueError: no word, or another number of scores.
    """
    if not len(words) or len(words) != len(scores):
        raise ValueError(f"{len(words)} words and {len(scores)} scores cannot be drawn")
    side, row = 1.7, 0.19
    text_height = max(row * len(words), 0.6)
    width, height = 7.2, _TOP + max(side, text_height) + 0.42
    figure = new_figure((width, height))
    _titles(figure, title, subtitle)
    panels = (("the image", image), ("relevance of its patches", overlay(image, _scaled(heat))))
    for place, (name, panel) in enumerate(panels):
        left = _GAP + place * (side + _GAP)
        axes = _box(figure, left, height - _TOP - side, side, side)
        _show(axes, panel)
        figure.text(
            left / width, (height - _TOP - side - 0.15) / height, name, fontsize=_FONT, color=INK
        )
    left = 2 * (side + _GAP) + 1.25
    axes = _box(figure, left, height - _TOP - text_height, width - left - 0.55, text_height)
    shares = np.asarray(scores, float) / max(float(np.sum(scores)), 1e-12)
    axes.barh(np.arange(len(words)), shares, color=CURVE_COLORS[0], height=0.7)
    for place, share in enumerate(shares):
        axes.text(share, place, f" {share:.0%}", fontsize=_FONT - 0.5, va="center", color=INK)
    labels = [word if len(word) <= 18 else f"{word[:17]}…" for word in words]
    axes.set_yticks(np.arange(len(words)), labels, fontsize=_FONT, parse_math=False)
    axes.set_ylim(len(words) - 0.5, -0.5)
    axes.set_xlim(0, max(1.15 * shares.max(), 1e-6))
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("share of the relevance of all tokens", fontsize=_FONT, color=INK)
    save_figure(figure, path)


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

    Args:
      path: the PNG; its directory is made.
      neighbours, captions: of each query, best first.

    Raises:
      ValueError: no query, or another number of rows.
    """
    if not len(queries) or not len(queries) == len(neighbours) == len(captions):
        raise ValueError(f"{len(queries)} queries and {len(neighbours)} rows cannot be drawn")
    panels, texts = [], []
    for query, found, names in zip(queries, neighbours, captions):
        panels += [query, *found]
        texts += ["" if isinstance(query, str) else "the query", *names]
    across = 1 + max(map(len, neighbours))
    figure, _ = _grid(panels, texts, title, subtitle, across=across, side=1.05)
    save_figure(figure, path)


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

    Args:
      path: the PNG; its directory is made.
      groups: of each point; of more than 12 the smallest are drawn as one, "others".
      colors: of groups; default: colors that are told apart with any kind of color vision.

    Raises:
      ValueError: no point, or another number of groups.
    """
    if not len(points) or len(points) != len(groups):
        raise ValueError(f"{len(points)} points and {len(groups)} groups cannot be drawn")
    names, counts = np.unique(np.asarray(groups), return_counts=True)
    many = len(names) > _MOST_GROUPS
    kept = sorted(names[np.argsort(-counts, kind="stable")][: _MOST_GROUPS - many])
    kept += ["others"] if many else []
    member = np.array([name if name in kept else "others" for name in groups])
    figure = new_figure((6.2, 4.9))
    _titles(figure, title, subtitle)
    axes = figure.add_axes((0.03, 0.03, 0.74, 0.82))
    for number, name in enumerate(kept):
        chosen = points[member == name]
        axes.scatter(
            *chosen.T,
            s=16,
            marker=_MARKERS[number % len(_MARKERS)],
            color=(colors or {}).get(name, CURVE_COLORS[number % len(CURVE_COLORS)]),
            edgecolors=INK,
            linewidths=0.3,
            alpha=0.85,
            label=f"{name} ({len(chosen):,})",
        )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=PALE, linewidth=0.6)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=_FONT + 0.5)
    save_figure(figure, path)


def _grid(
    panels: Sequence[Image | str],
    captions: Sequence[str],
    title: str,
    subtitle: str,
    *,
    across: int,
    side: float,
) -> tuple[Figure, list[Axes]]:
    """Pictures in rows, with their captions beneath, wrapped; and the axes of each."""
    across = min(across, len(panels))
    fitter = TextFitter(new_figure((1, 1)))
    lines = [
        fitter.lay_out([Colored(text, INK)], _FONT, side, 0.6)[0] if text else []
        for text in captions
    ]
    line = _FONT * LINE_SPACING / 72
    text_height = (max(map(len, lines)) + 0.7) * line
    down = -(-len(panels) // across)
    width = max(across * (side + _GAP) + _GAP, _LEAST_WIDTH)
    height = down * (side + text_height + 0.05) + _TOP + 0.05
    figure, cells = new_figure((width, height)), []
    _titles(figure, title, subtitle)
    for index, panel in enumerate(panels):
        row, column = divmod(index, across)
        left = _GAP + column * (side + _GAP)
        bottom = height - _TOP - side - row * (side + text_height + 0.05)
        axes = _box(figure, left, bottom, side, side)
        cells.append(axes)
        if isinstance(panel, str):
            _write(axes, fitter, panel, side)
        else:
            _show(axes, panel)
        for number, text in enumerate(lines[index]):
            y = bottom - 0.04 - (number + 0.8) * line
            x = left / width
            figure.text(x, y / height, text.text, fontsize=_FONT, color=INK, parse_math=False)
    return figure, cells


def _write(axes: Axes, fitter: TextFitter, text: str, side: float) -> None:
    """A text in the place of a picture."""
    axes.set_axis_off()
    lines, _ = fitter.lay_out([Colored(f"“{text}”", INK)], 9, 0.94 * side, side)
    axes.text(
        0.03,
        0.5,
        "\n".join(line.text for line in lines),
        fontsize=9,
        color=INK,
        va="center",
        transform=axes.transAxes,
        parse_math=False,
    )


def _show(axes: Axes, image: Image) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=PALE, linewidth=0.5)


def _box(figure: Figure, left: float, bottom: float, across: float, up: float) -> Axes:
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, bottom / height, across / width, up / height))


def _scaled(heat: np.ndarray) -> np.ndarray:
    """Between 0 and 1, by its own least and largest value."""
    low, high = float(heat.min()), float(heat.max())
    return (heat - low) / (high - low) if high > low else np.zeros_like(heat)


def _titles(figure: Figure, title: str, subtitle: str) -> None:
    width, height = figure.get_size_inches()
    fitter = TextFitter(figure)
    for text, sizes, weight, color, drop in (
        (title, (10.5, 9.5, 8.5, 7.5, 6.5), "bold", INK, 0.09),
        (subtitle, (7.5, 7, 6.5, 6, 5.5, 5), "normal", PALE, 0.32),
    ):
        size = fitter.largest_size(text, width - 2 * _GAP, sizes, weight)
        figure.text(
            _GAP / width,
            1 - drop / height,
            text,
            fontsize=size,
            color=color,
            va="top",
            weight=weight,
            parse_math=False,
        )
