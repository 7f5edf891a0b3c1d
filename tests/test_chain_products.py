"""chain_products: what was measured to win runs in one launch, and each tenant gets what it gets alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import coalesce
from coalesce.blocks import Blocks
from coalesce.bundle import Bundle, Pack, packs, units
from coalesce.bundle_check import check_bundle
from coalesce.errors import IRError
from coalesce.explain import bundle_text
from coalesce.html import html_page
from coalesce.kernels import chained, VERSION
from coalesce.measuring import tune
from coalesce.measuring.chain_case import ChainCase, chains_in
from coalesce.passes.chain_products import chain_products, Scope
from coalesce.passes.choose_kernels import choose_kernels
from coalesce.passes.form_packs import form_packs
from coalesce.passes.fuse_epilogues import fuse_epilogues
from coalesce.program import Program
from coalesce.tuning import Database, Entry, Key, Tuned
from tests.alone import alone, array, Tenant
from tests.bundles import bundle_of, replanned
from tests.compare import assert_as_good
from tests.dataflow import check_plan
from tests.heavy_cases import indexed
from tests.serving import BY_SLOT, fit_of, serve

BLOCKS = Blocks(16, 16, 16)


def relu(x: Any) -> Any:
    return lax.max(x, jnp.zeros((), x.dtype))


def convolved(x: Any, w: Any) -> Any:
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def bottleneck(p: Any, x: Any) -> Any:
    """With a shortcut, and the first product of the next one."""
    shortcut = x @ p["shortcut"] + p["bias"].reshape(1, 1, 1, -1)
    y = relu(convolved(x, p["taps"]))
    y = relu(shortcut + y @ p["wide"])
    return relu(y @ p["narrow"]), y.mean((1, 2))


def commuted(p: Any, x: Any) -> Any:
    """The same, which adds the other way round and computes the shortcut last."""
    y = relu(convolved(x, p["taps"])) @ p["wide"]
    y = relu(y + (x @ p["shortcut"] + p["bias"].reshape(1, 1, 1, -1)))
    return relu(y @ p["narrow"]), y.mean((1, 2))


def chain_alone(p: Any, x: Any) -> Any:
    return relu(x @ p["wide"]) @ p["narrow"]


SHAPES = {"taps": (3, 3, 16, 16), "wide": (16, 32), "shortcut": (16, 32), "bias": (32,), "narrow": (32, 16)}
IMAGE = (1, 5, 5, 16)


def two(fn: Any, names: str, *inputs: tuple[int, ...], dtype: Any = jnp.bfloat16) -> list[Tenant]:
    """Two tenants of a function, with weights of their own."""

    def draw(*shape: int) -> jax.Array:
        return (array(*shape) / (np.sqrt(shape[-2]) if len(shape) > 1 else 1)).astype(dtype)

    return [(fn, {name: draw(*SHAPES[name]) for name in names.split()}, tuple(draw(*s) for s in inputs)) for _ in "ab"]


BOTTLENECKS = two(bottleneck, " ".join(SHAPES), IMAGE)
PLAIN = two(chain_alone, "wide narrow", IMAGE)


def planned(*tenants: Tenant) -> Bundle:
    return fuse_epilogues(choose_kernels(form_packs(bundle_of(*tenants)), platform="cpu", choice=indexed))


def measured(bundle: Bundle, most: int = 4, gain: float = 1.0, width: int = 0) -> Database:
    """As if every chain of so many products at most had won, longer ones more."""
    scope = Scope(bundle)
    found: dict[Key, Entry] = {}
    for one in scope.chains():
        chain, lanes, rows = scope.size(one)
        us = 10.0 - gain * len(one.places) if len(one.places) <= most else 11.0
        key = Key("cpu", VERSION, str(chain), width or lanes, rows)
        found[key] = Entry(
            "chained" if us < 10 else "apart", min(us, 10.0), BLOCKS if us < 10 else None, {"apart": 10.0}
        )
    return Database(found)


def chains(bundle: Bundle) -> list[list[Pack]]:
    return [list(unit) for unit in units(packs(bundle.schedule)) if len(unit) > 1]


def run(bundle: Bundle, **options: Any) -> Any:
    return chain_products(bundle, tuned=Tuned(measured(bundle, **options), "cpu"))


def fused(tenants: list[Tenant], **options: Any) -> coalesce.Fused:
    return coalesce.fuse(programs_of(tenants), choose_kernel=indexed, strict=True, **options)


def check(tenants: list[Tenant], **options: Any) -> list[list[Pack]]:
    """Chain what can be, compare each tenant with itself alone, and say what was chained."""
    database = measured(planned(*tenants), **options)
    program = fused(tenants, tuned=database)
    check_plan(program.bundle, 0.0)
    for tenant, got in zip(tenants, program([xs for _, _, xs in tenants]), strict=True):
        assert_as_alone(got, tenant)
    return chains(program.bundle)


def assert_as_alone(got: Any, tenant: Tenant) -> None:
    fn, params, xs = tenant
    exactly = alone((fn, *jax.tree.map(lambda x: x.astype(jnp.float32), (params, xs))))
    own = alone(tenant)
    assert_as_good(got, own, exactly, [False] * len(jax.tree.leaves(own)))


def test_a_bottleneck(golden):
    bundle = planned(*BOTTLENECKS)
    golden(replanned(partial(chain_products, tuned=Tuned(measured(bundle), "cpu")), bundle))


@pytest.mark.parametrize("most", [2, 4])
def test_bottlenecks_are_right(most):
    """Of all four products, or of two of them; the sum is read by others too."""
    (found,) = check(BOTTLENECKS, most=most)
    assert [pack.inner for pack in found] == {2: [True, False], 4: [True, True, False, False]}[most]
    assert [pack.chained for pack in found] == {2: [False, True], 4: [False, False, True, True]}[most]


def test_what_nobody_else_reads_is_not_written():
    (found,) = check(PLAIN)
    assert [(pack.inner, pack.chained) for pack in found] == [(True, False), (False, True)]


def test_only_what_won_is_chained():
    bundle = planned(*PLAIN)
    assert chain_products(bundle) is bundle, "nothing was measured"
    assert run(bundle, most=1) is bundle, "products by themselves were faster"
    assert run(bundle, gain=0.5) is bundle, "by less than measurements are worth"
    assert run(bundle, width=1) is bundle, "one lane says nothing of several"
    three = planned(*PLAIN, PLAIN[0])
    assert run(three, width=2) is not three, "more lanes than were measured"
    assert run(bundle, width=4) is bundle, "fewer of them, of whose programs there are fewer"


def test_how_a_sum_is_spelled_decides_nothing():
    plans = [planned(*two(fn, " ".join(SHAPES), IMAGE)) for fn in (bottleneck, commuted)]
    texts = [bundle_text(plan) for plan in plans]
    assert texts[0] == texts[1]
    assert max(len(found.places) for found in Scope(plans[1]).chains()) == 4


def test_tuned_blocks_that_divide_no_columns_are_left_out(caplog):
    """Those of somebody who wrote the database by hand."""
    bundle = planned(*PLAIN)
    found = {key: replace(entry, blocks=Blocks(16, 64, 16)) for key, entry in measured(bundle).entries.items()}
    assert chains(chain_products(bundle, tuned=Tuned(measured(bundle), "cpu")))
    assert not chains(chain_products(bundle, tuned=Tuned(Database(found), "cpu")))
    assert "tuned blocks 16x64x16 w4 s3 that do not divide 32 columns are left out" in caplog.text


def test_the_chain_that_wins_most_goes_first():
    """Of three products in a row each pair could be chained."""

    def three(p: Any, x: Any) -> Any:
        return relu(relu(x @ p["wide"]) @ p["narrow"]) @ p["shortcut"]

    bundle = planned(*two(three, "wide narrow shortcut", IMAGE))
    scope = Scope(bundle)
    database = dict(measured(bundle, most=2).entries)
    pairs = [one for one in scope.chains() if len(one.places) == 2]
    assert len(pairs) == 2
    for better in pairs:
        chain, *size = scope.size(better)
        key = Key("cpu", VERSION, str(chain), *size)
        tuned = Tuned(Database({**database, key: replace(database[key], us=1.0)}), "cpu")
        (found,) = chains(chain_products(bundle, tuned=tuned))
        assert [pack.members[0].site for pack in found] == [scope.packs[at].members[0].site for at in better.places]


NEVER = {
    "float32": two(chain_alone, "wide narrow", IMAGE, dtype=jnp.float32),
    "another op between them": two(lambda p, x: lax.cumsum(relu(x @ p["wide"]), 1) @ p["narrow"], "wide narrow", IMAGE),
    "a product of two results": two(lambda p, x: (x @ p["wide"]) @ (x @ p["wide"]).mT, "wide", (5, 16)),
}


@pytest.mark.parametrize("tenants", NEVER.values(), ids=NEVER)
def test_what_cannot_be_chained(tenants):
    assert list(Scope(planned(*tenants)).chains()) == []


def test_a_narrow_product_does_not_run_before_what_it_adds():
    """Its residual is made after the wide one's place."""

    def late(p: Any, x: Any) -> Any:
        y = relu(x @ p["wide"])
        return lax.tanh(lax.cumsum(y, 3)[..., :16] + y @ p["narrow"])

    assert list(Scope(planned(*two(late, "wide narrow", IMAGE))).chains()) == []


