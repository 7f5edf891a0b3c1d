"""The models are the published ones: parameter counts, heavy operations, shapes and dtypes, all without compiling;
then one small network of each kind runs."""

from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import subjaxprs

from coalesce.models import by_name, Model, NAMES

KEY = jax.random.key(0)


def dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def bert(layers: int, hidden: int) -> int:
    norm = 2 * hidden
    embeddings = (30522 + 512 + 2) * hidden + norm
    layer = 4 * dense(hidden, hidden) + dense(hidden, 4 * hidden) + dense(4 * hidden, hidden) + 2 * norm
    return embeddings + layers * layer + dense(hidden, hidden)


KAGGLE_ROWS = 33_762_577
DLRM_MLPS = ((13, 512), (512, 256), (256, 64), (64, 16), (16 + 27 * 26 // 2, 512), (512, 256), (256, 1))

PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "se_resnet50": 28_088_024,
    "senet154": 115_088_984,
    "mobilenetv2": 3_504_872,
    "vgg16": 138_357_544,
    "vit_ti16": 5_717_416,
    "vit_b16": 86_567_656,
    "bert_base": 109_482_240,
    "bert_small": bert(layers=4, hidden=512),
    "lstm": 4 * (512 * 512 + dense(512, 512)) + dense(512, 1000),
    # The candidate gate has a bias on its recurrent product too, since the reset gate multiplies it.
    "gru": 3 * (512 * 512 + dense(512, 512)) + 512 + dense(512, 1000),
    "dlrm": 16 * KAGGLE_ROWS + sum(dense(*sizes) for sizes in DLRM_MLPS),
    "mlp": 24 * dense(16, 16),
}
STATISTICS = {
    "resnet18": 9_600,
    "resnet34": 17_024,
    "resnet50": 53_120,
    "se_resnet50": 53_120,
    "senet154": 247_552,
    "mobilenetv2": 34_112,
}

# dot_general and conv_general_dilated equations; the body of a scan counts once.
HEAVY = {
    "resnet18": (1, 20),
    "resnet34": (1, 36),
    "resnet50": (1, 53),
    "se_resnet50": (16 * 2 + 1, 53),
    "senet154": (50 * 2 + 1, 3 + 50 * 3 + 4),
    "mobilenetv2": (1, 52),
    "vgg16": (3, 13),
    "vit_ti16": (12 * 8 + 1, 1),
    "vit_b16": (12 * 8 + 1, 1),
    "bert_base": (12 * 8 + 1, 0),
    "bert_small": (4 * 8 + 1, 0),
    "lstm": (2 + 1, 0),
    "gru": (6 + 1, 0),
    "dlrm": (4 + 1 + 3, 0),
    "mlp": (24, 0),
}
# Deeper than a model beside them, of the same operations: traced by one version of JAX is enough.
DEEPER = {"resnet34", "se_resnet50", "senet154", "vit_b16", "bert_base"}
EACH = [pytest.param(name, marks=[pytest.mark.once] * (name in DEEPER)) for name in NAMES]
WIDTHS = {"bert_base": 768, "bert_small": 512, "dlrm": 1, "mlp": 16}  # of the outputs; 1000 classes elsewhere

SMALL = {
    "resnet18": dict(stages=(1, 1, 1, 1), width=8, classes=10, image_size=32),
    "resnet50": dict(stages=(1, 1, 1, 1), width=8, classes=10, image_size=32),
    "se_resnet50": dict(stages=(1, 1, 1, 1), width=8, classes=10, image_size=32),
    "senet154": dict(stages=(1, 1), stem=((3, 4), (3, 8)), width=8, groups=2, classes=10, image_size=32),
    "mobilenetv2": dict(stages=((1, 4, 1, 1), (3, 8, 2, 2)), stem=8, last=16, classes=10, image_size=32),
    "vgg16": dict(stages=((8,), (16, 16)), hidden=32, classes=10, image_size=32),
    "vit_ti16": dict(layers=1, hidden=32, heads=2, classes=10, image_size=32),
    "bert_small": dict(layers=1, hidden=32, heads=2, vocabulary=100, length=12, classes=3),
    "lstm": dict(layers=2, features=8, hidden=16, steps=5, classes=10),
    "gru": dict(layers=2, features=8, hidden=16, steps=5, classes=10),
    "dlrm": dict(rows=(50, 3, 200), bottom=(16, 4), top=(8,), max_rows=100),
    "mlp": dict(layers=4, width=8),
}


@cache
def shapes(name: str) -> Any:
    return jax.eval_shape(by_name(name).init, KEY)


def size(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def equations(jaxpr: Any) -> list[Any]:
    return [*jaxpr.eqns, *(eqn for inner in subjaxprs(jaxpr) for eqn in equations(inner))]


@cache
def traced(name: str, dtype: str = "float32") -> tuple[list[Any], jax.ShapeDtypeStruct]:
    model = by_name(name, dtype=dtype)
    closed, output = jax.make_jaxpr(model.apply, return_shape=True)(shapes(name), *model.inputs(batch=3))
    return equations(closed.jaxpr), output


def small(name: str) -> tuple[Model, Any]:
    """A small network and random weights for it, statistics too; flax's own initializers compile for each shape."""
    model = by_name(name, **SMALL[name])
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        values = jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)
        return abs(values) if path[-1].key == "var" else values

    return model, jax.tree.map_with_path(draw, jax.eval_shape(model.init, KEY))


def test_tables_cover_every_model():
    assert set(NAMES) == set(PARAMETERS) == set(HEAVY)


@pytest.mark.parametrize("name", EACH)
def test_parameters(name):
    assert size(shapes(name)["params"]) == PARAMETERS[name]
    assert size(shapes(name).get("batch_stats", {})) == STATISTICS.get(name, 0)


def test_published_bert_sizes_follow_from_the_formula():
    assert bert(layers=12, hidden=768) == PARAMETERS["bert_base"]
    assert bert(layers=4, hidden=512) == 28_763_648


@pytest.mark.parametrize("name", EACH)
def test_heavy_operations(name):
    eqns, _ = traced(name)
    count = Counter(eqn.primitive.name for eqn in eqns)
    assert (count["dot_general"], count["conv_general_dilated"]) == HEAVY[name]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.once)])
