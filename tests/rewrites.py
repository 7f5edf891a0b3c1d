"""What every pass over one program must keep, and the text that its goldens hold."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

import coalesce
from coalesce import jaxpr as J
from coalesce.program import check, Program
from tests.alone import plain
from tests.compare import assert_same

Pass = Callable[[Program], Program]


def rewritten(run: Pass, fn: Callable[..., Any], params: Any, *inputs: Any, first: Sequence[Pass] = ()) -> str:
    """Trace a function, run `first` and then the pass, check what it made, and print both programs."""
    before = coalesce.trace(fn, params, *inputs, name="a")
    for earlier in first:
        before = earlier(before)
    return f"{before}\n\n# {run.__name__}\n\n{checked(run, before)}"


def checked(run: Pass, before: Program) -> Program:
    """The pass's result: well formed, of the same meaning, from the same source lines, and left alone the next time."""
    after = run(before)
    check(after, strict=True)
    assert run(after) is after
    inputs = [example(slot.aval, seed) for seed, slot in enumerate(before.inputs)]
    assert_same(plain(evaluate(after, inputs)), plain(evaluate(before, inputs)))
    assert sources(after) <= sources(before)
    return after


def evaluate(program: Program, inputs: Sequence[Any]) -> list[Any]:
    """The flat outputs of a program, interpreted under jit."""

    def run(raw: list[Any], inputs: Sequence[Any]) -> list[Any]:
        weights = raw if program.prepare is None else J.evaluate(program.prepare, raw)
        return J.evaluate(program.jaxpr, [*weights, *inputs])

    return jax.jit(run)([leaf.value for leaf in program.leaves], inputs)


def example(aval: Any, seed: int) -> jax.Array:
    normal = jax.random.normal(jax.random.key(seed), aval.shape)
    return (normal > 0) if aval.dtype == bool else (2 * normal).astype(aval.dtype)


def equations(program: Program) -> list[Any]:
    """Every equation of a program and of what prepares its weights, those of loop bodies included."""
    return [eqn for jaxpr in (program.jaxpr, program.prepare) if jaxpr is not None for eqn in J.walk(jaxpr)]


def sources(program: Program) -> set[str]:
    return {J.source(eqn) for eqn in equations(program)}
