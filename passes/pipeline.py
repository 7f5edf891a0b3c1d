"""The passes over one program, in order, and the driver that checks, times and records each.

normalise(program).program      the program that families are found among
normalise(program).steps        what each pass made of it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from coalesce.errors import IRError, PassError
from coalesce.passes.canonicalize import canonicalize
from coalesce.passes.cse import cse
from coalesce.passes.dce import dce
from coalesce.passes.hoist_weights import hoist_weights
from coalesce.passes.inline import inline
from coalesce.passes.lift_from_steps import lift_from_steps
from coalesce.passes.merge_products import merge_products
from coalesce.program import check, Program

ProgramPass = Callable[[Program], Program]

PROGRAM_PASSES: tuple[ProgramPass, ...] = (
    inline,  # calls away: everything after compares flat programs
    lift_from_steps,  # before dce, which takes what a scan no longer reads out of its operands
    dce,  # early, so that nobody canonicalises dead code
    canonicalize,  # one spelling per operation, so that equal work looks equal and 1x1 convs are dots
    cse,  # canonical forms leave copies of one value, and casts of one input are one
    merge_products,  # then it shows which products read the same; before their weights are laid side by side
    hoist_weights,  # what the weights alone decide runs once a tenant
    cse,  # hoisting leaves copies of one value
    dce,  # and operands that nobody reads any more
)


OPTIONAL = ("lift_from_steps", "cse", "merge_products", "hoist_weights")  # what programs compute right without, too


@dataclass(frozen=True)
class Step:
    """A pass's name, what it returned and how long it took."""

    name: str
    program: Program
    seconds: float
    changed: bool


@dataclass(frozen=True)
class Normalised:
    program: Program
    steps: tuple[Step, ...]


def normalise(program: Program, passes: Sequence[ProgramPass] = PROGRAM_PASSES, strict: bool = False) -> Normalised:
    """Run the passes; the driver checks the program after each. `strict` adds JAX's own type check.

    Raises:
      PassError: a pass raised or returned a program that is not well formed; names the passes that ran before it.
    """
    check(program, strict)
    steps: list[Step] = []
    for run in passes:
        start = perf_counter()
        try:
            after = run(program)
            seconds = perf_counter() - start
            if after is not program:
                check(after, strict)
        except Exception as e:
            kind = "handed on a broken program" if isinstance(e, IRError) else "failed"
            before = ", ".join(step.name for step in steps) or "none"
            raise PassError(
                f"{name_of(run)} {kind} (ran before: {before}): tenant {program.name!r}: {type(e).__name__}: {e}"
            ) from e
        steps.append(Step(name_of(run), after, seconds, after is not program))
        program = after
    return Normalised(program, tuple(steps))


def name_of(run: Callable[..., object]) -> str:
    return getattr(run, "__name__", None) or getattr(getattr(run, "func", run), "__name__", repr(run))
