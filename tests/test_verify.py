"""`add_tenant(verify=True)`: tenants who do not get in company what they get alone are served alone."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coalesce.errors import InvalidInput
from coalesce.kernels import batched_dot
from coalesce.passes.pipeline import normalise
from coalesce.runtime.runtime import Runtime
from coalesce.runtime.verify import Alone
from coalesce.tracing import trace

SLO = 30.0


def net(params: Any, x: jax.Array) -> dict[str, jax.Array]:
    y = jnp.tanh(x @ params["w"])
    return {"y": y @ params["v"], "count": (x > 0).sum(dtype=jnp.int32), "best": jnp.argmax(y, -1)}


def params_of(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((6, 6)).astype(np.float32) for name in "wv"}


def row(seed: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 6)).astype(np.float32)


def check(rt: Runtime, name: str, params: Any, x: np.ndarray) -> None:
    want = jax.jit(net)(params, x)
    got = rt.submit(name, x).result(60)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_who_is_within_tolerance_shares_bundles():
    with Runtime(widths=(1, 2)) as rt:
        for i in range(2):
            rt.add_tenant(f"t{i}", net, params_of(i), examples=[(row(i),), (row(i, 3),)], slo=SLO, verify=True)
        check(rt, "t0", params_of(0), row(5))
        assert not rt.health().alone and not rt.stats().tenants["t1"].alone
        assert len({rt._tenancy.residents[f"t{i}"].host for i in range(2)}) == 1


def make_wrong(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Every product is off by a factor, as from a kernel that has a bug."""
    right = batched_dot.run
    monkeypatch.setattr(batched_dot, "run", lambda *args: right(*args) * jnp.float32(factor))


def test_who_is_outside_of_it_is_served_alone_and_correctly(monkeypatch, caplog):
    make_wrong(monkeypatch, 1.001)
    with Runtime(widths=(1, 2)) as rt, caplog.at_level(logging.WARNING, "coalesce.runtime"):
        rt.add_tenant("unverified", net, params_of(0), example=(row(0),), slo=SLO)
        rt.add_tenant("verified", net, params_of(1), examples=[(row(1),), (row(1, 3),)], slo=SLO, verify=True)
        rt.warm_up(60.0)
        assert any("'verified' is served alone: output" in r.getMessage() for r in caplog.records)
        why = rt.health().alone
        assert set(why) == {"verified"} and "is off by 0.00" in why["verified"]
        assert rt.stats().tenants["verified"].alone == why["verified"] and not rt.stats().tenants["unverified"].alone
        replies = [rt.submit("verified", row(i)) for i in range(8)]
        for i, reply in enumerate(replies):
            want = jax.jit(net)(params_of(1), row(i))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), reply.result(60), want)
        check(rt, "verified", params_of(1), row(9, 3))
        families = {course.family for course in rt._tenancy.residents["verified"].host.courses}
        offered = rt._stations[0].device.catalog.executables
        own = [e.entries for e in offered if any(entry.family in families for entry in e.entries)]
        assert sorted(entries[0].width for entries in own) == [1, 1] and all(len(entries) == 1 for entries in own)
        rt.update_tenant("verified", params_of(2))
        check(rt, "verified", params_of(2), row(9))
        rt.remove_tenant("verified")
        assert not rt.health().alone and rt.health().tenants == 1


def test_there_must_be_something_to_verify_with():
    with Runtime(widths=(1,)) as rt:
        with pytest.raises(InvalidInput, match=r"tenant 't'.*ShapeDtypeStruct; give arrays"):
            rt.add_tenant(
                "t", net, params_of(0), example=(jax.ShapeDtypeStruct((2, 6), jnp.float32),), slo=SLO, verify=True
            )
        assert not rt.health().tenants


def alone_of(fn: Any, params: Any, *inputs: Any) -> Alone:
    return Alone(normalise(trace(fn, params, *inputs, name="t")).program, fn, params, inputs)


def test_floats_are_compared_with_the_tenants_own():
    alone = alone_of(net, params_of(0), row(0))
    want = jax.tree.map(np.asarray, jax.jit(net)(params_of(0), row(0)))
    assert alone.fault(want) == ""
    assert alone.fault({**want, "y": want["y"] * np.float32(1 + 1e-6)}) == ""
    assert alone.fault({**want, "y": want["y"] * np.float32(1.0001)}).startswith("output 2, float32[2, 6], is off by")
    assert alone.fault({**want, "y": np.full_like(want["y"], np.nan)}).startswith("output 2")


