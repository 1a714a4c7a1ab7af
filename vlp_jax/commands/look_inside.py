"""Draws where a trained model looks in an image, and which regions answer a text.

    vlp-jax look-inside --workdir demo/run --image scene.png --text "a red circle" \\
        --text "a blue star" --output looks
    vlp-jax look-inside --weights hf:models/clip --image cat.jpg --text "a cat"

Writes into --output:
  heat_maps.png      each text's heat map over the image, with its peak
  relevance_N.png    of text N: which patches and which tokens make the pair similar
  attention.png      every layer and head of the image tower: how much each patch is looked at
  rollout.png        the same of all layers together
  neighbours.png     with --neighbours: the most similar images to the image and to each text
  projection.png     with --projection: the embeddings of these images on a plane
The last two look among the images in the folder --among, or among scenes of the embedded dataset.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from jaxtyping import Float

import vlp_jax
from vlp_jax.arguments import make_parser
from vlp_jax.data.shapes import records, vocabulary
from vlp_jax.encoders import Encoder
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.inspection import (
    attention_maps,
    embeddings,
    heat_map,
    image_rollout,
    nearest,
    pictures,
    project,
    relevance,
    token_strings,
)
from vlp_jax.inspection.heat_maps import METHODS
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.parallel import startup
from vlp_jax.training.command import run_command

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
PROJECTIONS = {"pca": "PCA", "tsne": "t-SNE"}
# Of the embedded dataset, a point in a projection has the color of its object.
SCENE_COLORS = {
    **{"red": "#d62728", "orange": "#ff9f1c", "yellow": "#f2e205", "green": "#2ca02c"},
    **{"cyan": "#17d4d4", "blue": "#1f5fd6", "purple": "#8338ec", "pink": "#ff8fc7"},
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments; raises UserError if they do not fit each other."""
    parser = make_parser("vlp-jax look-inside", __doc__)
    add = parser.add_argument
    add("--workdir", metavar="DIR", help="folder of a run")
    add("--step", type=int, metavar="N", help="which of its checkpoints; default: the newest")
    add("--weights", metavar="FORMAT:PATH", help="files of others instead, such as hf:DIR")
    add("--image", type=Path, metavar="FILE", required=True, help="any size and format")
    add("--text", action="append", default=[], metavar="T", help="may be given several times")
    add("--method", default="windows", metavar="NAME", help=f"heat maps: {', '.join(METHODS)}")
    add("--against", action="append", default=[], metavar="T", help="texts that maps go against")
    add("--neighbours", type=int, default=0, metavar="K", help="how many of the most similar")
    add("--projection", metavar="METHOD", help=" or ".join(embeddings.METHODS))
    add("--among", type=Path, metavar="DIR", help="images for these two, with subfolders")
    add("--limit", type=int, default=500, metavar="N", help="at most so many; default: 500")
    add("--output", type=Path, default=Path("looks"), metavar="DIR", help="default: looks")
    arguments = parser.parse_args(argv)
    if (arguments.workdir is None) == (arguments.weights is None):
        raise UserError("name one model: --workdir DIR of a run, or --weights FORMAT:PATH")
    if arguments.method not in METHODS:
        raise UserError(unknown_key_message(arguments.method, METHODS, "--method"))
    projection, known = arguments.projection, embeddings.METHODS
    if projection is not None and projection not in known:
        raise UserError(unknown_key_message(projection, known, "--projection"))
    if arguments.method == "relevance" and arguments.against:
        raise UserError("--method relevance has nothing to go --against; choose another method")
    if arguments.neighbours < 0 or arguments.limit < 3:
        raise UserError("--neighbours must be at least 0, and --limit at least 3")
    return arguments


@dataclasses.dataclass(frozen=True)
class Collection:
    """Images among which neighbours are sought: pixels, names, and the group of each."""

    pixels: np.ndarray
    names: list[str]
    groups: list[str]
    what: str


def collect(encoder: Encoder, folder: Path | None, limit: int) -> Collection:
    """Reads the images of a folder, a group for each subfolder; without one, test scenes.

    Raises:
      UserError: the folder holds fewer than 3 images, or one that cannot be read.
    """
    if folder is None:
        # Scenes of one object: a neighbour is then right or wrong by its label.
        stream = records.stream_records(records.SPECS["default"], "test", 0)
        found = list(itertools.islice((r for r in stream if r["num_objects"] == 1), limit))
        pixels = [encoder.images(record["image"], record["id"]) for record in found]
        labels = [record["label"] for record in found]
        groups = [label.split()[0] for label in labels]
        what = f"{len(found):,} test scenes of one object"
        return Collection(np.stack(pixels), labels, groups, what)
    if not folder.is_dir():
        raise UserError(f"--among {folder} is no folder")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if len(files) < 3:
        raise UserError(f"--among {folder} holds {len(files)} images; at least 3 are needed")
    files = files[:limit]
    return Collection(
        np.stack([encoder.images(file) for file in files]),
        [str(file.relative_to(folder)) for file in files],
        [file.relative_to(folder).parts[0] if file.parent != folder else "." for file in files],
        f"{len(files):,} images of {folder}",
    )


