"""Peers in PyTorch on one CUDA device, each round replayed as CUDA graphs. PyTorch is optional: without it, or without
a device that it sees, they say so.

Weights are `plain`, as flax has them, or `prepared` ahead (see torch_weights.prepare); a model may be compiled by
torch.compile besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

from experiments.alone import alone
from experiments.methods import Candidate
from experiments.peers_common import CannotRun, Cell, Configurations

Call = Callable[[], Any]  # one tenant's outputs
Round = Callable[[], list[Any]]  # each tenant's outputs
Compiled = bool | str  # by torch.compile, and if so perhaps in a mode of its own
AUTOTUNED = "max-autotune-no-cudagraphs"  # times kernels of its own for every product; the graph is ours


@dataclass(frozen=True)
class Parts:
    """A model's function, and for each tenant its weights and its request."""

    apply: Any
    trees: list[Any]
    requests: list[Any]

    def calls(self, compiled: Compiled = False) -> list[Call]:
        import torch  # pyright: ignore[reportMissingImports]

        mode = compiled if isinstance(compiled, str) else None
        call = torch.compile(self.apply, fullgraph=True, dynamic=False, mode=mode) if compiled else self.apply
        return [partial(call, tree, *request) for tree, request in zip(self.trees, self.requests, strict=True)]


def in_turn(cell: Cell) -> Configurations:
    """A CUDA graph for each tenant, replayed one after the other; or one graph with the tenants in a row."""
    parts = prepared_cell(cell)
    for weights, compiled in forms(cell):
        options = {"weights": weights, "compiled": compiled}
        yield options, lambda w=weights, c=compiled: graph_each(parts(w).calls(c))
        yield options, lambda w=weights, c=compiled: graph_of_all(parts(w).calls(c), streams=False)


def streams(cell: Cell) -> Configurations:
    """One CUDA graph in which each tenant has a stream, hence a branch, of its own."""
    parts = prepared_cell(cell)
    for weights, compiled in forms(cell):
        options = {"weights": weights, "compiled": compiled}
        yield options, lambda w=weights, c=compiled: graph_of_all(parts(w).calls(c), streams=True)


def vmap(cell: Cell) -> Configurations:
    """torch.func.vmap over stacked weights; in a CUDA graph, and called as it is."""
    parts = prepared_cell(cell)
    for weights in variants(cell, traced=True):
        for graph in (True, False):
            yield {"weights": weights}, lambda w=weights, g=graph: stacked(parts(w), g)


def compiled(cell: Cell) -> Configurations:
    """torch.compile of all models in one graph, recorded as one CUDA graph."""
    parts = prepared_cell(cell)
    weights = variants(cell, traced=True)[-1]  # compiling takes minutes: one form must do
    yield {"weights": weights}, lambda: all_compiled(parts(weights))


def prepared_cell(cell: Cell) -> Callable[[str], Parts]:
    """The cell's tenants for PyTorch, by form of their weights; each form is put on the device once."""
    check(cell)
    return cache(partial(parts_of, cell, "cuda"))


def check(cell: Cell) -> None:
    """Raise CannotRun where PyTorch's peers cannot; else set what all of them want."""
    check_device(cell.precision)
    from experiments.torch_models import network

    if network(cell.model) is None:
        raise CannotRun(f"{cell.model.name} has no PyTorch form in experiments/torch_models.py")


def check_device(precision: str | None) -> None:
    if find_spec("torch") is None:
        raise CannotRun("PyTorch is not installed")
    import torch  # pyright: ignore[reportMissingImports]

    if not torch.cuda.is_available():
        raise CannotRun("needs a GPU: PyTorch sees no CUDA device to record CUDA graphs on")
    tf32 = precision in (None, "default", "tensorfloat32")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True


def parts_of(cell: Cell, device: str, weights: str) -> Parts:
    from experiments.torch_models import network
    from experiments.torch_weights import convert, prepare, tensor

    trees = [convert(params, device) for params in cell.tenants.params]
    requests = [[tensor(x, device) for x in inputs] for inputs in cell.tenants.inputs]
    return Parts(network(cell.model), trees if weights == "plain" else list(map(prepare, trees)), requests)


