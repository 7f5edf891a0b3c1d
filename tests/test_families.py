"""Which tenants are one family: those whose normalised dataflow is equal, however it was written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

from tests.alone import array, check_fused


def families(*tenants):
    return check_fused(tenants).report.families


# ---- one network in two frameworks ---------------------------------------------------------------------------------


class LinenCNN(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Conv(4, (3, 3), strides=2)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        x = linen.Conv(6, (1, 1), use_bias=False)(x)
        x = linen.max_pool(linen.gelu(x), (2, 2), strides=(2, 2))
        return linen.Dense(5)(x.reshape(x.shape[0], -1))


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        # Other names, in another order, than linen's: only the dataflow counts.
        self.head = nnx.Linear(24, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.wide = nnx.Conv(4, 6, (1, 1), use_bias=False, rngs=rngs)
        self.stem = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.max_pool(nnx.gelu(self.wide(x)), (2, 2), strides=(2, 2))
        return self.head(x.reshape(x.shape[0], -1))


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(3):
            x = linen.relu(linen.Dense(8)(linen.LayerNorm()(x)))
        return x


class NnxMLP(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(8, rngs=rngs) for _ in range(3)])
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])

    def __call__(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = nnx.relu(layer(norm(x)))
        return x


def in_linen(module, x):
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    return module.apply, jax.tree.map(lambda s: abs(array(*s.shape)), shapes), (x,)


def in_nnx(module, x):
    module.eval()
    graph, state = nnx.split(module)
    return lambda state, x: nnx.merge(graph, state)(x), state, (x,)


@pytest.mark.parametrize(
    ("ours", "theirs", "shape", "heavy"),
    [(LinenCNN, NnxCNN, (2, 8, 8, 3), 3), (LinenMLP, NnxMLP, (2, 8), 3)],
    ids=["cnn", "mlp"],
)
def test_linen_and_nnx(ours, theirs, shape, heavy):
    x = array(*shape)
    report = check_fused([in_linen(ours(), x), in_nnx(theirs(nnx.Rngs(0)), x + 1)]).report
    assert (report.families, report.heavy_ops, report.superkernels, report.alone) == (1, 2 * heavy, heavy, 0)


# ---- what does not count -------------------------------------------------------------------------------------------

X, Y = array(2, 4), array(2, 4)


def test_order_of_params():
    def one(p, x):
        return jnp.tanh(x @ p[0]) @ p[1]

    def other(p, x):
        return jnp.tanh(x @ p[1]) @ p[0]

    assert families((one, [array(4, 4), array(4, 4)], (X,)), (other, [array(4, 4), array(4, 4)], (X,))) == 1


def test_order_of_dict_keys():
    def one(p, x):
        return x @ p["a"] + p["z"][None]

    def other(p, x):
        return x @ p["z"] + p["a"][None]

    params = {"a": array(4, 3), "z": array(3)}, {"z": array(4, 3), "a": array(3)}
    assert families((one, params[0], (X,)), (other, params[1], (X,))) == 1


def test_order_of_inputs():
    def one(w, x, y):
        return jnp.sin(x @ w) - y

    def other(w, y, x):
        return jnp.sin(x @ w) - y

    assert families((one, array(4, 4), (X, Y)), (other, array(4, 4), (Y, X))) == 1


def test_unused_params_and_inputs():
    def one(p, x, y):
        return x @ p["w"]

    def other(p, x):
        return x @ p["w"]

    assert families((one, {"a": array(7), "w": array(4, 4)}, (X, array(9))), (other, {"w": array(4, 4)}, (X,))) == 1


def test_order_of_statements():
    def one(w, x):
        a = jnp.sin(x)
        b = jnp.cos(x)
        return (a @ w, b)

    def other(w, x):
        b = jnp.cos(x)
        a = jnp.sin(x)
        return (a @ w, b)

    assert families((one, array(4, 4), (X,)), (other, array(4, 4), (X,))) == 1


def test_operands_of_what_commutes():
    def one(p, x):
        return 2.0 * (x @ p[0] + p[1][None])

    def other(p, x):
        return (p[1][None] + x @ p[0]) * 2.0

    params = [array(4, 4), array(4)], [array(4, 4), array(4)]
    assert families((one, params[0], (X,)), (other, params[1], (X,))) == 1


def test_calls():
    def one(w, x):
        return jax.nn.relu(x @ w)

    other = jax.jit(lambda w, x: jax.checkpoint(lambda y: jnp.maximum(y, jnp.zeros((), y.dtype)))(x @ w))
    assert families((one, array(4, 4), (X,)), (other, array(4, 4), (X,))) == 1


def test_dead_code():
    def one(w, x):
        jnp.linalg.norm(x @ w)
        return x @ w

    assert families((one, array(4, 4), (X,)), (lambda w, x: x @ w, array(4, 4), (X,))) == 1


def test_literals_that_are_equal_in_another_spelling():
    def one(w, x):
        return (x @ w) * np.float32(0.5)

    def other(w, x):
        return (x @ w) * 0.5

    assert families((one, array(4, 4), (X,)), (other, array(4, 4), (X,))) == 1


def rnn(first, second):
    """A scan whose body reads two weights; which of params they are is the caller's."""

    def apply(params, x):
        def body(carry, row):
            carry = jnp.tanh(row[None] @ params[first] + carry @ params[second])
            return carry, carry

        return lax.scan(body, jnp.zeros((1, 4)), x)

    return apply


def test_bodies_of_scans():
    one, other = [array(3, 4), array(4, 4)], [array(4, 4), array(3, 4)]
    assert families((rnn(0, 1), one, (array(5, 3),)), (rnn(1, 0), other, (array(5, 3),))) == 1


def test_branches_of_conds():
    def apply(first, second):
        return lambda p, i, x: lax.cond(i > 0, lambda: x @ p[first], lambda: jnp.sin(x) @ p[second])

    params = [array(4, 4), array(4, 4)], [array(4, 4), array(4, 4)]
    assert families((apply(0, 1), params[0], (jnp.int32(1), X)), (apply(1, 0), params[1], (jnp.int32(0), X))) == 1