def test_small_results_are_compared_too():
    def tiny(w: Any, x: Any) -> Any:
        return x @ w * np.float32(1e-8)

    w, x = params_of(0)["w"], row(0)
    alone, want = alone_of(tiny, w, x), np.asarray(jax.jit(tiny)(w, x))
    assert alone.fault(want * np.float32(1 + 1e-6)) == ""
    assert alone.fault(want * np.float32(1.001)).startswith("output 0, float32[2, 6], is off by")
    assert alone.fault(np.zeros_like(want)) != ""


def test_what_a_cancellation_leaves_may_be_any_rounding_error_of_that_size():
    def cancels(w: Any, x: Any) -> Any:
        return x @ w - x[:, ::-1] @ w[::-1], x @ w - x @ w

    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 4), (2, 64)))
    alone, zeros = alone_of(cancels, w, x), np.zeros((2, 4), np.float32)
    terms = x[:, :, None] * w
    one_by_one, backwards = (np.add.accumulate(own, axis=1)[:, -1] for own in (terms, terms[:, ::-1]))
    left = one_by_one - backwards
    assert left.any() and alone.fault((left, zeros)) == ""
    assert alone.fault((left + np.float32(1e-4), zeros)).startswith("output 0, float32[2, 4], is off by")


def test_integers_must_be_equal_unless_sums_of_floats_feed_them():
    alone = alone_of(net, params_of(0), row(0))
    want = jax.tree.map(np.asarray, jax.jit(net)(params_of(0), row(0)))
    assert alone.fault({**want, "best": want["best"] + 1}) == ""  # a tie may fall either way
    assert alone.fault({**want, "count": want["count"] + 1}).startswith("output 1, int32[], differs")


def test_a_sum_inside_a_loop_feeds_what_comes_after_it():
    def looped(w: Any, x: Any) -> Any:
        y, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, 2)
        return (y > 0).sum(dtype=jnp.int32), (x > 0).sum(dtype=jnp.int32)

    alone = alone_of(looped, params_of(0)["w"], row(0))
    one, other = (np.asarray(x) for x in jax.jit(looped)(params_of(0)["w"], row(0)))
    assert alone.fault((one + 1, other)) == "" and alone.fault((one, other + 1)) != ""


def test_low_precision_may_be_as_wrong_as_the_tenant_itself():
    def low(w: Any, x: Any) -> Any:
        return jnp.tanh(x @ w) @ w

    w, x = (jnp.asarray(a, jnp.bfloat16) for a in (params_of(0)["w"], row(0)))
    alone = alone_of(low, w, x)
    exact = np.asarray(low(np.asarray(w, np.float32), np.asarray(x, np.float32)))
    assert alone.fault(exact.astype(jnp.bfloat16)) == ""
    assert alone.fault((exact * np.float32(1.1)).astype(jnp.bfloat16)) != ""


def test_what_a_tenant_casts_to_16_bits_by_itself_is_of_low_precision_too():
    def mixed(ws: Any, x: Any) -> Any:
        def step(x: Any, w: Any) -> Any:
            return jnp.tanh(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32), None

        x, _ = jax.lax.scan(step, x, ws)
        return x, x.astype(jnp.bfloat16), x * 2 > 0

    ws, x = np.stack(list(params_of(0).values())), row(0)
    alone, wide = alone_of(mixed, ws, x), x
    for w in ws:
        wide = np.tanh(wide @ w)
    positive = np.asarray(jax.jit(mixed)(ws, x)[2])
    low, wrong = wide.astype(jnp.bfloat16), wide * np.float32(1.05)
    assert alone.fault((wide, low, positive)) == ""
    assert alone.fault((wrong, low, positive)).startswith("output 0, float32")
    assert alone.fault((wide, wrong.astype(jnp.bfloat16), positive)).startswith("output 1, bfloat16")


def test_weights_of_16_bits_are_no_reason_for_a_result_in_float32_to_be_wrong():
    def wide(w: Any, x: Any, seed: Any) -> Any:
        return x @ w.astype(jnp.float32) + jax.random.uniform(jax.random.key(seed))

    w, x, seed = jnp.asarray(params_of(0)["w"], jnp.bfloat16), row(0), np.int32(0)
    alone, want = alone_of(wide, w, x, seed), np.asarray(jax.jit(wide)(w, x, seed))
    assert alone.fault(want * np.float32(1 + 1e-6)) == "" and alone.fault(want * np.float32(1.001)) != ""
