"""One forward pass for several losses: what a tower computed is handed to whoever asks again.

No objective knows of it. While `shared_forward` is open, a call of a tower's method that was made
before, with the same parameters and the same inputs, gives what that call gave. In the program
there is then one forward pass, and one backward pass of the sum of the gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.extend.core import get_opaque_trace_state


@contextlib.contextmanager
def shared_forward() -> Iterator[None]:
    """Makes equal calls of a module's shared methods only once, within this context.

    A module lists its shared methods in a class attribute `SHARED`: method -> names of the fields
    that do not change the method's result. Two calls are equal if the other fields, the parameters
    and the arguments are the same. Random keys are not compared: every caller gets the stochastic
    depth of the first call.
    """
    results: dict[Hashable, tuple[Any, Any]] = {}  # key of a call -> (trace it ran in, its result)

    def intercept(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module, method = context.module, context.method_name
        without = getattr(module, "SHARED", {}).get(method)
        if without is None:
            return call(*args, **kwargs)
        given = (module.variables.get("params"), args, kwargs)
        key = (
            method,
            _settings(module, without),
            *(_Same(leaf) for leaf in jax.tree.leaves(given, is_leaf=lambda x: x is None)),
            jax.tree.structure(given),
        )
        # A tracer from the body of a scan must not be used outside of it (a leaked tracer), so a
        # result counts only within the trace that computed it.
        now = get_opaque_trace_state()
        if key not in results or results[key][0] != now:
            results[key] = now, call(*args, **kwargs)
        return results[key][1]

    with nn.intercept_methods(intercept):
        yield


def _settings(module: nn.Module, without: tuple[str, ...]) -> tuple[Hashable, ...]:
    """Returns the class of a module and its fields, except the ones named in `without`."""
    names = {field.name for field in dataclasses.fields(module)} - {"parent", "name", *without}
    return (type(module), *((name, getattr(module, name)) for name in sorted(names)))


class _Same:
    """Compares plain values by value, methods by their objects, and arrays by identity."""

    def __init__(self, value: Any):
        self._value = value  # keeps the array alive, so that its id is not given to another
        if inspect.ismethod(value):
            self._key = (value.__func__, value.__self__)
        elif value is None or isinstance(value, bool | int | float | str):
            self._key = value
        else:
            self._key = id(value)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self._key == other._key
