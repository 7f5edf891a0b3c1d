"""Sets of different programs that resemble each other, so that they pack across families.

A template is a list of seeds, one a layer. A layer makes two kinds of choices: those of `kin`, from its seed, which all
programs share (what it computes, strides, axes), and those of `own`, which each program makes for itself (sizes,
literals, the order of branches). Programs are small edits of one template: a layer dropped, doubled, inserted, swapped.
Layers are Ops (tests/programs.py) on values of rank 2, "rows", and of rank 4, "images"; a layer that does not fit to
what is there is left out. Nothing jumps, and every divisor of a tenant's own is far from zero; in padding it is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from tests.kin_images import convolved, IMAGES
from tests.kin_rows import dense, near, ROWS
from tests.kin_scans import SCANS
from tests.programs import Aval, Draw, Model, Op, Ref, Scope
from tests.tenants import draw_family, Pool, Tenant

STEMS = {2: dense, 4: convolved}  # how every program begins
RULES = {2: (ROWS, ROWS, SCANS), 4: (IMAGES,)}
Template = Sequence[int]


def draw_kin(draw: Draw, layers: int, families: int, dtype: Any) -> list[Tenant]:
    """Tenants of a few programs that are edits of one template, in any order."""
    template = [draw.getrandbits(32) for _ in range(layers)]
    rank, base = draw.choice([2, 2, 4]), draw.getrandbits(32)
    found: list[Tenant] = []
    pool: Pool = {}
    for _ in range(families):
        if found and draw.integer(0, 4) == 0:
            model = replace(found[0].model, gain=0.5)  # nearly, not quite, the same family
        else:
            model = grown(edited(draw, template), Draw(base), Draw(draw.getrandbits(32)), rank, dtype)
        found += draw_family(draw, model, draw.choice([1, 1, 2, 3]), pool)
    return draw.shuffled(found)


def edited(draw: Draw, template: Template) -> list[int]:
    seeds = list(template)
    at = draw.integer(0, len(seeds) - 1)
    match draw.choice(["as it is", "as it is", "drop", "double", "insert", "swap"]):
        case "drop" if len(seeds) > 1:
            del seeds[at]
        case "double":
            seeds.insert(at, seeds[at])
        case "insert":
            seeds.insert(at, draw.getrandbits(32))
        case "swap" if at:
            seeds[at - 1 : at + 1] = seeds[at], seeds[at - 1]
    return seeds


def grown(seeds: Template, kin: Draw, own: Draw, rank: int, dtype: Any) -> Model:
    """A program of these layers; its inputs are floats, a mask and integers."""
    sizes = [near(kin, own, 4) for _ in range(rank)]
    if rank == 4:
        sizes[0] = kin.integer(1, 2)
    floats = Aval(tuple(sizes), jnp.dtype(dtype))
    rows, columns = near(kin, own, 3), near(kin, own, 3)
    inputs = (floats, Aval((rows, columns), jnp.dtype(jnp.bool_)), Aval((rows, columns), jnp.dtype(jnp.int32)))
    scope = Scope(inputs, [True] * len(inputs), dtype)
    add(scope, STEMS[rank](kin, own, scope, 0))
    for seed in seeds:
        layer = Draw(seed)
        i = scope.candidates("f")[0]
        rules = layer.choice(RULES[len(scope.values[i].shape)])
        add(scope, layer.choice(rules)(layer, own, scope, i))
    results = scope.block().sinks(len(inputs))
    return Model(scope.block(), inputs, [Ref(i, scope.exact[i]) for i in results], False, False, 1.0)


def add(scope: Scope, op: Op | None) -> None:
    if op is not None:
        scope.add(op)
