"""Peers of Coalesce for one product of each tenant, x @ params["kernel"]: what experiments/peers_jax.py and
peers_torch.py do for whole models, with the weights in the layout that suits each best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

from experiments import methods, peers_torch
from experiments.methods import Candidate
from experiments.peers_common import Cell, Configurations, Peer, with_options

LAYOUTS = ("KxN", "NxK")  # of the weights; in the second, K is what lies together


def jax_in_turn(cell: Cell) -> Configurations:
    """One executable: a program of one product has no CUDA graph, which would ask for an executable a tenant."""
    return with_options(methods.sequential, cell)


def torch_in_turn(cell: Cell) -> Configurations:
    """A CUDA graph for each product, replayed one after the other; or one graph with the products in a row."""
    of = cache(partial(operands, ready(cell), "cuda"))
    for layout in LAYOUTS:
        yield {"weights": layout}, lambda at=layout: peers_torch.graph_each(products(*of(at)))
        yield {"weights": layout}, lambda at=layout: peers_torch.graph_of_all(products(*of(at)), streams=False)


def torch_streams(cell: Cell) -> Configurations:
    """One CUDA graph in which each product has a stream, hence a branch, of its own."""
    of = cache(partial(operands, ready(cell), "cuda"))
    for layout in LAYOUTS:
        yield {"weights": layout}, lambda at=layout: peers_torch.graph_of_all(products(*of(at)), streams=True)


def torch_bmm(cell: Cell) -> Configurations:
    """torch.bmm of operands that were stacked ahead, in a CUDA graph."""
    of = cache(partial(operands, ready(cell), "cuda"))
    for layout in LAYOUTS:
        yield {"weights": layout}, lambda at=layout: batched(*of(at), at)


PEERS = {
    "jax_in_turn": Peer("time", jax_in_turn),
    "torch_in_turn": Peer("time", torch_in_turn),
    "torch_streams": Peer("space", torch_streams),
    "torch_bmm": Peer("user", torch_bmm),
}


def ready(cell: Cell) -> Cell:
    peers_torch.check_device(cell.precision)
    return cell


def operands(cell: Cell, device: str, layout: str) -> tuple[list[Any], list[Any]]:
    """Left and right operands as tensors, the right ones [K, N] by shape."""
    from experiments.torch_weights import tensor

    lefts = [tensor(x, device) for (x,) in cell.tenants.inputs]
    rights = [tensor(params["kernel"], device) for params in cell.tenants.params]
    return lefts, rights if layout == "KxN" else [w.t().contiguous().t() for w in rights]


def products(lefts: Sequence[Any], rights: Sequence[Any]) -> list[peers_torch.Call]:
    import torch  # pyright: ignore[reportMissingImports]

    return [partial(torch.mm, x, w) for x, w in zip(lefts, rights, strict=True)]


def batched(lefts: Sequence[Any], rights: Sequence[Any], layout: str) -> Iterator[Candidate]:
    import torch  # pyright: ignore[reportMissingImports]

    x = torch.stack(tuple(lefts))
    w = torch.stack(tuple(rights)) if layout == "KxN" else torch.stack([right.t() for right in rights]).mT
    yield peers_torch.candidate("in one CUDA graph", [peers_torch.recorded(lambda: list(torch.bmm(x, w)))])
