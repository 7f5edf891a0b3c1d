"""keep_layouts: a weight lies in one layout, whatever the width and the request shape."""

from __future__ import annotations

from functools import partial
from itertools import product

import jax.numpy as jnp
import pytest
from jax import lax

import coalesce
from coalesce.blocks import Blocks
from coalesce.bundle import Bundle, packs
from coalesce.costs import Costs, device_of
from coalesce.family import find_families
from coalesce.kernels import choose, KERNELS
from coalesce.layout import AS_IS
from coalesce.passes.form_packs import form_packs
from coalesce.passes.keep_layouts import keep_layouts
from coalesce.passes.pipeline import normalise
from coalesce.serving.schema import Options, plan_lanes, plan_schema
from coalesce.tuning import Database, Entry, key_of, Tuned
from tests.alone import alone, array
from tests.compare import distance, norm
from tests.serving import fit_of, serve

conv = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
CPU = {"platform": "cpu", "costs": Costs(device_of("cpu"))}
GPU = {"platform": "gpu", "costs": Costs(device_of("gpu"))}


def net(p, x):
    y = conv(x, p["conv"], (1, 1), "SAME").sum((1, 2))
    return jnp.dot(y, p["head"]) @ jnp.ones((5, 2)), y @ y.T


def formed(lanes, image=(1, 8, 8, 16)):
    params = [{"conv": array(3, 3, 16, 16), "head": array(16, 5)} for _ in range(lanes)]
    programs = [normalise(coalesce.trace(net, p, array(*image), name=f"t{i}")).program for i, p in enumerate(params)]
    return form_packs(Bundle(tuple(p.name for p in programs), find_families(programs)))


def formed_of(fn, params, x):
    tenants = enumerate(params)
    programs = [normalise(coalesce.trace(fn, p, x, name=f"t{i}", shared=None)).program for i, p in tenants]
    return form_packs(Bundle(tuple(p.name for p in programs), find_families(programs)))


def kernels(bundle, **options):
    """The kernel of each op; idempotent."""
    done = keep_layouts(bundle, **options)
    again = keep_layouts(done, **options)
    assert [p.kernel for p in packs(again.schedule)] == [p.kernel for p in packs(done.schedule)]
    return {f"{p.op.kind} {p.op.n}": p.kernel for p in packs(done.schedule)}


def test_without_anything_held_a_cpu_goes_by_rule():
    bundle = formed(4)
    rule = {f"{p.op.kind} {p.op.n}": choose(p.op, 4, "cpu") for p in packs(bundle.schedule)}
    assert kernels(bundle, held=[{}], **CPU) == rule
    assert rule["conv 16"] == "conv_slices" and rule["dot 5"] == "batched_dot"


def test_a_kernel_that_reads_what_is_held_goes_before_the_rule():
    large = formed(1)
    (pack,) = (p for p in packs(large.schedule) if p.op.kind == "conv")
    assert choose(pack.op, 1, "cpu") == "separate"
    assert kernels(large, held=[{}], **CPU)["conv 16"] == "separate"
    wanted = KERNELS["conv_slices"].layout(pack.op)
    assert kernels(large, held=[{0: [wanted]}], **CPU)["conv 16"] == "conv_slices"


def test_a_weight_lies_twice_only_where_no_kernel_reads_it():
    nowhere = AS_IS.reshape((3, 3, 256))
    assert kernels(formed(1), held=[{0: [nowhere], 1: [nowhere]}], **CPU) == kernels(formed(1), held=[{}], **CPU)


def test_on_a_gpu_a_weight_is_rather_read_in_place_than_gathered():
    found = kernels(formed(8, (4, 8, 8, 16)), held=[{}], **GPU)
    assert found["conv 16"] == found["dot 5"] == "indexed_gemm"
    assert found["dot 4"] == choose_of_attention()


