"""The command: python -m vlp_jax.serve --workdir DIR."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlp_jax.arguments import make_parser
from vlp_jax.encoders import load
from vlp_jax.encoders.subject import Subject
from vlp_jax.errors import UserError
from vlp_jax.files import read_lines
from vlp_jax.parallel import startup
from vlp_jax.serve.explorer import Classes, Explorer
from vlp_jax.serve.index import (
    EvaluationImages,
    Folder,
    Pictures,
    build_index,
    default_folder,
    import_faiss,
)
from vlp_jax.training.command import run_command
from vlp_jax.training.restore import CHOICES
from vlp_jax.training.run import Run

EPILOG = """examples:
  python -m vlp_jax.serve --workdir demo/run                 the images it is evaluated on
  python -m vlp_jax.serve --workdir runs/clip --images DIR     your own
  python -m vlp_jax.serve --weights hf:DIR --images DIR --classes names.txt

The page is for one person on one machine: it has no login. Other machines are not answered unless
--host says so. Embeddings of images are kept, and only new or changed ones are embedded again.
"""
DEFAULT_TEMPLATE = "a photo of a {}."


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    what = (
        "A local page on which a text finds images, and an image finds classes, similar images and "
        "the regions that answer a text."
    )
    parser = make_parser("vlp-jax serve", what, epilog=EPILOG)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", metavar="DIR", help="folder of a run")
    model.add_argument("--weights", metavar="FORMAT:PATH", help="hf:DIR, open_clip:DIR, ...")
    add = parser.add_argument
    add("--step", type=int, metavar="N", help="checkpoint; default: the newest")
    add("--params", choices=CHOICES, default="auto", help="as in vlp_jax.evaluate")
    add("--tokenizer", metavar="FILE", help="for weights that come without one")
    told = "folder of the images to be found; default: images of the run's retrieval evaluator"
    add("--images", type=Path, metavar="DIR", help=told)
    add("--max-images", type=int, default=100_000, metavar="N", help="at most so many")
    told = "names or captions, a line each, to compare images with; default: classes of the run's "
    add("--classes", type=Path, metavar="FILE", help=told + "zero-shot evaluator")
    told = (
        f"with {{}} for the name of a class, can be repeated; default: {DEFAULT_TEMPLATE!r}, "
        "or the templates of the run; '{}' for captions"
    )
    add("--template", action="append", metavar="TEXT", help=told)
    add("--index", type=Path, metavar="DIR", help="where embeddings are kept; default: ~/.cache")
    told = "address to listen on; default: this machine only"
    add("--host", default="127.0.0.1", help=told)
    add("--port", type=int, default=8000, help="0 takes any free port")
    told = "a name by which browsers may ask for the page, besides --host and this machine's"
    add("--allow-host", action="append", default=[], metavar="NAME", help=told)
    told = "size of an image; default: 20"
    add("--max-upload", type=float, default=20.0, metavar="MIB", help=told)
    return parser.parse_args(argv)


def open_pictures(arguments: argparse.Namespace, subject: Subject | None) -> Pictures:
    """Opens the images that can be found; UserError if there are none."""
    if arguments.max_images < 1:
        raise UserError(f"--max-images is at least 1, not {arguments.max_images}")
    if arguments.images is not None:
        return Folder(arguments.images.expanduser(), arguments.max_images)
    if subject is None:
        raise UserError("--weights needs --images DIR: the images to be found")
    for wanted in ("retrieval", "zero_shot"):
        for name, section in subject.config.evaluators.items():
            if section.name == wanted:
                return EvaluationImages(subject, name, arguments.max_images)
    raise UserError("the run is not evaluated on images: give --images DIR")


def open_classes(arguments: argparse.Namespace, subject: Subject | None) -> Classes | None:
    """Reads the classes that images are compared with; None without any, UserError for bad ones."""
    if arguments.classes is not None:
        names = list(read_lines(arguments.classes, "--classes"))
        templates = arguments.template or [DEFAULT_TEMPLATE]
        return Classes.of_names(f"--classes {arguments.classes}", names, templates)
    sections = {} if subject is None else subject.config.evaluators
    for name, section in sections.items():
        if section.name == "zero_shot":
            evaluator = subject.evaluators[name]
            templates = arguments.template or evaluator.templates
            return Classes.of_names(f"config.evaluators.{name}", evaluator.class_names, templates)
    if arguments.template:
        raise UserError("--template needs --classes FILE: the names that go into it")
    return None


def open_subject(arguments: argparse.Namespace) -> Subject | None:
    """Opens the run with the evaluators that give images and classes; None if none is needed."""
    if arguments.workdir is None:
        return None
    config = Run.open(arguments.workdir).config
    # Reversed, so that the first evaluator of a kind counts.
    kinds = {s.name: name for name, s in reversed(list(config.evaluators.items()))}
    wanted = [kinds[kind] for kind in ("retrieval", "zero_shot") if kind in kinds]
    if not wanted or (arguments.images is not None and arguments.classes is not None):
        return None
    return Subject.of_run(arguments.workdir, names=wanted)


def make_explorer(arguments: argparse.Namespace) -> Explorer:
    """Loads the model and embeds the images that are not embedded yet."""
    import_faiss()  # first: nobody should wait for a model to learn that faiss is missing
    encoder = load(
        arguments.workdir or arguments.weights,
        step=arguments.step,
        params=arguments.params,
        tokenizer=arguments.tokenizer,
    )
    if encoder.texts is None:
        raise UserError(
            f"{encoder.source} is an image model; the page needs one of images and texts"
        )
    for note in encoder.notes:
        print(f"note: {note}")
    subject = open_subject(arguments)
    pictures, classes = open_pictures(arguments, subject), open_classes(arguments, subject)
    folder = arguments.index or default_folder(f"{encoder.source} {pictures.title}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), transient=True) as progress:
        task = progress.add_task("embedding images", total=len(pictures.names))
        index = build_index(
            encoder, pictures, folder, lambda n: progress.advance(task, n), progress.console.print
        )
    # `--max-images` leaves out the last ones, which the user should know.
    left = pictures.found - len(pictures.names)
    more = f" ({left:,} more are left out: --max-images)" if left > 0 else ""
    print(f"{len(index):,} images of {pictures.title}{more}; embeddings in {folder}")
    return Explorer(encoder, pictures, index, classes)


def is_loopback(host: str) -> bool:
    """Returns whether other machines cannot reach this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def hosts_of(host: str, allowed: Sequence[str]) -> list[str]:
    """Returns the names under which the page answers."""
    names = {"localhost", "127.0.0.1", "[::1]", *allowed}
    if not is_loopback(host):
        names |= {host, socket.gethostname(), socket.getfqdn()}
    return sorted(names)


