"""A staged program that is launched without JAX: its inputs and outputs lie where they lie, for every launch.

    captured = staged.capture(requests)
    captured()                          launches it; returns before it has ended
    captured(other_requests)            brings these to where it reads, then launches it
    results = captured.results()        waits

On an NVIDIA GPU it is one CUDA graph (coalesce/capture). Elsewhere the same calls run the compiled program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from coalesce.capture.aside import Aside, Graph, Line, OPTIONS, place_of
from coalesce.capture.cuda import Cuda
from coalesce.capture.ending import ends
from coalesce.errors import CaptureError

Stacks = list[list[Any]]  # of each family, in order, its inputs or outputs [L, ...], L its tenants
MOVING = 64  # arrays on their way, of which nobody has waited for any
SPOTS = 2  # one is read while another is written
ALIGNED = 64  # bytes
Stacked = Callable[[Sequence[Any], Stacks], Stacks]  # (bank, inputs) -> outputs


@runtime_checkable
class Running(Protocol):
    """What is launched."""

    def write(self, inputs: Stacks) -> None:
        """Of arrays on the device, or on the host."""
        ...

    def launch(self) -> None: ...

    def wait(self) -> None: ...

    def copied(self) -> Stacks:
        """The outputs, after waiting."""
        ...


class Captured:
    """`Staged.capture` makes it. One thread calls it at a time; several of them may be called on several threads."""

    def __init__(
        self, running: Running, stacked: Callable[[Any], Stacks], unstage: Callable[[Stacks], list[Any]]
    ) -> None:
        self._running, self._stacked, self._unstage = running, stacked, unstage

    def __call__(self, requests: Any = None) -> Captured:
        """Launch it, with other requests if they are given, and return itself before it has ended. It runs after
        whatever was launched before. Requests on the host are copied once there, and brought by the device itself.

        Raises:
          InvalidInput: an input is not what its tenant was traced with; nothing has changed then.
        """
        if requests is not None:
            self._running.write(self._stacked(requests))
        self._running.launch()
        return self

    @property
    def outputs(self) -> Stacks:
        """What the last launch has left: of each family its outputs [L, ...], as `Staged` gives them. Copies on the
        device, which no other launch changes; waits."""
        return self._running.copied()

    def block_until_ready(self) -> Captured:
        """Wait for the last launch; `jax.block_until_ready` and `coalesce.block_until_ready` call this."""
        self._running.wait()
        return self

    def results(self) -> list[Any]:
        """Each tenant's results of the last launch in its own pytree, as `Staged.unstage` gives them; waits."""
        return self._unstage(self.outputs)


class ByCall:
    """As JAX calls it."""

    def __init__(self, compiled: Callable[[Stacks], Stacks], inputs: Stacks) -> None:
        self._compiled, self._inputs, self._outputs = compiled, inputs, compiled(inputs)

    def write(self, inputs: Stacks) -> None:
        self._inputs = inputs

    def launch(self) -> None:
        self._outputs = self._compiled(self._inputs)

    def wait(self) -> None:
        jax.block_until_ready(self._outputs)

    def copied(self) -> Stacks:
        self.wait()
        return self._outputs


class Spot:
    """Page-locked memory for the inputs of a round."""

    def __init__(self, cuda: Cuda, nbytes: int) -> None:
        self._memory, self._read = cuda.host_memory(nbytes, np.dtype(np.uint8)), cuda.event()

    def bring(self, pairs: Sequence[tuple[np.ndarray, int]], line: Line) -> None:
        """Arrays to addresses of the device, for what is launched from now on; returns before they are there."""
        with line.cuda:
            line.cuda.wait("cuEventSynchronize", self._read.handle)
        start = 0
        for x, to in pairs:
            held = self._memory[start : start + x.nbytes]
            np.copyto(held.view(x.dtype).reshape(x.shape), x)
            with line.cuda:
                line.cuda.copy(to, held.ctypes.data, x.nbytes, line.stream)
            start += aligned(x.nbytes)
        with line.cuda:
            line.cuda("cuEventRecord", self._read.handle, line.stream)


