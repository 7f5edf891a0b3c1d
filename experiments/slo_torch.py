"""One PyTorch CUDA graph a tenant, behind an EDF queue: a peer of the runtime in slo_attainment.

Each tenant's model is what experiments/peers_torch.py finds the fastest in turn: weights prepared ahead, compiled by
inductor, recorded as a CUDA graph with buffers of its own for inputs and outputs. A request's input goes through pinned
memory, and nothing waits for the device but who hands out results. On a CPU, for tests, the models run as they are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, ExitStack, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import peers_torch
from experiments.cells import largest_error
from experiments.methods import Tenants
from experiments.peers_common import CannotRun, Cell
from experiments.slo_probe import Counts
from experiments.slo_queue import EdfQueue
from experiments.slo_real import Owned

NAME = "torch_edf"
DEPTHS = (1, 2, 4)  # requests on the device at once, of which the best is kept
BETTER = 1.02  # times the throughput, for more of them
PATIENT_S = 60.0


class Graph(NamedTuple):
    """A tenant on the device: `replay` computes `outputs` from `inputs`, which stay where they are."""

    inputs: list[Any]
    replay: Callable[[], list[Any]]
    outputs: list[Any]
    kind: str


class Place(NamedTuple):
    """Memory of the host that the device copies from and to, for one request of a kind at a time."""

    inputs: list[Any]
    outputs: list[Any]


class Begun(NamedTuple):
    place: Place
    event: Any


class TorchEngine:
    def __init__(self, graphs: Mapping[str, Graph], most: int, device: str) -> None:
        """For `most` requests at once."""
        import torch  # pyright: ignore[reportMissingImports]

        self._torch, self._graphs, self._on_gpu = torch, graphs, device != "cpu"
        self._stream = torch.cuda.Stream() if self._on_gpu else None
        one_of = {graph.kind: graph for graph in graphs.values()}
        self._places = {kind: [self._place(graph) for _ in range(most)] for kind, graph in one_of.items()}

    def _place(self, graph: Graph) -> Place:
        def like(x: Any) -> Any:
            return self._torch.empty(tuple(x.shape), dtype=x.dtype, pin_memory=self._on_gpu)

        return Place([like(x) for x in graph.inputs], [like(x) for x in graph.outputs])

    def begin(self, tenant: str, inputs: Sequence[np.ndarray], place: int) -> Begun:
        graph = self._graphs[tenant]
        own = self._places[graph.kind][place]
        for pinned, x in zip(own.inputs, inputs, strict=True):
            bytes_of(pinned)[:] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        with self._torch.no_grad(), self._torch.cuda.stream(self._stream) if self._on_gpu else nullcontext():
            for x, pinned in zip(graph.inputs, own.inputs, strict=True):
                x.copy_(pinned, non_blocking=True)
            outputs = graph.replay()
            for pinned, x in zip(own.outputs, outputs, strict=True):
                pinned.copy_(x, non_blocking=True)
            event = self._torch.cuda.Event() if self._on_gpu else None
            if event is not None:
                event.record(self._stream)
        return Begun(own, event)

    def finish(self, begun: Begun) -> list[np.ndarray]:
        if begun.event is not None:
            begun.event.synchronize()
        return [array_of(x) for x in begun.place.outputs]


def bytes_of(tensor: Any) -> np.ndarray:
    """The memory of a tensor on the host."""
    import torch  # pyright: ignore[reportMissingImports]

    return tensor.reshape(-1).view(torch.uint8).numpy()


def array_of(tensor: Any) -> np.ndarray:
    """A copy; NumPy knows bfloat16 by JAX's name."""
    dtype = jnp.dtype(str(tensor.dtype).removeprefix("torch."))
    return bytes_of(tensor).copy().view(dtype).reshape(tuple(tensor.shape))


class Queued:
    """The queue, as a probe sees it."""

    def __init__(self, queue: EdfQueue, owned: Sequence[Owned]) -> None:
        self.queue, self._inputs = queue, {own.name: own.inputs for own in owned}
        self.slo_ns: Mapping[str, int] = {own.name: own.kind.slo_ns for own in owned}

    def begin(self) -> None:
        """It knows nothing that it could forget."""

    def submit(self, tenant: str) -> Any:
        return self.queue.submit(tenant, *self._inputs[tenant])

    def drain(self) -> None:
        if not self.queue.drain(PATIENT_S):
            raise RuntimeError(f"requests have not ended after {PATIENT_S:g} s")

    def counts(self) -> Counts:
        queue = self.queue
        return Counts(queue.runs, queue.runs, queue.busy_ns / 1e9, 0, queue.dropped)


