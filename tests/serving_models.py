"""Small models for the tests of coalesce/serving/: `MODELS[name]()` is (fn, params, inputs), other ones each time."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.alone import array, Tenant

dot = partial(jnp.einsum, precision="highest")


def mlp(p: Any, x: Any) -> Any:
    for w, b in p:
        x = jnp.tanh(jnp.dot(x, w, precision="highest") + b[None])
    return {"y": x, "sum": jnp.abs(x).sum()}  # not of both signs, where next to nothing may be left of a sum


def convnet(p: Any, x: Any) -> Any:
    conv = partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest")
    x = jax.nn.relu(conv(x, p["stem"], (2, 2), "SAME"))
    x = (x - p["mean"][None, None, None]) * (p["gain"] * lax.rsqrt(p["var"] ** 2 + 1e-3))[None, None, None]
    x = jax.nn.relu(conv(x, p["mix"], (1, 1), "SAME"))
    return jnp.dot(x.mean((1, 2)), p["head"], precision="highest")


def lstm(p: Any, xs: Any) -> Any:
    def step(carry: Any, x: Any) -> Any:
        h, c = carry
        i, f, g, o = jnp.split(dot("i,ij->j", x, p["x"]) + dot("i,ij->j", h, p["h"]) + p["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    (h, _), hs = lax.scan(step, (p["h0"], jnp.zeros(6)), xs)
    return hs, h


def transformer(p: Any, ids: Any) -> Any:
    x = p["embed"][ids]

    def layer(x: Any, p: Any) -> Any:
        q, k, v = (dot("td,dhe->hte", x, p[n]) for n in "qkv")
        att = jax.nn.softmax(dot("hte,hse->hts", q, k) / 2.0)
        x = x + dot("hte,hed->td", dot("hts,hse->hte", att, v), p["o"])
        return x + jnp.dot(jnp.tanh(jnp.dot(x, p["up"], precision="highest")), p["down"], precision="highest"), None

    x, _ = lax.scan(layer, x, p["layers"])
    return dot("td,vd->tv", x, p["embed"])  # a tied embedding: gathered and multiplied


def mixed(p: Any, x: Any, flag: Any, n: Any) -> Any:
    y = jnp.dot(x, p["half"].astype(jnp.float32), precision="highest")
    y = jnp.where(flag[:, None], y, -y) + p["count"][n].astype(jnp.float32)
    return y, p["count"] + n, flag & p["mask"]


def noisy(p: Any, x: Any, key: Any) -> Any:
    key, draw = jax.random.split(key)
    return jnp.dot(x, p, precision="highest") + jax.random.normal(draw, (2, 5)), key


def with_backbone(p: Any, x: Any) -> Any:
    x = jnp.tanh(jnp.dot(x, p["backbone"]["w"], precision="highest") * p["backbone"]["gain"][None])
    return jnp.dot(x, p["head"], precision="highest")


def layers(n: int) -> Any:
    block = {"q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (2, 4, 8), "up": (8, 16), "down": (16, 8)}
    return {name: array(n, *shape) / 3 for name, shape in block.items()}


MODELS = {
    "mlp": lambda: (mlp, [(array(6, 6), array(6)) for _ in range(3)], (array(2, 6),)),
    "convnet": lambda: (
        convnet,
        {
            "stem": array(3, 3, 2, 4), "mean": array(4), "gain": array(4), "var": array(4),
            "mix": array(3, 3, 4, 8), "head": array(8, 5),
        },
        (array(1, 8, 8, 2),),
    ),
    "lstm": lambda: (
        lstm, {"x": array(4, 24), "h": array(6, 24), "b": array(24), "h0": array(6)}, (array(5, 4),)
    ),
    "transformer": lambda: (
        transformer,
        {"embed": array(11, 8), "layers": layers(3)},
        (jnp.asarray([3, 1, 4, 10], jnp.int32),),
    ),
    "mixed": lambda: (
        mixed,
        {"half": array(4, 3, dtype=jnp.bfloat16), "count": jnp.arange(5, dtype=jnp.int32), "mask": array(6) > 0},
        (array(6, 4), array(6) > 0, jnp.asarray(2, jnp.int32)),
    ),
    "noisy": lambda: (noisy, array(4, 5), (array(2, 4), jax.random.key(int(abs(array()) * 1e6)))),
}  # fmt: skip


def tenants(name: str, count: int) -> list[Tenant]:
    return [MODELS[name]() for _ in range(count)]