def test_lanes_that_share_a_weight_of_one_product_alone_are_not_chained():
    """They are rows of one problem there, and problems of their own here."""
    shared = PLAIN[0][1]["wide"]
    tenants = [(fn, {**p, "wide": shared}, xs) for fn, p, xs in PLAIN]
    assert list(Scope(planned(*tenants)).chains()) == []
    assert len(list(Scope(planned(*[(fn, PLAIN[0][1], xs) for fn, _, xs in PLAIN])).chains())) == 1


def test_a_chain_that_hides_what_others_read_is_refused():
    bundle = run(planned(*BOTTLENECKS))

    def hidden(item: Any) -> Any:
        return replace(item, inner=True) if isinstance(item, Pack) and item.chained else item

    with pytest.raises(IRError, match="a result of the program|before what it reads"):
        check_bundle(replace(bundle, schedule=tuple(map(hidden, bundle.schedule))))
    loose = tuple(replace(i, chained=False) if isinstance(i, Pack) else i for i in bundle.schedule)
    with pytest.raises(IRError, match="runs before what it reads"):
        check_bundle(replace(bundle, schedule=loose))


def test_it_is_said():
    program = fused(PLAIN, tuned=measured(planned(*PLAIN)))
    text = program.explain()
    assert "indexed_gemm 16x16x16 w4 s3 in launch 0, not written" in text
    assert "chained in launch 0" in bundle_text(program.bundle)
    assert program.report.superkernels == 1 and program.report.launches_shared == 1
    assert "launch: with pack 1" in html_page(program)


