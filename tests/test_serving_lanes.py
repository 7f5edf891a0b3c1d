"""Lanes that read a bank by slot get what their tenants get alone, whatever the slots, the width and the company."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coalesce.runtime.bundle import blanks_of
from coalesce.serving.executable import compile_executable, frame_of
from coalesce.serving.staging import Lane
from coalesce.serving.store import Preparer, Store
from tests.alone import array
from tests.compare import assert_bitwise
from tests.serving import assert_alone, BY_SLOT, CPU, fit_of, flat, plain, serve
from tests.serving_models import mlp, MODELS, tenants, with_backbone


@pytest.mark.parametrize("name", MODELS)
def test_lanes_are_as_their_tenants_alone(name):
    """Slots in any order and more than once, and as many lanes as there are or fewer."""
    found = tenants(name, 3)
    serving = serve([fit_of(fn, p, x) for fn, p, x in found], capacity=5)
    executable = serving.executable(4)
    for lanes in ([2, 0, 2, 1], [1, 2]):
        other = [(t, MODELS[name]()[2]) for t in lanes]
        for (t, x), got in zip(other, serving.call(executable, other), strict=True):
            assert_alone(got, (*found[t][:2], x))


def test_kernels_that_read_by_slot():
    """Interpreted; with tails of their own, whose operands are read by slot too."""
    for name in ("mlp", "convnet", "lstm"):
        found = tenants(name, 3)
        serving = serve([fit_of(fn, p, x) for fn, p, x in found], options=BY_SLOT)
        other = [(t, MODELS[name]()[2]) for t in (2, 0, 1)]
        for (t, x), got in zip(other, serving.call(serving.executable(4), other), strict=True):
            assert_alone(got, (*found[t][:2], x))


@pytest.mark.parametrize("rows", [1, 2])
def test_weights_of_several_heads(rows):
    """A row of the bank holds those of all heads, of which each is a problem of its own."""

    def heads(w, x):
        return jnp.einsum("hmi,hij->hmj", x, w, precision="highest")

    found = [(heads, array(3, 4, 5), (array(3, rows, 4),)) for _ in range(3)]
    one_row = replace(BY_SLOT, choice=lambda op, groups, platform: "indexed_matvec")
    serving = serve([fit_of(*own) for own in found], capacity=4, options=one_row if rows == 1 else BY_SLOT)
    order = [2, 0, 1]
    for t, got in zip(order, serving.call(serving.executable(4), [(t, found[t][2]) for t in order]), strict=True):
        assert_alone(got, found[t])


@pytest.mark.parametrize("options", [CPU, BY_SLOT], ids=["gathered", "by slot"])
def test_what_tenants_share_lies_there_once(options):
    backbone = {"w": array(6, 8), "gain": array(8)}
    found = [(with_backbone, {"backbone": backbone, "head": array(8, 3)}, (array(2, 6),)) for _ in range(3)]
    fits = [fit_of(fn, p, x, shared={"backbone": backbone}) for fn, p, x in found]
    serving = serve(fits, capacity=4, options=options)
    rows = sorted((x.shape[0], serving.schema.owned(i)) for i, x in enumerate(serving.store.bank))
    assert rows == [(1, False), (1, False), (4, True)]
    order = [2, 0, 1]
    got = serving.call(serving.executable(4), [(t, found[t][2]) for t in order])
    for t, result in zip(order, got, strict=True):
        assert_alone(result, found[t])
    other = {"w": array(6, 8), "gain": array(8)}
    assert (
        fit_of(with_backbone, {"backbone": other, "head": array(8, 3)}, (array(2, 6),), shared={"backbone": other}).key
        != fits[0].key
    )


@pytest.mark.parametrize("name", ["mlp", "convnet", "lstm"])
def test_padding_reaches_no_lane(name):
    """NaNs in the inputs and in the weights of other lanes: the same bits, from the same executable."""
    found = tenants(name, 3)
    bad = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), found[2][1])
    serving = serve([fit_of(found[0][0], p, found[0][2]) for p in (found[0][1], found[1][1], bad)])
    executable = serving.executable(4)
    lanes = [serving.lane(0, found[0][2]), serving.lane(1, found[1][2])]
    poison = Lane(serving.slots[2], [np.full_like(x, np.nan) for x in flat(serving.fits[2], found[2][2])])

    def run(given):
        return [x[:2] for x in serving.run(executable, given)]

    clean = run(lanes)
    assert all(np.isfinite(x).all() for x in clean)
    assert_bitwise(run([*lanes, poison, poison]), clean)


@pytest.mark.parametrize("packed", [False, True])
def test_a_program_that_might_not_end_on_zeros_is_given_none(packed):
    """Neither lanes that nobody uses nor runs that nobody has asked for: they take weights and inputs of somebody."""

    def grows(w, x):
        return jax.lax.while_loop(lambda v: v.sum() < 100, lambda v: v * w, x)

    serving = serve([fit_of(grows, np.float32(2), (np.ones(3, np.float32),))], segments=2)
    lanes = serving.lanes(4)
    staging = frame_of([lanes], packed).staging
    for first in (5.0, 7.0):
        filled = staging.fill([[Lane(0, [np.full(3, first, np.float32)]), Lane(0, [np.ones(3, np.float32)])]])
        np.testing.assert_array_equal(filled.given[0].inputs[0][:, 0], [first, 1, first, first])
        staging.take_back(filled)
    blanks = blanks_of(lanes, None, [np.full(3, 9, np.float32)])
    assert [own.inputs[0].sum() for own in blanks] == [27] * 4
    before = Store(serving.schema, 2, Preparer(serving.schema)(serving.fits[0])).bank
    assert all(np.asarray(own)[0].any() for own in before), "slot 0, before anybody has it"


def test_all_widths_read_one_bank():
    for name in ("mlp", "convnet"):
        found = tenants(name, 4)
        serving = serve([fit_of(fn, p, x) for fn, p, x in found])
        assert len(serving.schema.arrays) == len({w for a in serving.schema.arrays for _, w in a.rows})
        for width in (1, 2, 8):
            lanes = [(t, found[t][2]) for t in (3, 1, 0, 2)[:width]]
            for (t, _), got in zip(lanes, serving.call(serving.executable(width), lanes), strict=True):
                assert_alone(got, found[t])


def test_request_shapes_read_one_copy():
    """A batch of one and one of nine, for which a rule would choose another kernel."""
    fn, _, (image,) = MODELS["convnet"]()
    found = [(fn, MODELS["convnet"]()[1], (image,)) for _ in range(2)]
    batch = jnp.concatenate([image] * 9)
    one = serve([fit_of(fn, p, x) for fn, p, x in found])
    both = serve([fit_of(fn, p, x, (batch,)) for fn, p, x in found])
    assert [x.shape for x in both.store.bank] == [x.shape for x in one.store.bank]
    for template, x in enumerate([(image,), (batch,)]):
        for t, got in enumerate(both.call(both.executable(2, template), [(0, x), (1, x)], template)):
            assert_alone(got, (*found[t][:2], x))


def test_families_share_a_call():
    """Each with slots, inputs and a bank of its own, in the order of the entries."""
    found = {name: tenants(name, 2) for name in ("mlp", "lstm")}
    for options in (CPU, BY_SLOT):
        each = [serve([fit_of(fn, p, x) for fn, p, x in own], options=options) for own in found.values()]
        executable = compile_executable([s.lanes(2) for s in each])
        entries = [[s.lane(t, found[n][t][2]) for t in (1, 0)] for n, s in zip(found, each, strict=True)]
        got = executable.fetch(executable.run([s.store.bank for s in each], [None, None], executable.stage(entries)))
        for (name, own), outputs in zip(found.items(), got, strict=True):
            for i, t in enumerate((1, 0)):
                want = jax.tree.leaves(plain(jax.jit(own[t][0])(own[t][1], *own[t][2])))
                for x, y in zip(outputs, want, strict=True):
                    np.testing.assert_allclose(x[i], y, rtol=1e-4, atol=1e-5, err_msg=name)


def test_names_and_orders_of_weights_do_not_matter():
    """Tenants of one family hold their weights in other pytrees, and take their inputs in another order."""
    one = (
        lambda p, x, y: jnp.tanh(x @ p["a"]) @ p["b"] + y,
        {"a": array(4, 4), "b": array(4, 4)},
        (array(2, 4), array(2, 4)),
    )
    two = (lambda p, y, x: jnp.tanh(x @ p[1]) @ p[0] + y, [array(4, 4), array(4, 4)], (array(2, 4), array(2, 4)))
    serving = serve([fit_of(fn, p, x) for fn, p, x in (one, two)])
    for got, tenant in zip(serving.call(serving.executable(2), [(0, one[2]), (1, two[2])]), (one, two), strict=True):
        assert_alone(got, tenant)


def test_a_weight_that_is_two_is_another_schema():
    w = array(6, 6)
    tied = fit_of(mlp, [(w, array(6)), (w, array(6))], (array(2, 6),))
    apart = fit_of(mlp, [(w, array(6)), (array(6, 6), array(6))], (array(2, 6),))
    assert tied.key != apart.key
    assert (len(tied.own), len(apart.own)) == (3, 4)
