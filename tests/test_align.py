"""cluster and align: what runs together across families, and why everything else does not.

Costs are those of tests/fixed_costs.py: 10 us a superkernel, whatever it holds, and 1 us to stack an operand.
"""

from functools import partial

import pytest
from jax import lax

from coalesce.bundle import Aligned, packs
from coalesce.bundle_check import check_bundle
from coalesce.clusters import clusters_text
from coalesce.explain import aligned_text, bundle_text, place_text
from coalesce.passes import unroll_loops
from coalesce.passes.align import align
from coalesce.passes.cluster import cluster
from coalesce.passes.form_packs import form_packs
from tests.alone import array
from tests.bundles import bundle_of
from tests.fixed_costs import Fixed


def formed(*tenants, waste_bound=0.5, **options):
    return cluster(form_packs(bundle_of(*tenants), **options), waste_bound=waste_bound)


def aligned(*tenants, costs=None, policy="auto", waste_bound=0.5, **options):
    run = partial(align, costs=costs or Fixed(), policy=policy, waste_bound=waste_bound)
    after = run(formed(*tenants, waste_bound=waste_bound, **options))
    check_bundle(after)
    assert run(after) is after
    assert cluster(after) is after
    return after


def shown(bundle):
    records = [f"{place_text(place)}: {record}" for place, record in bundle.records.items()]
    chosen = [*map(aligned_text, bundle.aligned), f"predicted to win {bundle.predicted_us:.1f} us"]
    parts = [
        bundle_text(bundle),
        "# cluster",
        clusters_text(bundle.clusters),
        "# align",
        *chosen,
        "# records",
        *records,
    ]
    return "\n".join(parts)


def places(bundle):
    return [(group.form, *group.places) for group in bundle.aligned]


def reasons(bundle):
    return {place_text(place): record.reason for place, record in bundle.records.items()}


def mlp(weights, x):
    for w in weights:
        x = lax.tanh(lax.dot(x, w))
    return x


def layers(rows, *widths):
    """A tenant of an MLP."""
    weights = [array(i, o) for i, o in zip(widths, widths[1:], strict=False)]
    return mlp, weights, (array(rows, widths[0]),)


def scan_of(step, length, reverse=False):
    def run(w, x):
        return lax.scan(lambda c, _: (step(w, c), None), x, None, length, reverse)[0]

    return run


def rnn(length, d=4, **options):
    """A tenant of a recurrent layer."""
    return scan_of(lambda w, c: lax.tanh(lax.dot(c, w)), length, **options), array(d, d), (array(2, d),)


def test_two_mlps_of_other_widths(golden):
    """The second layers find their operand stacked, which saves the stacking and a kernel between them."""
    bundle = aligned(layers(2, 4, 8, 3), layers(2, 4, 6, 3))
    golden(shown(bundle))
    own = [record for (family, _), record in bundle.records.items() if family == 0]
    assert sum(record.gain_us + record.tails_us for record in own) == pytest.approx(bundle.predicted_us)


@pytest.fixture
def loops_stay(monkeypatch):
    """Loops that are not unrolled: so one of two saves iterations."""
    monkeypatch.setattr(unroll_loops, "MOST", 0)


def test_scans_of_unequal_length(golden, loops_stay):
    """Each of five steps saves a kernel, and three of eight iterations are saved; two of the shorter one are wasted."""
    golden(shown(aligned(rnn(3), rnn(5, 5), costs=Fixed(loop_us=20.0))))


def test_nothing_to_align():
    bundle = form_packs(bundle_of(layers(2, 4, 8), layers(2, 4, 8)))
    assert cluster(bundle) is bundle
    assert align(bundle, costs=Fixed()) is bundle
    light = form_packs(
        bundle_of((lambda w, x: x * w, array(3), (array(3),)), (lambda w, x: x + w, array(3), (array(3),)))
    )
    assert cluster(light) is light
    assert align(light, costs=Fixed()) is light


# ---- what is chosen --------------------------------------------------------------------------------------------------


def test_families_are_wide_lanes():
    bundle = aligned(layers(2, 4, 8), layers(2, 4, 8), layers(2, 4, 6), layers(2, 4, 7))
    assert [family.width for family in bundle.families] == [2, 1, 1]
    assert places(bundle) == [("padded", (0, "0"), (1, "0"), (2, "0"))]


def test_every_form():
    first, second = layers(2, 4, 8), (lambda w, x: lax.sin(lax.dot(x, w)), array(4, 8), (array(2, 4),))
    assert places(aligned(first, second)) == [("equal", (0, "0"), (1, "0"))]
    assert places(aligned(first, layers(2, 4, 7))) == [("padded", (0, "0"), (1, "0"))]

    def conv(w, x):
        return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert places(aligned(layers(4, 8, 3), (conv, array(2, 2, 2, 3), (array(1, 3, 3, 2),)))) == [
        ("product", (0, "0"), (1, "0"))
    ]