def draw_texts(
    encoder: Encoder, pixels: np.ndarray, arguments: argparse.Namespace, similarity: np.ndarray
) -> list[Path]:
    """Draws heat maps of all texts, and the relevance of each; returns the files."""
    texts, output = arguments.text, arguments.output
    tokens = encoder.texts(texts)
    images = np.repeat(pixels[None], len(texts), axis=0)
    against = encoder.embed_text(arguments.against) if arguments.against else None
    maps = heat_map(
        encoder.module, encoder.params, images, tokens, method=arguments.method, against=against
    )
    contrast = f", against {len(arguments.against)} texts" if arguments.against else ""
    pictures.draw_heat_maps(
        output / "heat_maps.png",
        pixels,
        maps,
        [f"“{text}”, similarity {value:.2f}" for text, value in zip(texts, similarity)],
        title="Which region answers the text",
        subtitle=f"{encoder.source}; method {arguments.method}{contrast}; {pictures.LEGEND}; "
        "a cross at the peak",
    )
    written = [output / "heat_maps.png"]
    found = relevance(encoder.module, encoder.params, images, tokens)
    # Relevance of texts comes with `relevance`; for the image it is one more method of maps.
    relevant = heat_map(encoder.module, encoder.params, images, tokens, method="relevance")
    tower = encoder.module.text
    for number, text in enumerate(texts):
        words = token_strings(encoder.tokenizer, tokens[number], tower.eos_id, tower.pad_id)
        written.append(output / f"relevance_{number + 1}.png")
        pictures.draw_relevance(
            written[-1],
            pixels,
            relevant[number],
            words,
            found.text[number, : len(words)],
            title=f"What makes the image similar to “{text}”",
            subtitle=f"{encoder.source}; cosine similarity {found.similarity[number]:.2f}; "
            f"gradient-weighted attention; {pictures.LEGEND}",
        )
    return written


def draw_attention(encoder: Encoder, pixels: np.ndarray, output: Path) -> list[Path]:
    """Draws where the heads of the image tower look, and rollout; returns the files."""
    module = encoder.module
    maps = attention_maps(module, encoder.params, images=pixels[None])
    first, (rows, columns) = module.image.prefix_tokens, module.image.grid
    weights = maps["image"][0]
    whose = "of the class token" if module.image.pooling == "cls" else "mean over all tokens"
    # With another pooling no token stands for the image: the mean over all that look.
    looked = weights[:, :, 0] if module.image.pooling == "cls" else weights.mean(axis=2)
    looked = looked[..., first:].reshape(*weights.shape[:2], rows, columns)
    pictures.draw_attention(
        output / "attention.png",
        pixels,
        looked,
        title=f"Attention to each patch, {whose}",
        subtitle=f"{encoder.source}; each map from its least weight (dark) to its "
        "largest (yellow), which stands beneath it",
    )
    rolled = image_rollout(module, maps)[0]
    pictures.draw_attention(
        output / "rollout.png",
        pixels,
        rolled[None, None],
        title="Attention rollout to what is pooled",
        subtitle=f"{encoder.source}; all layers together; {pictures.LEGEND}",
        captions=[f"share of a patch: up to {rolled.max():.3f}"],
    )
    return [output / "attention.png", output / "rollout.png"]


def draw_among(
    encoder: Encoder, pixels: np.ndarray, arguments: argparse.Namespace, texts: np.ndarray
) -> list[Path]:
    """Draws neighbours and projection; returns the files."""
    collection = collect(encoder, arguments.among, arguments.limit)
    index = encoder.apply("embed_image", collection.pixels)
    written, output = [], arguments.output
    if arguments.neighbours:
        count = min(arguments.neighbours, len(index))
        own = encoder.apply("embed_image", [pixels])
        rows, products = nearest(np.concatenate([own, texts]), index, count)
        written.append(output / "neighbours.png")
        pictures.draw_neighbours(
            written[-1],
            [pixels, *arguments.text],
            [collection.pixels[row] for row in rows],
            [
                [f"{value:.2f} {collection.names[n]}" for n, value in zip(row, best)]
                for row, best in zip(rows, products)
            ],
            title="Nearest neighbours",
            subtitle=f"{encoder.source}; among {collection.what}; cosine similarity, best first",
        )
    if arguments.projection:
        written.append(output / "projection.png")
        scenes = arguments.among is None and set(collection.groups) <= set(vocabulary.COLORS)
        pictures.draw_projection(
            written[-1],
            project(index, arguments.projection),
            collection.groups,
            title=f"Image embeddings, projected by {PROJECTIONS[arguments.projection]}",
            subtitle=f"{encoder.source}; {collection.what}, a point each"
            + ("; groups are the colors of the objects" if scenes else "; groups are subfolders"),
            colors=SCENE_COLORS if scenes else None,
        )
    return written


def text_embeddings(encoder: Encoder, texts: Sequence[str]) -> Float[np.ndarray, "n dim"]:
    """Embeds texts as unit vectors; warns on stderr where a text is cut."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = encoder.embed_text(texts) if texts else np.zeros((0, encoder.module.embed_dim))
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return found.astype(np.float32)


def look(arguments: argparse.Namespace) -> None:
    """Loads the model, draws and tells the files.

    Raises:
      UserError: a model, an image or a text that does not do, or a folder that cannot be written.
    """
    encoder = vlp_jax.load(arguments.weights or arguments.workdir, step=arguments.step)
    # Heat maps and relevance are between an image and a text.
    if not isinstance(encoder.module, DualEncoder):
        raise UserError(f"{encoder.source} is an image model: looking inside needs a text tower")
    pixels = encoder.images(arguments.image)
    texts = text_embeddings(encoder, arguments.text)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {arguments.output} cannot be made: {error.strerror}") from None
    written = []
    if arguments.text:
        similarity = texts @ encoder.apply("embed_image", [pixels])[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a long text, which was told already
            written += draw_texts(encoder, pixels, arguments, similarity)
    # Needs no text, and is drawn without one.
    written += draw_attention(encoder, pixels, arguments.output)
    if arguments.neighbours or arguments.projection:
        written += draw_among(encoder, pixels, arguments, texts)
    for path in written:
        print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""

    def command() -> None:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        startup.initialize()
        startup.use_compilation_cache()
        look(arguments)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
