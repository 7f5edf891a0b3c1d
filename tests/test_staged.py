"""Staged: requests and results that lie stacked by family give each tenant what the fused program gives it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coalesce
from coalesce import jaxpr as J
from coalesce.errors import InvalidInput, TraceError
from coalesce.lower import lower_stacked
from tests.alone import array
from tests.compare import assert_same
from tests.serving import plain


def dense(p, x, scale):
    y = jnp.tanh(x @ p["w"]) * scale[None]
    return {"y": y, "sum": y.sum(), "constant": jnp.arange(3)}


def noisy(p, x, key):
    return x @ p + jax.random.normal(key, (4, 5))


def programs(found):
    return [coalesce.trace(fn, p, *x, name=f"t{i}") for i, (fn, p, x) in enumerate(found)]


def tenants():
    """Two families, whose tenants take turns."""
    found = []
    for i in range(3):
        found.append((dense, {"w": array(8, 6)}, (array(4, 8), array(6))))
        found.append((noisy, array(8, 5), (array(4, 8), jax.random.key(i))))
    return found


def requests_of(found):
    return [x for _, _, x in found]


def test_tenants_get_what_they_get_from_a_call():
    found = tenants()
    fused = coalesce.fuse(programs(found))
    staged = fused.staged()
    assert staged.families == [["t0", "t2", "t4"], ["t1", "t3", "t5"]]
    inputs = staged.stage(requests_of(found))
    assert [[x.shape for x in own] for own in inputs] == [[(3, 4, 8), (3, 6)], [(3, 4, 8), (3, 2)]]
    results = staged.unstage(staged(inputs))
    for got, want in zip(results, fused(requests_of(found)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_one_tenant():
    found = tenants()[:1]
    fused = coalesce.fuse(programs(found))
    staged = fused.staged()
    (got,) = staged.unstage(staged(staged.stage(requests_of(found))))
    jax.tree.map(np.testing.assert_array_equal, got, fused(requests_of(found))[0])


def test_keys_that_come_out_are_keys():
    found = [(lambda p, key: jax.random.split(key)[1], (), (jax.random.key(i),)) for i in range(2)]
    fused = coalesce.fuse(programs(found))
    staged = fused.staged()
    results = staged.unstage(staged(staged.stage(requests_of(found))))
    for got, want in zip(results, fused(requests_of(found)), strict=True):
        np.testing.assert_array_equal(jax.random.key_data(got), jax.random.key_data(want))


def test_what_lies_on_the_host_is_staged_in_one_batch(monkeypatch):
    found = [(dense, {"w": array(8, 6)}, (np.ones((4, 8), np.float32), np.ones(6, np.float32))) for _ in range(4)]
    staged = coalesce.fuse(programs(found)).staged()
    put = jax.device_put
    batches = []
    monkeypatch.setattr(jax, "device_put", lambda x, *args: batches.append(x) or put(x, *args))
    staged.stage(requests_of(found))
    ((own,),) = batches
    assert [type(x) for x in own] == [np.ndarray] * 2


def test_a_call_has_an_argument_for_each_input_of_a_family():
    found = [(dense, {"w": array(8, 6)}, (array(4, 8), array(6))) for _ in range(6)]
    staged = coalesce.fuse(programs(found)).staged()
    shapes = [x.shape for x in jax.tree.leaves(staged.compile().args_info[0])]
    assert sorted(shapes) == sorted([(6, 8, 6), (6, 4, 8), (6, 6)])


def test_other_arrays_are_refused():
    staged = coalesce.fuse(programs(tenants())).staged()
    inputs = staged.stage(requests_of(tenants()))
    for wrong, message in [
        (inputs[:1], "of 1 families, expected 2"),
        ([inputs[0][:1], inputs[1]], r"family 0 \(t0, t2, t4\): got 1 arrays, expected 2"),
        ([inputs[0][::-1], inputs[1]], r"family 0 .*, input 0: got f32\[3,6\], expected f32\[3,4,8\]"),
        ([inputs[0], [inputs[1][0], 1.5]], r"family 1 .*, input 1: got float, expected u32\[3,2\]"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            staged(wrong)
    with pytest.raises(InvalidInput, match="tenant 't1'"):
        staged.stage([requests_of(tenants())[0]] * 6)


def test_programs_without_weights_cannot_be_staged():
    program = coalesce.trace(lambda w, x: x @ w, jax.ShapeDtypeStruct((8, 4), "float32"), array(2, 8), name="a")
    with pytest.raises(TraceError, match="tenant 'a'"):
        coalesce.fuse([program]).staged()


def test_it_may_be_part_of_a_program():
    found = tenants()[::2]
    staged = coalesce.fuse(programs(found)).staged()
    inputs = staged.stage(requests_of(found))
    for got, want in zip(jax.jit(staged)(inputs)[0], staged(inputs)[0], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_inputs_may_lie_on_another_device():
    here, *others = jax.devices()
    if not others:
        pytest.skip("needs two devices")
    found = [(dense, {"w": array(8, 6)}, tuple(jax.device_put((array(4, 8), array(6)), others[0]))) for _ in range(2)]
    staged = coalesce.fuse(programs(found)).staged()
    assert all(x.devices() == {here} for x in jax.tree.leaves(staged(staged.stage(requests_of(found)))))


def test_families_by_themselves():
    """What is compiled for some, as branches of a graph are, traces nothing of others."""
    found = tenants()
    fused = coalesce.fuse(programs(found))
    staged, bundle = fused.staged(), fused.bundle
    bank = fused._weights()
    inputs = staged.stage(requests_of(found))
    both = staged(inputs)
    for f in range(2):
        run = lower_stacked(bundle, [f])
        (own,) = run(bank, inputs)
        for got, want in zip(own, both[f], strict=True):
            assert_same(plain(got), plain(want))
        dots = [eqn for eqn in J.walk(jax.make_jaxpr(run)(bank, inputs)) if eqn.primitive.name == "dot_general"]
        assert len(dots) == 1