def test_the_largest_gain_is_chosen():
    """One layer against two: it runs with the one that is faster to share."""

    def us(op, groups, rows):
        return 10.0 if groups == 1 else 12.0 if op.n == 8 else 16.0

    bundle = aligned(layers(2, 4, 6, 6), layers(2, 4, 8), costs=Fixed(us))
    assert places(bundle) == [("padded", (0, "0"), (1, "0"))]

    def other(op, groups, rows):
        return 10.0 if groups == 1 else 12.0 if op.k == 6 else 16.0

    bundle = aligned(layers(2, 4, 6, 6), layers(2, 4, 8), costs=Fixed(other))
    assert places(bundle) == [("padded", (0, "2"), (1, "0"))]


def test_chains_that_cross_are_not_both_packed():
    """Equal layers stand in the opposite order: to run both pairs, each would have to wait for the other."""
    bundle = aligned(layers(2, 3, 9, 3), layers(2, 9, 3, 9), policy="always", waste_bound=0.0)
    assert len(bundle.aligned) == 1


def test_always_packs_what_loses():
    tenants = layers(2, 4, 8), layers(2, 4, 6)
    assert places(aligned(*tenants, costs=Fixed(stack_us=50.0))) == []
    assert places(aligned(*tenants, costs=Fixed(stack_us=50.0), policy="always")) == [("padded", (0, "0"), (1, "0"))]
    bundle = aligned(*tenants, costs=Fixed(stack_us=50.0), policy="always")
    assert bundle.predicted_us == 20 - 10 - 50


def test_the_waste_bound():
    """2x4x6 in 2x4x8 wastes a quarter."""
    tenants = layers(2, 4, 8), layers(2, 4, 6)
    assert places(aligned(*tenants, waste_bound=0.25)) != []
    assert places(aligned(*tenants, waste_bound=0.24)) == []


def test_nested_scans():
    """The inner scans run as one inside the outer ones."""

    def nested(length):
        def run(w, x):
            def step(c, _):
                return lax.scan(lambda c, _: (lax.tanh(lax.dot(c, w)), None), c, None, length)[0], None

            return lax.scan(step, x, None, 3)[0]

        return run, array(4, 4), (array(2, 4),)

    bundle = aligned(nested(2), nested(4), policy="always")
    inner = "0.body.0"
    assert bundle.aligned == (
        Aligned(((0, "0"), (1, "0")), "scan"),
        Aligned(((0, inner), (1, inner)), "scan"),
        Aligned(((0, f"{inner}.body.0"), (1, f"{inner}.body.0")), "equal", bundle.aligned[2].stacked),
    )


def counted(w, c):
    """A step with a loop inside whose trip count is data."""
    c = lax.tanh(lax.dot(c, w))
    return lax.while_loop(lambda v: v[0, 0] > 1.0, lambda v: v / 2, c)


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (rnn(3), rnn(3, 5), True),
        (rnn(3), rnn(5), True),
        (rnn(3), rnn(5, reverse=True), False),
        (rnn(5, reverse=True), rnn(3, reverse=True), True),
        (rnn(0), rnn(3), False),
        (rnn(3), (scan_of(counted, 3), array(4, 4), (array(2, 4),)), True),
        (rnn(3), (scan_of(counted, 5), array(4, 4), (array(2, 4),)), False),
        (rnn(3), (scan_of(lambda w, c: c * w, 3), array(2, 4), (array(2, 4),)), False),
    ],
    ids=["other sizes", "other lengths", "opposite", "both reverse", "no steps", "while", "while longer", "no dots"],
)
def test_which_scans_run_as_one(first, second, together):
    bundle = aligned(first, second, policy="always")
    assert ("scan" in {group.form for group in bundle.aligned}) == together


# ---- why not ---------------------------------------------------------------------------------------------------------


def test_no_partner():
    bundle = aligned(layers(2, 4, 8), layers(2, 16, 8))
    assert set(reasons(bundle).values()) == {"no op of another family is within the waste bound of it"}


def test_precision_differs():
    exact = (lambda w, x: lax.dot(x, w, precision="highest"), array(4, 8), (array(2, 4),))
    assert reasons(aligned(layers(2, 4, 8), exact)) == {
        "family 0 at 0": "precision or dtype differs from that of family 1 at 0, which is as large",
        "family 1 at 0": "precision or dtype differs from that of family 0 at 0, which is as large",
    }


def test_precision_differs_from_a_near_op():
    """2x4x6 in 2x4x8 wastes a quarter."""
    exact = (lambda w, x: lax.dot(x, w, precision="highest"), array(4, 6), (array(2, 4),))
    assert reasons(aligned(layers(2, 4, 8), exact, waste_bound=0.25)) == {
        "family 0 at 0": "precision or dtype differs from that of family 1 at 0, which is near enough in shape",
        "family 1 at 0": "precision or dtype differs from that of family 0 at 0, which is near enough in shape",
    }
    too_far = "no op of another family is within the waste bound of it"
    assert set(reasons(aligned(layers(2, 4, 8), exact, waste_bound=0.24)).values()) == {too_far}


