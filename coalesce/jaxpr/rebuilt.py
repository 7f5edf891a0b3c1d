"""Scan, while and cond traced anew around other regions: their parameters differ between JAX versions, the signature of
`lax.scan` does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn as Eqn

from coalesce.jaxpr.build import stage
from coalesce.jaxpr.control import as_cond, as_scan, as_while, Scan
from coalesce.jaxpr.read import Atom, aval_struct, outvars, shape
from coalesce.jaxpr.run import context_of, evaluate, precision_as_traced, set_weak_type


def staged(call: Callable[..., Any], args: Sequence[Atom]) -> ClosedJaxpr:
    """Each equation in the context, and from the source line, that it was traced in."""
    with precision_as_traced():
        return stage(call, *(aval_struct(a.aval) for a in args))[0]


def rebuilt(eqn: Eqn, fixed: Sequence[Sequence[Atom]], inner: Sequence[ClosedJaxpr]) -> tuple[ClosedJaxpr, list[Atom]]:
    """(a scan, while or cond around other regions, what it takes). Each region gets other operands in the place of its
    loop-invariant ones; a while has one predicate, whatever that of `eqn` is."""
    match eqn.primitive.name:
        case "scan":
            scan, (consts,), (body,) = as_scan(eqn), fixed, inner
            args, call = [*consts, *scan.init, *scan.xs], rebuilt_scan(scan, body, len(consts))
        case "while":
            loop, (asked, done), (runs, body) = as_while(eqn), fixed, inner
            args, call = [*asked, *done, *loop.init], rebuilt_while(runs, body, len(asked), len(done))
        case _:
            args = [as_cond(eqn).index, *(a for part in fixed for a in part)]
            call = rebuilt_cond(inner, [len(part) for part in fixed])
    with context_of(eqn):  # what is added comes from where the loop does
        return staged(call, args), args


def rebuilt_scan(scan: Scan, body: ClosedJaxpr, n_consts: int) -> Callable[..., Any]:
    n_carry = len(scan.init)

    def call(*args: Any) -> Any:
        consts, init, xs = args[:n_consts], args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]

        def step(carry: Any, x: Any) -> Any:
            outs = evaluate(body, [*consts, *carry, *x])
            return tuple(outs[:n_carry]), tuple(outs[n_carry:])

        carry, ys = lax.scan(step, tuple(init), tuple(xs), scan.length, scan.reverse, scan.unroll)
        return [*carry, *ys]

    return call


def rebuilt_while(cond: ClosedJaxpr, body: ClosedJaxpr, n_cond: int, n_body: int) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        c, b, init = args[:n_cond], args[n_cond : n_cond + n_body], args[n_cond + n_body :]
        return while_any(
            lambda carry: evaluate(cond, [*c, *carry])[0],
            lambda carry: evaluate(body, [*b, *carry]),
            init,
            len(shape(outvars(cond)[0])),
        )

    return call


def while_any(
    runs: Callable[[Any], Any], body: Callable[[Any], Sequence[Any]], init: Sequence[Any], batch: int
) -> Sequence[Any]:
    """`lax.while_loop`, also with a predicate that has dimensions, as `jax.vmap` makes it: they lead in all that is
    carried. The loop runs as long as any row does, and rows that are done keep what they have."""

    def any_runs(carry: Any) -> Any:
        return lax.reduce_or(runs(carry), tuple(range(batch)))

    def step(carry: Any) -> Any:
        go = runs(carry)
        return tuple(kept(go, new, old) for new, old in zip(body(carry), carry, strict=True))

    if not batch:
        return lax.while_loop(runs, lambda carry: tuple(body(carry)), tuple(init))
    return lax.while_loop(any_runs, step, tuple(init))


def kept(go: Any, new: Any, old: Any) -> Any:
    chosen = lax.select(lax.broadcast_in_dim(go, new.shape, tuple(range(go.ndim))), new, old)
    return set_weak_type(chosen, bool(getattr(jax.typeof(old), "weak_type", False)))


def rebuilt_cond(branches: Sequence[ClosedJaxpr], sizes: Sequence[int]) -> Callable[..., Any]:
    def call(index: Any, *args: Any) -> Any:
        cuts, rest = [], iter(args)
        for n in sizes:
            cuts.append([next(rest) for _ in range(n)])
        return lax.switch(index, [lambda b=b, a=a: evaluate(b, a) for b, a in zip(branches, cuts, strict=True)])

    return call