def choose_of_attention():
    """Products without weights go by rule."""
    (pack,) = (p for p in packs(formed(8, (4, 8, 8, 16)).schedule) if p.op.n == 4)
    return choose(pack.op, 8, "gpu")


def test_what_the_caller_chooses_stands():
    def mine(op, groups, platform):
        return "separate"

    assert set(kernels(formed(4), held=[{}], choice=mine, **GPU).values()) == {"separate"}


def one_row(p, x):
    return jnp.tanh(jnp.dot(x, p["first"])) @ p["second"]


def test_a_product_of_one_row_is_run_as_in_programs():
    """Kernels that read in place are predicted alike where nothing was measured: the one for one row goes first."""
    for dtype, shared in product((jnp.float32, jnp.bfloat16), (False, True)):
        params = [{"first": array(64, 48, dtype=dtype), "second": array(48, 80, dtype=dtype)} for _ in range(8)]
        params = params[:1] * 8 if shared else params
        bundle = formed_of(one_row, params, array(1, 64, dtype=dtype))
        wanted = "indexed_gemm" if shared else "indexed_matvec"  # lanes that share weights are rows of one product
        assert set(kernels(bundle, held=[{}], **GPU).values()) == {wanted}


def test_a_weight_that_others_read_for_several_rows_lies_as_they_read_it():
    def run(p, x):
        return x @ p, jnp.sum(x, 0, keepdims=True) @ p

    bundle = formed_of(run, [array(16, 16, dtype=jnp.bfloat16) for _ in range(4)], array(5, 16, dtype=jnp.bfloat16))
    done = keep_layouts(bundle, held=[{}], **GPU)
    assert {p.kernel for p in packs(done.schedule) if p.op.m == 1} == {"indexed_gemm"}


@pytest.mark.parametrize("rows", [(1, 4), (4, 1), (1,)])
def test_request_shapes_read_one_copy(rows):
    examples = [(array(n, 64, dtype=jnp.bfloat16),) for n in rows]
    params = {"first": array(64, 48, dtype=jnp.bfloat16), "second": array(48, 80, dtype=jnp.bfloat16)}
    schema = plan_schema(fit_of(one_row, params, *examples), Options("gpu", GPU["costs"]))
    assert sorted(weight for weight, _ in schema.places) == [0, 1]
    held = {weight: [layout] for weight, layout in schema.places}
    for n, whole in zip(rows, schema.segments, strict=True):
        bundle = plan_lanes([(schema, whole.templates[0], 8)], [held])[-1].bundle
        kernel = "indexed_matvec" if rows == (1,) else "indexed_gemm"
        assert {pack.kernel for pack in packs(bundle.schedule)} == {kernel}, n


BLOCKS, HOPPER = Blocks(64, 64, 32, 4, 3), "NVIDIA H200"


def measured(fn, params, x, us):
    """`us[width]` is what each kernel took for each product of `fn` at so many problems."""
    ops = [pack.op for pack in packs(formed_of(fn, [params], x).schedule)]
    entries = {}
    for width, times in us.items():
        best = min(times, key=times.__getitem__)
        tried = {f"{kernel} {BLOCKS}": time for kernel, time in times.items()}
        entries |= {key_of(op, width, 1, HOPPER): Entry(best, times[best], BLOCKS, tried) for op in ops}
    return Tuned(Database(entries), HOPPER)


def rows(p, x):
    """Of products that TMA can fetch."""
    return jnp.tanh(x @ p["first"]) @ p["second"]


def weights_of_rows(dtype=jnp.float32):
    return {"first": array(64, 64, dtype=dtype) / 8, "second": array(64, 128, dtype=dtype) / 8}