def test_a_grouped_convolution_is_no_product():
    """As large as a dot, and with its precision: its form is another."""

    def depthwise(w, x):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=dims, feature_group_count=3)

    grouped = depthwise, array(2, 2, 1, 3), (array(1, 3, 3, 3),)
    bundle = aligned(layers(4, 4, 1), grouped, policy="always")
    ops = [pack.op for pack in packs(bundle.schedule)]
    assert {(op.m, op.n, op.k) for op in ops} == {(4, 1, 4)} and len(ops) == 2
    assert set(reasons(bundle).values()) == {"no op of another family is within the waste bound of it"}


def test_different_loop():
    assert reasons(aligned(rnn(3), layers(2, 4, 4))) == dict.fromkeys(
        ("family 0 at 0.body.0", "family 1 at 0"),
        "different loop: those within the waste bound of it run in other loops",
    )


def test_predicted_loss():
    """20 us apart; 10 and 50 of stacking together."""
    assert reasons(aligned(layers(2, 4, 8), layers(2, 4, 6), costs=Fixed(stack_us=50.0))) == {
        "family 0 at 0": "predicted loss of 40.0 us with family 1 at 0, the best partner",
        "family 1 at 0": "predicted loss of 40.0 us with family 0 at 0, the best partner",
    }


def test_a_gain_within_the_margin():
    """20 us apart; 10 and 8.5 of stacking together. What wins is chosen for all that it wins."""
    tenants, costs = [layers(2, 4, 8), layers(2, 4, 6)], [Fixed(stack_us=8.5, least=least) for least in (0.05, 0.1)]
    (chosen, left), always = (
        (aligned(*tenants, costs=c) for c in costs),
        aligned(*tenants, costs=costs[1], policy="always"),
    )
    assert reasons(left) == {
        "family 0 at 0": "predicted gain of 1.5 us with family 1 at 0, the best partner: within the cost model's error",
        "family 1 at 0": "predicted gain of 1.5 us with family 0 at 0, the best partner: within the cost model's error",
    }
    assert chosen.predicted_us == always.predicted_us == pytest.approx(1.5)
    assert len(chosen.aligned) == len(always.aligned) == 1


@pytest.mark.parametrize(("wait", "won"), [(0.6, 1.5), (0.7, 0.0)])
def test_steps_that_wait_for_each_other(wait, won, loops_stay):
    """Each of three steps wins 10.5, stacked carry and all, and an iteration of 2; of its 20 us it waits 12 or 14."""
    bundle = aligned(rnn(3), rnn(3, 5), costs=Fixed(stack_us=5.0, wait=wait))
    assert bundle.predicted_us == pytest.approx(won)
    assert bool(bundle.aligned) == (won > 0)


def test_dependent_on_a_better_choice():
    """Two layers and one: the one cannot run with both, since the second waits for the first."""
    bundle = aligned(layers(2, 4, 4, 4), layers(2, 4, 4))
    alone = [reason for reason in reasons(bundle).values() if reason]
    assert alone == [
        "dependent: family 1 at 0, its best partner, runs with others that win more or come in another order"
    ]


def test_dependent_across_a_pack():
    bundle = aligned(layers(2, 3, 9, 3), layers(2, 9, 3, 9), waste_bound=0.0)
    alone = [reason for reason in reasons(bundle).values() if reason]
    assert len(alone) == 2
    assert all(reason.endswith("would have to run before and after packs that win more") for reason in alone)


NO_KERNEL = "no op of another family can share a kernel with it: its lanes share all operands, or waste too much"


def test_lanes_that_share_all_operands(loops_stay):
    """Powers of a weight that lanes share are computed once for all of them: there is nothing to stack."""

    def powers(w, x):
        def step(c, _):
            return (lax.tanh(lax.dot(c[0], w)), c[1] + c[0]), None

        return lax.scan(step, (w, x), None, 3)[0][1]

    w = array(4, 4)
    same = [(powers, w, (array(4, 4),)) for _ in range(2)]
    bundle = aligned(*same, (scan_of(lambda w, c: lax.sin(lax.dot(c, w)), 3), array(4, 4), (array(4, 4),)))
    assert [family.width for family in bundle.families] == [2, 1]
    assert places(bundle) == [("scan", (0, "0"), (1, "0"))]  # which saves three iterations
    assert set(reasons(bundle).values()) == {NO_KERNEL}


def test_weights_do_not_mix_with_activations():
    scores = (lambda _, q, k: lax.dot(q, k), (), (array(2, 4), array(4, 8)))
    bundle = aligned(layers(2, 4, 8), scores)
    assert bundle.aligned == ()
    assert set(reasons(bundle).values()) == {NO_KERNEL}


def test_equal_tenants_need_no_record():
    bundle = aligned(layers(2, 4, 8), layers(2, 4, 8), layers(2, 4, 7), policy="always")
    record = bundle.records[0, "0"]
    assert (record.company, record.reason) == (((1, "0"),), "")
    assert record.waste == 0
    assert bundle.records[1, "0"].waste == pytest.approx(1 / 8)
    assert (record.alone_us, record.packed_us, record.parts_us, record.movement_us) == (10.0, 10.0, 20.0, 1.0)
    assert record.gain_us == 9.0
