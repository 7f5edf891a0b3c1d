"""Weights that tenants have in common: found, kept once, and read by one matrix product of all their lanes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coalesce
from coalesce.bundle import packs, problems
from tests.alone import alone, array, check_fused
from tests.compare import assert_same


def apply(params, x):
    return jnp.tanh(x @ params["backbone"]) @ params["head"]


X = array(2, 4)


def tenant(backbone):
    return {"backbone": backbone, "head": array(8, 3)}


def fuse_and_check(named, **options):
    """`named`: name -> (fn, params, shared). Fuses them on the input X and compares each with itself alone."""
    programs = [coalesce.trace(fn, p, X, name=name, shared=shared) for name, (fn, p, shared) in named.items()]
    fused = coalesce.fuse(programs, strict=True, **options)
    for (fn, params, _), result in zip(named.values(), fused([(X,)] * len(named)), strict=True):
        assert_same(result, alone((fn, params, (X,))))
    return fused


def rows(fused):
    """How many rows the weight arrays have, by the shape of a row."""
    return {array.shape: len(array.rows) for array in fused.bundle.arrays}


def dots(fused):
    """The shapes and dimension numbers of all dots in the fused program itself."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                yield *(v.aval.shape for v in eqn.invars), eqn.params["dimension_numbers"]
            for value in eqn.params.values():
                if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                    yield from walk(getattr(value, "jaxpr", value))

    return list(walk(fused.jaxpr.jaxpr))


# ---- how sharing is found ------------------------------------------------------------------------------------------


def test_one_array_object_is_one_row():
    backbone = array(4, 8)
    fused = fuse_and_check({name: (apply, tenant(backbone), None) for name in "abc"})
    assert rows(fused) == {(4, 8): 1, (8, 3): 3}
    assert "1 of 2 weights shared between lanes" in fused.explain()


def test_equal_bytes_in_other_arrays_are_shared_if_declared():
    backbone = array(4, 8)
    params = {name: tenant(jnp.array(backbone, copy=True)) for name in "abc"}
    declared = {name: (apply, p, {"backbone": p["backbone"]}) for name, p in params.items()}
    assert rows(fuse_and_check(declared)) == {(4, 8): 1, (8, 3): 3}
    undeclared = {name: (apply, p, None) for name, p in params.items()}
    assert rows(fuse_and_check(undeclared)) == {(4, 8): 3, (8, 3): 3}


def test_other_bytes_stay_apart_though_declared():
    params = {name: tenant(array(4, 8)) for name in "ab"}
    fused = fuse_and_check({name: (apply, p, {"backbone": p["backbone"]}) for name, p in params.items()})
    assert rows(fused) == {(4, 8): 2, (8, 3): 2}


def test_one_nan_is_equal_to_itself():
    backbone = array(4, 8).at[0, 0].set(jnp.nan)
    params = [tenant(jnp.array(backbone, copy=True)) for _ in range(2)]
    fused = coalesce.fuse(
        [coalesce.trace(apply, p, X, name=str(i), shared=p["backbone"]) for i, p in enumerate(params)]
    )
    assert rows(fused)[4, 8] == 1


def test_zeros_of_either_sign_are_different_bytes():
    params = [tenant(jnp.full((4, 8), zero)) for zero in (0.0, -0.0)]
    fused = fuse_and_check({str(i): (apply, p, p["backbone"]) for i, p in enumerate(params)})
    assert rows(fused)[4, 8] == 2


def test_abstract_params_are_shared_by_declaration():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tenant(array(4, 8)))
    programs = []
    for name in "abc":
        params = {k: jax.ShapeDtypeStruct(s.shape, s.dtype) for k, s in shapes.items()}
        programs.append(coalesce.trace(apply, params, X, name=name, shared={"backbone": params["backbone"]}))
    assert rows(coalesce.fuse(programs)) == {(4, 8): 1, (8, 3): 3}


def closing_over(backbone):
    return lambda head, x: jnp.tanh(x @ backbone) @ head


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_closed_over_arrays_are_weights(convert):
    """Equal bytes are one row, other bytes another row, and all of them are one family."""
    first, second = np.asarray(array(4, 8)), np.asarray(array(4, 8))
    named = {
        "a": (closing_over(convert(first.copy())), array(8, 3), None),
        "b": (closing_over(convert(second.copy())), array(8, 3), None),
        "c": (closing_over(convert(first.copy())), array(8, 3), None),
    }
    fused = fuse_and_check(named)
    assert (fused.report.families, rows(fused)) == (1, {(4, 8): 2, (8, 3): 3})


# ---- prepared values -----------------------------------------------------------------------------------------------


def normed(params, x):
    """Batch norm after a dense layer: its scale depends on shared leaves alone, and is worth preparing."""
    norm = params["norm"]
    scale = norm["scale"] / jnp.sqrt(norm["var"] + 1e-5)
    return ((x @ params["w"] - norm["mean"]) * scale).sum(0) * params["own"]


def test_prepared_values_of_shared_leaves_are_kept_once():
    shared = {"w": array(4, 8), "norm": {k: abs(array(1, 8)) for k in ("scale", "var", "mean")}}
    copies = [jax.tree.map(lambda a: jnp.array(a, copy=True), shared) for _ in range(3)]
    named = {str(i): (normed, {**c, "own": array(8)}, c) for i, c in enumerate(copies)}
    fused = fuse_and_check(named)
    assert sorted((a.shape, len(a.rows)) for a in fused.bundle.arrays) == [
        ((1, 8), 1),  # mean
        ((1, 8), 1),  # scale / sqrt(var + 1e-5)
        ((4, 8), 1),
        ((8,), 3),
    ]


