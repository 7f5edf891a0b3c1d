"""Products of what a scan reads step by step leave the scan, and run once for all of its steps.

Before                                                After
    %4:f32[8] = scan %0 %1 %2 %3 [length=5 ...]           %4:f32[5,1,8] = dot_general %3 %0 [precision=HIGHEST]
      body(%5:f32[4,8], %6:f32[8,8],                      %5:f32[8] = scan %1 %2 %4 [length=5 ...]
           %7:f32[1,8], %8:f32[1,4])                        body(%6:f32[8,8], %7:f32[1,8], %8:f32[1,8])
        %9:f32[1,8] = dot_general %8 %5                       %9:f32[1,8] = dot_general %7 %6
        %10:f32[1,8] = dot_general %7 %6                      %10:f32[1,8] = add %8 %9
        %11:f32[1,8] = add %9 %10                             ...
        ...

A step of a recurrent network multiplies its input, which is there from the start, and its carry, which is not. The
first product has a row a step: together they read their weights once instead of once a step. So a dot or a convolution
moves if one operand stays the same in every step, the other does not depend on the carry, and the weight is larger than
the result that is written and read instead. What its operand is computed from moves with it, and is handed to the scan
where the scan reads it too. It may be no heavy op that would not move by itself, nor what may not run for several steps
at once, as it may not for several lanes: random bits would be others. A value of all steps is kept at once, so it has
at most LARGEST bytes.

XLA multiplies and adds one row of float32 as it is, on every device; a product of many rows it may round to TF32 first,
where nobody asked for more than "high". What had one row a step then asks for the highest precision, so that its
results stay those of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.heavy import heavy_op, is_heavy, is_usual
from coalesce.passes.lane_rules import why_not_batched
from coalesce.program import Program

LARGEST = 16 * 1024 * 1024  # bytes, of a lane
WRITTEN_AND_READ = 2
HIGHEST = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


def lift_from_steps(program: Program) -> Program:
    main = without_products_of_steps(program.jaxpr)
    return program if main is program.jaxpr else program.with_jaxpr(main)


def without_products_of_steps(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    """The jaxpr with such products before its scans; the same object if there are none."""
    splicer = J.Splicer()
    env: dict[Any, J.Atom] = {}
    changed = False
    for old in jaxpr.jaxpr.eqns:
        ins = [J.read(env, a) for a in old.invars]
        inner = J.regions(old)
        new_inner = [without_products_of_steps(region) for region in inner]  # inner scans first: it may leave both
        same = all(a is b for a, b in zip([*ins, *inner], [*old.invars, *new_inner], strict=True))
        eqn = old if same else J.respell(old, ins, old.outvars, new_inner or None)
        found = products(J.as_scan(eqn)) if eqn.primitive.name == "scan" else None
        changed |= eqn is not old or found is not None
        if found is None:
            splicer.eqns.append(eqn)
            continue
        results = rebuilt(J.as_scan(eqn), found, eqn, splicer)
        env.update((v, r) for v, r in zip(old.outvars, results, strict=True) if not J.is_drop(v))
    if not changed:
        return jaxpr
    return J.close(J.invars(jaxpr), splicer.eqns, [J.read(env, a) for a in J.outvars(jaxpr)])


@dataclass(frozen=True)
class Products:
    """`before` computes `results` from the constants and the inputs of one step; `eqns` are those of the body that
    stay, and read them."""

    before: ClosedJaxpr
    results: list[J.Var]
    eqns: list[J.Eqn]


def products(scan: J.Scan) -> Products | None:
    """What of a scan's body may run ahead; None if nothing may."""
    if scan.length < 2:
        return None
    args = J.invars(scan.body)
    first_x = len(scan.consts) + len(scan.init)
    fixed, steps = set(args[: len(scan.consts)]), set(args[first_x:])
    eqns = scan.body.jaxpr.eqns
    chosen: list[J.Var] = []
    for eqn in eqns:
        read = [a for a in eqn.invars if not isinstance(a, J.Literal)]
        if J.regions(eqn) or not all(a in fixed or a in steps for a in read) or not may_run_at_once(eqn, steps):
            continue
        made = [v for v in eqn.outvars if not J.is_drop(v)]
        if all(a in fixed for a in read):
            fixed.update(made)
        elif scan.length * sum(J.nbytes(v.aval) for v in made) <= LARGEST and (not is_heavy(eqn) or pays(eqn, fixed)):
            steps.update(made)
            chosen += made if is_heavy(eqn) else []
    if not chosen:
        return None
    needed = behind(eqns, chosen)
    moved = {id(eqn) for eqn in needed if not all(v in fixed for v in eqn.outvars)}
    stay = [eqn for eqn in eqns if id(eqn) not in moved]
    read = {a for a in [*(a for e in stay for a in e.invars), *J.outvars(scan.body)] if not isinstance(a, J.Literal)}
    results = [v for eqn in needed if id(eqn) in moved for v in eqn.outvars if v in read]
    before = J.close([*args[: len(scan.consts)], *args[first_x:]], list(map(as_precise, needed)), results, "steps")
    return Products(before, results, stay)


