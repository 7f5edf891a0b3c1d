"""Wrong inputs, NaNs and mixed-up company: what others do changes no bit of a result.

The runtime is `reproducible`, so that every request of a tenant runs in one executable (in three, where programs are
cut), and its result alone can be compared with that in company, bit by bit.
"""

import random
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coalesce.errors import InvalidInput
from coalesce.runtime.runtime import Runtime
from tests.checked import checked_runtime
from tests.compare import assert_same
from tests.programs import Draw
from tests.tenants import alone as alone_of, draw_tenants

SLO = 60.0
WHOLE_AND_CUT = [1, pytest.param(3, marks=pytest.mark.once)]
ODD = 13  # no multiple of what a processor computes at once
SMALL, FULL = 200, 10_000


def net(params: Any, x: jax.Array, number: jax.Array) -> dict[str, jax.Array]:
    """`number` goes through it unchanged, as a watermark."""
    y = jnp.tanh(x @ params["w"] + params["b"][None])
    return {"y": jax.nn.softmax(y @ params["v"]), "number": number}


def gated(params: Any, x: jax.Array, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.nn.sigmoid(x @ params["w"]) * x, number + params["one"]


def params_of(kind: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    square = rng.standard_normal((2, ODD, ODD)).astype(np.float32) / 4
    if kind == "gated":
        return {"w": square[0], "one": np.int32(1)}
    return {"w": square[0], "v": square[1], "b": rng.standard_normal(ODD).astype(np.float32)}


FUNCTIONS = {"net": net, "gated": gated}
NAMES = [f"{kind}{i}" for kind in FUNCTIONS for i in range(3)]


def kind_of(name: str) -> str:
    return name.rstrip("0123456789")


def row(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, ODD)).astype(np.float32)


@pytest.fixture(scope="module", params=WHOLE_AND_CUT, ids=["whole", "in segments"])
def rt(request: pytest.FixtureRequest) -> Iterator[Runtime]:
    with checked_runtime(widths=(1, 4), reproducible=True, segments=request.param, compiled=False) as rt:
        for i, name in enumerate(NAMES):
            kind = kind_of(name)
            example = (row(0), np.int32(0))
            rt.add_tenant(name, FUNCTIONS[kind], params_of(kind, i), example=example, slo=SLO, quota=FULL)
        yield rt


def bits(result: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(result)]


def alone(rt: Runtime, name: str, seed: int) -> Any:
    """Nobody else asks at the time."""
    assert rt.drain(60.0)
    return rt.submit(name, row(seed), np.int32(seed)).result(60)


WRONG: list[tuple[Any, ...]] = [
    (),
    (row(0),),
    (row(0)[:, 1:], np.int32(0)),
    (row(0).astype(np.int32), np.int32(0)),
    (row(0), np.float32(0)),
    ({"x": row(0)}, np.int32(0)),
    ("text", np.int32(0)),
    (None, None),
]


@pytest.mark.parametrize("count", [SMALL, pytest.param(FULL, marks=pytest.mark.soak)])
def test_wrong_inputs_are_refused_at_once_and_change_no_bit_for_others(rt: Runtime, count: int):
    chosen, seeds = random.Random(1), range(8)
    want = {(name, seed): bits(alone(rt, name, seed)) for name in NAMES for seed in seeds}
    sent = []
    for i in range(count):
        name, seed = chosen.choice(NAMES), chosen.choice(seeds)
        if i % 3:
            sent.append((name, seed, rt.submit(name, row(seed), np.int32(seed))))
            continue
        with pytest.raises(InvalidInput, match=f"tenant '{name}'"):
            rt.submit(name, *chosen.choice(WRONG))
    assert all(bits(reply.result(60)) == want[name, seed] for name, seed, reply in sent)


def test_nan_in_inputs_and_weights_changes_no_bit_for_others(rt: Runtime):
    want = {name: bits(alone(rt, name, 5)) for name in NAMES}
    for value in (np.nan, np.inf, -np.inf):
        sick, poison = "net0", np.full((1, ODD), value, np.float32)
        rt.update_tenant(sick, jax.tree.map(lambda x, v=value: np.full_like(x, v), params_of("net", 0)))
        for _ in range(6):
            replies = [(name, rt.submit(name, row(5), np.int32(5))) for name in NAMES for _ in range(2)]
            bad = [rt.submit(name, poison, np.int32(0)) for name in NAMES]
            for name, reply in replies:
                assert name == sick or bits(reply.result(60)) == want[name], name
            assert all(not np.isfinite(jax.tree.leaves(reply.result(60))[-1]).all() for reply in bad[1:3])
    rt.update_tenant(sick, params_of("net", 0))
    assert bits(alone(rt, sick, 5)) == want[sick]


@pytest.mark.parametrize("count", [SMALL, pytest.param(FULL, marks=pytest.mark.soak)])
def test_in_any_order_everybody_gets_their_own(rt: Runtime, count: int):
    """Watermarks are exact, and results are within tolerance of what the tenant computes alone."""
    chosen = random.Random(2)
    programs = {name: jax.jit(FUNCTIONS[kind_of(name)]) for name in NAMES}
    params = {name: params_of(kind_of(name), i) for i, name in enumerate(NAMES)}
    sent = []
    for number in range(count):
        name = chosen.choice(NAMES)
        sent.append((name, number, rt.submit(name, row(number % 50), np.int32(number))))
    for name, number, reply in sent:
        got, want = reply.result(60), programs[name](params[name], row(number % 50), np.int32(number))
        assert jax.tree.structure(got) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            if b.dtype == jnp.int32:
                assert a == b
            else:
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def marked(fn: Any) -> Any:
    """Also with a number, which goes through it unchanged."""
    return lambda params, number, *inputs: (number, fn(params, *inputs))


@pytest.mark.parametrize(
    ("models", "segments"),
    [
        (2, 1),
        pytest.param(1, 3, marks=pytest.mark.once),
        pytest.param(60, 1, marks=pytest.mark.soak),
        pytest.param(60, 3, marks=pytest.mark.soak),
    ],
)
def test_random_tenants_get_what_they_compute_alone(models: int, segments: int):
    """Of random programs, shapes and weights, each with its watermark, in a random order."""
    chosen = random.Random(3)
    with checked_runtime(widths=(1, 2), segments=segments, compiled=False) as rt:
        who = [tenant for seed in range(models) for tenant in draw_tenants(Draw(seed), 4, 1, jnp.float32)]
        for i, tenant in enumerate(who):
            example = (np.int32(0), *tenant.inputs)
            rt.add_tenant(f"t{i}", marked(tenant.fn), tenant.params, example=example, slo=SLO)
        order = [*range(len(who))] * 6
        chosen.shuffle(order)
        sent = [(n, i, rt.submit(f"t{i}", np.int32(n), *who[i].inputs)) for n, i in enumerate(order)]
        for n, i, reply in sent:
            number, got = reply.result(60)
            assert number == n
            assert_same(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, alone_of(who[i])))
