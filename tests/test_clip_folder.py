"""A folder of files as people have them: JPEG and PNG, of any size, grey, with alpha, Unicode."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlp_jax import train
from vlp_jax.observe.jsonl import read_metrics

CONFIG = str(Path(__file__).resolve().parent.parent / "configs" / "clip_folder.py")
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 80, 230),
    "yellow": (245, 225, 40),
    "noir": (15, 15, 15),
    "blanc": (245, 245, 245),
    "gray": (128, 128, 128),
    "violett": (150, 50, 200),
}
MODES = ("RGB", "RGB", "RGB", "L", "RGBA", "LA")


def picture(path: Path, width: int, top: str, bottom: str, mode: str, seed: int) -> None:
    """A noisy picture of two colors, one above the other, 0.25 to 1.2 times as high as wide."""
    rng = np.random.default_rng(seed)
    height = min(4000, max(20, int(width * rng.uniform(0.25, 1.2))))
    small = np.zeros((8, 8, 3))
    small[:4], small[4:] = COLORS[top], COLORS[bottom]
    small = np.clip(small + rng.normal(0, 12, small.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.new("L", image.size, 200 + seed % 56))
    image = image.convert(mode)
    options = {"quality": 90} if path.suffix == ".jpg" else {"compress_level": 1}
    image.save(path, **options)


def make_folder(folder: Path, count: int, widths: tuple[int, int]) -> None:
    """`count` pictures with widths from `widths[0]` to `widths[1]`, and captions.csv."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [("path", "caption")]
    for number in range(count):
        mode = MODES[number % len(MODES)]
        top, bottom = rng.choice(list(COLORS), 2)
        width = int(np.exp(rng.uniform(*np.log(widths))))
        width = {0: widths[0], 1: widths[1]}.get(number, width)
        suffix = ".png" if mode in ("RGBA", "LA") or number % 4 == 0 else ".jpg"
        name = ("图片", "bild", "été", "фото")[number % 4] + f" {number}{suffix}"
        picture(folder / name, width, top, bottom, mode, number)
        rows.append((name, f"{top} über {bottom} 🌊 №{number % 7}, «{mode}»"))
    with open(folder / "captions.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(rows)


def run(folder: Path, workdir: Path, size: int, *overrides: str) -> dict[str, float]:
    """Trains on the folder; the scores of the last step."""
    arguments = ["--config", f"{CONFIG}:{size}", "--workdir", str(workdir)]
    assert train.main([*arguments, f"--config.data.path={folder}", *overrides]) == 0
    scores = {}
    for record in read_metrics(workdir / "metrics.jsonl"):
        scores.update({k: v for k, v in record.items() if k.startswith("eval/")})
    return scores


@pytest.mark.slow
def test_a_folder_of_pictures_trains_and_is_evaluated(tmp_path):
    folder = tmp_path / "bilder für alle"
    make_folder(folder, 60, (40, 800))
    tower = {"width": 32, "heads": 2, "depth": 1}
    small = [f"--config.objective.{t}.{k}={v}" for t in ("image", "text") for k, v in tower.items()]
    steps = ["--config.duration.epochs=None", "--config.duration.steps=3"]
    scores = run(folder, tmp_path / "run", 32, *small, *steps, "--config.batch_size=16")
    assert 0 < scores["eval/retrieval/pairs"] < 20


@pytest.mark.slow
def test_two_thousand_files_up_to_4000_pixels_teach_colors(tmp_path):
    folder = tmp_path / "bilder für alle"
    make_folder(folder, 2000, (40, 4000))
    scores = run(folder, tmp_path / "run", 64, "--config.duration.epochs=3.0")
    print(scores)
    assert 150 < scores["eval/retrieval/pairs"] < 250  # a tenth, never trained on
    # Captions differ in more than can be seen, so that the best possible R@1 is far from 1.
    assert scores["eval/retrieval/image_to_text_r10"] > 0.3
    assert scores["eval/retrieval/chance_r1"] < 0.007