def may_run_at_once(eqn: J.Eqn, steps: set[Any]) -> bool:
    """Whether an equation gives every step its own result when it runs for all of them. A function's own rule for
    that, of `custom_vmap`, is the user's."""
    flags = [not isinstance(a, J.Literal) and a in steps for a in eqn.invars]
    return not why_not_batched(eqn, flags) and "custom_vmap_call" not in J.primitives(eqn)


def pays(eqn: J.Eqn, fixed: set[Any]) -> bool:
    """Whether one operand is the same in every step, and larger than what the product costs when it has moved."""
    weights = [a for a in eqn.invars[:2] if not isinstance(a, J.Literal) and a in fixed]
    return bool(weights) and J.nbytes(weights[0].aval) > WRITTEN_AND_READ * J.nbytes(eqn.outvars[0].aval)


def as_precise(eqn: J.Eqn) -> J.Eqn:
    """The equation for all steps: a product of one row of float32 keeps what it has by itself."""
    if eqn.primitive.name != "dot_general" or not is_usual(eqn.params["precision"]):
        return eqn
    op = heavy_op(eqn)
    if 1 not in (op.m, op.n) or {str(op.lhs.dtype), str(op.rhs.dtype)} != {"float32"}:
        return eqn
    return eqn.replace(params=eqn.params | {"precision": HIGHEST})


def behind(eqns: Sequence[J.Eqn], results: Sequence[J.Var]) -> list[J.Eqn]:
    """The equations that the results are computed by, in order."""
    wanted: set[Any] = set(results)
    found: list[J.Eqn] = []
    for eqn in reversed(eqns):
        if wanted.intersection(eqn.outvars):
            found.append(eqn)
            wanted.update(a for a in eqn.invars if not isinstance(a, J.Literal))
    return found[::-1]


def rebuilt(scan: J.Scan, found: Products, eqn: J.Eqn, splicer: J.Splicer) -> list[J.Atom]:
    """Emit the products of all steps, and the scan that reads them; returns its results."""
    given = [*scan.consts, *scan.xs]
    start = len(splicer.eqns)
    ahead = splicer.inline(J.staged(all_steps(found.before, len(scan.consts)), given), given)
    splicer.eqns[start:] = [from_source(made, found.before, eqn) for made in splicer.eqns[start:]]
    body = J.close([*J.invars(scan.body), *found.results], found.eqns, J.outvars(scan.body))
    operands = [*scan.consts, *scan.init, *scan.xs, *ahead]
    return splicer.inline(J.staged(J.rebuilt_scan(scan, body, len(scan.consts)), operands), operands, like=eqn)


def all_steps(before: ClosedJaxpr, n_consts: int) -> Callable[..., Any]:
    """What `before` computes of a step, of all steps: from its constants, and from inputs with a leading axis."""

    def call(*args: Any) -> Any:
        consts, xs = args[:n_consts], args[n_consts:]
        return jax.vmap(lambda *x: J.evaluate(before, [*consts, *x]))(*xs)

    return call


def from_source(made: J.Eqn, before: ClosedJaxpr, scan: J.Eqn) -> J.Eqn:
    """What an axis for the steps took besides comes from where the scan does."""
    own = any(made.source_info.traceback is eqn.source_info.traceback for eqn in before.jaxpr.eqns)
    return made if own else made.replace(source_info=scan.source_info)
