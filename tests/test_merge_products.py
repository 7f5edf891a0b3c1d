"""merge_products: products that read one operand become one, where no weight comes to lie in the bank twice by it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

import coalesce
from coalesce import jaxpr as J
from coalesce.family import find_families
from coalesce.heavy import heavy_eqns
from coalesce.models.recurrent import gru
from coalesce.models.transformer import Bert
from coalesce.passes.canonicalize import canonicalize
from coalesce.passes.cse import cse
from coalesce.passes.dce import dce
from coalesce.passes.inline import inline
from coalesce.passes.merge_products import merge_products
from coalesce.passes.pipeline import normalise, PROGRAM_PASSES
from coalesce.serving.store import Preparer
from tests.alone import array, check_fused, fuse_tenants
from tests.compare import assert_bitwise
from tests.programs import Draw
from tests.rewrites import checked, rewritten
from tests.serving import assert_alone, fit_of, serve
from tests.small import check, dot

FIRST = (inline, dce, canonicalize, cse)
X = array(3, 4)


def simplified(fn: Any, params: Any, *inputs: Any) -> coalesce.Program:
    program = coalesce.trace(fn, params, *inputs, name="a")
    for run in FIRST:
        program = run(program)
    return program


def shapes(fn: Any, params: Any, *inputs: Any) -> list[tuple[int, ...]]:
    """Of the right operands of the products that are left."""
    program = checked(merge_products, simplified(fn, params, *inputs))
    return [J.shape(eqn.invars[1]) for eqn in heavy_eqns(program.jaxpr)]


def qkv(p: Any, x: Any) -> Any:
    q, k, v = (dot(x, p[name]) for name in "qkv")
    return dot(jnp.tanh(dot(q, k.T)), v)


QKV = {name: array(4, 4) for name in "qkv"}


def gates(p: Any, xs: Any) -> Any:
    """Two gates a step, of the carry."""

    def step(h: Any, x: Any) -> Any:
        h = jax.nn.sigmoid(dot(h, p["z"]) + x) * jnp.tanh(dot(h, p["n"]))
        return h, h

    return lax.scan(step, jnp.ones((1, 4)), xs)


GATES = {"z": array(4, 4), "n": array(4, 4)}


# ---- what is one product ---------------------------------------------------------------------------------------------


def test_two_products(golden):
    golden(rewritten(merge_products, lambda p, x: (x @ p[0], x @ p[1]), [array(4, 8), array(4, 2)], X, first=FIRST))


def test_q_k_and_v(golden):
    """V is wanted by a later product than Q and K are, and not much later."""
    golden(normalise(coalesce.trace(qkv, QKV, X, name="a")).program)


def test_gates_in_the_body_of_a_scan(golden):
    """Their weights are laid side by side before the loop, and so before all requests."""
    golden(normalise(coalesce.trace(gates, GATES, array(5, 1, 4), name="a")).program)


def transposed(p: Any, x: Any) -> Any:
    return x @ p["q"], x @ p["k"].T.astype(jnp.float32)


def heads(p: Any, x: Any) -> Any:
    """Columns have two dimensions; the first of them differs, as with more queries than keys."""
    q, k = (jnp.einsum("tc,chd->thd", x, p[name]) for name in "qk")
    return q.sum(1) * k.sum(1)


def batched(p: Any, x: Any) -> Any:
    q, k = (jnp.einsum("hc,hcd->hd", x, p[name]) for name in "qk")
    return q.sum(1) + k.sum(1)


def in_branches(p: Any, x: Any) -> Any:
    return lax.cond(x[0, 0] > 0, lambda: x @ p["q"] + x @ p["k"], lambda: x)


def the_second_is_prepared_between(p: Any, x: Any) -> Any:
    q = x @ p["q"]
    return q + x @ (p["k"] * lax.rsqrt(jnp.sum(p["v"] ** 2)))


SQUARE = {name: array(4, 4) for name in "qkv"}
ONE = {
    "weights that are computed": (transposed, SQUARE, (X,), [(4, 8)]),
    "columns of two dimensions": (heads, {"q": array(4, 6, 2), "k": array(4, 2, 2)}, (X,), [(4, 8, 2)]),
    "a batch": (batched, {"q": array(3, 4, 5), "k": array(3, 4, 2)}, (X,), [(3, 4, 7)]),
    "in branches": (in_branches, SQUARE, (X,), [(4, 8)]),
    "a weight that is computed later": (the_second_is_prepared_between, SQUARE, (X,), [(4, 8)]),
}


@pytest.mark.parametrize(("fn", "params", "inputs", "left"), ONE.values(), ids=ONE)
def test_one(fn, params, inputs, left):
    assert shapes(fn, params, *inputs) == left


# ---- and what is added to each ---------------------------------------------------------------------------------------


def dense(p: Any, x: Any) -> Any:
    return tuple(x @ p[f"w{i}"] + p[f"b{i}"][None] for i in (1, 2))


def added(fn: Any, params: Any, *inputs: Any) -> list[tuple[int, ...]]:
    """Shapes of the sums that are left of `fn`, where one product is."""
    program = checked(merge_products, simplified(fn, params, *inputs))
    eqns = program.jaxpr.jaxpr.eqns
    assert sum(eqn.primitive.name == "dot_general" for eqn in eqns) == 1
    return [J.shape(eqn.outvars[0]) for eqn in eqns if eqn.primitive.name == "add"]


DENSE = {"w1": array(4, 5), "b1": array(5), "w2": array(4, 2), "b2": array(2)}


def test_biases(golden):
    golden(rewritten(merge_products, dense, DENSE, X, first=FIRST))
    check(dense, [DENSE, jax.tree.map(lambda w: 2 * w, DENSE)], [(X,), (X,)])


def test_biases_of_heads():
    def apply(p: Any, x: Any) -> Any:
        return tuple(jnp.einsum("tc,chd->thd", x, p[name]) + p[name + "b"][None] for name in "qk")

    params = {"q": array(4, 6, 2), "k": array(4, 2, 2), "qb": array(6, 2), "kb": array(2, 2)}
    assert added(apply, params, X) == [(3, 8, 2)]


APART = {
    "one has none": lambda p, x: (x @ p["w1"] + p["b1"][None], x @ p["w2"]),
    "one for all columns": lambda p, x: tuple(x @ p[w] + p["b1"][None, :1] for w in ("w1", "w2")),
    "one for each row": lambda p, x: tuple(x @ p[w] + p["b1"][:3, None] for w in ("w1", "w2")),
    "not of weights": lambda p, x: tuple(x @ p[f"w{i}"] + x[:1, :1] * p[f"b{i}"][None] for i in (1, 2)),
    "read by others": lambda p, x: (*dense(p, x), jnp.tanh(x @ p["w1"])),
    "left": lambda p, x: (*dense(p, x), x @ p["w1"]),
    "to itself": lambda p, x: tuple(y + y for y in (x @ p["w1"], x @ p["w2"])),
    "the same for both": lambda p, x: tuple(x @ w + p["b1"][None] for w in (p["w1"], p["w1"][::-1])),
    "along other dimensions": lambda p, x: (
        x @ p["w1"] + p["b1"][None],
        x @ p["w2"] + p["b2"][None] * p["b1"][:3, None],
    ),
}


@pytest.mark.parametrize("fn", APART.values(), ids=APART)
def test_sums_that_stay_apart(fn):
    assert all(columns <= 5 for _, columns in added(fn, DENSE, X))


def test_one_weight_of_one_product_in_two_places():
    """A step by itself and the loop after it read the same weights side by side, which lie once."""

    def apply(p: Any, xs: Any) -> Any:
        first = jax.nn.sigmoid(dot(xs[0], p["z"])) * jnp.tanh(dot(xs[0], p["n"]))
        return first + gates(p, xs)[0]

    fused = check(apply, [GATES, jax.tree.map(lambda w: 2 * w, GATES)], [(array(5, 1, 4),)] * 2)
    assert [(array.shape, len(array.rows)) for array in fused.bundle.arrays] == [((4, 8), 2)]


SMALL = {
    "gru": gru(hidden=8, features=8, classes=3, steps=4),
    "bert": Bert(layers=1, hidden=8, heads=2, vocabulary=9, positions=6, length=6),
}


@pytest.mark.once  # traced by one version of JAX is enough: products are those of the other tests
@pytest.mark.parametrize("model", SMALL.values(), ids=SMALL)
def test_models_are_as_they_are_alone(model):
    """And weights of one tenant that are no numbers reach no other."""
    inputs = [model.example(jax.random.key(i)) for i in range(2)]
    with jax.default_matmul_precision("highest"):
        params = [model.init(jax.random.key(i), *inputs[0]) for i in range(2)]
        fused = check_fused([(model.apply, p, x) for p, x in zip(params, inputs, strict=True)])
        clean = fused(inputs)
        params[1] = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), params[1])
        dirty = fuse_tenants([(model.apply, p, x) for p, x in zip(params, inputs, strict=True)])
    flat = fused.compile()(list(dirty.bank), jax.tree.leaves(inputs))
    assert not jnp.isfinite(flat[1]).any()
    assert_bitwise(flat[0], clean[0])


# ---- what stays ------------------------------------------------------------------------------------------------------


def other_operands(p: Any, x: Any) -> Any:
    return x @ p["q"] + jnp.sin(x) @ p["k"]


def other_precision(p: Any, x: Any) -> Any:
    return x @ p["q"] + dot(x, p["k"])


def other_accumulation(p: Any, x: Any) -> Any:
    return x @ p["q"] + jnp.dot(x, p["k"].astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def read_elsewhere(p: Any, x: Any) -> Any:
    """A tied embedding: the rows are looked up too."""
    return x @ p["q"] + x @ p["k"] + p["q"][jnp.argmax(x, 1)]


def read_by_a_widening_cast(p: Any, x: Any) -> Any:
    """Which is cheaper to compute than to keep, and so reads the weight in every request."""
    return x @ p["q"] + x @ p["k"] + p["q"].astype(jnp.complex64)[jnp.argmax(x, 1)].real


def read_by_another_product(p: Any, x: Any) -> Any:
    """Q lies beside K for one of them, and beside V for the other."""
    y = jnp.tanh(x @ p["q"] * (x @ p["k"]))
    return y @ p["q"] + y @ p["v"]


def a_result_of_the_program(p: Any, x: Any) -> Any:
    return x @ p["q"] + x @ p["k"], p["q"]


def carried(p: Any, x: Any) -> Any:
    """In the body it is no weight: it changes."""
    return lax.scan(lambda w, _: (w + 1, x @ w + x @ p["k"]), p["q"], None, length=2)[1]


def no_weight(p: Any, x: Any) -> Any:
    return x @ jnp.sin(x).T + x @ jnp.cos(x).T


def constants(p: Any, x: Any) -> Any:
    """Nobody prepares what is computed from no weight."""
    return x @ lax.iota(jnp.float32, 16).reshape(4, 4) + x @ p["k"]


def without_columns(p: Any, x: Any) -> Any:
    return x @ p["q"][0] + x @ p["k"][0]


def of_an_image(p: Any, x: Any) -> Any:
    image = x[None, None]
    return image @ p["q"] + image @ p["k"]


def wanted_far_apart(p: Any, x: Any) -> Any:
    """Keys of two layers that attend to one memory."""
    y = jnp.tanh(x @ p["q"])
    for _ in range(2):
        y = jnp.tanh(y @ x.T @ jnp.sin(x))
    return y * (x @ p["k"])


STAYS = {
    fn.__name__: fn
    for fn in (
        other_operands,
        other_precision,
        other_accumulation,
        read_elsewhere,
        read_by_a_widening_cast,
        read_by_another_product,
        a_result_of_the_program,
        carried,
        no_weight,
        constants,
        without_columns,
        of_an_image,
        wanted_far_apart,
    )
}


@pytest.mark.parametrize("fn", STAYS.values(), ids=STAYS)
def test_what_stays(fn):
    program = simplified(fn, QKV, X)
    assert merge_products(program) is program


def test_the_others_of_a_product_that_stays():
    def apply(p: Any, x: Any) -> Any:
        return x @ p["q"] + x @ p["k"] + x @ p["v"], p["k"]

    assert sorted(shapes(apply, QKV, X)) == [(4, 4), (4, 8)]


def test_what_some_tenants_share_is_kept_once():
    """A backbone that is one array for all tenants does not lie beside what each has its own."""

    def apply(p: Any, x: Any) -> Any:
        return dot(x, p["q"]) * dot(x, p["k"]) + dot(x, p["v"])

    backbone = {"q": array(4, 4), "k": array(4, 4)}
    fused = check(apply, [{**backbone, "v": array(4, 4)} for _ in range(3)], [(X,)] * 3)
    assert sorted((a.shape, len(a.rows)) for a in fused.bundle.arrays) == [((4, 4), 3), ((4, 8), 1)]


def test_nor_beside_what_others_share():
    """Tenants 0 and 1 have Q in common, 1 and 2 have K; and tenants of functions of their own alike."""
    q, k = [array(4, 4) for _ in range(2)], [array(4, 4) for _ in range(2)]
    params = [{"q": q[0], "k": k[0]}, {"q": q[0], "k": k[1]}, {"q": q[1], "k": k[1]}]

    def fn() -> Any:
        return lambda p, x: dot(x, p["q"]) * dot(x, p["k"])

    one = fn()
    for fns in ([one] * 3, [fn() for _ in range(3)]):
        fused = check_fused([(f, p, (X,)) for f, p in zip(fns, params, strict=True)])
        assert [(a.shape, len(a.rows)) for a in fused.bundle.arrays] == [((4, 4), 2)] * 2


def test_functions_of_their_own_are_one_family():
    """Though only two of the tenants have Q in common."""
    q = array(4, 4)
    params = [{"q": q if i < 2 else array(4, 4), "k": array(4, 4)} for i in range(4)]
    fns = [lambda p, x: dot(x, p["q"]) * dot(x, p["k"]) for _ in params]
    programs = [coalesce.trace(fn, p, X, name=f"t{i}") for i, (fn, p) in enumerate(zip(fns, params, strict=True))]
    (family,) = coalesce.fuse(programs).bundle.families
    assert sorted(map(len, family.owners)) == [3, 4]


def closed_over(p: Any) -> Any:
    return lambda _, x: dot(x, p["q"]) * dot(x, p["k"])


def of_params(p: Any, x: Any) -> Any:
    return closed_over(p)(None, x)


@pytest.mark.parametrize("closed", [False, True], ids=["declared", "closed over"])
def test_copies_that_are_one_array_in_the_bank(closed):
    """All tenants have one Q, and two each one K: that they are equal shows in their bytes."""
    raw = [np.asarray(array(4, 4)) for _ in range(3)]
    params = [{"q": jnp.array(raw[0]), "k": jnp.array(raw[1 + i // 2])} for i in range(4)]
    programs = [
        coalesce.trace(closed_over(p), None, X, name=f"t{i}")
        if closed
        else coalesce.trace(of_params, p, X, name=f"t{i}", shared=p)
        for i, p in enumerate(params)
    ]
    (family,) = coalesce.fuse(programs).bundle.families
    assert sorted(map(len, family.owners)) == [1, 2]


@pytest.mark.parametrize("declared", [True, False])
def test_what_is_declared_as_shared_lies_by_itself(declared):
    """To a runtime, whose tenants come one by one, nothing else says it."""
    params = {"backbone": {"q": array(4, 4), "k": array(4, 4)}, "v": array(4, 4)}

    def apply(p: Any, x: Any) -> Any:
        return dot(x, p["backbone"]["q"]) * dot(x, p["backbone"]["k"]) + dot(x, p["v"])

    found = fit_of(apply, params, (X,), shared=params["backbone"] if declared else None)
    assert found.own == ((False, True) if declared else (True,))


# ---- it is no matter how a program is written, or for how many rows --------------------------------------------------


def test_order_of_statements_does_not_count():
    def kqv(p: Any, x: Any) -> Any:
        v, k, q = (dot(x, p[name]) for name in "vkq")
        return dot(jnp.tanh(dot(q, k.T)), v)

    programs = [coalesce.trace(fn, QKV, X, name=fn.__name__) for fn in (qkv, kqv)]
    assert len(find_families([normalise(program).program for program in programs])) == 1


def test_request_shapes_read_one_copy_and_weights_are_replaced():
    examples = [(array(rows, 4),) for rows in (0, 1, 70)]
    params = [{name: array(4, 4) for name in "qkv"} for _ in range(3)]
    fits = [fit_of(qkv, p, *examples) for p in params]
    serving = serve(fits[:2])
    assert [(a.shape, a.rows) for a in serving.schema.arrays] == [((4, 12), ((0, 0),))]
    for now in (params[:2], [params[0], params[2]]):
        for template, x in enumerate(examples):
            found = serving.call(serving.executable(2, template), [(0, x), (1, x)], template)
            for p, got in zip(now, found, strict=True):
                assert_alone(got, (qkv, p, x))
        serving.store.write(serving.slots[1], Preparer(serving.schema)(fits[2]))


# ---- random programs -------------------------------------------------------------------------------------------------


def draw_program(pick: Draw) -> tuple[Any, Any]:
    """Products of few operands by few weights, which may be read again, turned round, in loops and branches too."""
    params = [array(4, 4) for _ in range(pick.integer(2, 6))]

    def drawn(inner: Any, kinds: Any) -> Any:
        steps = [(pick.choice(kinds), [pick.integer(0, 9) for _ in range(3)]) for _ in range(pick.integer(2, 6))]

        def run(p: Any, x: Any) -> Any:
            values = [x]
            for kind, (i, j, k) in steps:
                a, b, w = values[i % len(values)], values[j % len(values)], p[k % len(p)]
                match kind:
                    case "product":
                        values.append(dot(a, w) / 2)
                    case "turned":
                        values.append(dot(a, w.T) / 2)
                    case "tanh":
                        values.append(jnp.tanh(a))
                    case "sum":
                        values.append((a + b) / 2)
                    case "loop":
                        values.append(lax.scan(lambda c, _: (jnp.tanh(inner(p, c)), None), a, None, length=2)[0])
                    case "branch":
                        values.append(lax.cond(b[0, 0] > 0, partial(inner, p), jnp.sin, a))
            return sum(values[1:], values[0])

        return run

    straight = ("product", "product", "product", "turned", "tanh", "sum")
    return drawn(drawn(None, straight), (*straight, "loop", "branch")), params


@settings(max_examples=max(10, settings().max_examples // 8))
@given(st.integers(0, 2**32))
def test_random_programs_mean_the_same_and_keep_no_weight_twice(seed):
    fn, params = draw_program(Draw(seed))
    program = simplified(fn, params, X)
    checked(merge_products, program)
    apart = [run for run in PROGRAM_PASSES if run is not merge_products]
    done, before = normalise(program).program, normalise(program, apart).program
    assert stored(done) <= stored(before)
    assert len(heavy_eqns(done.jaxpr)) <= len(heavy_eqns(before.jaxpr))


def stored(program: coalesce.Program) -> int:
    """Bytes of prepared weights, each value once."""
    assert program.prepare is not None
    return sum(J.nbytes(v.aval) for v in set(J.outvars(program.prepare)))