def test_a_prepared_value_of_a_leaf_of_its_own_has_a_row_of_its_own():
    backbone = array(4, 8)

    def adapted(p, x):
        return x @ (p["backbone"] + p["down"] @ p["up"])

    named = {n: (adapted, {"backbone": backbone, "down": array(4, 1), "up": array(1, 8)}, None) for n in "ab"}
    assert rows(fuse_and_check(named)) == {(4, 8): 2}


def test_one_raw_weight_prepared_in_two_ways_is_not_shared():
    """Both programs are `x @ prepared`, one family, but what they prepare from the one array differs."""
    w = array(4, 8)
    named = {"plain": (lambda w, x: x @ w, w, None), "doubled": (lambda w, x: x @ (w * 2), w, None)}
    fused = fuse_and_check(named)
    assert (fused.report.families, rows(fused)) == (1, {(4, 8): 2})


def test_tenants_that_prepare_alike_in_other_words_share():
    w = array(4, 8)
    named = {"one": (lambda w, x: x @ (2 * w).T.T, w, None), "other": (lambda p, x: x @ (p[0] * 2), [w], None)}
    assert rows(fuse_and_check(named)) == {(4, 8): 1}


def test_weights_tied_inside_a_program_are_kept_once():
    def tied(p, x):
        return jnp.tanh(x @ p["in"]) @ p["out"]

    fused = fuse_and_check({n: (tied, {"in": (w := array(4, 4)), "out": w}, None) for n in "ab"})
    assert [len(a.rows) for a in fused.bundle.arrays] == [2]


def test_a_backbone_under_heads_of_two_sizes_is_kept_once():
    backbone = array(4, 8)
    named = {str(n): (apply, {"backbone": backbone, "head": array(8, n)}, None) for n in (3, 5)}
    fused = fuse_and_check(named)
    assert fused.report.families == 2
    assert [len(a.rows) for a in fused.bundle.arrays if a.shape == (4, 8)] == [1]


# ---- one product for all lanes of a group --------------------------------------------------------------------------


def test_lanes_of_a_group_are_rows_of_one_product():
    backbone = array(4, 8)
    fused = fuse_and_check({name: (apply, tenant(backbone), None) for name in "abc"})
    (lhs, rhs, numbers), head = dots(fused)
    assert lhs in ((3, 2, 4), (6, 4)) and rhs == (4, 8) and numbers[1] == ((), ())  # no batch dimension
    assert head[:2] == ((3, 2, 8), (3, 8, 3)) and head[2][1] == ((0,), (0,))
    assert (fused.report.superkernels, fused.report.padding_waste) == (2, 0)


def test_groups_are_a_batch_of_products():
    first, second = array(4, 8), array(4, 8)
    named = {n: (apply, tenant(b), None) for n, b in zip("abcd", [first, second] * 2, strict=True)}
    fused = fuse_and_check(named)
    lhs, rhs, (_, batch) = dots(fused)[0]
    assert lhs in ((2, 2, 2, 4), (2, 4, 4)) and rhs == (2, 4, 8) and batch == ((0,), (0,))
    assert fused.report.padding_waste == 0


def test_groups_of_unequal_size_are_padded_and_the_report_says_so():
    first, second = array(4, 8), array(4, 8)
    named = {n: (apply, tenant(b), None) for n, b in zip("abc", [first, second, first], strict=True)}
    fused = fuse_and_check(named)
    backbone, head = 2 * 2 * 4 * 8, 2 * 2 * 8 * 3  # FLOPs of one lane
    assert fused.report.padding_waste == pytest.approx(backbone / (4 * backbone + 3 * head))


def test_sharing_in_the_body_of_a_scan():
    def rnn(params, xs):
        def body(carry, x):
            carry = jnp.tanh(x @ params["backbone"] + carry @ params["own"])
            return carry, carry

        return jax.lax.scan(body, jnp.zeros(8), xs)

    backbone = array(4, 8)
    tenants = [(rnn, {"backbone": backbone, "own": array(8, 8)}, (array(5, 4),)) for _ in range(3)]
    fused = check_fused(tenants)
    assert rows(fused) == {(4, 8): 1, (8, 8): 3}
    assert dots(fused)[0][1] == (4, 8)


def test_a_backbone_that_families_share_is_one_product():
    """Heads of two sizes make two families; packed across them, the backbone is read once, with a row for each lane."""
    backbone, heads = array(8, 8), [array(8, n) for n in (5, 5, 3)]
    tenants = [
        (lambda p, x: jnp.tanh(x @ p["backbone"]) @ p["head"], {"backbone": backbone, "head": head}, (array(1, 8),))
        for head in heads
    ]
    fused = check_fused(tenants, policy="always", waste_bound=0.5)
    shared, head = packs(fused.bundle.schedule)
    assert problems(shared, fused.bundle.families) == (1, 3)
    assert problems(head, fused.bundle.families) == (3, 1)
    assert [len(fused.bundle.arrays[i].rows) for i in (shared.array, head.array) if i is not None] == [1, 3]
