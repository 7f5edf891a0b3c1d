"""plan_layouts: one array a weight, in the layout that its reader wants; rows are shared as the lanes share."""

import jax.numpy as jnp
from jax import lax

from coalesce.bundle import JointStep
from coalesce.kernels import choose
from coalesce.passes.align import align
from coalesce.passes.choose_kernels import choose_kernels
from coalesce.passes.cluster import cluster
from coalesce.passes.form_packs import form_packs
from coalesce.passes.pack import pack
from coalesce.passes.plan_layouts import plan_layouts
from tests.alone import array
from tests.bundles import bundle_of, replanned
from tests.fixed_costs import Fixed


def planned(*tenants, kernel=None, **options):
    """A bundle with packs and kernels, `kernel` for all of them if given."""
    return choose_kernels(form_packs(bundle_of(*tenants), **options), platform="cpu", choice=always(kernel))


def across(*tenants, kernel=None):
    """The same with whatever can be packed across families."""
    costs = Fixed()
    bundle = align(
        cluster(form_packs(bundle_of(*tenants)), waste_bound=0.8), costs=costs, policy="always", waste_bound=0.8
    )
    return choose_kernels(pack(bundle), platform="cpu", choice=always(kernel))


def always(kernel):
    return choose if kernel is None else lambda op, groups, platform: kernel


def shown(bundle):
    return replanned(plan_layouts, bundle)


def dense(p, x):
    return lax.dot(x, p["w"]) + lax.broadcast_in_dim(p["b"], (2, 3), (1,))


def dense_tenant(w=None):
    return dense, {"w": array(4, 3) if w is None else w, "b": array(3)}, (array(2, 4),)


def biased(columns):
    return lambda p, x: lax.dot(x, p["w"]) + p["b"][None], {"w": array(4, columns), "b": array(columns)}, (array(2, 4),)


def conv(w, x):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convs():
    return [(conv, array(3, 3, 2, 4), (array(1, 8, 8, 2),)) for _ in range(2)]


def test_dense_layers(golden):
    golden(shown(planned(dense_tenant(), dense_tenant())))


def test_convs_as_slices(golden):
    golden(shown(planned(*convs(), kernel="conv_slices")))


def test_convs_in_groups(golden):
    golden(shown(planned(*convs(), kernel="conv_grouped")))


def test_lanes_that_share(golden):
    """Two rows for three lanes; the bias is each lane's own."""
    first, second = array(4, 3), array(4, 3)
    golden(shown(planned(dense_tenant(first), dense_tenant(second), dense_tenant(first))))


def test_a_tied_embedding(golden):
    """The table is gathered from as it is, and read by a dot, transposed: two prepared weights, two arrays."""

    def apply(table, tokens):
        rows = jnp.take(table, tokens, axis=0, mode="clip")
        return lax.dot(rows, lax.transpose(table, (1, 0)))

    golden(shown(planned(*[(apply, array(5, 4), (jnp.arange(2),)) for _ in range(2)])))


def test_a_weight_that_a_dot_and_another_equation_read(golden):
    """Both want it as it is, so it lies there once."""

    def apply(w, x):
        return lax.dot(x, w) * w

    golden(shown(planned(*[(apply, array(4, 4), (array(4, 4),)) for _ in range(2)])))


def test_a_kernel_of_a_conv_that_another_equation_reads(golden):
    """One array as it is, one in the layout of the kernel."""

    def apply(w, x):
        return (conv(w, x), lax.reduce_sum(w * x[0, 0, 0, 0], (0, 1, 2, 3)))

    tenants = [(apply, array(3, 3, 2, 4), (array(1, 8, 8, 2),)) for _ in range(2)]
    golden(shown(planned(*tenants, kernel="conv_slices")))


def test_the_body_of_a_scan(golden):
    """A weight that only the packs of the body read is not given to the loop."""

    def rnn(p, x):
        return lax.scan(lambda c, _: (lax.tanh(lax.dot(c, p["w"]) * p["s"]), None), x, None, 3)[0]

    golden(shown(planned(*[(rnn, {"w": array(4, 4), "s": array(2, 4)}, (array(2, 4),)) for _ in range(2)])))


def test_members_of_one_program(golden):
    """Q and K are one pack of two members, on one array of all their rows."""

    def apply(p, x, y):
        return lax.dot(x, p["q"]) * lax.dot(y, p["k"])

    tenants = [(apply, {"q": array(4, 4), "k": array(4, 4)}, (array(2, 4), array(2, 4))) for _ in range(2)]
    golden(shown(planned(*tenants, within_program=True)))


def test_two_programs_of_other_widths(golden):
    """Weights of a shared superkernel and of a joint equation lie in arrays of their own, padded to one shape."""
    golden(shown(across(biased(3), biased(5))))


def test_two_programs_in_the_layout_of_a_kernel(golden):
    """A row is padded first, then laid out for the kernel."""
    tenants = [(conv, array(3, 3, c, 4), (array(1, 8, 8, c),)) for c in (2, 3)]
    golden(shown(across(*tenants, kernel="conv_slices")))


def test_two_programs_as_plain_products(golden):
    """A row becomes a matrix, and is padded then."""
    tenants = [(conv, array(w, w, 2, 4), (array(1, 4, 4, 2),)) for w in (2, 3)]
    golden(shown(across(*tenants, kernel="batched_matvec")))


def test_programs_that_share_a_weight():
    """It is one row of one array, whichever families read it."""
    w = array(4, 3)
    other = lambda p, x: lax.sin(lax.dot(x, p))  # noqa: E731
    bundle = plan_layouts(across((lambda p, x: lax.dot(x, p), w, (array(2, 4),)), (other, w, (array(2, 4),))))
    assert [a.rows for a in bundle.arrays] == [((0, 0),)]


def test_right_operands_that_are_no_weights():
    """Attention's scores: nothing to store."""

    def scores(w, q, k):
        return lax.dot(q, k)

    bundle = plan_layouts(planned(*[(scores, (), (array(2, 4), array(4, 2))) for _ in range(2)]))
    assert (bundle.arrays, bundle.stored) == ((), {})
    assert plan_layouts(bundle) is bundle


def test_joint_steps_of_tenants_without_weights():
    """Nothing is stored, and yet each operand of a joint step is known to be no weight."""

    def scaled(gain):
        return lambda p, x: lax.dot(x, x) * gain

    bundle = across(*[(scaled(gain), (), (array(3, 3),)) for gain in (0.5, 2.0)])
    planned = plan_layouts(bundle)
    (step,) = [item for item in planned.schedule if isinstance(item, JointStep)]
    assert step.arrays == (None, None)
    assert planned.arrays == ()
    assert plan_layouts(planned) is planned