class Chosen(NamedTuple):
    depth: int
    a_second: dict[int, float]  # by depth, the most requests


@contextmanager
def queue_of(
    owned: Sequence[Owned], precision: str | None, tolerance: float, seconds: float = 0.5, device: str = "cuda"
) -> Iterator[tuple[Queued, Chosen]]:
    """With the depth that serves the most.

    Raises:
      CannotRun: it does not run here, or does not compute what JAX does.
    """
    if device != "cpu":
        peers_torch.check_device(precision)
    engine = TorchEngine(graphs_of(owned, precision, device), max(DEPTHS), device)
    run_ns = {own.name: checked_ns(engine, own, tolerance) for own in owned}
    slo_ns = {own.name: own.kind.slo_ns for own in owned}
    found = {}
    for depth in DEPTHS:
        with EdfQueue(engine, slo_ns, depth, run_ns) as queue:
            found[depth] = most_a_second(queue, owned, seconds)
    depth = DEPTHS[0]
    for other in DEPTHS[1:]:
        depth = other if found[other] > BETTER * found[depth] else depth
    with EdfQueue(engine, slo_ns, depth, run_ns) as queue:
        yield Queued(queue, owned), Chosen(depth, found)


def graphs_of(owned: Sequence[Owned], precision: str | None, device: str) -> dict[str, Graph]:
    found = {}
    for kind in {own.kind.name: own.kind for own in owned}.values():
        own = [tenant for tenant in owned if tenant.kind.name == kind.name]
        tenants = Tenants(kind.model.apply, [o.params for o in own], [tuple(map(jnp.asarray, o.inputs)) for o in own])
        dtype = str(own[0].inputs[0].dtype)
        cell = Cell(kind.model, kind.fields, dtype, 1, precision, tenants, [], ExitStack())
        from experiments.torch_models import network

        if network(kind.model) is None:
            raise CannotRun(f"{kind.name} has no PyTorch form in experiments/torch_models.py")
        parts = peers_torch.parts_of(cell, device, peers_torch.variants(cell, traced=True)[-1])
        for tenant, call, request in zip(own, parts.calls(compiled=device != "cpu"), parts.requests, strict=True):
            found[tenant.name] = graph_of(call, request, kind.name, device)
        print(f"{NAME}: {len(own)} graphs of {kind.name}", file=sys.stderr, flush=True)
    return found


def graph_of(call: Callable[[], Any], request: list[Any], kind: str, device: str) -> Graph:
    replay = peers_torch.recorded(lambda: [call()]) if device != "cpu" else lambda: [call()]
    return Graph(request, replay, replay(), kind)


def checked_ns(engine: TorchEngine, own: Owned, tolerance: float) -> int:
    """How long a request of it takes at least on the idle engine, which gives what JAX gives."""
    times = []
    for _ in range(5):
        begun_ns = time.monotonic_ns()
        outputs = engine.finish(engine.begin(own.name, own.inputs, 0))
        times.append(time.monotonic_ns() - begun_ns)
    want = jax.tree.leaves(jax.jit(own.kind.model.apply)(own.params, *own.inputs))
    flat = [np.concatenate([np.asarray(x, np.float64).ravel() for x in one]) for one in (outputs, want)]
    error = largest_error(flat[:1], flat[1:])
    if not error <= tolerance:
        raise CannotRun(f"the outputs of {own.name} differ by {error:.1e}, more than {tolerance:.0e}")
    return min(times)


def most_a_second(queue: EdfQueue, owned: Sequence[Owned], seconds: float) -> float:
    """With something to do at any time."""
    first = a_second(queue, owned, 2)
    return a_second(queue, owned, max(2, round(seconds * first / len(owned))))


def a_second(queue: EdfQueue, owned: Sequence[Owned], rounds: int) -> float:
    begun = time.perf_counter()
    for _ in range(rounds):
        for own in owned:
            queue.submit(own.name, *own.inputs, deadline=PATIENT_S)
    queue.drain()
    return rounds * len(owned) / (time.perf_counter() - begun)
