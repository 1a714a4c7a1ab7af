"""Drawing of scenes: exact area coverage at 8 x 8 samples a pixel, then JPEG."""

from __future__ import annotations

import io
import math

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageChops, ImageDraw

from vlp_jax.data.shapes import scenes

SUPERSAMPLING = 8
JPEG_QUALITY = 92

_LIGHT = np.array([250.0, 250.0, 250.0], np.float32)
_DARK = np.array([18.0, 18.0, 20.0], np.float32)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_CENTERS = (np.arange(scenes.IMAGE_SIZE, dtype=np.float32) + 0.5) / scenes.IMAGE_SIZE - 0.5

Pixels = Float[np.ndarray, "height width 3"]


def encode_jpeg(image: UInt8[np.ndarray, "height width 3"]) -> bytes:
    """JPEG bytes of an RGB picture, without chroma subsampling."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def draw_background(background: scenes.Background, rng: np.random.Generator) -> Pixels:
    """float32 (64, 64, 3), 0 to 255: flat, a linear gradient, or pixel noise."""
    size = scenes.IMAGE_SIZE
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = background.rgb
    if background.style == "gradient":
        slope_x, slope_y = math.cos(background.angle), math.sin(background.angle)
        plane = _CENTERS[None, :] * slope_x + _CENTERS[:, None] * slope_y
        canvas += (2.6 * background.amplitude * plane)[:, :, None]
    elif background.style == "noise":
        grain = rng.standard_normal((size, size, 1), dtype=np.float32)
        canvas += 0.8 * background.amplitude * grain
    return canvas


def coverage(obj: scenes.SceneObject) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """How much of each pixel the object covers.

    Returns:
      (column, row) of the upper left pixel of a window around the object, and two float32 arrays
      (height, width) in [0, 1]: covered by the object at all, and covered by the marks on it
      (stripes or dots; 0 for solid and outlined objects).
    """
    left, top, right, bottom = obj.box
    column, row = max(0, math.floor(left)), max(0, math.floor(top))
    width = min(scenes.IMAGE_SIZE, math.ceil(right)) - column
    height = min(scenes.IMAGE_SIZE, math.ceil(bottom)) - row
    extent = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    # Pillow puts a sample at the integer coordinate; ours lie half a sample further in.
    points = (obj.outline - (column, row)) * SUPERSAMPLING - 0.5
    polygon = [tuple(p) for p in points.tolist()]
    # 8 x 8 samples a pixel, then a mean: exact coverage, the same on every machine.
    body = Image.new("L", extent, 0)
    ImageDraw.Draw(body).polygon(polygon, fill=255)
    marks = Image.new("L", extent, 0)
    if obj.texture == "outlined":
        body = ImageChops.darker(body, _rim(extent, polygon, obj.shape, 1.1 + 0.09 * obj.radius))
    elif obj.texture in ("striped", "dotted"):
        draw = ImageDraw.Draw(marks)
        center = ((obj.x - column) * SUPERSAMPLING, (obj.y - row) * SUPERSAMPLING)
        (_draw_stripes if obj.texture == "striped" else _draw_dots)(draw, center, obj)
        # A rim without marks: the outline stays legible where marks and background are alike.
        inside = ImageChops.subtract(body, _rim(extent, polygon, obj.shape, 1.0))
        marks = ImageChops.darker(marks, inside)
    scale = np.float32(1 / 255)
    return (
        (column, row),
        np.asarray(body.reduce(SUPERSAMPLING), np.float32) * scale,
        np.asarray(marks.reduce(SUPERSAMPLING), np.float32) * scale,
    )


def _rim(
    extent: tuple[int, int], polygon: list[tuple[float, ...]], shape: str, thickness: float
) -> Image.Image:
    """A mask that, inside the polygon, holds what lies within `thickness` pixels of its outline."""
    rim = Image.new("L", extent, 0)
    draw = ImageDraw.Draw(rim)
    reach = thickness * SUPERSAMPLING
    draw.line([*polygon, polygon[0]], fill=255, width=round(2 * reach))
    # The bars of two sides overlap inside the polygon, but for the points where it turns inwards.
    for x, y in (polygon[i] for i in scenes.DENTS[shape]):
        draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill=255)
    return rim


def _draw_stripes(
    draw: ImageDraw.ImageDraw, center: tuple[float, float], obj: scenes.SceneObject
) -> None:
    period = (3.0 + 0.22 * obj.radius) * SUPERSAMPLING
    reach = 1.5 * obj.radius * SUPERSAMPLING
    cos, sin = math.cos(obj.texture_angle), math.sin(obj.texture_angle)
    count = math.ceil(reach / period)
    for k in range(-count, count + 1):
        offset = (k + obj.texture_phase) * period
        x, y = center[0] + offset * cos, center[1] + offset * sin
        ends = [(x - reach * sin, y + reach * cos), (x + reach * sin, y - reach * cos)]
        draw.line(ends, fill=255, width=round(0.42 * period))


def _draw_dots(
    draw: ImageDraw.ImageDraw, center: tuple[float, float], obj: scenes.SceneObject
) -> None:
    spacing = (2.8 + 0.2 * obj.radius) * SUPERSAMPLING
    radius = 0.29 * spacing
    reach = 1.5 * obj.radius * SUPERSAMPLING
    cos, sin = math.cos(obj.texture_angle), math.sin(obj.texture_angle)
    count = math.ceil(reach / spacing)
    for i in range(-count, count + 1):
        for j in range(-count, count + 1):
            # Rows are shifted by half a spacing, like the dots of a fabric.
            u = (i + 0.5 * (j % 2) + obj.texture_phase) * spacing
            v = j * 0.866 * spacing
            x, y = center[0] + u * cos - v * sin, center[1] + u * sin + v * cos
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


def paint(canvas: Pixels, obj: scenes.SceneObject) -> None:
    """Draws the object onto `canvas` (0 to 255) in place."""
    (column, row), body, marks = coverage(obj)
    window = canvas[row : row + body.shape[0], column : column + body.shape[1]]
    rgb = np.asarray(obj.rgb, np.float32)
    # Half-way to white or black: plain to see, and the object keeps its color.
    mark_rgb = 0.5 * rgb + 0.5 * (_LIGHT if rgb @ _LUMA < 135 else _DARK)
    plain = (body - marks)[:, :, None]
    window *= 1 - body[:, :, None]
    window += plain * rgb
    window += marks[:, :, None] * mark_rgb


def quantized(canvas: Pixels) -> UInt8[np.ndarray, "height width 3"]:
    """The canvas rounded to bytes."""
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def render_scene(
    scene: scenes.Scene, rng: np.random.Generator
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture of a scene, uint8 (64, 64, 3). `rng` feeds the noise of the background alone."""
    canvas = draw_background(scene.background, rng)
    for obj in scene.objects:
        paint(canvas, obj)
    return quantized(canvas)
