"""choose_kernels: every pack gets a kernel that supports its operation, by the rule or by the caller's own."""

from functools import partial

import pytest
from jax import lax

from coalesce.bundle import packs
from coalesce.errors import PlanError
from coalesce.kernels import KERNELS
from coalesce.passes.choose_kernels import choose_kernels
from coalesce.passes.form_packs import form_packs
from tests.alone import array
from tests.bundles import bundle_of, replanned

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def conv(w, x, **params):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=DIMENSIONS, **params)


def net(p, x):
    """A small conv, one in groups, one whose patches leave a cache, and a dot."""
    x = conv(p["conv"], x)
    x = conv(p["grouped"], x, feature_group_count=4)
    return lax.dot(
        lax.reduce_max(conv(p["large"], lax.pad(x, 0.0, ((0, 0, 0), (0, 56, 0), (0, 56, 0), (0, 0, 0)))), (1, 2)),
        p["dense"],
    )


def formed(count):
    shapes = {"conv": (3, 3, 8, 8), "grouped": (3, 3, 2, 8), "large": (3, 3, 8, 16), "dense": (16, 5)}
    tenants = [(net, {k: array(*s) for k, s in shapes.items()}, (array(1, 8, 8, 8),)) for _ in range(count)]
    return form_packs(bundle_of(*tenants))


def kernels(bundle):
    return [pack.kernel for pack in packs(bundle.schedule)]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_by_the_rule(golden, platform):
    golden(replanned(partial(choose_kernels, platform=platform), formed(2)))


def test_the_number_of_problems_counts():
    """Slices of one problem of many rows do not pay on a CPU."""
    first = [kernels(choose_kernels(formed(count), platform="cpu"))[0] for count in (1, 2)]
    assert first == ["separate", "conv_slices"]


def test_by_the_callers_own_rule():
    seen = []

    def separately(op, groups, platform):
        seen.append((op.kind, groups, platform))
        return "separate"

    bundle = choose_kernels(formed(3), platform="tpu", choice=separately)
    assert kernels(bundle) == ["separate"] * 4
    assert seen == [("conv", 3, "tpu")] * 3 + [("dot", 3, "tpu")]


def test_lanes_that_share_weights_are_one_problem():
    w = array(4, 3)
    shared = [(lambda w, x: lax.dot(x, w), w, (array(2, 4),)) for _ in range(3)]
    groups = []
    choose_kernels(
        form_packs(bundle_of(*shared)), platform="cpu", choice=lambda op, n, _: [groups.append(n), "separate"][1]
    )
    assert groups == [1]


@pytest.mark.parametrize("name", ["unknown", "batched_dot"])
def test_a_kernel_that_does_not_support_the_operation(name):
    with pytest.raises(PlanError, match=f"pack 0 .conv 3x3 .*: kernel '{name}' does not support it; .*conv_slices"):
        choose_kernels(formed(2), platform="cpu", choice=lambda op, groups, platform: name)


def test_kernels_in_loops():
    def rnn(w, x):
        return lax.scan(lambda c, _: (lax.tanh(lax.dot(c, w)), None), x, None, 3)[0]

    bundle = form_packs(bundle_of(*[(rnn, array(4, 4), (array(2, 4),)) for _ in range(2)]))
    assert kernels(bundle) == [""]
    assert kernels(choose_kernels(bundle, platform="cpu"))[0] in KERNELS
