"""Peers in JAX: what one process does with XLA alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments import methods
from experiments.methods import Candidate, Options, Tenants
from experiments.peers_common import CannotRun, Cell, Configurations, with_options

COMMANDS = "xla_gpu_enable_command_buffer"


def in_turn(cell: Cell) -> Configurations:
    """One ahead-of-time executable, or one for each tenant where CUDA graphs record addresses."""
    own = jax.default_backend() == "gpu"
    return with_options(lambda tenants, options: methods.sequential(tenants, options, own), cell)


def concurrent(cell: Cell) -> Configurations:
    """All tenants in one program whose independent kernels XLA may run side by side, as branches of a CUDA graph."""
    if jax.default_backend() != "gpu":
        raise CannotRun("needs a GPU: command buffers are CUDA graphs")
    options = {**cell.options[0], "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}
    recorded = options.get(COMMANDS, "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL")
    # Convolutions cut a command buffer, unless XLA records them too, which not all of them allow.
    for also in [recorded] if "CONVOLUTION" in recorded else [recorded, f"{recorded},CONVOLUTION"]:
        tried = {**options, COMMANDS: also}
        yield tried, partial(methods.one_program, cell.tenants, tried)


def vmap(cell: Cell) -> Configurations:
    return with_options(methods.vmap, cell)


def own_batch(cell: Cell) -> Configurations:
    """What one tenant pays for n times its batch: each weight is read once for all requests. Not a peer, but what
    serving n different tenants is held against."""
    return with_options(one_tenant_batched, cell)


def one_tenant_batched(tenants: Tenants, options: Options) -> Iterator[Candidate]:
    """The first tenant serves all requests as one batch; only its own has a reference to be compared with."""
    requests = [jnp.concatenate(column) for column in zip(*tenants.inputs, strict=True)]
    arguments = (*jax.tree.leaves(tenants.params[0]), *requests)
    rows = tenants.inputs[0][0].shape[0]
    executable = jax.jit(lambda *leaves: tenants.on_leaves(leaves)).lower(*arguments).compile(options)

    def split(outputs: Any) -> list[Any]:
        return [jax.tree.map(lambda leaf: leaf[:rows], outputs)]

    yield Candidate("", lambda: executable(*arguments), split, {"compared": 1})
