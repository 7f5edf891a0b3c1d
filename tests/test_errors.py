"""What each refusal of `trace` and `fuse` says: which tenant, which equation, what was expected, and what to do."""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

import coalesce
from tests.alone import array
from tests.annotations import nothing_checked

W, X = array(4, 4), array(2, 4)


def dense(w, x):
    return x @ w


def line_of(fn, text):
    """`file:line` of the line of a function's source that holds a text."""
    lines, start = inspect.getsourcelines(fn)
    [number] = [start + i for i, line in enumerate(lines) if text in line]
    return f"{__file__}:{number}"


# ---- effects -------------------------------------------------------------------------------------------------------


def ordered_print(w, x):
    jax.debug.print("{}", x[0, 0], ordered=True)
    return x @ w


def ordered_debug(w, x):
    jax.debug.callback(print, x[0, 0], ordered=True)
    return x @ w


def io(w, x):
    io_callback(print, None, x[0, 0])
    return x @ w


def ordered_io(w, x):
    return x @ w + io_callback(np.sin, jax.ShapeDtypeStruct((), jnp.float32), x[0, 0], ordered=True)


def io_in_a_scan(w, x):
    def step(carry, _):
        io_callback(print, None, carry[0, 0])
        return jnp.sin(carry @ w), None

    return lax.scan(step, x, None, 3)[0]


def io_in_a_branch(w, x):
    return lax.cond(x[0, 0] > 0, lambda: [x @ w, io_callback(print, None)][0], lambda: x)


def io_in_a_call(w, x):
    return jax.jit(jax.checkpoint(lambda v: [v @ w, io_callback(print, None)][0]))(x)


@pytest.mark.parametrize(
    ("fn", "call", "primitive", "effect"),
    [
        (ordered_print, "jax.debug.print", r"debug_\w+", "OrderedDebugEffect"),
        (ordered_debug, "jax.debug.callback", "debug_callback", "OrderedDebugEffect"),
        (io, "io_callback(", "io_callback", "IOEffect"),
        (ordered_io, "io_callback(", "io_callback", "OrderedIOEffect"),
        (io_in_a_scan, "io_callback(", "io_callback", "IOEffect"),
        (io_in_a_branch, "io_callback(", "io_callback", "IOEffect"),
        (io_in_a_call, "io_callback(", "io_callback", "IOEffect"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_effects(fn, call, primitive, effect):
    with pytest.raises(coalesce.TraceError) as caught:
        coalesce.trace(fn, W, X, name="loud")
    assert re.fullmatch(
        rf"tenant 'loud': equation {primitive} at {re.escape(line_of(fn, call))}\S* \({fn.__name__}\S*\) has the "
        rf"effect {effect}; ordered and I/O effects cannot be fused\. Use jax\.debug\.callback\(ordered=False\) or "
        r"jax\.pure_callback, or move the call out of the function",
        str(caught.value),
    )


def inside(w, x):
    sums = jax.new_ref(jnp.zeros((2, 4)))
    sums[...] = x @ w
    return sums[...]


OUTSIDE = jax.new_ref(jnp.zeros((2, 4)))


def outside(w, x):
    OUTSIDE[...] = x @ w
    return x


@pytest.mark.parametrize(("fn", "effect"), [(inside, "InternalMutableArrayEffect"), (outside, "WriteEffect")])
def test_references(fn, effect):
    text = rf"has the effect {effect}; references \(jax\.new_ref\) cannot be fused\. Use values instead, which "
    with pytest.raises(coalesce.TraceError, match=text):
        coalesce.trace(jax.jit(fn), W, X, name="loud")


# ---- functions and params that cannot be traced --------------------------------------------------------------------


def raises(w, x):
    raise KeyError("no such layer")


def branches(w, x):
    return x if x[0, 0] > 0 else w


@pytest.mark.parametrize(
    ("fn", "text"),
    [
        (raises, "tenant 'bad': raises cannot be traced: KeyError: 'no such layer'"),
        (branches, "tenant 'bad': branches cannot be traced: TracerBoolConversionError: "),
        (lambda w, x: "text", "tenant 'bad': .*<lambda> cannot be traced: TypeError: .*str"),
        (lambda w: w, "tenant 'bad': .*<lambda> cannot be traced: TypeError: .*takes 1 positional argument"),
        (lambda w, x: w @ x, "tenant 'bad': .*<lambda> cannot be traced: TypeError: .*shape"),
    ],
    ids=["raises", "branches on a value", "returns no array", "takes fewer inputs", "shapes do not fit"],
)
def test_functions_that_cannot_be_traced(fn, text):
    with pytest.raises(coalesce.TraceError, match=text) as caught:
        coalesce.trace(fn, W, X, name="bad")
    assert caught.value.__cause__ is not None


def test_params_in_the_place_of_the_function():
    with nothing_checked(), pytest.raises(coalesce.TraceError, match=r"tenant 'a': fn is a dict; give a function of"):
        coalesce.trace({"w": W}, lambda w, x: x, X, name="a")  # pyright: ignore


def test_an_example_that_is_no_array():
    with pytest.raises(coalesce.TraceError, match=r"tenant 'a': example input\[1\]\['k'\] is a str; expected an array"):
        coalesce.trace(lambda w, x, y: x, W, X, {"k": "text"}, name="a")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2**40, r"a int that JAX does not take \(.*too large"),
        (np.ma.masked_array(X, mask=X > 0), r"a MaskedArray that JAX does not take \(.*filled"),
        (np.array([None]), r"a ndarray that JAX does not take \(.*object"),
    ],
    ids=["large", "masked", "objects"],
)
def test_what_looks_like_an_array_or_a_number_and_is_none_to_jax(value, text):
    with pytest.raises(coalesce.TraceError, match=rf"tenant 'a': params\['n'\] is {text}"):
        coalesce.trace(lambda p, x: x * p["n"], {"n": value}, X, name="a")
    with pytest.raises(coalesce.TraceError, match=rf"tenant 'a': example input\[0\] is {text}"):
        coalesce.trace(lambda w, x: x, W, value, name="a")


