"""The subject of an evaluation: a model with the evaluators of a config, without its training.

Neither training data nor an optimizer is needed, and the devices may differ from the run's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.sources.base import as_plain
from vlp_jax.data.wording import Wording
from vlp_jax.encoders.encoder import load
from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.evaluators import differing_wordings, make_evaluators, merged_data
from vlp_jax.evaluators.attacks import with_attacks
from vlp_jax.evaluators.base import Evaluator, Outcome, Resources, compile_functions
from vlp_jax.evaluators.loss import evaluator_functions
from vlp_jax.evaluators.saved import save_embeddings
from vlp_jax.interop.trees import to_tree
from vlp_jax.objectives import Objective
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules
from vlp_jax.training.abstract_setup import batch_spec
from vlp_jax.training.restore import LoadedParameters
from vlp_jax.training.run import Run

EXAMPLES_PER_DEVICE = 64  # in an evaluation batch, where the run's batch does not fit


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, and the evaluators that score it.

    Attributes:
      title: the name of the workdir or of the files.
      config: the config with the evaluators; a run's own config.
      objective: the run's objective; None for foreign files.
      module: the model; the first part's model for a composite.
      resources: functions, tokenizer, mesh and batch size of the evaluators.
      evaluators: name in the config -> evaluator.
      run: the run; None for foreign files.
      notes: lines for the user.
    """

    title: str
    config: ConfigDict
    objective: Objective | None
    module: nn.Module
    resources: Resources
    evaluators: dict[str, Evaluator]
    run: Run | None
    notes: tuple[str, ...]
    _abstract: Any = None
    _loaded: LoadedParameters | None = None

    @classmethod
    def of_run(
        cls,
        workdir: str | epath.Path,
        *,
        further: ConfigDict | None = None,
        overrides: Sequence[str] = (),
        names: Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> Subject:
        """Opens the run in `workdir` with its evaluators.

        Args:
          further: a config whose evaluators judge the run too, see `add_evaluators`.
          overrides: assignments such as "evaluators.NAME.KEY=VALUE", see `vlp_jax.config.override`.
          names: names of evaluators; None for all. Only their data is opened.
          batch_size: examples of an evaluation batch; None: see `_mesh_and_batch_size`.

        Raises:
          UserError: there is no run, or an evaluator, a key or data is missing.
        """
        run = Run.open(workdir)
        config, objective = run.config, run.objective
        train_data = as_plain(config.data)  # before the overrides: as it was in training
        if further is not None:
            add_evaluators(config, further)
        config_lib.override(config, list(overrides))
        mesh, batch_size, notes = _mesh_and_batch_size(config, batch_size)
        wording, more = run.wording
        chosen = choose_evaluators(config, names)
        spec = {k: jax.ShapeDtypeStruct(*v) for k, v in batch_spec(config, objective).items()}
        boxed = jax.eval_shape(lambda: objective.init(jax.random.key(0), spec))
        resources = Resources(
            functions=compile_functions(evaluator_functions(objective), mesh),
            tokenizer=run.tokenizer,
            mesh=mesh,
            batch_size=batch_size,
            wording=wording,
            train_data=train_data,
        )
        return cls(
            title=str(run.workdir),
            config=config,
            objective=objective,
            module=objective.model,
            resources=resources,
            evaluators=make_evaluators(chosen, config.data, resources),
            run=run,
            notes=(*notes, *more, *differing_wordings(chosen, config.data, wording)),
            _abstract=jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                nn.unbox(boxed),
                rules.param_shardings(boxed, mesh),
            ),
        )

    @classmethod
    def of_weights(
        cls,
        weights: str,
        config: ConfigDict,
        *,
        names: Sequence[str] | None = None,
        batch_size: int | None = None,
        dtype: str = "float32",
        tokenizer: str | None = None,
    ) -> Subject:
        """Opens foreign files with the evaluators of a config.

        Args:
          weights: FORMAT:PATH, see `vlp_jax.load`.
          config: supplies `evaluators` and `data`; its objective and tokenizer are ignored.
          dtype, tokenizer: see `vlp_jax.load`.

        Raises:
          UserError: the files cannot be read, or see `of_run`.
        """
        encoder = load(weights, dtype=dtype, tokenizer=tokenizer)
        mesh, batch_size, notes = _mesh_and_batch_size(config, batch_size)
        resources = Resources(
            functions=compile_functions(with_attacks(encoder.functions), mesh),
            tokenizer=None if encoder.texts is None else encoder.tokenizer,
            mesh=mesh,
            batch_size=batch_size,
            wording=Wording() if encoder.texts is None else encoder.texts.preprocess,
        )
        tree = to_tree(encoder.module, encoder.weights)
        boxed = jax.eval_shape(
            lambda: encoder.module.init(jax.random.key(0), *encoder.module.example())["params"]
        )
        params = jax.device_put(tree, rules.param_shardings(boxed, mesh))
        chosen = choose_evaluators(config, names)
        subject = cls(
            title=weights,
            config=config,
            objective=None,
            module=encoder.module,
            resources=resources,
            evaluators=make_evaluators(chosen, config.data, resources),
            run=None,
            notes=(*notes, *encoder.notes),
            _loaded=LoadedParameters(step=0, part="params", params=params),
        )
        height, width = encoder.image_size
        for name in subject.evaluators:
            shape = subject.open_evaluation_data(name).batch_spec()["image"][0]
            if tuple(shape[1:3]) != (height, width):
                raise UserError(
                    f"{weights} takes images of {height} x {width} pixels, and "
                    f"config.evaluators.{name} gives {shape[1]} x {shape[2]}: set the size in "
                    f"--config.evaluators.{name}.data.preprocess"
                )
        return subject

    @property
    def workdir(self) -> epath.Path | None:
        """The folder of the run; None for foreign files."""
        return None if self.run is None else self.run.workdir

    def load(self, step: int | None = None, choice: str = "auto") -> LoadedParameters:
        """Loads the parameters at `step` (default: the newest) onto the mesh.

        Foreign files have one set of parameters, which is returned.

        Args:
          choice: one of `vlp_jax.training.restore.CHOICES`.

        Raises:
          UserError: there is no such checkpoint or average.
        """
        if self._loaded is not None:
            return self._loaded
        return self.run.saved(step, choice).load(self._abstract)

    def open_evaluation_data(
        self, name: str, extra_fields: Sequence[str] = (), **settings: Any
    ) -> EvalPipeline:
        """Opens the examples of the evaluator `name`, as the evaluator sees them.

        Args:
          extra_fields: fields beside those that the functions read.
          settings: keys that replace those of the evaluator's data.
        """
        data = merged_data(self.config.data, self.config.evaluators[name])
        return self.resources.pipeline({**data, **settings}, extra_fields)

    def open_stored_data(self, name: str, fields: Sequence[str]) -> EvalPipeline:
        """Opens `fields` as the source stores them: no image is decoded, and no text is chosen."""
        return self.open_evaluation_data(name, fields, preprocess={})


