"""Equations run jointly on stacks whose padding is NaN or worse, for the tests of coalesce/joint.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from coalesce import jaxpr as J
from coalesce.joint import run
from coalesce.lanes import Joint
from coalesce.unify import largest
from tests.compare import assert_same
from tests.programs import Aval, kind_of
from tests.tenants import array

Shape = tuple[int, ...]

# Only move elements, or pick one.
EXACT = {"reshape", "transpose", "squeeze", "slice", "broadcast_in_dim", "reduce_max", "reduce_min", "select_n"}


def equation(fn: Callable[..., Any], *avals: Any) -> J.Eqn:
    """The one equation of a function of values; shapes alone are of float32."""
    structs = [Aval(a, jnp.float32) if isinstance(a, tuple) else a for a in avals]
    (eqn,) = jax.make_jaxpr(fn)(*structs).jaxpr.eqns
    return eqn


def reshape_to(x: Any, new: Shape) -> Any:
    """The equation, also where nothing changes; so below."""
    return lax.reshape_p.bind(x, new_sizes=new, dimensions=None, sharding=None)


def cut(x: Any, start: Sequence[int], limit: Sequence[int], strides: Sequence[int] | None = None) -> Any:
    steps = None if strides is None else tuple(strides)
    return lax.slice_p.bind(x, start_indices=tuple(start), limit_indices=tuple(limit), strides=steps)


def padding_of(aval: Any) -> Any:
    """What no result should depend on."""
    match kind_of(aval):
        case "f":
            return np.nan
        case "b":
            return True
    return jnp.iinfo(aval.dtype).min


def stack(columns: Sequence[Sequence[Any]], lanes: Sequence[int]) -> Joint:
    """Each member's values, one a lane, as the stack that a pack would leave."""
    shapes = tuple(tuple(values[0].shape) for values in columns)
    padded = largest(shapes)
    aval = columns[0][0]
    whole = np.full((sum(lanes), *padded), padding_of(aval), aval.dtype)
    rows = iter(range(len(whole)))
    for values in columns:
        for value in values:
            whole[next(rows), *map(slice, value.shape)] = value
    return Joint(jnp.asarray(whole), tuple(lanes), shapes)


def check_joint(eqns: Sequence[J.Eqn], lanes: Sequence[int], seed: int = 0) -> None:
    """Run equations as one on padded stacks, and each lane of each by itself."""
    rng = np.random.default_rng(seed)
    own = [
        [[array(J.aval_struct(a.aval), rng) for a in eqn.invars] for _ in range(n)]
        for eqn, n in zip(eqns, lanes, strict=True)
    ]
    stacks = [
        None if isinstance(atom, J.Literal) else stack([[operands[k] for operands in part] for part in own], lanes)
        for k, atom in enumerate(eqns[0].invars)
    ]

    def both(values: Any, own: Any) -> Any:
        args = [None if s is None else Joint(v, s.lanes, s.shapes) for s, v in zip(stacks, values, strict=True)]
        together = []
        for k, whole in enumerate(run(eqns, args)):
            shapes = tuple(J.shape(eqn.outvars[k]) for eqn in eqns)
            assert whole.shape == (sum(lanes), *largest(shapes))
            together.append([part.value for part in Joint(whole, tuple(lanes), shapes).parts()])
        alone = [[J.bind(eqn, with_literals(eqn, one)) for one in part] for eqn, part in zip(eqns, own, strict=True)]
        return together, alone

    together, alone = jax.jit(both)([None if s is None else s.value for s in stacks], own)
    exact = eqns[0].primitive.name in EXACT
    for k, parts in enumerate(together):
        for values, part in zip(parts, alone, strict=True):
            assert_same(list(values), [results[k] for results in part], [exact] * len(part))


def with_literals(eqn: J.Eqn, operands: Sequence[Any]) -> list[Any]:
    pairs = zip(eqn.invars, operands, strict=True)
    return [J.literal_value(a) if isinstance(a, J.Literal) else x for a, x in pairs]
