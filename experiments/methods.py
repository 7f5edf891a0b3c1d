"""Ways to serve one round of n tenants. Each is built ahead of time and gets its arguments ready ahead of the timed
loop: weights are on the device, in the form the method likes best, and a round is dispatch and execution alone.

A method yields one candidate for each configuration worth trying; the caller measures them all and keeps the best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import coalesce
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose, indexed_gemm, indexed_matvec
from coalesce.passes.choose_kernels import Choice
from experiments.measure import Round

Options = dict[str, Any]  # XLA's, for `Lowered.compile`


@dataclass(frozen=True)
class Tenants:
    """Tenants of one model: params and a request for each, all on the device."""

    apply: Callable[..., Any]
    params: list[Any]
    inputs: list[tuple[jax.Array, ...]]

    @property
    def count(self) -> int:
        return len(self.params)

    def on_leaves(self, leaves: tuple[Any, ...]) -> Any:
        """One tenant's outputs from its flat params and inputs: flat arguments are the cheapest to dispatch."""
        return self.apply(*jax.tree.unflatten(jax.tree.structure((self.params[0], *self.inputs[0])), leaves))


@dataclass(frozen=True)
class Candidate:
    """One configuration of a method, compiled."""

    how: str
    run: Round
    split: Callable[[Any], list[Any]] = list  # a round's result -> outputs, tenant by tenant
    facts: dict[str, Any] = field(default_factory=dict)  # what else the results say about it
    issue: Round | None = None  # a round that is not waited for, where `run` waits by itself


OWN_CHOICE: Mapping[str, Choice] = {"": choose}
Served = TypeVar("Served")  # the tenants that a method serves: `Tenants`, or several of them
Method = Callable[[Served, Options], Iterator[Candidate]]


def sequential(tenants: Tenants, options: Options, own_executables: bool = False) -> Iterator[Candidate]:
    """One ahead-of-time executable, called for one tenant after the other; the round waits once, at its end."""
    arguments = [tuple(jax.tree.leaves(both)) for both in zip(tenants.params, tenants.inputs, strict=True)]
    executable = jax.jit(lambda *leaves: tenants.on_leaves(leaves)).lower(*arguments[0]).compile(options)
    yield Candidate("one executable for all tenants", lambda: [executable(*args) for args in arguments])
    if own_executables and tenants.count > 1:
        # A CUDA graph records addresses: an executable that always sees the same weights need not update its graph.
        saved = serialize(executable)
        calls = [(deserialize_and_load(*saved), args) for args in arguments]
        yield Candidate("an executable for each tenant", lambda: [own(*args) for own, args in calls])


def one_program(tenants: Tenants, options: Options) -> Iterator[Candidate]:
    """All tenants' programs in one XLA program, side by side, as they are."""
    arguments = [leaf for both in zip(tenants.params, tenants.inputs, strict=True) for leaf in jax.tree.leaves(both)]
    each = len(arguments) // tenants.count

    def together(*leaves: Any) -> list[Any]:
        return [tenants.on_leaves(leaves[start : start + each]) for start in range(0, len(leaves), each)]

    executable = jax.jit(together).lower(*arguments).compile(options)
    yield Candidate("", lambda: executable(*arguments))