def aligned(nbytes: int, to: int = ALIGNED) -> int:
    return -(-nbytes // to) * to


class InGraph:
    """As a CUDA graph. `parts` are families by number, those that share no kernel with others apart from them; each
    part runs on an `Aside` of its own, and all at once."""

    def __init__(
        self,
        run: Callable[[Sequence[int]], Stacked],
        bank: Sequence[jax.Array],
        inputs: Stacks,
        outputs: Stacks,
        parts: Sequence[Sequence[int]],
        asides: Sequence[Aside],
        compile: Callable[..., Any],
    ) -> None:
        """`run(families)` is the function that gives the outputs of these alone; `outputs` are structs;
        `compile(function, structs, options)` is JAX's Compiled, of a function that donates its last argument."""
        # JAX does not know that these change, and keeps what it has once brought to the host: nobody else gets them.
        self._inputs = jax.tree.map(jnp.copy, inputs)
        self._outputs = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
        self._line: Line = asides[0].line
        self._moving: list[Any] = []  # what is on its way to where it is read
        self._spots: list[Spot] = []  # made when they are needed
        arguments = (list(bank), self._inputs)
        graphs, programs = [], []
        for own, aside in zip(parts, asides, strict=False):
            into = [x for f in own for x in self._outputs[f]]
            try:
                compiled = compile(ends(partial(in_a_row, run(own))), (*arguments, into), OPTIONS)
            except RuntimeError as e:
                raise CaptureError(f"the program cannot be compiled as a graph: {type(e).__name__}: {e}") from e
            programs.append(aside.load(compiled))
            places = jax.tree.map(place_of, (arguments, into))
            graphs.append(aside.capture(programs[-1], *places))
        self._graph, self._bank = Graph(self._line, graphs, programs), bank
        self._line.follow(jax.tree.leaves((arguments, self._outputs)))

    def write(self, inputs: Stacks) -> None:
        line, pairs = self._line, list(zip(jax.tree.leaves(inputs), jax.tree.leaves(self._inputs), strict=True))
        if len(self._moving) > MOVING:
            self.wait()
        self._bring([(x, to) for x, to in pairs if isinstance(x, np.ndarray)])
        there = [(x, to) for x, to in pairs if not isinstance(x, np.ndarray)]
        line.follow([x for x, _ in there])
        with line.cuda:
            for x, to in there:
                line.cuda.copy(to.unsafe_buffer_pointer(), x.unsafe_buffer_pointer(), x.nbytes, line.stream)
                self._moving.append(x)

    def _bring(self, pairs: Sequence[tuple[np.ndarray, jax.Array]]) -> None:
        """From the host, by way of memory that the device reads by itself."""
        if not pairs:
            return
        if not self._spots:
            nbytes = sum(aligned(to.nbytes) for to in jax.tree.leaves(self._inputs))
            with self._line.cuda:
                self._spots = [Spot(self._line.cuda, nbytes) for _ in range(SPOTS)]
        spot = self._spots.pop(0)
        spot.bring([(x, to.unsafe_buffer_pointer()) for x, to in pairs], self._line)
        self._spots.append(spot)

    def launch(self) -> None:
        self._graph.launch()

    def wait(self) -> None:
        self._line.wait()
        self._moving.clear()

    def copied(self) -> Stacks:
        self.wait()
        return jax.block_until_ready(jax.tree.map(jnp.copy, self._outputs))

    def __del__(self, is_ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """Else JAX would give memory that is written to, or read, to somebody else. When the interpreter ends this
        module's names may be gone before what it has made."""
        if not is_ending() and hasattr(self, "_graph"):
            self._line.wait()


def in_a_row(run: Stacked, bank: Sequence[Any], inputs: Stacks, into: Sequence[Any]) -> list[Any]:
    """The outputs of all families that it runs."""
    return [x for own in run(bank, inputs) for x in own]
