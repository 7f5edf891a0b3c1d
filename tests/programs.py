"""Random tenant programs for the property tests: `fn(params, *inputs)` functions built from drawn ops.

    Op       one step: reads values that are there, has weights of its own, adds one value
    Block    a straight line of ops over some arguments; the body of a loop is a Block too
    Model    a Block with a tenant's calling convention: a params pytree, nested inputs, nested outputs

program_moves.py, program_ops.py, program_heavy.py and program_control.py beside this file say which ops there are, and
tenants.py draws models. Shapes come from `jax.eval_shape`, so that an op says only what it computes. Each value knows
whether it is exact: of movement and integer arithmetic alone, so that any right program returns the same bits.
Whatever jumps (a comparison, an index, a predicate) reads exact values only; then what a fused program rounds
differently moves every output a little, and none by much.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache

Aval = jax.ShapeDtypeStruct
MAX_SIZE = 512  # elements of one value


class Draw(random.Random):
    """Chooses everything about an example, from one seed that hypothesis draws. Choices that hypothesis made one by one
    would be repeated by its mutator: two examples in three were near copies of the one before."""

    def integer(self, low: int, high: int) -> int:
        return self.randint(low, high)

    def flag(self) -> bool:
        return self.random() < 0.5

    def shuffled(self, items: Iterable[Any]) -> list[Any]:
        items = list(items)
        self.shuffle(items)
        return items

    def shape(self, rank: int, size: int) -> tuple[int, ...]:
        """Of up to `rank` dimensions of up to `size`."""
        return tuple(self.integer(1, size) for _ in range(self.integer(0, rank)))


@dataclass(frozen=True, eq=False)
class Op:
    """`apply(weights, *operands)` -> one value."""

    name: str
    reads: tuple[int, ...]  # positions among the values
    weights: tuple[Aval, ...]
    apply: Callable[..., Any]
    exact: bool = False  # whether exact operands give an exact result


@dataclass(frozen=True, eq=False)
class Block:
    """Ops in order: arguments first among the values, then each op's result."""

    ops: tuple[Op, ...]

    @property
    def weights(self) -> tuple[Aval, ...]:
        return tuple(w for op in self.ops for w in op.weights)

    def __call__(self, weights: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        values, rest = list(args), iter(weights)
        for op in self.ops:
            values.append(op.apply([next(rest) for _ in op.weights], *(values[i] for i in op.reads)))
        return values

    def sinks(self, n_args: int) -> list[int]:
        """The values that no op reads, which are therefore results; the last argument if there are no ops."""
        read = {i for op in self.ops for i in op.reads}
        return [i for i in range(n_args, n_args + len(self.ops)) if i not in read] or [n_args - 1]

    def result(self, weights: Sequence[Any], args: Sequence[Any], like: Any) -> Any:
        """All that the block computes as one value of the type of `like`."""
        values = self(weights, args)
        parts = [fit(values[i], like) for i in self.sinks(len(args))]
        return sum(parts[1:], start=parts[0]) / len(parts)

    def __str__(self) -> str:
        return "; ".join(f"{op.name}{list(op.reads)}" for op in self.ops)


class Scope:
    """What is there to read while a block is drawn, and how deep inside loops it stands."""

    def __init__(self, args: Sequence[Aval], exact: Sequence[bool], dtype: Any, depth: int = 0) -> None:
        self.values, self.exact = list(args), list(exact)
        self.dtype, self.depth = jnp.dtype(dtype), depth
        self.ops: list[Op] = []

    def candidates(self, kinds: str, exact: bool = False) -> list[int]:
        """Positions of values of these kinds ("f" float, "i" integer, "b" bool), the latest first."""
        found = [i for i, v in enumerate(self.values) if kind_of(v) in kinds and (self.exact[i] or not exact)]
        return found[::-1]

    def add(self, op: Op) -> bool:
        """Append the op unless its result is empty or large."""
        operands = [self.values[i] for i in op.reads]
        result = jax.eval_shape(op.apply, list(op.weights), *operands)
        if not 0 < result.size <= MAX_SIZE:
            return False
        self.ops.append(op)
        self.values.append(Aval(result.shape, result.dtype, weak_type=result.weak_type))
        self.exact.append(op.exact and all(self.exact[i] for i in op.reads))
        return True

    def block(self) -> Block:
        return Block(tuple(self.ops))


def kind_of(aval: Any) -> str:
    if jnp.issubdtype(aval.dtype, jnp.floating):
        return "f"
    return "b" if aval.dtype == jnp.bool_ else "i"


@dataclass(frozen=True, eq=False)
class Ref:
    """An output that is a value of the block."""

    index: int
    exact: bool


@dataclass(frozen=True, eq=False)
class Model:
    """A tenant's function. `outputs` is a pytree of Refs and of constants."""

    block: Block
    inputs: tuple[Aval, ...]
    outputs: Any
    nested: bool  # inputs are ({"first": a, "rest": [b]},) rather than (a, b)
    returns_weight: bool
    gain: float  # a literal that multiplies the outputs of floats: a power of two, so that it is exact

    def __call__(self, params: Any, *inputs: Any) -> Any:
        values = self.block(params["ops"], jax.tree.leaves(inputs))
        outs = jax.tree.map(lambda ref: self.output(values[ref.index]) if isinstance(ref, Ref) else ref, self.outputs)
        return (outs, params["extra"]) if self.returns_weight else outs

    @cached_property
    def jitted(self) -> Callable[..., Any]:
        """Traced once for all tenants that have it."""
        return jax.jit(self.__call__)

    def output(self, value: Any) -> Any:
        return value * self.gain if kind_of(value) == "f" and self.gain != 1 else value

    @property
    def exact(self) -> list[bool]:
        """For each output leaf, whether it must come out bit by bit."""
        flags = [ref.exact if isinstance(ref, Ref) else True for ref in jax.tree.leaves(self.outputs)]
        return flags + [True] * self.returns_weight

    def pack(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """Flat inputs as the positional arguments of a call."""
        return ({"first": flat[0], "rest": list(flat[1:])},) if self.nested else tuple(flat)

    def __str__(self) -> str:
        ins = ", ".join(f"{i.dtype}{list(i.shape)}" for i in self.inputs)
        outs = jax.tree.map(lambda ref: ref.index if isinstance(ref, Ref) else ref, self.outputs)
        return f"({ins}) {self.block} -> {outs}"


def readable(padding: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """A convolution's padding without what XLA's CPU backend gets wrong: with negative low and some high padding it
    reads behind its operand (https://github.com/openxla/xla/issues/48713)."""
    return [(max(low, 0) if high > 0 else low, high) for low, high in padding]


def fit(x: Any, like: Any) -> Any:
    """`x` repeated or cut to the shape of `like`, in its dtype."""
    return jnp.resize(x, like.shape).astype(like.dtype)


def fewer(share: float) -> settings:
    """Where an example is several programs to compile: a share of the usual number; soak has them all."""
    usual = settings().max_examples
    return settings(max_examples=usual if usual > 100 else max(5, int(usual * share)))


@contextmanager
def many_compiles(cache: Path) -> Iterator[None]:
    """Makes it bearable to compile hundreds of small programs: no LLVM optimisations, a folder of what XLA has compiled
    already. XLA's own passes, which decide what is computed, stay on."""
    values = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in values}
    try:
        set_all(values)
        yield
    finally:
        set_all(before)


def set_all(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else the folder stays what it was at the first compile
