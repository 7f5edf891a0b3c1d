"""Layers on images, [b, h, w, c] floats. See tests/kin.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.kin_rows import HIGHEST, literal, near, product
from tests.programs import Aval, Draw, Op, readable, Scope

NUMBERS = ("NHWC", "HWIO", "NHWC")


def convolved(kin: Draw, own: Draw, scope: Scope, i: int) -> Op | None:
    """Any window, stride, padding and dilation; plain, grouped or depthwise."""
    x = scope.values[i]
    window, strides, dilation, spread = ((kin.integer(1, n), kin.integer(1, n)) for n in (3, 2, 2, 2))
    if kin.flag():
        spread = (1, 1)  # lhs_dilation
    around = readable([(kin.integer(-1, 2), kin.integer(-1, 2)) for _ in range(2)])
    padding = kin.choice(["SAME", "VALID", around]) if spread == (1, 1) else around
    groups, out = kin.choice(["one", "one", "depthwise", "two"]), near(kin, own, 4)
    channels = x.shape[-1]
    feature_groups = {"one": 1, "depthwise": channels, "two": 2}[groups]
    if channels % feature_groups:
        return None
    features = channels if groups == "depthwise" else out * feature_groups
    rhs = Aval((*window, channels // feature_groups, features), scope.dtype)
    squash = kin.choice([jnp.tanh, jax.nn.relu, lambda y: y])

    def apply(w: Any, v: Any) -> Any:
        y = lax.conv_general_dilated(
            v, w[0], strides, padding, lhs_dilation=spread, rhs_dilation=dilation, dimension_numbers=NUMBERS,
            feature_group_count=feature_groups, precision=HIGHEST,
        )  # fmt: skip
        return squash(y)

    held = [(s - 1) * d + 1 for s, d in zip(x.shape[1:3], spread, strict=True)]
    if padding != "SAME":
        held = [s + (sum(p) if padding != "VALID" else 0) for s, p in zip(held, around, strict=True)]
        reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
        if any(s < r for s, r in zip(held, reach, strict=True)):
            return None
    return Op(f"convolved {groups}", (i,), (rhs,), apply)


def pooled(kin: Draw, own: Draw, scope: Scope, i: int) -> Op | None:
    x, window, strides = scope.values[i], (1, 2, kin.integer(1, 2), 1), (1, kin.integer(1, 2), 1, 1)
    init, fn = kin.choice([(-jnp.inf, lax.max), (jnp.inf, lax.min), (0.0, lax.add)])
    padding = kin.choice(["SAME", "VALID"])
    if padding == "VALID" and any(n < k for n, k in zip(x.shape, window, strict=True)):
        return None
    start = jnp.asarray(init, x.dtype)[()]
    return Op("pooled", (i,), (), lambda w, v: lax.reduce_window(v, start.item(), fn, window, strides, padding))


def scaled(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    """A normalisation by statistics that are weights, and an activation."""
    c, eps = scope.values[i].shape[-1], literal(kin, own)
    squash = kin.choice([jnp.tanh, jax.nn.relu, jnp.sin])

    def apply(w: Any, x: Any) -> Any:
        gain = (w[0] * lax.rsqrt(w[1] * w[1] + eps))[None, None, None]
        return squash((x - w[2][None, None, None]) * gain)

    return Op("scaled", (i,), (Aval((c,), scope.dtype),) * 3, apply)


def excited(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    """Squeeze and excite: channels weighed by their means."""
    c, e = scope.values[i].shape[-1], near(kin, own, 3)

    def apply(w: Any, x: Any) -> Any:
        y = jax.nn.relu(product(jnp.mean(x, (1, 2)), w[0]))
        return x * jax.nn.sigmoid(product(y, w[1]))[:, None, None]

    return Op("excited", (i,), (Aval((c, e), scope.dtype), Aval((e, c), scope.dtype)), apply)


def residual(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    x, window = scope.values[i], (kin.integer(1, 3), kin.integer(1, 3))
    rhs = Aval((*window, x.shape[-1], x.shape[-1]), scope.dtype)

    def apply(w: Any, v: Any) -> Any:
        y = lax.conv_general_dilated(v, w[0], (1, 1), "SAME", dimension_numbers=NUMBERS, precision=HIGHEST)
        return v + jnp.tanh(y)

    return Op("residual", (i,), (rhs,), apply)


def as_rows(kin: Draw, own: Draw, scope: Scope, i: int) -> Op:
    b, h, w, c = scope.values[i].shape
    kind = kin.integer(0, 4)

    def apply(_: Any, x: Any) -> Any:
        return [
            lambda: jnp.mean(x, (1, 2)),
            lambda: jnp.max(x, (1, 2)),
            lambda: x.reshape(b, h * w * c),
            lambda: x.reshape(b * h * w, c),
            lambda: jnp.sum(x, -1).reshape(b * h, w),
        ][kind]()

    return Op(f"as rows{kind}", (i,), (), apply)


IMAGES = (convolved, convolved, convolved, convolved, pooled, scaled, excited, residual, as_rows)