def listen(host: str, port: int) -> socket.socket:
    """Binds a socket before the model is loaded; UserError for a bad address or a taken port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    # Without it a port stays taken for a minute after the server ended.
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except (OSError, OverflowError) as error:
        opened.close()
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        hint = "; choose another --port (0 takes any)" if taken else ""
        raise UserError(f"cannot listen on {host} port {port}: {error}{hint}") from None
    return opened


def serve(arguments: argparse.Namespace) -> None:
    """Serves the page until told to stop."""
    try:
        import uvicorn

        from vlp_jax.serve.app import make_app
    except ImportError as error:
        raise UserError(
            f"the page needs a web server ({error}): pip install -r requirements-serve.txt"
        ) from None
    if arguments.max_upload <= 0:
        raise UserError(f"--max-upload is more than 0, not {arguments.max_upload}")
    startup.use_compilation_cache()  # heat maps compile at the first click
    with listen(arguments.host, arguments.port) as opened:
        explorer = make_explorer(arguments)
        hosts = hosts_of(arguments.host, arguments.allow_host)
        app = make_app(explorer, hosts, max_upload=round(arguments.max_upload * 2**20))
        host, port = opened.getsockname()[:2]
        if not is_loopback(host):
            print("note: other machines can reach this page, and it asks nobody who they are")
        shown = f"[{host}]" if ":" in host else host
        print(f"open http://{shown}:{port} (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(app, log_level="warning", server_header=False)
        uvicorn.Server(config).run(sockets=[opened])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: serve(arguments))


if __name__ == "__main__":
    sys.exit(main())
