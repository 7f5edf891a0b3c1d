"""What a command works on: the programs that a function of the user's returns, or some tenants of one of our models.

Targets are plain values, so that a process started for it finds the same programs again.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import reduce
from typing import Any

import jax

from coalesce.errors import CoalesceError
from coalesce.models import by_name
from coalesce.program import Program
from coalesce.tracing import trace

EXPECTED = "expected a function without parameters that returns a list of what coalesce.trace gave"


class UsageError(CoalesceError):
    """The command line names something that is not there, or not what it should be."""


@dataclass(frozen=True)
class Function:
    """`MODULE:FUNCTION`, as a user gives it."""

    name: str

    def __call__(self) -> list[Program]:
        return programs_of(self.name)


@dataclass(frozen=True)
class Tenants:
    """Tenants of a model of coalesce.models, without weights, for requests of one row."""

    model: str
    dtype: str
    count: int

    def __call__(self) -> list[Program]:
        try:
            model = by_name(self.model, dtype=self.dtype, param_dtype=self.dtype)
        except ValueError as e:
            raise UsageError(str(e)) from None
        params = jax.eval_shape(model.init, jax.random.key(0))
        return [trace(model.apply, params, *model.inputs(), name=f"tenant {i}") for i in range(self.count)]


def programs_of(target: str) -> list[Program]:
    """Call the function that `MODULE:FUNCTION` names.

    Raises:
      UsageError: there is no such module or function, it has parameters, or it returned something else.
    """
    function = find(target)
    needed = required_parameters(function)
    if needed:
        raise UsageError(f"{target} needs {', '.join(needed)}; {EXPECTED}")
    result = function()
    if isinstance(result, Program):
        raise UsageError(f"{target} returned one program; return a list, [program]")
    if not isinstance(result, list | tuple):
        raise UsageError(f"{target} returned a {type(result).__name__}; {EXPECTED}")
    if not result:
        raise UsageError(f"{target} returned no programs; {EXPECTED}")
    for i, item in enumerate(result):
        if not isinstance(item, Program):
            raise UsageError(f"{target} returned a list whose item {i} is a {type(item).__name__}; {EXPECTED}")
    return list(result)


def required_parameters(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-in callables tell nobody
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def find(target: str) -> Callable[..., Any]:
    """The function called `MODULE:FUNCTION`; the current directory is importable, as with `python -m`."""
    module_name, _, path = target.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")]):
        raise UsageError(f"{target!r} is not of the form MODULE:FUNCTION, such as serving.tenants:programs")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module_name}.".startswith(f"{e.name}."):
            raise  # the module is there; what it imports is not
        hint = "; leave .py out" if module_name.endswith(".py") else ""
        raise UsageError(f"no module {module_name!r} in {os.getcwd()} or elsewhere on sys.path{hint}") from None
    try:
        found = reduce(getattr, path.split("."), module)
    except AttributeError:
        close = "".join(f"; did you mean {name!r}?" for name in get_close_matches(path, dir(module), n=1))
        raise UsageError(f"module {module_name!r} has no {path!r}{close}") from None
    if not callable(found):
        raise UsageError(f"{target} is a {type(found).__name__}; {EXPECTED}")
    return found
