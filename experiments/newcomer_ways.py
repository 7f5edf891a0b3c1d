"""Ways to take a newcomer in: as it is done, and without one thing or another that spares the others.

present     as it is done
before      without any of the following
here        planned, lowered and compiled in the process that serves
late        executables run first on the driver's thread
graphs      what runs for a tenant has CUDA graphs too
bare        newcomers have none at all: what their executables cost those of others, and lose by themselves
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, ExitStack
from typing import Any
from unittest.mock import patch

from coalesce.runtime import first_runs, making as made_here
from coalesce.runtime.apart import Apart
from coalesce.serving import making

Switch = Callable[[], Any]  # a context in which it is done so


@contextmanager
def here() -> Iterator[None]:
    with patch.object(Apart, "compile", lambda *_: None), patch.object(Apart, "call", lambda *_, **__: None):
        yield


def late() -> Any:
    return patch.object(first_runs, "RUNS", 0)


def graphs() -> Any:
    return patch.object(making, "WITHOUT_GRAPH", {})


def bare() -> Any:
    return patch.object(made_here, "UNTIMED", {**making.UNTIMED, **making.WITHOUT_GRAPH})


@contextmanager
def before() -> Iterator[None]:
    with here(), late(), graphs():
        yield


WAYS: Mapping[str, Switch] = {
    "present": ExitStack,
    "before": before,
    "here": here,
    "late": late,
    "graphs": graphs,
    "bare": bare,
}
