"""Heavy ops and superkernels of every model, asserted exactly and derived a second time from `fused.jaxpr`.

On the platform "gpu" every superkernel lowers to one dot_general, to one grouped convolution, to a depthwise one's
taps, or to the kernel of a recurrent cell, so that counting the equations of the rewritten jaxpr gives the number of
superkernels without asking the plan.
"""

from functools import cache
from typing import Any

import jax
import jax.extend.core as jec
import pytest

import coalesce
from coalesce.bundle import Attention, items
from coalesce.jaxpr import walk
from coalesce.models import by_name, Model, NAMES

TENANTS = 3
# heavy ops of one tenant as it is traced, and superkernels: Q, K and V are one, and so are the gates of a GRU
EXPECTED = {
    "resnet18": (21, 21),
    "resnet34": (37, 37),
    "resnet50": (54, 54),
    "se_resnet50": (86, 86),
    "senet154": (88, 88),
    "mobilenetv2": (53, 53),
    "vgg16": (16, 16),
    "vit_ti16": (98, 74),
    "vit_b16": (98, 74),
    "bert_base": (97, 73),
    "bert_small": (33, 25),
    "lstm": (3, 3),
    "gru": (7, 3),
    "dlrm": (8, 8),
    "mlp": (24, 24),
}


# What counts but costs time here: rows of tables, and how often SENet-154 repeats a block (16 here, not 50).
OVERRIDES: dict[str, dict[str, Any]] = {"dlrm": {"max_rows": 100}, "senet154": {"stages": (3, 8, 2, 3)}}


# Deeper than a model beside them, of the same operations: traced by one version of JAX is enough.
DEEPER = {"resnet34", "se_resnet50", "vit_b16", "bert_base"}
EACH = [pytest.param(name, marks=[pytest.mark.once] * (name in DEEPER)) for name in NAMES]


@cache
def model_of(name: str) -> tuple[Model, Any]:
    """A model and the shapes of its params; JAX traces the same one once."""
    model = by_name(name, **OVERRIDES.get(name, {}))
    return model, jax.eval_shape(model.init, jax.random.key(0))


def programs(name: str, tenants: int = TENANTS) -> list[coalesce.Program]:
    model, params = model_of(name)
    return [coalesce.trace(model.apply, params, *model.inputs(1), name=f"{name}{i}") for i in range(tenants)]


def count(jaxpr: Any, primitives: tuple[str, ...]) -> int:
    """Equations of those primitives, inside calls and bodies too; a function that two calls share counts twice."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0
    for eqn in inner.eqns:
        total += eqn.primitive.name in primitives
        total += sum(count(sub, primitives) for sub in jec.jaxprs_in_params(eqn.params))
    return total


HEAVY = ("dot_general", "conv_general_dilated")
ATTENTION = {"vit_ti16": 12, "vit_b16": 12, "bert_base": 12, "bert_small": 4}  # layers


def products(fused: coalesce.Fused) -> int:
    """Heavy equations, those of an attention once: its kernel is written for CUDA, for ROCm and interpreted; and the
    kernels of recurrent cells, which multiply and add."""
    inside = sum(isinstance(item, Attention) for item in items(fused.bundle.schedule))
    cells = sum(eqn.params.get("name", "").endswith("_indexed_matvec") for eqn in walk(fused.jaxpr))
    return count(fused.jaxpr, HEAVY) - 2 * 2 * inside + cells


def taps(jaxpr: Any, name: str) -> int:
    """Superkernels that are elementwise work, by their operand, which each waits for once; a pool of windows that
    overlap, as the residual networks begin with, does so too, and on a GPU the rows of a result."""
    others = name.startswith(("resnet", "se_resnet", "senet")) + (jax.default_backend() == "gpu")
    return count(jaxpr, ("optimization_barrier",)) - others


def test_every_model_is_expected():
    assert set(EXPECTED) == set(NAMES)


@pytest.mark.parametrize("name", EACH)
def test_counts_of_tenants_of_one_model(name):
    """Across tenants, and across and within them."""
    heavy, superkernels = EXPECTED[name]
    fused = coalesce.fuse(programs(name), platform="gpu")
    report = fused.report
    assert (report.programs, report.families) == (TENANTS, 1)
    assert (report.heavy_ops, report.superkernels, report.alone) == (TENANTS * superkernels, superkernels, 0)
    assert report.padding_waste == 0.0
    assert all((t.heavy_ops, t.superkernels, t.alone) == (superkernels, superkernels, 0) for t in report.tenants)
    depthwise = 17 if name == "mobilenetv2" else 0
    assert (products(fused), taps(fused.jaxpr, name)) == (superkernels - depthwise, depthwise)
    assert sum(isinstance(item, Attention) for item in items(fused.bundle.schedule)) == ATTENTION.get(name, 0)
    model, params = model_of(name)
    assert count(jax.make_jaxpr(model.apply)(params, *model.inputs(1)), HEAVY) == heavy

    fused = coalesce.fuse(programs(name), platform="gpu", within_program=True)
    assert (fused.report.superkernels, fused.report.alone) == (superkernels, 0)
    assert products(fused) + taps(fused.jaxpr, name) == superkernels


def test_sixteen_resnet50s_are_54_superkernels():
    fused = coalesce.fuse(programs("resnet50", 16), platform="gpu")
    families = "16 programs in 1 family: 864 heavy ops"
    assert str(fused.report) == f"{families} -> 54 superkernels, 0 alone, 0.0% padding, in 2 executables"
    assert count(fused.jaxpr, HEAVY) == 54


def test_a_mix_of_three_families_is_packed_family_by_family():
    mix = [p for name in ("resnet18", "lstm", "bert_small") for p in programs(name)]
    fused = coalesce.fuse(mix, platform="gpu")
    assert fused.report.families == 3
    assert fused.report.heavy_ops == 3 * (21 + 3 + 25)
    assert (fused.report.superkernels, fused.report.alone) == (21 + 3 + 25, 0)
    assert products(fused) == 49


def test_one_tenant_is_alone_and_the_report_says_why():
    fused = coalesce.fuse(programs("mlp", 1))
    assert (fused.report.heavy_ops, fused.report.superkernels, fused.report.alone) == (24, 0, 24)
    assert "one lane in its family" in fused.explain()
