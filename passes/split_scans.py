"""Run a long scan as several in a row, so that a program can be cut between them.

Before                                                After, with a few steps a part
    %4:f32[8] = scan %0 %1 %2 [length=24 ...]             %3:f32[12,4] = slice %2 [start_indices=(0, 0) ...]
                                                          %4:f32[12,4] = slice %2 [start_indices=(12, 0) ...]
                                                          %5:f32[8] = scan %0 %1 %3 [length=12 ...]
                                                          %6:f32[8] = scan %0 %5 %4 [length=12 ...]

A part takes over the carry of the one before it, and reads its own part of the inputs. What the parts leave step by
step is put together behind the last. A scan over a weight, such as a stack of layers, stays whole: its parts would copy
theirs out of the weights in every call. Relies on: nothing. Gives: no part is split again with the same bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil
from typing import Any

from jax import lax
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.costs import Costs
from coalesce.costs.program import equation_us

MOST = 16  # parts of a scan, unless more are asked for


def split_scans(
    program: ClosedJaxpr, n_weights: int, *, costs: Costs, longest_us: float, most: int = MOST
) -> ClosedJaxpr:
    """The program with scans of which no part takes longer than `longest_us`, as far as `most` parts of it can; the
    same object if all are short."""
    known: set[Any] = set(J.invars(program)[:n_weights])
    env: dict[Any, J.Atom] = {}
    splicer, changed = J.Splicer(), False
    for old in program.jaxpr.eqns:
        eqn = J.respell(old, [J.read(env, a) for a in old.invars], old.outvars)
        if all(isinstance(a, J.Literal) or a in known for a in eqn.invars):
            known.update(eqn.outvars)
        bounds = bounds_of(eqn, known, costs, longest_us, most)
        if len(bounds) < 3:
            splicer.eqns.append(eqn)
            continue
        changed = True
        parts = J.staged(in_parts(J.as_scan(eqn), bounds), eqn.invars)
        results = splicer.inline(parts, eqn.invars, like=eqn)
        env.update((v, r) for v, r in zip(eqn.outvars, results, strict=True) if not J.is_drop(v))
    if not changed:
        return program
    return J.close(J.invars(program), splicer.eqns, [J.read(env, a) for a in J.outvars(program)])


def bounds_of(eqn: J.Eqn, known: set[Any], costs: Costs, longest_us: float, most: int) -> list[int]:
    """The steps at which its parts begin, and its length."""
    if eqn.primitive.name != "scan":
        return []
    scan = J.as_scan(eqn)
    us = equation_us(eqn, costs)
    if us <= longest_us or any(a in known for a in scan.xs) or any(J.is_key(a.aval) for a in [*scan.init, *scan.xs]):
        return [0, scan.length]
    steps = max(1, int(longest_us * scan.length / us), ceil(scan.length / most))
    parts = ceil(scan.length / steps)
    return [i * scan.length // parts for i in range(parts + 1)]


def in_parts(scan: J.Scan, bounds: Sequence[int]) -> Callable[..., Any]:
    n_consts, n_carry = len(scan.consts), len(scan.init)

    def call(*args: Any) -> Any:
        consts, carry, xs = args[:n_consts], args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]
        spans = list(pairwise(bounds))
        own = [[lax.slice_in_dim(x, first, end) for x in xs] for first, end in spans]
        left: dict[int, Sequence[Any]] = {}
        for part in reversed(range(len(spans))) if scan.reverse else range(len(spans)):
            first, end = spans[part]
            run = J.rebuilt_scan(scan._replace(length=end - first), scan.body, n_consts)
            outs = run(*consts, *carry, *own[part])
            carry, left[part] = outs[:n_carry], outs[n_carry:]
        ys = zip(*(left[part] for part in range(len(spans))), strict=True)
        return [*carry, *(lax.concatenate(parts, 0) for parts in ys)]

    return call
