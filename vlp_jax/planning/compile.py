"""The real training step, compiled ahead of time for devices that need not be here."""

from __future__ import annotations

import dataclasses
import re

import jax

from vlp_jax.training.setup import Setup
from vlp_jax.training.step import compile_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"
# Words of the TPU compiler, before it schedules the program and after.
_OUT_OF_MEMORY = (
    re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"[Uu]sed {_SIZE} of {_SIZE} hbm"),
)
_PRELIMINARY = 0  # index of the words before


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step: its bytes in a device's main memory, and its text.

    Attributes:
      arguments: state and batch; the new state takes the place of the old one.
      outputs: results without such a place: metrics.
      temporaries: activations, gradients and everything else that lives within the step.
      code: the program itself.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    text: str

    @property
    def bytes(self) -> int:
        """Bytes of all parts together."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """The refusal of the compiler, for want of memory.

    Attributes:
      needed, available: bytes of a device, as the compiler says.
      preliminary: the compiler gave up before it arranged the program, and `needed` is its first,
        high estimate.
    """

    needed: int
    available: int
    preliminary: bool


def compile_setup(setup: Setup) -> Program | OutOfMemory:
    """Compiles the step of `setup` for its mesh. Nothing is run, and nothing is cached.

    Raises:
      jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.
    """
    # A program from the cache may come without its figures.
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        step = compile_step(setup.step, setup.abstract, setup.batch_spec, setup.mesh)
    except jax.errors.JaxRuntimeError as error:
        refused = parse_out_of_memory(str(error))
        if refused is None:
            raise
        return refused
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    memory = step.program.memory_analysis()
    return Program(
        arguments=memory.argument_size_in_bytes,
        # The new state is donated the memory of the old one, and would count twice.
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        text=step.program.as_text(),
    )


def parse_out_of_memory(message: str) -> OutOfMemory | None:
    """Reads the figures in the compiler's words; None if they are about something else.

    Raises:
      ValueError: it is about memory, in words that are not known here.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for number, pattern in enumerate(_OUT_OF_MEMORY):
        found = pattern.search(message)
        if found:
            needed, unit, available, other = found.groups()
            return OutOfMemory(
                needed=int(float(needed) * _UNITS[unit]),
                available=int(float(available) * _UNITS[other]),
                preliminary=number == _PRELIMINARY,
            )
    # A new libtpu may say it in other words: a plan that took this for a crash, or for a fit, would
    # be wrong without a sound.
    raise ValueError(f"the compiler ran out of memory, in unknown words: {message[:500]}")
