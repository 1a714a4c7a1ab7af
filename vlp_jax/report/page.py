"""Rendering of sections as one HTML file that needs no other file."""

from __future__ import annotations

import base64
import datetime
import hashlib
import os
import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jinja2
from etils import epath

from vlp_jax.errors import UserError
from vlp_jax.observe.palette import DARK, LIGHT, declarations
from vlp_jax.report.blocks import Section
from vlp_jax.report.pictures import Album
from vlp_jax.versions import commit, versions

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow", "tensorflow-cpu")


def provenance(command: Sequence[str]) -> Mapping[str, str]:
    """Returns label -> text for the footer; facts that cannot be found out are left out."""
    now = datetime.datetime.now(datetime.UTC)
    found = {
        "made": now.strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "vlp_jax.evaluate", *command]),
        "commit": commit(),
        "devices": _devices(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": ", ".join(f"{name} {which}" for name, which in versions(PACKAGES).items()),
    }
    return {name: text for name, text in found.items() if text}


def _devices() -> str:
    kinds = sorted({device.device_kind for device in jax.devices()})
    processes = jax.process_count()
    more = f" on {processes} processes" if processes > 1 else ""
    return f"{jax.device_count()} \N{MULTIPLICATION SIGN} {', '.join(kinds)}{more}"


def _processor() -> str:
    # Under Linux `platform.processor` is empty.
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((ln.split(":", 1)[1].strip() for ln in lines if "model name" in ln), model)
    except OSError:
        pass  # elsewhere than on Linux
    return f"{model}, {os.cpu_count()} cores" if model else ""


MAX_BYTES = 5_000_000  # of the whole page
# Of all pictures, tried in turn until the page is below `MAX_BYTES`.
_PICTURE_BYTES = (3_000_000, 1_000_000, 0)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("vlp_jax.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name fails instead of printing nothing
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(
    title: str, facts: Sequence[str], sections: Sequence[Section], made_by: Mapping[str, str]
) -> str:
    """Renders the page as HTML and escapes all text.

    Its policy (Content-Security-Policy) allows its one style sheet and pictures that are part of
    it. Network, scripts and forms are forbidden, also to a text that should escape the escaping.
    """
    environment = _environment()
    style = environment.get_template("style.css").render(
        light=declarations(LIGHT), dark=declarations(DARK), series=range(6)
    )
    # The policy names the style sheet by its hash, so that no other style is applied.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        title=title,
        facts=facts,
        sections=sections,
        made_by=made_by,
        # Ours and not from a run, so it may go in unescaped.
        style=jinja2.utils.markupsafe.Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
    )


def render_small(build: Callable[[Album], str]) -> str:
    """Builds the page with as many pictures as leave it below `MAX_BYTES`; UserError if none do."""
    for most in _PICTURE_BYTES:
        page = build(Album(most))
        size = len(page.encode())
        if size < MAX_BYTES:
            return page
    raise UserError(
        f"the page has {size:,} bytes without a picture: evaluate fewer at a time "
        "(--evaluators A,B)"
    )


def check_output(path: str | os.PathLike[str]) -> epath.Path:
    """Checks the path of a page before anything is computed; UserError for one that cannot be."""
    file = epath.Path(path)
    if file.is_dir():
        raise UserError(f"--report {path} is a folder: name a file in it, such as report.html")
    folder = file.parent
    if "://" not in os.fspath(path) and not folder.is_dir():
        raise UserError(f"--report {path}: the folder {folder} does not exist")
    return file


def write(file: epath.Path, page: str) -> None:
    """Writes the page; raises UserError if it cannot be written."""
    try:
        file.write_text(page)
    except OSError as error:
        raise UserError(f"--report {file} cannot be written: {error.strerror or error}") from None
