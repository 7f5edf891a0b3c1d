"""Control flow, whose parameters differ between JAX versions: taken apart here, rebuilt by tracing `lax`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, JaxprEqn as Eqn, Var

from coalesce.jaxpr.read import Atom, closed, invars, outvars, shape


class Scan(NamedTuple):
    consts: list[Atom]
    init: list[Atom]
    xs: list[Atom]
    body: ClosedJaxpr  # (consts, carry, x) -> (carry, y)
    length: int
    reverse: bool
    unroll: Any


class While(NamedTuple):
    cond_consts: list[Atom]
    body_consts: list[Atom]
    init: list[Atom]
    cond: ClosedJaxpr  # (cond_consts, carry) -> bool, or a bool for each row
    body: ClosedJaxpr  # (body_consts, carry) -> carry


class Cond(NamedTuple):
    index: Atom
    operands: list[Atom]
    branches: tuple[ClosedJaxpr, ...]


def as_scan(eqn: Eqn) -> Scan:
    params = eqn.params
    if "num_consts" in params:
        consts, carry = params["num_consts"], params["num_carry"]
    else:  # JAX 0.11 and later
        consts, carry = (len(part) for part in params["ft_in"].unpack()[:2])
    ins = list(eqn.invars)
    body = closed(params["jaxpr"])
    split = ins[:consts], ins[consts : consts + carry], ins[consts + carry :]
    return Scan(*split, body, params["length"], params["reverse"], params["unroll"])


def as_while(eqn: Eqn) -> While:
    params, ins = eqn.params, list(eqn.invars)
    c, b = params["cond_nconsts"], params["body_nconsts"]
    return While(ins[:c], ins[c : c + b], ins[c + b :], closed(params["cond_jaxpr"]), closed(params["body_jaxpr"]))


def as_cond(eqn: Eqn) -> Cond:
    return Cond(eqn.invars[0], list(eqn.invars[1:]), tuple(map(closed, eqn.params["branches"])))


def ends_by_row(eqn: Eqn) -> bool:
    """Whether it is a while whose predicate has dimensions, those of `jax.vmap`: each row ends by itself."""
    return eqn.primitive.name == "while" and bool(shape(outvars(as_while(eqn).cond)[0]))


REGIONS = {"scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",)}


def region_labels(eqn: Eqn) -> tuple[str, ...]:
    """What the regions are called in texts, in the order of `regions`."""
    match eqn.primitive.name:
        case "scan":
            return ("body",)
        case "while":
            return ("cond", "body")
        case "cond":
            return tuple(f"branch{i}" for i in range(len(eqn.params["branches"])))
    return ()


def regions(eqn: Eqn) -> tuple[ClosedJaxpr, ...]:
    """The jaxprs of a scan, while or cond, in the order of `respell`; empty for every other equation."""
    found: list[ClosedJaxpr] = []
    for param in REGIONS.get(eqn.primitive.name, ()):
        value = eqn.params[param]
        found.extend(map(closed, value if isinstance(value, tuple | list) else (value,)))
    return tuple(found)


def region_operands(eqn: Eqn) -> list[tuple[list[Atom], int]]:
    """For each region: the operands that its arguments get, and how many of them, leading, are loop-invariant."""
    match eqn.primitive.name:
        case "scan":
            return [(list(eqn.invars), len(as_scan(eqn).consts))]
        case "while":
            loop = as_while(eqn)
            c, b = loop.cond_consts, loop.body_consts
            return [([*c, *loop.init], len(c)), ([*b, *loop.init], len(b))]
        case "cond":
            return [(list(eqn.invars[1:]), len(eqn.invars) - 1)] * len(eqn.params["branches"])
    return []


def region_args(eqn: Eqn, var: Var) -> Iterator[tuple[Var, ClosedJaxpr]]:
    """Where a control-flow equation hands an operand to its regions: (the region's argument, the region)."""
    for region, (atoms, _) in zip(regions(eqn), region_operands(eqn), strict=True):
        yield from ((arg, region) for arg, atom in zip(invars(region), atoms, strict=True) if atom is var)
