"""One export from first to last: written, read back, proved, scored, described, put in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from vlp_jax import versions
from vlp_jax.errors import UserError
from vlp_jax.handover import artifacts, card, record, scores
from vlp_jax.handover.artifacts import ARTIFACTS
from vlp_jax.handover.scores import Scores
from vlp_jax.handover.verify import verify
from vlp_jax.interop import FORMATS, files, format_named
from vlp_jax.interop.base import Extras
from vlp_jax.interop.staging import staged
from vlp_jax.interop.transfer import Model, how_to_load, write_into
from vlp_jax.training.restore import SavedParameters


@dataclasses.dataclass
class Job:
    """What is exported, how, and what there is to say of it.

    Attributes:
      format: a key of `interop.FORMATS` or of `ARTIFACTS`.
      model: the module and its float32 parameters.
      extras: fields of `vlp_jax.interop.Extras`.
      workdir, config, saved: the run, and which parameters of it.
      dtype: of an artifact's matrix products.
      overwrite: whether files may be there already.
      check: whether what is written is read back.
      prove: whether the format's library loads it in another process.
      evaluate: whether the run's evaluators run; None: if the weights are rounded and it is
        possible.
      license: for the card.
      notes: what the user has to know, a line each; is added to.
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
    def weights(self) -> str:
        """How they are stored."""
        return self.extras.get("weights", "float32")

    def run(self, output: Path) -> str:
        """Exports into the folder `output`; returns a report.

        Raises:
          UserError: the folder is not free, the format does not hold the model, or what was written
            is not it. Nothing is left behind.
        """
        said: dict[str, Any] = {}
        with staged(output, self.overwrite) as folder:
            lines = self._write(folder, said)
            lines += self._prove(folder, said)
            lines += self._score(said)
            self._describe(folder, output.resolve().name, said)
            names = sorted(x.relative_to(folder) for x in folder.rglob("*") if x.is_file())
        sizes = {output / name: (output / name).stat().st_size for name in names}
        head = [f"{self.workdir}, {self.saved.part} of step {self.saved.step:,}"]
        head += [f"note: {note}" for note in self.notes]
        wrote = [f"wrote {path} ({size:,} bytes)" for path, size in sizes.items()]
        total = f"{sum(sizes.values()):,} bytes in all, weights in {self.weights}"
        return "\n".join([*head, *wrote, total, *lines, f"load it with {self._loading(output)}"])

    def _loading(self, output: Path) -> str:
        if self.format in ARTIFACTS:
            return artifacts.LOADED_BY[self.format].format(output)
        return how_to_load(self.format, output)

    def _write(self, folder: Path, said: dict[str, Any]) -> list[str]:
        if self.format in ARTIFACTS:
            module, params = self.model.module, self.model.params
            artifacts.write(self.format, module, params, folder, self.dtype, **self.extras)
            return []
        _, difference = write_into(self.format, self.model, folder, check=self.check, **self.extras)
        said["read_back"] = (
            {"max_difference": difference} if self.check else {"skipped": "--no-check"}
        )
        if difference is None:
            return []
        return [f"read back: features of a random input differ by at most {difference:.1e}"]

    def _prove(self, folder: Path, said: dict[str, Any]) -> list[str]:
        if not self.prove:
            said["verified"] = {"skipped": "--no-verify"}
            return []
        extras = Extras(**self.extras)
        proof = verify(self.format, self.model, folder, extras, self.dtype)
        said["verified"] = proof
        if "skipped" in proof:
            return [f"not verified: {proof['skipped']}"]
        return [
            f"verified: {proof['library']} {proof['version']}, in a process without vlp_jax, "
            f"differs by at most {proof['max_difference']:.1e}"
        ]

    def _score(self, said: dict[str, Any]) -> list[str]:
        """Scores and what rounding costs, as lines; into `said` as well."""
        lines = []
        if self.weights != "float32":
            cosine = scores.cosines(self.model, Extras(**self.extras))
            said["rounding"] = {"least_cosine": cosine}
            lines += [f"weights in {self.weights}, on random inputs:", *scores.as_lines(cosine)]
        before, after = self._evaluated()
        if before is not None:
            title = before.source if after is None else "what the weights cost:"
            lines += [title, *scores.table(before, after)]
        if after is not None:
            said["rounding"]["before"] = before.values
            said["rounding"]["after"] = after.values
        known = after or before or self._noted()
        said["scores"] = None if known is None else known.as_json()
        return lines

    def _evaluated(self) -> tuple[Scores | None, Scores | None]:
        """Scores of the parameters, and of those that rounding leaves, if they are wanted."""
        wanted = self.evaluate
        if wanted is False or (wanted is None and self.weights == "float32"):
            return None, None
        if not self.config.evaluators:
            if wanted:
                raise UserError("--evaluate: the run's config has no evaluators")
            return None, None
        try:
            return scores.evaluate_rounded(self.workdir, self.config, self.saved, self.weights)
        except UserError as error:
            if wanted:
                raise
            self.notes.append(f"what the weights cost could not be measured: {error}")
            return None, None

    def _noted(self) -> Scores | None:
        if self.saved.part == "params" and self.config.optimizer.ema_decay:
            return None  # the run has evaluated the average
        found = scores.noted(self.workdir, self.saved.step)
        if found is None or self.weights == "float32":
            return found
        return dataclasses.replace(found, source=f"{found.source}, with weights in float32")

    def _describe(self, folder: Path, name: str, said: dict[str, Any]) -> None:
        """The card and the record, which is the last file."""
        libraries, code = versions.versions(record.LIBRARIES), versions.commit()
        architectures = files.load_json_if_there(folder / "config.json").get("architectures", [""])
        _, untagged = card.pipeline_of(self.format, self.model.module, architectures[0])
        self.notes += [untagged] if untagged else []
        subject = card.Subject(
            name=name,
            format=self.format,
            model=self.model,
            extras=Extras(**self.extras),
            config=self.config,
            step=self.saved.step,
            part=self.saved.part,
            scores=None if said["scores"] is None else Scores(**_back(said["scores"])),
            versions=libraries,
            commit=code,
            architecture=architectures[0],
            license=self.license,
            notes=self.notes,
        )
        files.save_bytes(card.text(subject).encode(), folder / "README.md")
        head = {
            "format": self.format,
            "weights": self.weights,
            "vlp_jax": versions.version(),
            "commit": code,
            "source": {
                "workdir": self.workdir.name,
                "step": self.saved.step,
                "params": self.saved.part,
            },
        }
        if self.format in ARTIFACTS:
            head["computes_in"] = self.dtype
        rest = {"versions": libraries, "notes": self.notes, **said}
        record.write(folder, {**head, **rest})


def _back(said: Mapping[str, Any]) -> dict[str, Any]:
    return {"values": said["values"], "source": said["source"], "step": said["step"]}


def kinds_of(format: str) -> tuple[type, ...]:
    """The modules that a format or artifact can hold.

    Raises:
      UserError: there is no such format.
    """
    return artifacts.KINDS if format in ARTIFACTS else format_named(format).KINDS


def known_formats() -> list[str]:
    """The names that an export can have."""
    return sorted([*FORMATS, *ARTIFACTS])