@pytest.mark.parametrize("name", EACH)
def test_outputs(name, dtype):
    _, output = traced(name, dtype)
    assert (output.shape, output.dtype) == ((3, WIDTHS.get(name, 1000)), dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes(name))} == {"float32"}


@pytest.mark.parametrize("name", SMALL)
def test_param_dtype_is_for_all_but_normalisation(name):
    model = by_name(name, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, **SMALL[name])
    params = jax.eval_shape(model.init, KEY)
    for path, leaf in jax.tree.leaves_with_path(params):
        owner = path[-2].key
        assert leaf.dtype == ("float32" if owner.startswith(("BatchNorm", "LayerNorm")) else "bfloat16"), path
    assert jax.eval_shape(model.apply, params, *model.inputs()).dtype == jnp.bfloat16


def test_resnet50_strides_in_the_3x3_and_pads_symmetrically():
    eqns, _ = traced("resnet50")
    convs = [eqn for eqn in eqns if eqn.primitive.name == "conv_general_dilated"]
    # Kernels are HWIO.
    found = {(eqn.invars[1].aval.shape[0], eqn.params["window_strides"], eqn.params["padding"]) for eqn in convs}
    assert found == {
        (7, (2, 2), ((3, 3), (3, 3))),
        (1, (1, 1), ((0, 0), (0, 0))),
        (3, (1, 1), ((1, 1), (1, 1))),
        (3, (2, 2), ((1, 1), (1, 1))),
        (1, (2, 2), ((0, 0), (0, 0))),  # the shortcuts
    }
    (pool,) = [eqn for eqn in eqns if eqn.primitive.name == "reduce_window_max"]
    assert pool.params["padding"] == ((0, 0), (1, 1), (1, 1), (0, 0))
    assert pool.outvars[0].aval.shape == (3, 56, 56, 64)


@pytest.mark.once  # counted in what the tests above trace
@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "resnet50": {1: 53},
        "se_resnet50": {1: 53},
        "senet154": {1: 107, 64: 50},
        "mobilenetv2": {1: 35, 32: 1, 96: 1, 144: 2, 192: 3, 384: 4, 576: 3, 960: 3},
    }.items(),
)
def test_feature_groups(name, expected):
    eqns, _ = traced(name)
    convs = [eqn for eqn in eqns if eqn.primitive.name == "conv_general_dilated"]
    assert Counter(eqn.params["feature_group_count"] for eqn in convs) == expected


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.once
def test_a_row_is_finite_and_depends_on_its_own_inputs_alone(name):
    model, params = small(name)
    inputs = model.example(jax.random.key(1), batch=2)
    others = model.example(jax.random.key(2), batch=2)
    mixed = [jnp.stack([a[0], b[1]]) for a, b in zip(inputs, others, strict=True)]

    apply = jax.jit(model.apply)
    before, after = np.asarray(apply(params, *inputs)), np.asarray(apply(params, *mixed))
    assert np.isfinite(before).all() and np.isfinite(after).all()
    np.testing.assert_array_equal(before[0], after[0])
    assert (before[1] != after[1]).any()


def test_bert_ignores_padding_and_tells_segments_apart():
    model, params = small("bert_small")
    apply = jax.jit(model.apply)
    tokens = jnp.arange(12)[None]
    mask = tokens < 7
    result = apply(params, tokens, mask)
    np.testing.assert_array_equal(result, apply(params, jnp.where(mask, tokens, 99), mask))
    np.testing.assert_allclose(result, apply(params, tokens, mask, jnp.zeros_like(tokens)), rtol=1e-5)
    assert (result != apply(params, tokens, mask, jnp.ones_like(tokens))).any()


def test_init_gives_finite_weights():
    model = by_name("gru", **SMALL["gru"] | {"layers": 1}, param_dtype=jnp.bfloat16)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(model.init(KEY)))


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "resnet50": "bfloat16[3,224,224,3]",
        "vgg16": "bfloat16[3,224,224,3]",
        "vit_b16": "bfloat16[3,224,224,3]",
        "bert_base": "int32[3,128] bool[3,128]",
        "lstm": "bfloat16[3,25,512]",
        "dlrm": "bfloat16[3,13] int32[3,26]",
        "mlp": "bfloat16[3,16]",
    }.items(),
)
def test_inputs(name, expected):
    specs = by_name(name, dtype=jnp.bfloat16).inputs(batch=3)
    assert " ".join(f"{spec.dtype}{list(spec.shape)}".replace(", ", ",") for spec in specs) == expected


def test_overrides_reach_the_inputs():
    (image,) = by_name("resnet18", image_size=64).inputs()
    assert image.shape == (1, 64, 64, 3)


def test_equal_arguments_give_the_same_model():
    assert by_name("resnet50") is by_name("resnet50", dtype="float32", classes=1000)
    assert by_name("resnet50").apply is not by_name("resnet50", dtype=jnp.bfloat16).apply
    assert by_name("lstm") is not by_name("gru")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'resnet51'; choose one of resnet18, .*, mlp$"):
        by_name("resnet51")
