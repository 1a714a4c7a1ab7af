"""Runs one export: write, read back, verify, score, describe, and move the folder into place."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vlp_jax import versions
from vlp_jax.errors import UserError
from vlp_jax.handover import artifacts, card, scores
from vlp_jax.handover.artifacts import ARTIFACTS
from vlp_jax.handover.scores import Scores
from vlp_jax.handover.verify import verify
from vlp_jax.interop import FORMATS, files, format_named
from vlp_jax.interop.base import Extras
from vlp_jax.interop.staging import RECORD, staged
from vlp_jax.interop.transfer import Model, architecture_in, how_to_load, write_into
from vlp_jax.training.restore import SavedParameters

LIBRARIES = ("jax", "flax", "numpy", "safetensors", "orbax-checkpoint")  # named in export.json


@dataclasses.dataclass
class ExportJob:
    """An export with its settings.

    Attributes:
      format: a key of `interop.FORMATS` or of `ARTIFACTS`.
      model: the module and its float32 parameters.
      extras: fields of `vlp_jax.interop.Extras`.
      workdir, config, saved: the run, its config, and the parameters to export.
      dtype: dtype of an artifact's matrix products.
      overwrite: whether the output folder may contain files.
      check: whether to read the files back.
      prove: whether to load the files with the format's library, in another process.
      evaluate: whether to run the run's evaluators. None runs them if the weights are rounded and
        the data is available.
      license: the license, for the card.
      notes: lines for the user; the export appends to them.
    """

    format: str
    model: Model
    extras: dict[str, Any]
    workdir: epath.Path
    config: ConfigDict
    saved: SavedParameters
    dtype: str = "float32"
    overwrite: bool = False
    check: bool = True
    prove: bool = True
    evaluate: bool | None = None
    license: str | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def settings(self) -> Extras:
        """The settings with their defaults."""
        return Extras(**self.extras)

    def run(self, output: Path) -> str:
        """Exports into the folder `output`; returns a report.

        Raises:
          UserError: the folder is not empty, the format cannot express the model, or the written
            model computes something else. Nothing is left behind.
        """
        facts: dict[str, Any] = {}  # for export.json; each stage adds its own
        with staged(output, self.overwrite) as folder:
            lines = self._write(folder, facts)
            lines += self._prove(folder, facts)
            lines += self._score(facts)
            self._describe(folder, output.resolve().name, facts)
            names = sorted(x.relative_to(folder) for x in folder.rglob("*") if x.is_file())
        sizes = {output / name: (output / name).stat().st_size for name in names}
        head = [f"{self.workdir}, {self.saved.part} of step {self.saved.step:,}"]
        head += [f"note: {note}" for note in self.notes]
        wrote = [f"wrote {path} ({size:,} bytes)" for path, size in sizes.items()]
        total = f"{sum(sizes.values()):,} bytes in all, weights in {self.settings.weights}"
        loading = artifacts.LOADED_BY.get(self.format, "").format(output)
        loading = loading or how_to_load(self.format, output)
        return "\n".join([*head, *wrote, total, *lines, f"load it with {loading}"])

    def _write(self, folder: Path, facts: dict[str, Any]) -> list[str]:
        if self.format in ARTIFACTS:
            module, params = self.model.module, self.model.params
            artifacts.write(self.format, module, params, folder, self.dtype, **self.extras)
            return []
        _, difference = write_into(self.format, self.model, folder, check=self.check, **self.extras)
        if difference is None:
            facts["read_back"] = {"skipped": "--no-check"}
            return []
        facts["read_back"] = {"max_difference": difference}
        return [f"read back: features of a random input differ by at most {difference:.1e}"]

    def _prove(self, folder: Path, facts: dict[str, Any]) -> list[str]:
        if not self.prove:
            facts["verified"] = {"skipped": "--no-verify"}
            return []
        proof = verify(self.format, self.model, folder, self.settings, self.dtype)
        facts["verified"] = proof
        if "skipped" in proof:
            return [f"not verified: {proof['skipped']}"]
        return [
            f"verified: {proof['library']} {proof['version']}, in a process without vlp_jax, "
            f"differs by at most {proof['max_difference']:.1e}"
        ]

    def _score(self, facts: dict[str, Any]) -> list[str]:
        """Returns lines about scores and the cost of rounding; adds them to `facts`."""
        lines, weights = [], self.settings.weights
        if weights != "float32":
            cosine = scores.cosines(self.model, self.settings)
            facts["rounding"] = {"least_cosine": cosine}
            lines.append(f"weights in {weights}, on random inputs:")
            lines += [f"  {f}: least cosine with float32 {x:.6f}" for f, x in cosine.items()]
        before, after = self._evaluated(weights)
        if before is not None:
            title = before.source if after is None else "what the weights cost:"
            lines += [title, *scores.table(before, after)]
        if after is not None:
            facts["rounding"] |= {"before": before.values, "after": after.values}
        facts["scores"] = after or before or self._noted(weights)
        return lines

    def _evaluated(self, weights: str) -> tuple[Scores | None, Scores | None]:
        """Scores the parameters, and the rounded parameters, if evaluation is wanted."""
        wanted = self.evaluate
        if wanted is False or (wanted is None and weights == "float32"):
            return None, None
        if not self.config.evaluators:
            if wanted:
                raise UserError("--evaluate: the run's config has no evaluators")
            return None, None
        try:
            return scores.evaluate_rounded(self.workdir, self.config, self.saved, weights)
        except UserError as error:
            if wanted:
                raise
            self.notes.append(f"what the weights cost could not be measured: {error}")
            return None, None

    def _noted(self, weights: str) -> Scores | None:
        if self.saved.part == "params" and self.config.optimizer.ema_decay:
            return None  # the run's scores belong to the average
        known = scores.noted(self.workdir, self.saved.step)
        if known is None or weights == "float32":
            return known
        # The run has scored its own parameters, before any rounding.
        return dataclasses.replace(known, source=f"{known.source}, with weights in float32")

    def _describe(self, folder: Path, name: str, facts: dict[str, Any]) -> None:
        """Writes the card, and then the record, whose presence marks the folder as complete."""
        libraries, code = versions.versions(LIBRARIES), versions.commit()
        architecture, known = architecture_in(folder), facts["scores"]
        _, untagged = card.pipeline_of(self.format, self.model.module, architecture)
        self.notes += [untagged] if untagged else []
        page = card.text(card.Card(name, self, known, libraries, code, architecture))
        files.save_bytes(page.encode(), folder / "README.md")
        source = {"workdir": self.workdir.name, "step": self.saved.step, "params": self.saved.part}
        head = {
            "format": self.format,
            "weights": self.settings.weights,
            "vlp_jax": versions.version(),
            "commit": code,
            "source": source,
        }
        head |= {"computes_in": self.dtype} if self.format in ARTIFACTS else {}
        facts["scores"] = None if known is None else vars(known)
        listed = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            key = path.relative_to(folder).as_posix()
            listed[key] = {"bytes": path.stat().st_size, "sha256": digest}
        rest = {"versions": libraries, "notes": self.notes, **facts, "files": listed}
        files.save_json({**head, **rest}, folder / RECORD)


def kinds_of(format: str) -> tuple[type, ...]:
    """Returns the classes of models that a format may express; a UserError for no format."""
    return artifacts.KINDS if format in ARTIFACTS else format_named(format).kinds


def known_formats() -> list[str]:
    """Returns the names of all formats and artifacts."""
    return sorted([*FORMATS, *ARTIFACTS])
