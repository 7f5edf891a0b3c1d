"""The runtime with real programs on a real device: fused against each tenant alone, and what users do wrong."""

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coalesce
from coalesce.errors import DeadlineExceeded, InvalidInput, OutOfDeviceMemory, Shutdown, TenantClosed, TenantFailure
from coalesce.runtime.form import Form
from coalesce.runtime.host import Host
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler.catalog import Entry
from tests.checked import Checked, checked_runtime
from tests.memory import held_from_now

SLO = 30.0  # generous: what is tested here is not time
WIDTH = 12


def mlp(params: Any, x: jax.Array) -> jax.Array:
    for w, b in params:
        x = jnp.tanh(x @ w + b)
    return x


def tagger(params: Any, x: jax.Array, scale: jax.Array) -> dict[str, jax.Array]:
    image = x.reshape(1, 4, 4, 1)
    y = jax.lax.conv_general_dilated(image, params["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return {"scores": jnp.mean(y, (1, 2)) * scale, "best": jnp.argmax(jnp.mean(y, (1, 2)), -1)}


def mlp_params(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return [
        (
            jnp.asarray(rng.standard_normal((WIDTH, WIDTH)) / 3, jnp.float32),
            jnp.asarray(rng.standard_normal((1, WIDTH)), jnp.float32),
        )
        for _ in range(3)
    ]


def tagger_params(seed: int) -> Any:
    return {"k": jnp.asarray(np.random.default_rng(seed).standard_normal((3, 3, 1, 5)), jnp.float32)}


def row(seed: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, WIDTH)).astype(np.float32)


class Foreign:
    """A table's column, whose type is none that NumPy knows."""

    shape, dtype = (1, WIDTH), "Float32Dtype()"

    def __init__(self, value: np.ndarray | None = None) -> None:
        if value is not None:
            self.__array_interface__ = value.__array_interface__
            self.value = value


@pytest.fixture(scope="module", params=[1, 3], ids=["whole", "in segments"])
def served(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    """Six mlps, two of them also with a batch of 3, and two taggers."""
    with checked_runtime(widths=(1, 2, 4), segments=request.param) as rt:
        for i in range(4):
            rt.add_tenant(f"mlp{i}", mlp, mlp_params(i), example=(row(0),), slo=SLO)
        for i in (4, 5):
            rt.add_tenant(f"mlp{i}", mlp, mlp_params(i), examples=[(row(0),), (row(0, 3),)], slo=SLO)
        for i in range(2):
            rt.add_tenant(
                f"tag{i}", tagger, tagger_params(i), example=(np.zeros(16, np.float32), np.float32(2)), slo=SLO
            )
        rt.warm_up(120.0)
        yield rt


def host_of(rt: Runtime, name: str) -> Host:
    return rt._tenancy.residents[name].host


def check(got: Any, want: Any) -> None:
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-6), got, want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(got))


def test_every_request_gets_what_its_own_tenant_computes_alone(served):
    alone = jax.jit(mlp)
    requests = [(i % 6, row(i)) for i in range(90)]
    replies = [served.submit(f"mlp{tenant}", x) for tenant, x in requests]
    images = [(i % 2, np.random.default_rng(i).standard_normal(16).astype(np.float32)) for i in range(20)]
    tags = [served.submit(f"tag{tenant}", x, np.float32(i)) for i, (tenant, x) in enumerate(images)]
    for (tenant, x), reply in zip(requests, replies, strict=True):
        check(reply.result(60), np.asarray(alone(mlp_params(tenant), x)))
    for i, ((tenant, x), reply) in enumerate(zip(images, tags, strict=True)):
        got, want = reply.result(60), tagger(tagger_params(tenant), jnp.asarray(x), jnp.float32(i))
        check(got, jax.tree.map(np.asarray, want))
        assert got["best"].dtype == want["best"].dtype
    assert served.stats().lanes > served.stats().bundles  # some of them shared a bundle


def test_several_request_shapes_read_one_copy_of_the_weights(served, monkeypatch):
    x, asked, takes = row(7, 3), list[Form](), Form.takes
    with monkeypatch.context() as patched:
        patched.setattr(Form, "takes", lambda form, inputs: asked.append(form) or takes(form, inputs))
        reply = served.submit("mlp4", x)
    assert len(asked) == 2 == len(set(asked)), "each shape is looked at once"
    check(reply.result(60), np.asarray(jax.jit(mlp)(mlp_params(4), x)))
    check(served.submit("mlp4", x[:1]).result(60), np.asarray(jax.jit(mlp)(mlp_params(4), x[:1])))
    host = host_of(served, "mlp4")
    assert len(host.families) == 2
    weights = sum(leaf.nbytes for pair in mlp_params(4) for leaf in pair)
    assert host.schema.slot_bytes < 1.5 * weights


@pytest.mark.parametrize(
    "inputs, error",
    [
        (
            (np.zeros((1, 7), np.float32),),
            r"tenant 'mlp0': input\[0\] is float32\[1, 7\], traced with float32\[1, 12\]",
        ),
        ((np.zeros((1, WIDTH), np.int32),), r"input\[0\] is int32"),
        (("text",), r"input\[0\] is a str"),
        ((), "inputs are"),
        ((row(0), row(1)), "inputs are"),
        ((np.ma.masked_array(row(0)),), r"input\[0\] is a MaskedArray, expected"),
        ((Foreign(),), r"input\[0\] is a Foreign of Float32Dtype\(\) that is no NumPy array"),
    ],
)
def test_wrong_inputs_are_refused_at_submit(served, inputs, error):
    with pytest.raises(InvalidInput, match=error):
        served.submit("mlp0", *inputs)


def test_another_librarys_array_is_one_of_numpys_own(served):
    check(served.submit("mlp0", Foreign(row(5))).result(60), np.asarray(jax.jit(mlp)(mlp_params(0), row(5))))


def test_what_is_traced_is_no_request(served):
    with pytest.raises(InvalidInput, match=r"input\[0\] is traced, and a request needs values"):
        jax.jit(lambda x: served.submit("mlp0", x))(row(0))


def test_an_input_of_none_of_the_shapes_names_them_all(served):
    with pytest.raises(InvalidInput, match=r"float32\[2, 12\], none of .*float32\[1, 12\]; float32\[3, 12\]"):
        served.submit("mlp5", row(0, 2))


@pytest.mark.parametrize("deadline", [float("nan"), float("inf"), float("-inf")])
def test_deadlines_that_are_none_are_refused(served, deadline):
    with pytest.raises(InvalidInput, match="deadline is"):
        served.submit("mlp0", row(0), deadline=deadline)


@pytest.mark.parametrize("deadline", [1e300, 1e18])
def test_deadlines_are_any_finite_number(served, deadline):
    check(served.submit("mlp0", row(0), deadline=deadline).result(60), np.asarray(jax.jit(mlp)(mlp_params(0), row(0))))


@pytest.mark.parametrize("deadline", [0.0, -1e-9, -1.0, -1e300])
def test_a_deadline_that_has_passed_before_submit_is_exceeded(served, deadline):
    """As with gRPC, where the caller's may have passed when the call arrives."""
    reply = served.submit("mlp0", row(0), deadline=deadline)
    with pytest.raises(DeadlineExceeded, match="before submit"):
        reply.result(10)
    assert served.drain(60.0) and "before submit" in served.explain(reply)
    with pytest.raises(DeadlineExceeded, match="before submit"):
        asyncio.run(served.infer("mlp0", row(0), deadline=deadline))


def test_a_deadline_too_near_is_an_error_of_its_own(served):
    with pytest.raises(DeadlineExceeded) as caught:
        served.submit("mlp0", row(0), deadline=1e-9).result(10)
    assert (caught.value.grpc, caught.value.http) == ("DEADLINE_EXCEEDED", 504)


def test_nobody_can_ask_for_a_tenant_that_is_not_there(served):
    with pytest.raises(TenantClosed, match="no tenant 'nobody'"):
        served.submit("nobody", row(0))


def test_jax_arrays_python_numbers_and_lists_of_shapes_are_taken_too(served):
    check(served.submit("mlp0", jnp.asarray(row(3))).result(60), np.asarray(jax.jit(mlp)(mlp_params(0), row(3))))
    got = served.submit("tag0", jnp.zeros(16), 3.0).result(60)
    assert got["scores"].shape == (1, 5)


def test_results_are_the_callers_own(served):
    one, other = served.submit("mlp0", row(1)), served.submit("mlp1", row(1))
    kept = other.result(60).copy()
    result = one.result(60)
    result[:] = 7
    assert result.base is None
    np.testing.assert_array_equal(other.result(0), kept)


@pytest.mark.parametrize(("weights", "rows"), [((WIDTH, 0), 1), ((0, 3), 1), ((WIDTH, 3), 0)], ids=str)
def test_what_is_empty_is_served_too(served, weights, rows):
    def product(w: Any, x: jax.Array) -> Any:
        y = x[:, : w.shape[0]] @ w
        return y, jnp.sum(y, 0), jnp.sum(w)

    given = np.ones(weights, np.float32), np.ones((rows, WIDTH), np.float32)
    served.add_tenant("empty", product, given[0], example=given[1:], slo=SLO)
    got = served.submit("empty", given[1]).result(60)
    served.remove_tenant("empty")
    for a, b in zip(got, jax.jit(product)(*given), strict=True):
        check(a, np.asarray(b))


def test_nan_in_one_tenant_stays_there(served):
    bad = np.full((1, WIDTH), np.nan, np.float32)
    replies = [served.submit(f"mlp{i}", bad if i == 2 else row(i)) for i in range(6)]
    for i, reply in enumerate(replies):
        result = reply.result(60)
        assert np.isnan(result).all() if i == 2 else np.isfinite(result).all()


def test_infer_in_an_event_loop(served):
    async def main() -> list[Any]:
        return await asyncio.gather(*(served.infer(f"mlp{i % 6}", row(i)) for i in range(24)))

    for i, result in enumerate(asyncio.run(main())):
        check(result, np.asarray(jax.jit(mlp)(mlp_params(i % 6), row(i))))


def test_a_cancelled_task_withdraws_its_request(served):
    async def main() -> None:
        task = asyncio.create_task(served.infer("mlp0", row(0)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert served.drain(30.0)
    check(served.submit("mlp0", row(0)).result(60), np.asarray(jax.jit(mlp)(mlp_params(0), row(0))))


def test_draining_waits_for_callbacks_and_for_what_they_send(served):
    """One after another, with nothing under way while a callback runs."""
    ended: list[Any] = []

    def again(reply: Any) -> None:
        threading.Event().wait(0.01)
        ended.append(reply.exception())
        if len(ended) < 5:
            served.submit("mlp0", row(0)).add_done_callback(again)

    served.submit("mlp0", row(0)).add_done_callback(again)
    assert served.drain(30.0)
    assert ended == [None] * 5
    assert all(served.drain(0.0) for _ in range(20)), "nothing is due"


def test_an_update_takes_effect_for_the_next_request_and_for_nobody_else(served):
    def made() -> set[Any]:
        """What was compiled for one family; the policy asks for others as they keep waiting for each other."""
        return {key for key in served._stations[0].foundry._made if len(key[0]) == 1}

    before = served.submit("mlp1", row(0)).result(60)
    ready = made()
    served.update_tenant("mlp0", mlp_params(100))
    check(served.submit("mlp0", row(0)).result(60), np.asarray(jax.jit(mlp)(mlp_params(100), row(0))))
    np.testing.assert_allclose(served.submit("mlp1", row(0)).result(60), before, rtol=1e-6)
    served.update_tenant("mlp0", mlp_params(0))
    assert made() == ready
    with pytest.raises(InvalidInput, match="another program, or share other weights"):
        served.update_tenant("mlp0", own := mlp_params(0), shared=own[0])


def test_weights_of_other_types_are_refused_before_anything_is_made_of_them(served, monkeypatch):
    made: list[Any] = []
    monkeypatch.setattr(served._tenancy, "_fit", lambda *given: made.append(given))
    (w, b), *rest = mlp_params(0)
    for params, says in [
        (rest, r"params\[2\]\[0\] is no leaf, and f32\[\d+,\d+\] when it was added"),
        ([*rest, (w, b), (w, b)], r"params\[3\]\[0\] is f32\[\d+,\d+\], and no leaf when"),
        ([(w.astype(jnp.bfloat16), b), *rest], r"params\[0\]\[0\] is bf16\[\d+,\d+\], and f32"),
        ([(w, b[:, :-1]), *rest], r"params\[0\]\[1\] is f32.*another tenant"),
        ([(np.full((2,), "w"), b), *rest], r"params\[0\]\[0\] is ndarray, and f32"),
    ]:
        with pytest.raises(InvalidInput, match="tenant 'mlp0': " + says):
            served.update_tenant("mlp0", params)
    assert not made


def test_names_and_terms_are_checked(served):
    for terms, error in [
        ({"slo": 0.0}, "slo is"),
        ({"slo": float("nan")}, "slo is"),
        ({"slo": 1.0, "weight": 0.0}, "weight is"),
        ({"slo": 1.0, "weight": 1e300}, "weight is"),  # two such are infinite together
        ({"slo": 1.0, "weight": 5e-324}, "weight is"),
        ({"slo": 1.0, "quota": 0}, "quota is"),
    ]:
        with pytest.raises(InvalidInput, match=error):
            served.add_tenant("new", mlp, mlp_params(0), example=(row(0),), **terms)
    with pytest.raises(InvalidInput, match="a tenant 'mlp0' already"):
        served.add_tenant("mlp0", mlp, mlp_params(0), example=(row(0),), slo=SLO)
    with pytest.raises(InvalidInput, match="either example"):
        served.add_tenant("new", mlp, mlp_params(0), slo=SLO)


def test_a_tenant_that_cannot_be_traced_is_refused_alone(served):
    def broken(params: Any, x: jax.Array) -> jax.Array:
        raise ValueError("not today")

    with pytest.raises(coalesce.TraceError, match="not today"):
        served.add_tenant("broken", broken, mlp_params(0), example=(row(0),), slo=SLO)
    assert "broken" not in served.stats().tenants
    served.submit("mlp0", row(0)).result(60)


def test_a_tenant_that_raises_at_run_time_fails_alone():
    """Its code is never called with what nobody has sent, such as zeros in lanes that nobody uses."""

    def fickle(params: Any, x: jax.Array) -> jax.Array:
        def look(v: Any, w: Any) -> Any:
            if np.any(np.asarray(v) > 100):
                raise ValueError("too large")
            assert np.all(np.asarray(v)) and np.any(np.asarray(w)), "zeros"
            return np.asarray(v)

        return jax.pure_callback(look, jax.ShapeDtypeStruct(x.shape, x.dtype), x, params) @ params

    with checked_runtime(widths=(1, 2, 4)) as rt:
        for i in range(4):
            rt.add_tenant(f"t{i}", fickle, jnp.eye(WIDTH) * (i + 1), example=(row(0),), slo=SLO)
        rt.warm_up(120.0)
        bad = np.full((1, WIDTH), 1000.0, np.float32)
        replies = [rt.submit(f"t{i}", bad if i == 1 else row(i)) for i in range(4)]
        with pytest.raises(TenantFailure, match=r"(?s)tenant 't1'.*too large"):
            replies[1].result(60)
        for i in (0, 2, 3):
            np.testing.assert_allclose(replies[i].result(60), row(i) * (i + 1), rtol=1e-6)


@pytest.mark.parametrize("segments, capacity", [(1, 8), (3, 8)])
def test_a_bank_grows_while_others_are_served(segments, capacity):
    """One slot is kept free where programs are cut: two, four and eight of which tenants have one, three and seven."""
    with checked_runtime(widths=(1, 2), capacity=1, segments=segments) as rt:
        stop, wrong = threading.Event(), []
        rt.add_tenant("t0", mlp, mlp_params(0), example=(row(0),), slo=SLO)
        want = np.asarray(jax.jit(mlp)(mlp_params(0), row(0)))

        def client() -> None:
            while not stop.is_set():
                if not np.allclose(rt.submit("t0", row(0)).result(60), want, rtol=1e-5, atol=1e-6):
                    wrong.append(1)

        thread = threading.Thread(target=client)
        thread.start()
        try:
            for i in range(1, 5):
                rt.add_tenant(f"t{i}", mlp, mlp_params(i), example=(row(0),), slo=SLO)
        finally:
            stop.set()
            thread.join()
        for i in range(5):
            check(rt.submit(f"t{i}", row(i)).result(60), np.asarray(jax.jit(mlp)(mlp_params(i), row(i))))
        assert host_of(rt, "t4").store.capacity == capacity
        assert not wrong
        assert rt.health().executables <= 2 * segments  # not those of the smaller banks


def test_removed_tenants_free_their_place_and_their_name():
    with checked_runtime(widths=(1, 2), capacity=2) as rt:
        for round_ in range(6):
            for i in range(2):
                rt.add_tenant(f"t{i}", mlp, mlp_params(round_ + i), example=(row(0),), slo=SLO)
            replies = [rt.submit(f"t{i}", row(i)) for i in range(2)]
            for i, reply in enumerate(replies):
                rt.remove_tenant(f"t{i}", drain=True, timeout=60.0)
                check(reply.result(60), np.asarray(jax.jit(mlp)(mlp_params(round_ + i), row(i))))
        with pytest.raises(TenantClosed):
            rt.submit("t0", row(0))
        assert not rt.stats().tenants


def test_who_removes_a_tenant_twice_does_not_remove_another_of_its_name():
    """A thread may look a tenant up, and go on when others have removed it and given its name away."""
    with checked_runtime(widths=(1,), capacity=2) as rt:
        rt.add_tenant("t0", mlp, mlp_params(0), example=(row(0),), slo=SLO)
        gone = rt._tenancy.residents["t0"]
        rt.remove_tenant("t0", timeout=60.0)
        rt.add_tenant("t0", mlp, mlp_params(1), example=(row(0),), slo=SLO)
        rt._tenancy.remove(gone, True, 60.0)
        check(rt.submit("t0", row(2)).result(60), np.asarray(jax.jit(mlp)(mlp_params(1), row(2))))
        rt.remove_tenant("t0", timeout=60.0)
        assert not rt._tenancy._names and not rt._stations[0].device.hosts


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.once
def test_device_memory_returns_to_where_it_was(segments):
    held = held_from_now()
    with checked_runtime(widths=(1, 2), capacity=1, segments=segments) as rt:
        rt.add_tenant("stays", mlp, mlp_params(0), example=(row(0),), slo=SLO)
        before = None
        for _ in range(3):
            rt.add_tenant("image", tagger, tagger_params(0), example=(np.zeros(16, np.float32), np.float32(2)), slo=SLO)
            rt.submit("image", np.zeros(16, np.float32), np.float32(2)).result(60)
            serving = held()
            rt.remove_tenant("image", timeout=60.0)
            assert held() < serving
            before = before or held()
            assert held() == before
        rt.submit("stays", row(0)).result(60)


def test_what_does_not_fit_is_refused_with_the_bytes():
    with checked_runtime(widths=(1,), capacity=1, memory_limit=10_000) as rt:
        rt.add_tenant("t0", mlp, mlp_params(0), example=(row(0),), slo=SLO)
        with pytest.raises(OutOfDeviceMemory, match=r"needs [\d,]+ bytes on the device, and [\d,]+ are free") as caught:
            for i in range(1, 9):
                rt.add_tenant(f"t{i}", mlp, mlp_params(i), example=(row(0),), slo=SLO)
        assert caught.value.http == 507
        check(rt.submit("t0", row(0)).result(60), np.asarray(jax.jit(mlp)(mlp_params(0), row(0))))


def test_a_bank_is_as_large_as_there_is_room_for():
    """Four tenants fit, but one is left out, whose weights are to be prepared; sixteen, or twice as many, do not."""
    with checked_runtime(widths=(1,), memory_limit=10_000, compiled=False) as rt:
        for i in range(3):
            rt.add_tenant(f"t{i}", mlp, mlp_params(i), example=(row(0),), slo=SLO)
        assert host_of(rt, "t0").store.capacity == 3
        with pytest.raises(OutOfDeviceMemory, match="room for 4 tenants of family 0 needs"):
            rt.add_tenant("t3", mlp, mlp_params(3), example=(row(0),), slo=SLO)
    with checked_runtime(widths=(1,), memory_limit=25_000, capacity=4, compiled=False) as rt:
        for i in range(6):
            rt.add_tenant(f"t{i}", mlp, mlp_params(i), example=(row(0),), slo=SLO)
        assert host_of(rt, "t0").store.capacity == 6, "eight do not fit"
        check(rt.submit("t5", row(0)).result(60), np.asarray(jax.jit(mlp)(mlp_params(5), row(0))))


def test_shared_weights_lie_on_the_device_once():
    backbone = jnp.asarray(np.random.default_rng(0).standard_normal((WIDTH, WIDTH)), jnp.float32)

    def headed(params: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ params["backbone"]) @ params["head"]

    with checked_runtime(widths=(1, 2)) as rt:
        heads = [jnp.asarray(np.random.default_rng(i).standard_normal((WIDTH, 3)), jnp.float32) for i in range(3)]
        for i, head in enumerate(heads):
            params = {"backbone": jnp.array(backbone), "head": head}
            rt.add_tenant(f"t{i}", headed, params, example=(row(0),), shared={"backbone": params["backbone"]}, slo=SLO)
        replies = [rt.submit(f"t{i}", row(i)) for i in range(3)]
        for i, reply in enumerate(replies):
            want = headed({"backbone": backbone, "head": heads[i]}, jnp.asarray(row(i)))
            check(reply.result(60), np.asarray(want))
        assert host_of(rt, "t0").schema.shared_bytes == backbone.nbytes


def test_what_waits_together_gets_the_next_width_that_is_offered():
    """The policy asks for the double of what there is, and that may not be among the widths."""
    with checked_runtime(widths=(1, 4), compiled=False) as rt:
        rt.add_tenant("t0", mlp, mlp_params(0), example=(row(0),), slo=SLO)
        for reply in [rt.submit("t0", row(i)) for i in range(20)]:
            reply.result(60)
        rt.warm_up(60.0)
        assert {e.entries[0].width for e in rt._stations[0].device.catalog.executables} == {1, 4}


def test_executables_are_as_wide_as_tenants_with_two_requests_each():
    """And ready before anybody has asked for so much."""
    with checked_runtime(widths=(1, 2, 4, 8), compiled=False) as rt:
        for i, widths in enumerate([{1}, {1, 2, 4}, {1, 2, 4}, {1, 2, 4, 8}]):
            rt.add_tenant(f"t{i}", mlp, mlp_params(i), example=(row(0),), slo=SLO)
            rt.warm_up(60.0)
            assert {e.entries[0].width for e in rt._stations[0].device.catalog.executables} == widths


@pytest.mark.parametrize(("widths", "tenants", "waited"), [
    ((1, 2, 4), 1, 1),
    ((1, 2, 4), 2, 2),
    ((4, 16), 1, 1),  # narrower ones there are not
])  # fmt: skip
def test_the_widest_is_not_waited_for(widths, tenants, waited):
    """Where a program is to be cut for somebody who cannot wait."""
    with checked_runtime(widths=widths, compiled=False) as rt:
        for i in range(tenants):
            rt.add_tenant(f"t{i}", mlp, mlp_params(i), example=(row(0),), slo=SLO)
        host = host_of(rt, "t0")
        assert len(rt._stations[0].quarters._site.order_all(host, host.courses)) == waited


def test_closing_ends_everything_once():
    checked = Checked()
    rt = Runtime(widths=(1,), observers=[checked])
    rt.add_tenant("t0", mlp, mlp_params(0), example=(row(0),), slo=SLO)
    replies = [rt.submit("t0", row(i)) for i in range(50)]
    rt.close()
    rt.close()
    assert all(reply.exception(0) is None for reply in replies)
    with pytest.raises(Shutdown):
        rt.submit("t0", row(0))
    with pytest.raises(Shutdown):
        rt.add_tenant("t1", mlp, mlp_params(0), example=(row(0),), slo=SLO)
    assert rt.health().status == "closed" and not rt.health().ok
    assert checked.violations() == []


def test_what_is_being_compiled_when_the_runtime_closes_has_not_failed(monkeypatch, caplog):
    """As where the process that compiles it has ended."""
    with Runtime(widths=(1, 2)) as rt:
        device, seen = rt._stations[0].device, list[int]()
        right = device.compile

        def compile(entries: tuple[Entry, ...], capacities: tuple[int, ...]) -> Any:
            seen.append(entries[0].width)
            if entries[0].width > 1:
                raise Shutdown("the runtime was closed")
            return right(entries, capacities)

        monkeypatch.setattr(device, "compile", compile)
        rt.add_tenant("t0", mlp, mlp_params(0), example=(row(0),), slo=SLO)
        with pytest.raises(Shutdown):
            rt._stations[0].foundry.order((Entry(0, 0, 2),)).result(60)
        assert seen == [1, 2] and not rt.health().failed
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_closing_inside_a_callback_hangs_nothing():
    checked = Checked()
    rt = Runtime(widths=(1,), observers=[checked])
    rt.add_tenant("t0", mlp, mlp_params(0), example=(row(0),), slo=SLO)
    done = threading.Event()
    reply = rt.submit("t0", row(0))
    reply.add_done_callback(lambda _: (rt.close(), done.set()))
    assert done.wait(30)
    for _ in range(300):
        if rt.health().status == "closed" and not any(t.is_alive() for t in rt._stations[0].driver.threads):
            break
        threading.Event().wait(0.1)
    assert not any(thread.is_alive() for thread in rt._stations[0].driver.threads)
    assert checked.violations() == []


def test_adding_without_waiting_gives_a_future():
    async def main() -> None:
        async with Runtime(widths=(1,)) as rt:
            added = rt.add_tenant("t0", mlp, mlp_params(0), example=(row(0),), slo=SLO, wait=False)
            added.result(60)
            check(await rt.infer("t0", row(1)), np.asarray(jax.jit(mlp)(mlp_params(0), row(1))))

    asyncio.run(main())


def test_reproducible_results_do_not_depend_on_company():
    with checked_runtime(widths=(1, 2, 4), reproducible=True) as rt:
        for i in range(4):
            rt.add_tenant(f"t{i}", mlp, mlp_params(i), example=(row(0),), slo=SLO)
        rt.warm_up(120.0)
        alone = rt.submit("t1", row(5)).result(60)
        replies = [rt.submit(f"t{i}", row(5)) for i in range(4) for _ in range(3)]
        together = [reply.result(60) for reply in replies]
        for result in together[3:6]:
            np.testing.assert_array_equal(result, alone)
        assert {e.entries[0].width for e in rt._stations[0].device.catalog.executables} == {4}


def test_a_runtime_that_is_closed_leaves_no_thread():
    """Nor what one would hold, as the weights on the device."""
    before = set(threading.enumerate())
    with Runtime(widths=(1,)):
        own = set(threading.enumerate()) - before
        assert len(own) > 3
    for thread in own:
        thread.join(10)
        assert not thread.is_alive(), thread.name


LEFT_OPEN = """
import atexit, threading
import jax.numpy as jnp, numpy as np, coalesce
def look():
    own = [thread for thread in threading.enumerate() if thread.name.startswith("coalesce")]
    for thread in own:
        thread.join(10)
    print(rt.health().status, [thread.name for thread in own if thread.is_alive()])
atexit.register(look)
rt = coalesce.Runtime(widths=(1, 2, 4), compiled=False)
for name in "abc":
    rt.add_tenant(name, lambda w, x: jnp.tanh(x @ w), np.eye(4), example=(np.ones((1, 4)),), slo=60.0)
"""


@pytest.mark.once
def test_an_interpreter_that_ends_closes_what_was_left_open():
    """A thread in the middle of JAX's code would take it along: it ended with a crash, now and then."""
    run = subprocess.run([sys.executable, "-c", LEFT_OPEN], capture_output=True, text=True, timeout=300)
    assert (run.stdout, run.returncode) == ("closed []\n", 0), run.stderr