def test_shared_that_is_no_part_of_params():
    params = {"backbone": {"w": W}, "head": array(4, 3)}
    copied = {"backbone": {"w": jnp.array(W, copy=True)}}
    with pytest.raises(coalesce.TraceError, match=r"tenant 'a': shared\['backbone'\]\['w'\] is not a leaf of params; "):
        coalesce.trace(lambda p, x: x @ p["backbone"]["w"] @ p["head"], params, X, name="a", shared=copied)
    with pytest.raises(coalesce.TraceError, match=r"tenant 'a': shared is not a leaf of params; .*\['backbone'\]"):
        coalesce.trace(lambda p, x: x @ p["backbone"]["w"] @ p["head"], params, X, name="a", shared="backbone")


# ---- lists of programs that contradict each other ------------------------------------------------------------------


def test_no_programs():
    with pytest.raises(coalesce.PlanError, match="fuse got no programs; give it what coalesce.trace returned"):
        coalesce.fuse([])


def test_two_programs_of_one_name():
    programs = [coalesce.trace(dense, W, X, name=name) for name in "aba"]
    with pytest.raises(coalesce.PlanError, match="two tenants are called 'a'; give each its own name"):
        coalesce.fuse(programs)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"policy": "sometimes"}, r"policy is 'sometimes'; expected one of 'auto', 'always', 'never'"),
        ({"waste_bound": 1.0}, r"waste_bound is 1.0; it is a share of the work and lies in \[0, 1\)"),
        ({"waste_bound": -0.1}, r"waste_bound is -0.1; .*"),
        ({"waste_bound": float("nan"), "policy": "never"}, r"waste_bound is nan; .*"),
        ({"platform": "cuda"}, r"platform is 'cuda'; expected one of 'cpu', 'gpu', or None"),
    ],
)
def test_options_that_mean_nothing(options, text):
    with pytest.raises(coalesce.PlanError, match=f"^{text}$"):
        coalesce.fuse([coalesce.trace(dense, W, X, name="a")], **options)


@pytest.mark.parametrize(
    "option", ["policy", "waste_bound", "costs", "choose_kernel", "executables", "side_by_side", "captured", "platform"]
)
def test_options_of_another_type(option):
    wrong: Any = {option: {}}
    with nothing_checked(), pytest.raises(coalesce.PlanError, match=f"^{option} is {{}}; "):
        coalesce.fuse([coalesce.trace(dense, W, X, name="a")], **wrong)


@pytest.mark.parametrize("kernel", ["fastest", "conv_slices"], ids=["unknown", "of another operation"])
def test_kernels_that_do_not_exist_or_support_the_operation(kernel):
    text = (
        rf"pack 0 \(dot M=2 N=4 K=4 f32\[2,4\] x f32\[4,4\]\): kernel '{kernel}' does not support it; "
        "kernels that do: batched_dot, .*separate"
    )
    with pytest.raises(coalesce.PlanError, match=text):
        coalesce.fuse([coalesce.trace(dense, W, X, name="a")], choose_kernel=lambda op, groups, platform: kernel)


@pytest.mark.parametrize(
    ("error", "usual"),
    [(coalesce.TraceError, TypeError), (coalesce.PlanError, ValueError), (coalesce.InvalidInput, ValueError)],
)
def test_errors_are_ours_and_usual_ones(error, usual):
    assert issubclass(error, coalesce.CoalesceError) and issubclass(error, usual)