def vmap(tenants: Tenants, options: Options) -> Iterator[Candidate]:
    """jax.vmap over weights that were stacked ahead."""
    n, n_inputs = tenants.count, len(jax.tree.leaves(tenants.inputs[0]))
    weights = jax.tree.leaves(jax.tree.map(lambda *leaves: jnp.stack(leaves), *tenants.params))
    requests = [jax.tree.leaves(inputs) for inputs in tenants.inputs]
    stacked = [jnp.stack(column) for column in zip(*requests, strict=True)]
    apart = [leaf for request in requests for leaf in request]
    batched = jax.vmap(lambda *leaves: tenants.on_leaves(leaves))

    def split(outputs: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(outputs)
        return [tree.unflatten([leaf[tenant] for leaf in leaves]) for tenant in range(n)]

    def stack_inside(*leaves: Any) -> list[Any]:
        requests = leaves[len(weights) :]
        columns = [jnp.stack(requests[i::n_inputs]) for i in range(n_inputs)]
        return split(batched(*leaves[: len(weights)], *columns))

    ahead = jax.jit(batched).lower(*weights, *stacked).compile(options)
    yield Candidate("inputs and outputs stay stacked", lambda: ahead(*weights, *stacked), split)
    inside = jax.jit(stack_inside).lower(*weights, *apart).compile(options)
    yield Candidate("inputs stacked inside, an output for each tenant", lambda: inside(*weights, *apart))


def fused(
    tenants: Tenants,
    options: Options,
    within_program: bool = False,
    kernels: Mapping[str, Choice] = OWN_CHOICE,
    staged: bool = False,
    side_by_side: bool = False,
    captured: bool = False,
) -> Iterator[Candidate]:
    """coalesce.fuse, by its public call: checks of the inputs and each tenant's own outputs are part of the round. With
    `staged` also by the other one, whose inputs were staged and whose outputs stay stacked, with `captured` as one CUDA
    graph (`in_graph`). With `within_program` and `side_by_side` these are tried too."""
    programs = traced(tenants)
    tries = product((False, True) if within_program else (False,), (None, True) if side_by_side else (None,))
    for (within, beside), (name, choice) in product(tries, kernels.items()):
        together = coalesce.fuse(programs, within_program=within, choose_kernel=choice, side_by_side=beside)
        together.compile(options)
        how = ", ".join(filter(None, ["within_program" if within else "", "side by side" if beside else "", name]))
        yield Candidate(how, lambda together=together: together(tenants.inputs))
        if staged:
            yield in_stacks(together, tenants, options, how)
        if captured:
            again = coalesce.fuse(
                programs, within_program=within, choose_kernel=choice, side_by_side=beside, captured=True
            )
            yield in_graph(again, tenants.inputs, how)


def traced(tenants: Tenants) -> list[coalesce.Program]:
    pairs = zip(tenants.params, tenants.inputs, strict=True)
    return [coalesce.trace(tenants.apply, p, *x, name=f"tenant {i}") for i, (p, x) in enumerate(pairs)]


def in_stacks(together: coalesce.Fused, tenants: Tenants, options: Options, how: str = "") -> Candidate:
    """The fused program by its call whose inputs were staged and whose outputs stay stacked."""
    call = together.staged()
    call.compile(options)
    inputs = call.stage(tenants.inputs)
    how = ", ".join(filter(None, [how, "inputs and outputs stay stacked"]))
    return Candidate(how, lambda: call(inputs), call.unstage)


def captured(
    tenants: Tenants, within_program: bool = False, kernels: Mapping[str, Choice] = OWN_CHOICE
) -> Iterator[Candidate]:
    """coalesce.fuse as one CUDA graph, and by nothing else."""
    programs = traced(tenants)
    for within, (name, choice) in product((False, True) if within_program else (False,), kernels.items()):
        together = coalesce.fuse(programs, within_program=within, choose_kernel=choice, captured=True)
        yield in_graph(together, tenants.inputs, ", ".join(filter(None, ["within_program" if within else "", name])))


def in_graph(together: coalesce.Fused, requests: Sequence[Any], how: str = "") -> Candidate:
    """The fused program as one CUDA graph, launched without JAX: inputs and outputs lie where they lie, as PyTorch's
    do in its graphs."""
    call = together.staged().capture(requests)
    return Candidate(", ".join(filter(None, [how, "captured"])), call, lambda own: own.results())


def by_pallas(op: HeavyOp, groups: int, platform: str) -> str:
    """A choice of kernels: ours for Pallas, with their epilogues, wherever they run an op."""
    if indexed_matvec.supports(op):
        return "indexed_matvec"
    return "indexed_gemm" if indexed_gemm.supports(op) else choose(op, groups, platform)


def own_jit(tenants: Tenants, options: Options) -> Iterator[Candidate]:
    """What a single tenant does without us: jax.jit of its function, called with its pytrees."""
    call = jax.jit(tenants.apply, compiler_options=options or None)
    yield Candidate("", lambda: [call(tenants.params[0], *tenants.inputs[0])])