def variants(cell: Cell, traced: bool = False) -> tuple[str, ...]:
    from experiments.torch_weights import variants

    return variants(cell.model, traced)


def forms(cell: Cell) -> list[tuple[str, Compiled]]:
    """(weights, whether compiled)."""
    traced = variants(cell, traced=True)[-1]
    compiled: list[Compiled] = [True, AUTOTUNED] if cell.autotune else [True]
    return [*((weights, False) for weights in variants(cell)), *((traced, how) for how in compiled)]


def graph_each(calls: Sequence[Call]) -> Iterator[Candidate]:
    choose_kernels(calls[0])
    yield candidate("a CUDA graph each", [recorded(lambda call=call: [call()]) for call in calls])


def graph_of_all(calls: Sequence[Call], streams: bool) -> Iterator[Candidate]:
    import torch  # pyright: ignore[reportMissingImports]

    choose_kernels(calls[0])
    own = [torch.cuda.Stream() if streams else None for _ in calls]

    def together() -> list[Any]:
        current, outputs = torch.cuda.current_stream(), []
        for call, stream in zip(calls, own, strict=True):
            if stream is not None:
                stream.wait_stream(current)
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                outputs.append(call())
        for stream in own:
            if stream is not None:
                current.wait_stream(stream)
        return outputs

    yield candidate("a stream each in one CUDA graph" if streams else "all in one CUDA graph", [recorded(together)])


def stacked(parts: Parts, graph: bool) -> Iterator[Candidate]:
    import torch  # pyright: ignore[reportMissingImports]
    import torch.utils._pytree as pytree  # pyright: ignore[reportMissingImports]

    weights = pytree.tree_map(lambda *leaves: torch.stack(leaves), *parts.trees)
    inputs = [torch.stack(column) for column in zip(*parts.requests, strict=True)]
    batched = torch.func.vmap(parts.apply)

    def call() -> list[Any]:
        return list(batched(weights, *inputs))

    choose_kernels(call)
    yield candidate("in one CUDA graph" if graph else "eager", [recorded(call) if graph else call])


def all_compiled(parts: Parts) -> Iterator[Candidate]:
    import torch  # pyright: ignore[reportMissingImports]

    together = torch.compile(partial(all_of, parts.apply), fullgraph=True, dynamic=False)
    call = partial(together, parts.trees, parts.requests)
    choose_kernels(call)
    yield candidate("in one CUDA graph", [recorded(call)])


def all_of(apply: Any, trees: Sequence[Any], requests: Sequence[Any]) -> list[Any]:
    return [apply(tree, *request) for tree, request in zip(trees, requests, strict=True)]


def choose_kernels(call: Call) -> None:
    """Let torch.compile compile, then cuDNN time its algorithms, with nothing beside it; it keeps them by shape."""
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        torch.backends.cudnn.benchmark = False
        try:
            call()
            torch.cuda.synchronize()
        finally:  # also for those that come after one that does not compile
            torch.backends.cudnn.benchmark = True
        with alone():
            call()
            torch.cuda.synchronize()


def recorded(call: Round) -> Round:
    """The call as a CUDA graph, whose replay overwrites the same outputs. It keeps the call, of whose weights the
    graph knows addresses alone."""
    import torch  # pyright: ignore[reportMissingImports]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX has threads of its own
        outputs = call()
    return partial(replayed, graph, outputs, call)


def replayed(graph: Any, outputs: list[Any], held: Round) -> list[Any]:
    graph.replay()
    return outputs


def candidate(how: str, rounds: Sequence[Round]) -> Candidate:
    """Calls that make up a round; it waits for the device at its end, as JAX's timing does for JAX's arrays."""
    import torch  # pyright: ignore[reportMissingImports]

    def issue() -> list[Any]:
        with torch.no_grad():
            return [one for call in rounds for one in call()]

    def run() -> list[Any]:
        outputs = issue()
        torch.cuda.synchronize()
        return outputs

    return Candidate(how, run, lambda outputs: [x.float().cpu().numpy() for x in outputs], issue=issue)
