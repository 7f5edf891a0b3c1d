"""Scans, conditionals and loops whose bodies are blocks of drawn ops, and the strategies that put it all together.

`models()` draws one function, `tenants()` families of tenants that run a few of them. See tests/programs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

from tests.program_heavy import HEAVY
from tests.program_ops import LIGHT
from tests.programs import array, Aval, Block, fit, kind_of, Model, Op, Ref, Scope, Tenant

DEPTH = 2  # how deep control flow nests


def body(draw: Any, scope: Scope, args: Sequence[Aval], exact: Sequence[bool] = ()) -> Block:
    inner = Scope(args, exact or [False] * len(args), scope.dtype, scope.depth + 1)
    extend(draw, inner, draw(st.integers(1, 2)))
    return inner.block()


def positives(x: Any) -> Any:
    """A small integer that tells lanes apart."""
    return jnp.sum(x if x.dtype == jnp.bool_ else x > 0, dtype=jnp.int32)


def scanned(draw: Any, scope: Scope, i: int) -> Op:
    """Over the leading dimension of the value, with a carry, constants of the outside and weights in the body."""
    x = scope.values[i]
    xs = Aval(x.shape or (1,), x.dtype)
    carry = Aval(tuple(draw(st.lists(st.integers(1, 3), max_size=2))), x.dtype)
    j = draw(st.sampled_from(scope.candidates("f")))
    outer = scope.values[j]
    block = body(draw, scope, [carry, Aval(xs.shape[1:], xs.dtype), outer])
    reverse, unroll, init = draw(st.booleans()), draw(st.integers(1, 2)), draw(st.booleans())
    first = draw(st.booleans())

    def apply(w: Any, v: Any, const: Any) -> Any:
        def step(c: Any, item: Any) -> Any:
            new = (c + jnp.tanh(block.result(w, [c, item, const], c))) / 2
            return new, (item, c)

        start = jnp.resize(v, carry.shape) if init else jnp.zeros(carry.shape, v.dtype)
        end, (ys, carries) = lax.scan(step, start, v.reshape(xs.shape), reverse=reverse, unroll=unroll)
        return end if first else jnp.concatenate([ys.reshape(-1), carries.reshape(-1)])

    return Op(f"scan({block})", (i, j), block.weights, apply)


def branched(draw: Any, scope: Scope, i: int) -> Op | None:
    """By an exact value of any kind, which differs between lanes unless it is a constant."""
    chosen = scope.candidates("fib", exact=True)
    if not chosen:
        return None
    j = draw(st.sampled_from(chosen))
    x = scope.values[i]
    blocks = [body(draw, scope, [x]) for _ in range(draw(st.integers(2, 3)))]
    like = draw(st.sampled_from([(), (2,), x.shape]))

    def apply(w: Any, v: Any, by: Any) -> Any:
        rest = list(w)
        parts = [[rest.pop(0) for _ in b.weights] for b in blocks]

        def branch(b: Block, part: Any) -> Any:
            return lambda operand: b.result(part, [operand], Aval(like, v.dtype))

        index = positives(by) % len(blocks)
        return lax.switch(index, [branch(b, part) for b, part in zip(blocks, parts, strict=True)], v)

    weights = tuple(w for b in blocks for w in b.weights)
    return Op(f"cond({' | '.join(map(str, blocks))})", (i, j), weights, apply)


def looped(draw: Any, scope: Scope, i: int) -> Op | None:
    """fori_loop with a fixed or an exact trip count; the latter is a while loop that ends at a lane's own time."""
    counts = scope.candidates("fib", exact=True)
    x = scope.values[i]
    block = body(draw, scope, [x])
    j = draw(st.sampled_from([*counts, *counts, None])) if counts else None

    def apply(w: Any, v: Any, *count: Any) -> Any:
        trips = positives(count[0]) % 4 if count else 2
        return lax.fori_loop(0, trips, lambda _, c: (c + jnp.tanh(block.result(w, [c], c))) / 2, v)

    return Op(f"loop({block})", (i,) if j is None else (i, j), block.weights, apply)


CONTROL = {"f": (scanned, branched, looped, looped), "i": (), "b": ()}