@dataclasses.dataclass(frozen=True)
class Findings:
    """The scores and outcomes of a model's evaluators.

    Attributes:
      scores: "eval/EVALUATOR/NAME" -> value.
      outcomes: name of an evaluator -> its outcome.
    """

    scores: Mapping[str, float]
    outcomes: Mapping[str, Outcome]

    def save_embeddings(self, folder: Path) -> Iterator[str]:
        """Writes EVALUATOR.npz for each outcome that has arrays, and yields a line for each file.

        Raises UserError if the folder cannot be written. See `vlp_jax.evaluators.saved`.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, outcome in self.outcomes.items():
                if outcome.arrays():
                    save_embeddings(outcome, folder / f"{name}.npz")
                    yield f"wrote {folder / name}.npz"
        except OSError as error:
            raise UserError(f"--embeddings {folder} cannot be written: {error}") from None


def find(
    subject: Subject, loaded: LoadedParameters, names: Sequence[str] | None = None
) -> Findings:
    """Runs each evaluator once. All processes must call it.

    Args:
      names: names of evaluators; None for all of the subject.
    """
    scores: dict[str, float] = {}
    outcomes: dict[str, Outcome] = {}
    with subject.resources.one_evaluation(loaded.params):
        for name in subject.evaluators if names is None else names:
            outcomes[name] = subject.evaluators[name].outcome(loaded.params)
            named = outcomes[name].scores()
            scores |= {f"eval/{name}/{score}": value for score, value in named.items()}
    return Findings(scores, outcomes)


# Keys of data that narrow it; None is none of them.
NARROWING = ("where", "limit", "fields", "batch_ops", "preprocess")


def add_evaluators(config: ConfigDict, further: ConfigDict) -> None:
    """Adds the evaluators of another config to a run's, in place.

    One with a name that the run has takes the place of the run's. They look at the data of their
    own config, or at the run's if that has none.
    """
    with config.unlocked():
        for name, section in further.evaluators.items():
            section = section.copy_and_resolve_references().unlock()
            if further.data:
                data = merged_data(further.data, section)
                # What differs from the run's data is said in full: else its limits would hold here.
                other = {key: None for key in NARROWING if key in config.data and key not in data}
                section.data = ConfigDict({**other, **data})
            config.evaluators[name] = section
    config_lib.complete(config)


def choose_evaluators(config: ConfigDict, names: Sequence[str] | None) -> ConfigDict:
    """Selects the sections of `config.evaluators` in `names`; None for all.

    Raises:
      UserError: a section is missing, or the config has no evaluators.
    """
    for name in names or ():
        if name not in config.evaluators:
            raise UserError(unknown_key_message(name, config.evaluators, "config.evaluators"))
    if not config.evaluators:
        raise UserError("the config has no evaluators: give one that has, with --config")
    chosen = config.evaluators if names is None else {n: config.evaluators[n] for n in names}
    return ConfigDict(dict(chosen.items()))


def _mesh_and_batch_size(
    config: ConfigDict, batch_size: int | None
) -> tuple[Mesh, int, tuple[str, ...]]:
    """Returns the run's mesh and batch size if they fit these devices, and notes.

    Otherwise parameters are sharded over all devices, and a batch has `EXAMPLES_PER_DEVICE` for
    each device. Scores depend on neither.
    """
    notes: tuple[str, ...] = ()
    try:
        mesh = mesh_lib.make_mesh(config.mesh)
    except UserError as error:
        mesh = mesh_lib.make_mesh({"preset": "fsdp"} if jax.device_count() > 1 else {})
        notes = (f"not on the run's mesh ({error}), but on {mesh_lib.describe(mesh)}",)
    parts = math.prod(mesh.shape[axis] for axis in mesh_lib.BATCH_AXES)
    most = EXAMPLES_PER_DEVICE * parts
    chosen = batch_size
    if chosen is None:
        fits = config.batch_size <= most and config.batch_size % parts == 0
        chosen = config.batch_size if fits else most
    mesh_lib.check_batch_size(chosen, mesh, "--batch-size")
    return mesh, chosen, notes
