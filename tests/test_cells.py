"""fuse_epilogues where columns are taken apart: a recurrent cell, or a gated unit, is one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from jax import lax

import coalesce
from coalesce import jaxpr as J
from coalesce.bundle import Bundle, items, JointLoop, Loop, Pack, packs
from coalesce.costs import Costs, device_of
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose, indexed_matvec, KERNELS, mosaic_gemm
from coalesce.measuring.case import cases
from coalesce.models import by_name
from coalesce.passes.choose_kernels import choose_kernels
from coalesce.passes.form_packs import form_packs
from coalesce.passes.fuse_epilogues import fuse_epilogues
from coalesce.serving.schema import Options
from tests.alone import alone, array, check_fused, fuse_tenants, Tenant
from tests.bundles import bundle_of, replanned
from tests.compare import assert_bitwise, assert_same, distance, matched, norm, ROUNDINGS, TIMES
from tests.heavy_cases import indexed
from tests.programs import Draw
from tests.serving import assert_alone, fit_of, serve


def by_row(op: HeavyOp, groups: int, platform: str) -> str:
    return "indexed_matvec" if indexed_matvec.supports(op) else indexed(op, groups, platform)


BY_ROW = Options("gpu", Costs(device_of("gpu")), choice=by_row)


def planned(*tenants: Tenant, choice: Any = choose, platform: str = "gpu") -> Bundle:
    return choose_kernels(form_packs(bundle_of(*tenants)), platform=platform, choice=choice)


def lanes(fn: Callable[..., Any], count: int, make: Callable[[], tuple[Any, tuple[Any, ...]]]) -> list[Tenant]:
    return [(fn, *make()) for _ in range(count)]


def lstm(p: Any, xs: Any, c: Any, h: Any) -> Any:
    """Steps of an LSTM whose inputs' product is one for all steps."""

    def step(carry: Any, x: Any) -> Any:
        c, h = carry
        i, f, g, o = jnp.split(h @ p["w"] + p["b"] + x, 4, axis=1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (c, h), h

    return lax.scan(step, (c, h), xs)


def lstms(count: int, size: int = 8, steps: int = 3, dtype: Any = np.float32) -> list[Tenant]:
    def make() -> tuple[Any, tuple[Any, ...]]:
        params = {"w": array(size, 4 * size, dtype=dtype), "b": array(1, 4 * size, dtype=dtype)}
        return params, (array(steps, 1, 4 * size, dtype=dtype), *(array(1, size, dtype=dtype) for _ in range(2)))

    return lanes(lstm, count, make)


def cells(bundle: Bundle) -> list[Pack]:
    """The packs that stand in loops."""
    return [pack for item in items(bundle.schedule) if isinstance(item, Loop) for pack in packs(item.bodies[0])]


def test_a_cell(golden):
    golden(replanned(fuse_epilogues, planned(*lstms(2, dtype=jnp.bfloat16))))


def test_a_gated_unit(golden):
    golden(replanned(fuse_epilogues, planned(*gated(2, jax.nn.silu), choice=indexed)))


def gated(
    count: int, act: Any, rows: int = 5, width: int = 24, dtype: Any = np.float32, features: int = 16
) -> list[Tenant]:
    def unit(p: Any, x: Any) -> Any:
        gate, up = jnp.split(x @ p["in"] + p["b"][None], 2, axis=1)
        return (act(gate) * up) @ p["out"]

    def make() -> tuple[Any, tuple[Any, ...]]:
        shapes = {"in": (features, 2 * width), "b": (2 * width,), "out": (width, features)}
        return {k: array(*v, dtype=dtype) for k, v in shapes.items()}, (array(rows, features, dtype=dtype),)

    return lanes(unit, count, make)


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.once
def test_a_step_of_a_model_is_one_kernel(name, count):
    model = by_name(name, hidden=16, features=12, steps=3, classes=5)
    tenants = [(model.apply, model.init(jax.random.key(i)), model.example(jax.random.key(9 + i))) for i in range(count)]
    fused = check_fused(tenants, choose_kernel=by_row)
    (body,) = [item.bodies[0] for item in items(fused.bundle.schedule) if isinstance(item, Loop)]
    (pack,) = body
    assert isinstance(pack, Pack) and pack.kernel == "indexed_matvec"
    assert len(pack.results) == (2 if name == "lstm" else 1)


def test_a_step_reads_its_inputs_where_they_lie():
    """Nothing slices them, or copies what a step computes for the next one."""
    fused = check_fused(lstms(3), choose_kernel=by_row, policy="never")
    calls = [eqn for eqn in J.walk(fused.jaxpr) if eqn.primitive.name == "pallas_call"]
    assert calls
    for call in calls:
        assert (3, 3, 32) in [J.shape(a) for a in call.invars]  # lanes, steps, columns
        assert [J.shape(v) for v in call.outvars] == [(3, 1, 8)] * 2


@pytest.mark.parametrize("steps", [0, 1])
def test_few_steps(steps):
    fused = check_fused(lstms(2, steps=steps), choose_kernel=by_row)
    assert [len(pack.results) for pack in cells(fused.bundle)] == [2]


@pytest.mark.parametrize("count", [1, 2])
def test_steps_from_the_last_to_the_first(count):
    """Of a loop that a GPU runs as none, for one lane too."""

    def run(p: Any, xs: Any, h: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            z, g = jnp.split(h @ p + x[:, 4:], 2, axis=1)
            return h + jax.nn.sigmoid(z) * jnp.tanh(g), h

        return lax.scan(step, h, xs, reverse=True)

    tenants = lanes(run, count, lambda: (array(8, 16), (array(4, 1, 20), array(1, 8))))
    fused = check_fused(tenants, platform="gpu", policy="never")
    assert "unrolled" in str(fused) and [len(pack.results) for pack in cells(fused.bundle)] == [1]


def test_a_cell_in_scans_that_run_as_one():
    """It is one kernel beside what others do in the same step, and reads its inputs where they lie."""

    def run(cell: bool) -> Callable[..., Any]:
        def step(p: Any, carry: Any, x: Any) -> Any:
            h, c = carry
            c = jnp.tanh(c @ p["own"])
            if cell:
                z, g = jnp.split(h @ p["w"] + p["b"] + x, 2, axis=1)
                h = h + jax.nn.sigmoid(z) * jnp.tanh(g)
            return (h, c), h

        return lambda p, xs, h, c: lax.scan(lambda carry, x: step(p, carry, x), (h, c), xs)

    def make(length: int) -> tuple[Any, tuple[Any, ...]]:
        params = {"own": array(4, 4), "w": array(8, 16), "b": array(1, 16)}
        return params, (array(length, 1, 16), array(1, 8), array(3, 4))

    tenants = [(fn, *make(length)) for fn, length in ((run(True), 3), (run(False), 5)) for _ in range(2)]
    fused = check_fused(tenants, choose_kernel=by_row, policy="always")
    (loop,) = [item for item in items(fused.bundle.schedule) if isinstance(item, JointLoop)]
    assert sorted((pack.kernel, len(pack.results)) for pack in packs(loop.body))[-1] == ("indexed_matvec", 1)
    calls = [eqn for eqn in J.walk(fused.jaxpr) if eqn.primitive.name == "pallas_call"]
    cells = [call for call in calls if [J.shape(v) for v in call.outvars] == [(2, 1, 8)]]
    assert cells and all((2, 3, 16) in [J.shape(a) for a in call.invars] for call in cells)


def test_it_reads_slices_of_them_there_too():
    """The gates of a GRU, whose inputs' products were merged: a step reads columns of rows of one array."""
    model = by_name("gru", hidden=16, features=12, steps=3, classes=5)
    tenants = [(model.apply, model.init(jax.random.key(i)), model.example(jax.random.key(9 + i))) for i in range(2)]
    fused = check_fused(tenants, choose_kernel=by_row, policy="never")
    calls = [eqn for eqn in J.walk(fused.jaxpr) if eqn.primitive.name == "pallas_call"]
    steps = [call for call in calls if [J.shape(v) for v in call.outvars] == [(2, 1, 16)]]
    assert steps and all([J.shape(a) for a in call.invars].count((2, 3, 48)) == 3 for call in steps)


@pytest.mark.parametrize("rows", [1, 3])
def test_slices_of_several_rows(rows):
    """Those that begin with the first column are in several pieces too."""

    def gates(p: Any, xs: Any, h: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            a, b = jnp.split(h @ p, 2, axis=1)
            h = jax.nn.sigmoid(a + x[0]) * jnp.tanh(b + x[1])
            return h, h

        return lax.scan(step, h, (xs[..., :8], xs[..., 8:]))

    tenants = lanes(gates, 2, lambda: (array(8, 16), (array(3, rows, 16), array(rows, 8))))
    assert [len(pack.results) for pack in cells(check_fused(tenants, choose_kernel=by_row).bundle)] == [1]


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_of_a_step(rows):
    """A loop inside a loop goes through what a step of the outer one reads."""

    def blocks(p: Any, xs: Any, c: Any, h: Any) -> Any:
        return lax.scan(lambda carry, x: lstm(p, x, *carry), (c, h), xs)

    def make() -> tuple[Any, tuple[Any, ...]]:
        params = {"w": array(8, 32), "b": array(1, 32)}
        return params, (array(2, 3, rows, 32), array(rows, 8), array(rows, 8))

    check_fused(lanes(blocks, 2, make), choose_kernel=by_row)


def test_a_gated_unit_is_one_kernel():
    fused = check_fused(gated(3, jax.nn.gelu), choose_kernel=indexed)
    first, _ = packs(fused.bundle.schedule)
    assert [J.shape(v) for v in first.results] == [(5, 24)]
    assert {type(item) for item in fused.bundle.schedule} == {Pack}


def test_one_row_of_it_too():
    tenants = gated(3, jax.nn.silu, rows=1)
    assert [len(pack.results) for pack in packs(check_fused(tenants, choose_kernel=by_row).bundle.schedule)] == [1, 0]


def test_a_kernel_by_tma_takes_nothing_apart():
    def by_tma(op: HeavyOp, groups: int, platform: str) -> str:
        return "mosaic_gemm" if mosaic_gemm.supports(op) else choose(op, groups, platform)

    tenants = gated(2, jax.nn.silu, rows=64, width=128, dtype=jnp.bfloat16, features=64)
    bundle = fuse_epilogues(planned(*tenants, choice=by_tma), choice=by_tma)
    first, _ = packs(bundle.schedule)
    assert first.kernel == "mosaic_gemm"
    assert [J.shape(v) for v in first.results] == [(64, 256)]  # with the bias, which takes nothing apart


def test_products_that_were_merged():
    """Gate and up by weights of their own are one product, whose columns lie side by side."""

    def unit(p: Any, x: Any) -> Any:
        return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    shapes = {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}
    tenants = lanes(unit, 2, lambda: ({k: array(*v) for k, v in shapes.items()}, (array(4, 16),)))
    first, _ = packs(check_fused(tenants, choose_kernel=indexed).bundle.schedule)
    assert [J.shape(v) for v in first.results] == [(4, 24)]


def test_where_it_wins_it_is_chosen():
    """For products of one row whose columns are taken apart, and no others."""
    for dtype in (jnp.bfloat16, np.float32):
        tenants = gated(3, jax.nn.silu, rows=1, dtype=dtype)
        first, second = packs(fuse_tenants(tenants, platform="gpu").bundle.schedule)
        assert (first.kernel, second.kernel) == ("indexed_matvec", "batched_matvec")
        (step,) = cells(fuse_tenants(lstms(2, dtype=dtype), platform="gpu").bundle)
        assert step.kernel == "indexed_matvec"


def test_a_kernel_that_a_caller_names_stays():
    def named(op: HeavyOp, groups: int, platform: str) -> str:
        return choose(op, groups, platform)

    bundle = planned(*lstms(2, dtype=jnp.bfloat16))
    assert fuse_epilogues(bundle, choice=named) is bundle
    assert [pack.kernel for pack in cells(fuse_epilogues(bundle))] == ["indexed_matvec"]


def test_lanes_that_share_weights_are_rows_of_one_product():
    fn, params, _ = lstms(1)[0]
    tenants = [(fn, params, xs) for _, _, xs in lstms(3)]
    assert [pack.kernel for pack in cells(check_fused(tenants, platform="gpu").bundle)] == ["batched_matvec"]


def test_columns_are_not_taken_apart_for_others():
    """Nor for more bytes than the product has, nor into many parts."""

    def slices(p: Any, x: Any) -> Any:
        a, b = jnp.split(x @ p, 2, axis=1)
        return a.sum(0), b * 2.0

    def more(p: Any, x: Any) -> Any:
        y = x @ p
        return y, jax.nn.silu(y[:, :4]) * y[:, 4:]

    def many(p: Any, x: Any) -> Any:
        return sum(jnp.split(x @ p, 16, axis=1))

    for fn, n in [(slices, 8), (more, 8), (many, 32)]:
        tenants = lanes(fn, 2, lambda n=n: (array(6, n), (array(3, 6),)))
        (pack,) = packs(check_fused(tenants, choose_kernel=indexed, policy="never").bundle.schedule)
        assert not pack.epilogue, fn.__name__


def test_strips_of_no_columns():
    def unit(p: Any, x: Any) -> Any:
        none, a, b = jnp.split(x @ p, [0, 4], axis=1)
        return jnp.tanh(none), jnp.tanh(a) * b

    check_fused(lanes(unit, 2, lambda: (array(6, 8), (array(3, 6),))), choose_kernel=indexed)


def test_what_leaves_in_the_middle():
    def unit(p: Any, x: Any) -> Any:
        a, b, _ = jnp.split(x @ p["w"], 3, axis=1)
        gate = jax.nn.sigmoid(a)
        return gate.sum(0), jnp.tanh(b) * gate + 1.0

    tenants = lanes(unit, 2, lambda: ({"w": array(6, 24)}, (array(3, 6),)))
    (pack,) = packs(check_fused(tenants, choose_kernel=indexed, policy="never").bundle.schedule)
    assert [J.shape(v) for v in pack.results] == [(3, 8)] * 2


def test_what_the_product_reads_stays_before_it():
    """Of one row the tail takes what is computed for it alone, which is not what the product reads too."""

    def unit(p: Any, x: Any) -> Any:
        x = jnp.tanh(x)
        a, b = jnp.split(x @ p, 2, axis=1)
        return a * x + b

    tenants = lanes(unit, 2, lambda: (array(8, 16), (array(1, 8),)))
    (pack,) = packs(check_fused(tenants, choose_kernel=by_row).bundle.schedule)
    assert [step.eqn.primitive.name for step in pack.epilogue] == ["split", "mul", "add"]


UNARY = (jnp.tanh, jax.nn.sigmoid, jax.nn.relu, jnp.negative, jax.nn.gelu, lambda x: x * 0.5, lambda x: 1.0 - x)
BINARY = (jnp.add, jnp.multiply, jnp.subtract, jnp.maximum, lambda a, b: jnp.where(a > 0, a, b))


def random_cell(
    pick: Draw, dtype: Any, seed: int
) -> tuple[Callable[..., Any], Callable[[], tuple[Any, tuple[Any, ...]]]]:
    """A cell of random parts: what is done to the parts of one product, and what leaves."""
    parts, width, rows, k = pick.integer(2, 5), pick.choice([4, 8, 12, 16]), pick.choice([1, 1, 3]), pick.integer(3, 20)
    n = parts * width
    wide = pick.choice(["bias", "inputs", ""])
    steps = [(pick.choice(UNARY), pick.choice(BINARY), pick.random(), pick.random()) for _ in range(pick.integer(1, 6))]
    first, leaves = pick.integer(0, parts - 1), pick.integer(1, 3)
    by_slices, casts = pick.flag(), pick.flag()

    def cell(p: Any, x: Any, own: Any, inputs: Any) -> Any:
        y = x @ p["w"]
        y = y + jnp.broadcast_to(p["b"], y.shape) if wide == "bias" else y + inputs if wide else y
        cut = [y[:, i * width : (i + 1) * width] for i in range(parts)] if by_slices else jnp.split(y, parts, axis=1)
        values = [*cut[first:], own, jnp.broadcast_to(p["small"], own.shape), *cut[:first]]
        done: list[Any] = []
        for one, two, a, b in steps:
            pool = [*done, *values]
            left, right = pool[int(a * len(pool))], pool[int(b * len(pool))]
            done.append(two(one(left), right))
        left = [z.astype(jnp.float32) if casts else z for z in done[-leaves:]]
        return left, (done[-1].sum() if leaves == 2 else None)

    numbers = np.random.default_rng(seed)

    def drawn(*shape: int) -> jax.Array:
        return jax.device_put(np.asarray(numbers.standard_normal(shape), dtype))

    def make() -> tuple[Any, tuple[Any, ...]]:
        params = {"w": drawn(k, n), "b": drawn(n), "small": drawn(width)}
        return params, (drawn(rows, k), drawn(rows, width), drawn(rows, n))

    return cell, make


@settings(max_examples=max(5, settings().max_examples // 8))  # interpreted kernels take their time
@given(seed=st.integers(0, 2**64 - 1))
@example(seed=66617)  # a bias that is read before the product too
def test_random_cells(seed: int) -> None:
    pick = Draw(seed)
    dtype = pick.choice([jnp.float32, jnp.float32, jnp.bfloat16])
    cell, make = random_cell(pick, dtype, seed)
    tenants = lanes(cell, pick.integer(1, 3), make)
    if pick.flag():  # weights of one tenant: lanes are rows
        tenants = [(fn, tenants[0][1], xs) for fn, _, xs in tenants]
    fused = fuse_tenants(tenants, choose_kernel=by_row, policy="never")
    results = fused([xs for _, _, xs in tenants])
    for tenant, result in zip(tenants, results, strict=True):
        assert_as_alone(tenant, result, dtype)
    poisoned = [
        (xs if i else jax.tree.map(lambda x: jax.device_put(np.full_like(x, np.nan)), xs))
        for i, (*_, xs) in enumerate(tenants)
    ]
    for clean, other in list(zip(results, fused(poisoned), strict=True))[1:]:
        assert_bitwise(other, clean)


def assert_as_alone(tenant: Tenant, result: Any, dtype: Any) -> None:
    """In 16 bits as good as alone, by the bounds of `tests.compare`: a rounding of the largest result, since one that
    cancels is as wrong as what it is made of, where XLA keeps more between two steps; and of a sum to one number a
    rounding of each that it adds up."""
    own = alone(tenant)
    if dtype == jnp.float32:
        assert_same(result, own)
        return
    true, eps = jax.tree.leaves(truth(tenant)), float(jnp.finfo(dtype).eps)
    largest, added = max(norm(t) for t in true if t.ndim), max(norm(t) * t.size**0.5 for t in true)
    for (path, a, b), t in zip(matched(result, own), true, strict=True):
        size = largest if t.ndim else added
        assert distance(a, t) <= TIMES * distance(b, t) + ROUNDINGS * eps * size, path


def truth(tenant: Tenant) -> Any:
    """In float32."""
    fn, params, xs = tenant
    return alone((fn, *jax.tree.map(lambda x: np.asarray(x, np.float32), (params, xs))))


@pytest.mark.parametrize("kernel", ["indexed_matvec", "indexed_gemm"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_lanes_of_a_recurrent_cell(kernel, dtype):
    """By each kernel, for lanes with weights of their own, and for lanes that share them."""
    tenants = lstms(3, dtype=dtype)
    shared = [(fn, tenants[0][1], xs) for fn, _, xs in tenants]
    for group in (tenants, shared):
        fused = fuse_tenants(group, choose_kernel=lambda *_: kernel)
        results = fused([xs for _, _, xs in group])
        for tenant, result in zip(group, results, strict=True):
            assert_as_alone(tenant, result, dtype)
        assert all(pack.kernel == kernel and len(pack.results) == 2 for pack in cells(fused.bundle))


@pytest.mark.parametrize("make", [lambda: lstms(3), lambda: gated(3, jax.nn.gelu)])
@pytest.mark.once
def test_what_is_measured_does_the_same_work(make):
    """By a kernel that takes columns apart, and by one of XLA's with XLA's own work behind it."""
    programs = [coalesce.trace(fn, params, *xs, name=f"t{i}") for i, (fn, params, xs) in enumerate(make())]
    case = next(case for case in cases(programs, "cpu") if case.epilogue and not case.epilogue.plain)
    kernels = [name for name, kernel in KERNELS.items() if kernel.supports(case.op) and name != "mosaic_gemm"]
    lhs, reads = array(*case.lhs.shape), [array(*read.shape) for read in case.reads]
    weights = array(len(lhs), *case.op.rhs.shape)
    want = None
    for name in kernels:
        got = case.run(name, None)(lhs, jax.vmap(KERNELS[name].layout(case.op))(weights), *reads)
        want = got if want is None else want
        assert_same(got, want)
    assert {"batched_dot", "indexed_gemm"} <= set(kernels)


def test_lanes_that_read_a_bank_by_slot():
    """Weights and biases, wherever they lie; two requests of one tenant too."""
    tenants = lstms(3)
    serving = serve([fit_of(fn, params, xs) for fn, params, xs in tenants], options=BY_ROW)
    order = [2, 0, 0]
    executable = serving.executable(3)
    results = serving.call(executable, [(i, tenants[i][2]) for i in order])
    for i, result in zip(order, results, strict=True):
        assert_alone(result, tenants[i])
    assert [len(pack.results) for pack in cells(executable.bundle)] == [2]


def test_it_is_said():
    text = str(fuse_tenants(lstms(2), choose_kernel=by_row))
    assert text.count("then it leaves") == 1
