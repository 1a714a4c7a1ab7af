"""What decoding and resizing of an image costs on one core, beside Pillow.

    taskset -c 1 python -m tools.bench_images --min_scale 0.08

Synthetic photographs (noise with a spectrum of 1/f, 256 x 256 to 500 x 400 pixels, JPEG quality 90)
go through `decode_image` and `random_resized_crop` to 224 pixels in a tf.data pipeline of one
thread. All rows take turns; the figure is the median over the rounds of the processor time of an
image, which other programs on the machine disturb less than the time on the clock.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Callable, Iterator

import numpy as np

SIZE = 224


def photographs(count: int, seed: int = 0) -> list[bytes]:
    """JPEG files of smooth noise in correlated colours."""
    from PIL import Image

    random = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        width, height = int(random.integers(256, 501)), int(random.integers(256, 401))
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        frequency[0, 0] = 1
        layers = []
        for _ in range(3):
            waves = random.standard_normal(frequency.shape) + 1j * random.standard_normal(
                frequency.shape
            )
            layer = np.fft.irfft2(waves / frequency, (height, width))
            layers.append((layer - layer.mean()) / layer.std())
        mixed = np.stack([0.8 * layers[0] + 0.6 * layer for layer in layers], -1)
        stream = io.BytesIO()
        pixels = np.clip(127 + 55 * mixed, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(stream, "jpeg", quality=90)
        files.append(stream.getvalue())
    return files


def through_pillow(files: list[bytes], method: int, min_scale: float) -> Iterator[np.ndarray]:
    """What a worker with Pillow does, without end: decode, cut out, resize."""
    from PIL import Image

    random = np.random.default_rng(0)
    while True:
        for data in files:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            area = image.width * image.height * random.uniform(min_scale, 1)
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            width = min(round(math.sqrt(area * ratio)), image.width)
            height = min(round(math.sqrt(area / ratio)), image.height)
            x = int(random.integers(0, image.width - width + 1))
            y = int(random.integers(0, image.height - height + 1))
            yield np.asarray(image.crop((x, y, x + width, y + height)).resize((SIZE, SIZE), method))


def through_tf(files: list[bytes], make: Callable) -> Iterator[object]:
    """`make` (file, seed) of all files, without end, in one thread."""
    from vlp_jax.data.lazy_tensorflow import import_tensorflow

    tf = import_tensorflow()
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    data = tf.data.Dataset.from_tensor_slices(files).cache().repeat().enumerate()

    def process(number: object, encoded: object) -> object:
        return make(encoded, tf.stack([tf.cast(number, tf.int32), 7]))

    return iter(data.map(tf.autograph.experimental.do_not_convert(process)).with_options(options))


def rows(files: list[bytes], min_scale: float) -> dict[str, Iterator]:
    """Name -> endless images."""
    from vlp_jax.data.lazy_tensorflow import import_tensorflow
    from vlp_jax.data.ops import apply_ops, build_ops

    tf = import_tensorflow()

    def ours(**arguments: object) -> Iterator:
        crop = {"size": SIZE, "min_scale": min_scale, **arguments}
        ops = build_ops({"decode_image": {}, "random_resized_crop": crop})
        return through_tf(
            files, lambda data, seed: apply_ops(ops, {"image": data}, tf.stack([seed] * 2))
        )

    def one_call(kernel: str) -> Callable:
        def make(data: object, seed: object) -> object:
            part = bare(data, seed)
            resized = tf.raw_ops.ScaleAndTranslate(
                images=part[None],
                size=[SIZE, SIZE],
                scale=tf.cast(SIZE / tf.shape(part)[:2], tf.float32),
                translation=[0.0, 0.0],
                kernel_type=kernel,
                antialias=True,
            )[0]
            return tf.cast(tf.clip_by_value(resized + 0.5, 0, 255), tf.uint8)

        return make

    def bare(data: object, seed: object) -> object:
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.zeros([0, 0, 4]),
            seed=seed,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(min_scale, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], extent[:2]], 0)
        return tf.io.decode_and_crop_jpeg(data, window, channels=3, dct_method="INTEGER_ACCURATE")

    return {
        "decoding of the rectangle alone": through_tf(files, bare),
        "bilinear, no antialiasing": ours(method="bilinear", antialias=False),
        "bilinear": ours(method="bilinear"),
        "bicubic": ours(method="bicubic"),
        "lanczos3": ours(method="lanczos3"),
        "bilinear, one ScaleAndTranslate": through_tf(files, one_call("triangle")),
        "bicubic, one ScaleAndTranslate": through_tf(files, one_call("keyscubic")),
        "Pillow, bilinear": through_pillow(files, 2, min_scale),
        "Pillow, bicubic": through_pillow(files, 3, min_scale),
    }


def main() -> None:
    """Prints one line of a Markdown table for each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--min_scale", type=float, default=0.08)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=128)
    arguments = parser.parse_args()
    files = photographs(arguments.images)
    streams = rows(files, arguments.min_scale)
    times: dict[str, list[float]] = {name: [] for name in streams}
    for number in range(arguments.rounds + 1):
        for name, stream in streams.items():
            start = time.process_time()
            for _ in files:
                next(stream)
            if number:
                times[name].append((time.process_time() - start) / len(files) * 1e3)
    pillow = float(np.median(times["Pillow, bilinear"]))
    print("| | ms an image | images/s | times Pillow, bilinear |\n|---|---:|---:|---:|")
    for name, each in times.items():
        cost = float(np.median(each))
        print(f"| {name} | {cost:.2f} | {1e3 / cost:.0f} | {pillow / cost:.2f} |")


if __name__ == "__main__":
    main()
