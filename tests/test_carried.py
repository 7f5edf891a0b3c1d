"""Jaxprs that go to another process come back as what they were, or are refused."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive

import coalesce
from coalesce import jaxpr as J
from coalesce.passes.inline import flatten
from coalesce.passes.pipeline import normalise
from coalesce.program import Program
from coalesce.runtime.tenancy import bare, normal_form
from coalesce.serving.executable import executable_recipe, Lanes
from coalesce.serving.fit import fit
from coalesce.serving.making import Recipe
from coalesce.serving.schema import plan_schema
from coalesce.structure import canonical
from coalesce.text import program_lines
from tests.serving import CPU

WEIGHTS = [np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32) for _ in range(2)]
X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
INDICES = np.array([1, 7], np.int32)


def scans(ws: Any, x: jax.Array) -> Any:
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, jnp.stack(ws))


def loops(ws: Any, x: jax.Array) -> jax.Array:
    small = lax.while_loop(lambda c: jnp.max(jnp.abs(c)) > 1, lambda c: c / 2, x)
    return lax.cond(small[0, 0] > 0, lambda: jax.nn.relu(small @ ws[0]), lambda: jax.nn.gelu(small @ ws[1]))


def takes(ws: Any, x: jax.Array) -> jax.Array:
    """Rows that are not there are NaN: a number that is not equal to itself stands in the program."""
    return jnp.take(ws[0], INDICES, axis=0) + jnp.sum(x) * 2


def draws(ws: Any, x: jax.Array) -> jax.Array:
    keys = jax.random.split(jax.random.key(3), 2)
    return x + jax.random.uniform(keys[0], x.shape) @ ws[0] + jax.random.normal(keys[1], x.shape)


def solves(ws: Any, x: jax.Array) -> jax.Array:
    """With calls in its parameters, of which nobody has said where they run: JAX has one word for that."""
    return jnp.linalg.solve(ws[0] + 4 * jnp.eye(4), x.T)


def convolves(ws: Any, x: jax.Array) -> jax.Array:
    with jax.named_scope("image"):
        image = jnp.astype(x.reshape(1, 2, 4, 1), jnp.bfloat16)
    return lax.conv(image, jnp.astype(ws[0].reshape(2, 2, 2, 2), jnp.bfloat16), (1, 1), "SAME")


def traced(fn: Callable[..., Any]) -> Program:
    return normalise(coalesce.trace(fn, WEIGHTS, X, name="t")).program


@pytest.mark.parametrize("fn", [scans, loops, takes, draws, solves, convolves])
def test_what_comes_back_is_the_same_program(fn):
    """Of one family with what was sent, also by a reader that has seen neither; with the same results."""
    program = traced(fn)
    back = J.loads(J.dumps([program.jaxpr, program.prepare]))
    for jaxpr, again in zip((program.jaxpr, program.prepare), back, strict=True):
        assert str(program.with_jaxpr(program.jaxpr, jaxpr)) == str(program.with_jaxpr(program.jaxpr, again))
        assert jaxpr is not None and canonical(jaxpr).key == canonical(again).key
        J.verify(again)
    assert str(program) == str(program.with_jaxpr(back[0]))
    assert [J.scopes(eqn) for eqn in J.walk(back[0])] == [J.scopes(eqn) for eqn in J.walk(program.jaxpr)]
    given = [np.ones(J.shape(v), J.dtype(v)) for v in J.invars(program.jaxpr)]
    for got, want in zip(J.evaluate(back[0], given), J.evaluate(program.jaxpr, given), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("fn", [scans, loops, takes, draws, convolves])
def test_recipes_and_plans_are_the_same_there(fn):
    """From the traced program to what XLA gets, each step on what the step before it sent."""
    program = coalesce.trace(fn, WEIGHTS, X, name="t")
    call, given, _ = J.loads(J.dumps((normal_form, (bare(program),), ()), inlined=True))
    normal = J.loads(J.dumps(call(*given)))
    here, there = (fit([program.with_jaxpr(*own)]) for own in (normal_form(bare(program)), normal))
    assert here.key == there.key
    plans = [plan_schema(there, CPU, 2), plan_schema(there, CPU, 2, call=sent)]
    assert len({str([own.slabs, own.arrays, own.places, own.segments[0].registers]) for own in plans}) == 1
    assert plans[1].templates[0] is there.templates[0] and plans[1].options is CPU
    at = len(plans[1].segments[0]) - 1
    lanes = Lanes(plans[1].bank, plans[1].segments[0], 2, 4, at, 8 if at else 0)
    recipe = partial(executable_recipe, (lanes,), None)
    assert lowered(recipe) == lowered(J.loads(J.dumps(recipe)))


def sent(function: Callable[..., Any], *given: Any, known: Any) -> Any:
    """As coalesce.runtime.apart and its other end do it."""
    function, given, there = J.loads(J.dumps((function, given, known)))
    return J.loads(J.dumps(function(*given), there), known)


def lowered(recipe: Recipe) -> str:
    jitted = recipe()
    with J.precision_as_traced():
        return jitted.function.lower(*jitted.arguments).as_text()


def test_what_both_have_is_not_sent():
    program = traced(scans)
    sent = J.dumps((program.jaxpr, [program.jaxpr]), [program.jaxpr])
    assert len(sent) < 100 < len(J.dumps(program.jaxpr))
    first, (second,) = J.loads(sent, [program.jaxpr])
    assert first is second is program.jaxpr
    one, other = J.loads(J.dumps([program.jaxpr, program.jaxpr]))
    assert one is other


def test_the_context_of_an_equation_is_sent_with_it():
    def odd(x: jax.Array) -> jax.Array:
        with J.cpu_small_call():
            return jax.jit(jnp.sin)(x)

    with jax.threefry_partitionable(False):
        jaxpr, _ = J.stage(odd, X)
    assert jaxpr.jaxpr.eqns[0].ctx.xla_metadata
    back = J.loads(J.dumps(jaxpr))
    assert [J.context_key(e) for e in J.walk(back)] == [J.context_key(e) for e in J.walk(jaxpr)]
    with J.context_of(back.jaxpr.eqns[0]):
        assert not jax.config.jax_threefry_partitionable  # pyright: ignore


def test_types_of_literals_are_kept():
    jaxpr, _ = J.stage(lambda x: (x * 2.5, x + np.float32(1), lax.add(x, jnp.int32(3).astype(jnp.float32))), X)
    for eqn, again in zip(jaxpr.jaxpr.eqns, J.loads(J.dumps(jaxpr)).jaxpr.eqns, strict=True):
        for a, b in zip(eqn.invars, again.invars, strict=True):
            assert (type(a), a.aval) == (type(b), b.aval)
            if isinstance(a, J.Literal):
                assert (type(a.val), a.val) == (type(b.val), b.val) and a.val.aval == b.val.aval


own_p = Primitive("own")


HELD = jnp.ones((4, 4))


class Owner:
    """Of this module."""


REFUSED = [
    (lambda: J.stage(lambda x: jax.pure_callback(np.sin, X, x), X)[0], "pure_callback calls back"),
    (lambda: J.stage(lambda x: jax.debug.print("{}", x), X)[0], "has an effect on this process"),
    (lambda: jnp.ones(3), r"an array of float32\[3\] on a device"),
    (lambda: J.stage(lambda x: x @ HELD, X)[0], "constants|on a device"),
    (lambda: Owner(), "of a module that the other process does not have"),
    (lambda: traced, "of a module that the other process does not have"),
    (lambda: own_p, "the primitive own is of no module"),
    (threading.Lock, "cannot pickle"),
]


@pytest.mark.parametrize(("make", "why"), REFUSED)
def test_what_would_be_something_else_there_is_refused(make, why):
    with pytest.raises(J.Uncarried, match=why):
        J.dumps(make())


READER = """
import sys
import threading
from coalesce.jaxpr import loads
from coalesce.runtime.tenancy import bare, normal_form
from coalesce.serving.executable import executable_recipe, Lanes
from coalesce.serving.fit import fit
from coalesce.serving.making import Recipe
from coalesce.serving.schema import plan_schema
from coalesce.structure import canonical
from coalesce.text import program_lines
from tests.serving import CPU

print("\\n".join(program_lines("t", loads(sys.stdin.buffer.read()), 2)))
"""


def test_a_process_that_has_traced_nothing_reads_it():
    jaxpr, _ = J.stage(loops, WEIGHTS, X)
    done = normalise(coalesce.trace(loops, WEIGHTS, X, name="t")).program.jaxpr
    with pytest.raises(J.Uncarried, match="has derivatives of its own"):
        J.dumps(jaxpr)
    bare = J.loads(J.dumps(jaxpr, inlined=True))
    assert str(flatten(bare)) == str(flatten(jaxpr))
    sent = J.dumps(done)
    found = subprocess.run([sys.executable, "-c", READER], input=sent, capture_output=True, check=True, timeout=120)
    assert found.stdout.decode().splitlines() == list(program_lines("t", done, 2))
