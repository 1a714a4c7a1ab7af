"""Makes a folder of pictures with captions of Debian's clip art, for `configs/clip_folder.py`.

    apt-get install openclipart-png openclipart-svg tuxpaint-stamps-default
    python -m tools.perf.collect_clipart --output pictures

About 8,000 drawings of the Open Clip Art Library, whose SVG files hold title and keywords, and 800
drawings and photographs of Tux Paint with a sentence each. All are in the public domain or free.
DIR gets the pictures, scaled down on a white ground, and captions.csv with the columns path,
caption and category. A picture that is there twice is taken once. Finished pictures stay when the
command is run again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import PIL.Image
from rich.progress import track

from tools.perf import harness
from vlp_jax.arguments import make_parser, parse_with_overrides
from vlp_jax.encoders.images import ImageProcessor, upright_rgb
from vlp_jax.errors import UserError
from vlp_jax.files import write_whole

CLIPART, STAMPS = Path("/usr/share/openclipart"), Path("/usr/share/tuxpaint/stamps")
# Keywords that every other picture has, and that say nothing of what is drawn.
EMPTY_KEYWORDS = {"", "hash", "unsorted", "special", "mimetypes", "clip_art", "clipart"}
COLLECTION = 20  # a title that more pictures share is the name of their collection
_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
THREADS = 4


class Drawing(NamedTuple):
    """A picture file with its title, words and category."""

    file: Path
    path: str  # below the output folder, without a suffix
    title: str  # of the picture or of its collection; a whole sentence for Tux Paint
    words: tuple[str, ...]  # the name of the file and the keywords
    category: str  # the first folder


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = make_parser("python -m tools.perf.collect_clipart", __doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder that is filled")
    add("--clipart", type=Path, default=CLIPART, metavar="DIR", help="default: %(default)s")
    add("--stamps", type=Path, default=STAMPS, metavar="DIR", help="default: %(default)s")
    told = "pixels of the shorter side of a large picture (default: %(default)s)"
    add("--side", type=int, default=128, metavar="N", help=told)
    return parse_with_overrides(parser, argv)[0]


def clipart(root: Path) -> Iterator[Drawing]:
    """Finds the drawings of the Open Clip Art Library, which need both packages."""
    for svg in sorted(root.glob("svg/**/*.svg")):
        relative = svg.relative_to(root / "svg")
        png = (root / "png" / relative).with_suffix(".png")
        if not png.is_file():
            continue
        try:
            title, keywords, authors = described(svg.read_bytes())
        except ElementTree.ParseError:
            title, keywords, authors = "", (), ()
        name = name_without_author(relative.stem, authors)
        words = (name, *(word.replace("_", " ") for word in keywords if word not in EMPTY_KEYWORDS))
        yield Drawing(png, str(relative.with_suffix("")), title, words, relative.parts[0])


def described(svg: bytes) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Reads (title, keywords in alphabetical order, names of authors) of an SVG's metadata."""
    tree = ElementTree.parse(io.BytesIO(svg))
    work = next((e for e in tree.iter() if e.tag.endswith("}Work")), None)
    if work is None:
        return "", (), ()
    authors = [e.text or "" for c in work.iter(f"{_DC}creator") for e in c.iter(f"{_DC}title")]
    authors = tuple(author.strip().lower() for author in authors if author.strip())
    keywords = {(e.text or "").strip().lower() for e in work.iter(f"{_RDF}li")}
    return (
        " ".join((work.findtext(f"{_DC}title") or "").split()),
        tuple(sorted(keywords - set(authors))),
        authors,
    )


def name_without_author(stem: str, authors: Sequence[str]) -> str:
    """Returns a file's words: "bored_dog_jose_hevia_01" by Jose Hevia gives "bored dog"."""
    name = " ".join(re.sub(r"[_\s]+", " ", stem.lower()).split())
    name = re.sub(r" \d+[a-z]?$", "", name)
    # Names of files were cut to a length: an author's may end early.
    for author in authors:
        for end in range(len(author), 4, -1):
            if name.endswith(f" {author[:end].strip()}"):
                return name[: -len(author[:end].strip())].strip()
    return name


def stamps(root: Path) -> Iterator[Drawing]:
    """Finds the stamps of Tux Paint that have a sentence in English."""
    for text in sorted(root.glob("**/*.txt")):
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        files = [text.with_suffix(suffix) for suffix in (".png", ".jpg")]
        found = next((file for file in files if file.is_file()), None)
        if found is None or not lines or not lines[0].strip():
            continue
        relative = text.relative_to(root).with_suffix("")
        yield Drawing(found, f"stamps/{relative}", lines[0].strip(), (), relative.parts[0])


def captions_of(drawings: Iterable[Drawing]) -> dict[Drawing, str]:
    """Makes captions: the title, unless it names a collection, and the words, each once."""
    drawings = list(drawings)
    counts = Counter(drawing.title.lower() for drawing in drawings)
    captions = {}
    for drawing in drawings:
        title = drawing.title if counts[drawing.title.lower()] <= COLLECTION else ""
        parts: dict[str, str] = {}
        for part in (title, *drawing.words):
            parts.setdefault(re.sub(r"[\W_]+", " ", part.lower()).strip(), part)
        parts.pop("", None)
        captions[drawing] = ", ".join(parts.values())
    return captions


def shrunk(drawing: Drawing, side: int, output: Path) -> str | UserError:
    """Writes the picture, unless it is there; returns a digest of its pixels, or why not."""
    target = output / f"{drawing.path}.png"
    if not target.exists():
        try:
            image = upright_rgb(ImageProcessor((side, side)).open(drawing.file)[0])
        except UserError as error:
            return error
        factor = side / min(image.size)
        if factor < 1:
            size = [max(1, round(length * factor)) for length in image.size]
            image = image.resize(size, PIL.Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, buffer.getvalue())
    with PIL.Image.open(target) as image:
        return hashlib.sha256(image.tobytes() + str(image.size).encode()).hexdigest()


def collect(arguments: argparse.Namespace) -> str:
    """Fills the folder; returns what was written.

    Raises:
      UserError: there are no pictures, or no place for them.
    """
    output = arguments.output
    if arguments.side < 16:
        raise UserError(f"--side {arguments.side} is too small: give at least 16 pixels")
    captions = captions_of([*clipart(arguments.clipart), *stamps(arguments.stamps)])
    if not captions:
        raise UserError(
            f"neither {arguments.clipart} nor {arguments.stamps} has pictures: apt-get install "
            "openclipart-png openclipart-svg tuxpaint-stamps-default"
        )
    output.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    rows = []
    with ThreadPoolExecutor(THREADS) as threads:
        digests = threads.map(lambda drawing: shrunk(drawing, arguments.side, output), captions)
        done = zip(captions, track(digests, "shrink pictures", len(captions)), strict=True)
        for drawing, digest in done:
            if isinstance(digest, UserError):
                print(f"left out: {digest}", file=sys.stderr)
            elif digest not in seen and captions[drawing]:
                seen.add(digest)
                rows.append((f"{drawing.path}.png", captions[drawing], drawing.category))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("path", "caption", "category"), *rows])
    write_whole(output / "captions.csv", table.getvalue())
    return f"{len(rows):,} of {len(captions):,} pictures differ; see {output / 'captions.csv'}"


main = harness.main_of(lambda argv: print(collect(parse(argv))))

if __name__ == "__main__":
    sys.exit(main())