def test_what_may_be_multiplied_in_tf32_lies_rounded_once_for_all_widths():
    params, x = [weights_of_rows() for _ in range(8)], array(5, 64)
    us = {1: {"indexed_gemm": 5.0, "mosaic_gemm": 9.0}, 8: {"indexed_gemm": 20.0, "mosaic_gemm": 10.0}}
    tuned = measured(rows, params[0], x, us)
    served = serve([fit_of(rows, p, (x,)) for p in params], options=Options("gpu", GPU["costs"], tuned=tuned))
    assert sorted(weight for weight, _ in served.schema.places) == [0, 1]
    assert all(layout == layout.rounded() for _, layout in served.schema.places)
    want = [alone((rows, p, (x,))) for p in params]
    for width, kernel in ((1, "indexed_gemm"), (2, "mosaic_gemm"), (8, "mosaic_gemm")):
        executable = served.executable(width)
        first, second = packs(executable.bundle.schedule)
        assert {first.kernel, second.kernel} == {kernel}, width
        assert first.rounds == second.rounded == (kernel == "mosaic_gemm")
        for i, got in enumerate(served.call(executable, [(i, (x,)) for i in range(width)])):
            assert 1e-6 < distance(got, want[i]) / norm(want[i]) < 1e-3, (width, i)


def exact(p, x):
    return jnp.dot(jnp.dot(x, p["first"], precision="highest"), p["second"], precision="highest")


def both(p, x):
    """In full and not."""
    return jnp.dot(jnp.dot(x, p["first"], precision="highest"), p["first"]) @ p["second"]


IN_FULL = {
    "as asked for": (exact, [5], [False, False]),
    "one weight both ways": (both, [5], [False, True]),
    "one row": (rows, [1], [False, False]),
    "one row of another request shape": (rows, [5, 1], [False, False]),
    "nothing": (rows, [5, 4], [True, True]),
}


@pytest.mark.parametrize(("fn", "lengths", "rounded"), IN_FULL.values(), ids=IN_FULL)
def test_what_is_read_in_full_lies_as_it_is_and_once(fn, lengths, rounded):
    """XLA multiplies one row element by element, in float32. Whatever was measured to win elsewhere."""
    examples = [(array(n, 64),) for n in lengths]
    weights = [weights_of_rows() for _ in range(2)]
    us = {8: {"indexed_gemm": 20.0, "mosaic_gemm": 10.0}}
    tuned = measured(fn, weights[0], examples[0][0], us)
    served = serve([fit_of(fn, p, *examples) for p in weights], options=Options("gpu", GPU["costs"], tuned=tuned))
    layouts = dict(served.schema.places)
    assert [weight for weight, _ in sorted(layouts, key=lambda at: at[0])] == [0, 1]
    assert [at == at.rounded() for _, at in sorted(layouts, key=lambda at: at[0])] == rounded
    for template, x in enumerate(examples):
        executable = served.executable(2, template)
        for p, got in zip(weights, served.call(executable, [(0, x), (1, x)], template), strict=True):
            error = distance(got, want := alone((fn, p, x))) / norm(want)
            assert error < (1e-3 if any(rounded) else 1e-5)


def test_nothing_is_rounded_on_a_gpu_that_has_no_kernel_for_it():
    schema = plan_schema(fit_of(rows, weights_of_rows(), (array(5, 64),)), Options("gpu", GPU["costs"]))
    assert all(at != at.rounded() for _, at in schema.places)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_reads_in_place_and_was_measured_to_win_runs_though_others_are_predicted_to_take_less(dtype):
    """Of 8 BERT-base three quarters of the products ran by another kernel behind the runtime than in a program."""
    params, x = [weights_of_rows(dtype) for _ in range(8)], array(5, 64, dtype=dtype)
    tuned = measured(rows, params[0], x, {8: {"mosaic_gemm": 1e4}})
    bundle = formed_of(rows, params, x)
    done = keep_layouts(bundle, held=[{}], tuned=tuned, **GPU)
    assert [(pack.kernel, pack.blocks) for pack in packs(done.schedule)] == [("mosaic_gemm", BLOCKS)] * 2
    assert {pack.kernel for pack in packs(keep_layouts(bundle, held=[{}], **GPU).schedule)} == {"indexed_gemm"}
