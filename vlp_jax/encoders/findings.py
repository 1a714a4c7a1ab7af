"""Runs the evaluators of a model on a set of parameters, and collects the outcomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vlp_jax.encoders.subject import Subject
from vlp_jax.errors import UserError
from vlp_jax.evaluators.base import Outcome
from vlp_jax.evaluators.saved import save_embeddings
from vlp_jax.training.restore import LoadedParameters


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
        """Writes EVALUATOR.npz for each outcome that has arrays, see `vlp_jax.evaluators.saved`.

        Yields:
          A line for each file.

        Raises:
          UserError: the folder cannot be written.
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