def test_lanes_that_read_a_bank_by_slot(monkeypatch):
    ran: list[int] = []
    monkeypatch.setattr(
        chained, "run", lambda links, blocks, run=chained.run: ran.append(len(links)) or run(links, blocks)
    )
    tuned = Tuned(measured(planned(*BOTTLENECKS)), "cpu")
    serving = serve([fit_of(*tenant) for tenant in BOTTLENECKS], capacity=3, options=replace(BY_SLOT, tuned=tuned))
    lanes = [(1, BOTTLENECKS[1][2]), (0, BOTTLENECKS[0][2])]
    executable = serving.executable(2)
    assert set(ran) == {4}
    for (t, _), got in zip(lanes, serving.call(executable, lanes), strict=True):
        assert_as_alone(got, BOTTLENECKS[t])


def test_what_is_measured_does_the_same_work():
    """Chained, and one after the other."""
    cases = chains_in(planned(*BOTTLENECKS), "cpu")
    longest = max(cases, key=lambda case: len(case.products))
    assert [product.written for product in longest.products] == [False, False, True, True]
    assert longest.steps == "add; max; add max; max" and longest.candidates("cpu", False) == []
    tried = longest.candidates("gpu", True)
    assert tried[0] == ("apart", None) and len(set(tried)) == len(tried) > 1
    assert all(blocks is None or 32 % blocks.n == 0 for _, blocks in tried)
    structs = (longest.lhs, longest.rhs("chained"), *longest.reads)
    given = [array(*s.shape).astype(s.dtype) * 0.3 for s in structs]
    each = [jax.jit(longest.run(*how))(*given) for how in (("apart", None), ("chained", BLOCKS))]
    for a, b in zip(*each, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.02, atol=0.05)


def test_a_gpu_measures_chains_too(monkeypatch):
    source = partial(programs_of, BOTTLENECKS)
    for gpu, found in ((False, 0), (True, len(chains_in(planned(*BOTTLENECKS), "cpu")))):
        monkeypatch.setattr(tune, "on_a_gpu", lambda gpu=gpu: gpu)
        tune.cases_of.cache_clear()
        cases = tune.cases_of(source)
        assert sum(isinstance(case, ChainCase) for case in cases) == found
        assert not found or " into conv" in tune.case_name(max(cases, key=lambda case: len(case.key.op)))
    tune.cases_of.cache_clear()


def programs_of(tenants: list[Tenant]) -> list[Program]:
    return [coalesce.trace(fn, params, *xs, name=f"t{i}") for i, (fn, params, xs) in enumerate(tenants)]