def extend(draw: Any, scope: Scope, n: int) -> None:
    """Draw up to n ops into the scope, most of them on the latest value."""
    for _ in range(n):
        found = scope.candidates("fib")
        i = draw(st.sampled_from(found[:1] * len(found) + found))
        kind = kind_of(scope.values[i])
        tables = [LIGHT, HEAVY, CONTROL] if scope.depth < DEPTH else [LIGHT, HEAVY]
        rules = draw(st.sampled_from([t[kind] for t in tables if t[kind]]))
        op = draw(st.sampled_from(rules))(draw, scope, i)
        if op is not None:
            scope.add(op)


@st.composite
def models(draw: Any, max_ops: int = 6, dtypes: Sequence[Any] = (jnp.float32,)) -> Model:
    """A function of one to three inputs, the first of them of floats."""
    dtype = draw(st.sampled_from(dtypes))
    shapes = st.sampled_from([2, 3, 4, 1, 0]).flatmap(lambda rank: st.tuples(*[st.integers(1, 6)] * rank))
    kinds = [dtype, *draw(st.lists(st.sampled_from([jnp.int32, jnp.bool_, dtype]), max_size=2))]
    inputs = tuple(Aval(draw(shapes), jnp.dtype(kind)) for kind in kinds)
    scope = Scope(inputs, [True] * len(inputs), dtype)
    extend(draw, scope, draw(st.integers(1, max_ops)))
    block = scope.block()
    results = block.sinks(len(inputs))
    if len(results) > 1 and draw(st.booleans()):
        results = results[1:]  # something is computed in vain
    outputs: dict[str, Any] = {"results": [Ref(i, scope.exact[i]) for i in results]}
    if draw(st.booleans()):
        outputs["more"] = (Ref(0, True), 1.5, np.arange(3, dtype=np.int32))
    return Model(block, inputs, outputs, draw(st.booleans()), draw(st.sampled_from([1.0, 2.0])))


@st.composite
def tenants(
    draw: Any, model: st.SearchStrategy[Model] | None = None, max_families: int = 2, min_lanes: int = 1
) -> list[Tenant]:
    """Tenants of a few models in any order; weights of one model are shared between its lanes in drawn groups."""
    found: list[Tenant] = []
    for _ in range(draw(st.integers(1, max_families))):
        if found and draw(st.booleans()):
            chosen = replace(found[0].model, gain=0.5)  # nearly, not quite, the same family
        else:
            chosen = draw(model if model is not None else models())
        found += family(draw, chosen, draw(st.sampled_from([n for n in (2, 3, 4, 1) if n >= min_lanes])))
    return draw(st.permutations(found))


def family(draw: Any, model: Model, lanes: int) -> list[Tenant]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = model.block.weights
    sharing = draw(st.sampled_from(["none", "all", "some"]))
    declared = sharing != "none" and draw(st.booleans())
    own: list[list[Any]] = []
    for w in weights:
        group = draw(st.lists(st.integers(0, 1), min_size=lanes, max_size=lanes)) if sharing == "some" else [0] * lanes
        arrays = {g: array(w, rng, 0.4) for g in sorted(set(group))}
        own.append([array(w, rng, 0.4) if sharing == "none" else arrays[g] for g in group])
    unused = [array(Aval((2,), jnp.dtype(jnp.float32)), rng) for _ in range(lanes)]
    result = []
    for lane in range(lanes):
        ops = [column[lane] for column in own]
        if declared:
            ops = [jnp.array(w, copy=True) for w in ops]  # equal bytes in arrays of their own
        params = {"ops": ops, "unused": unused[lane]}
        inputs = model.pack([array(v, rng) for v in model.inputs])
        fn = model if draw(st.booleans()) else wrapped(model)
        result.append(Tenant(model, fn, params, inputs, ops if declared else None))
    return result


def wrapped(model: Model) -> Any:
    """Another function object, so that the tenant is traced by itself."""
    return lambda params, *inputs: model(params, *inputs)


def reference(tenant: Tenant) -> Any:
    """The tenant in float32 throughout."""

    def wide(x: Any) -> Any:
        return x.astype(jnp.float32) if kind_of(x) == "f" else x

    return jax.jit(tenant.model)(jax.tree.map(wide, tenant.params), *jax.tree.map(wide, tenant.inputs))
