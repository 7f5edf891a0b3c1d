"""Bundles for the tests of the passes over them."""

from collections.abc import Callable

import coalesce
from coalesce.bundle import Bundle
from coalesce.bundle_check import check_bundle
from coalesce.explain import bundle_text
from coalesce.family import find_families
from coalesce.passes.pipeline import normalise
from tests.alone import Tenant

Pass = Callable[[Bundle], Bundle]


def bundle_of(*tenants: Tenant) -> Bundle:
    """Families of tenants "t0", "t1", ..., without a schedule."""
    programs = [coalesce.trace(fn, params, *xs, name=f"t{i}") for i, (fn, params, xs) in enumerate(tenants)]
    done = [normalise(program, strict=True).program for program in programs]
    return Bundle(tuple(p.name for p in programs), find_families(done))


def replanned(run: Pass, before: Bundle) -> str:
    """Run a pass, check what it made, and print both bundles."""
    after = run(before)
    check_bundle(after)
    assert run(after) is after
    name = getattr(run, "func", run).__name__
    return f"{bundle_text(before)}\n\n# {name}\n\n{bundle_text(after)}"
