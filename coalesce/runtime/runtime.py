"""`Runtime`: tenants in, requests in, results out.

    with coalesce.Runtime() as rt:
        rt.add_tenant("a", fn, params, example=(x,), slo=0.010)
        future = rt.submit("a", x)
        y = await rt.infer("a", x, deadline=0.005)

All times that users give and get are seconds; inside they are nanoseconds of a monotonic clock.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from copy import copy
from typing import Any, Literal

from coalesce.errors import InvalidInput, Shutdown, TenantClosed
from coalesce.runtime.accounts import Accounts, Stats
from coalesce.runtime.desk import Desk
from coalesce.runtime.device import Device
from coalesce.runtime.end import End
from coalesce.runtime.errands import Errands
from coalesce.runtime.health import Health
from coalesce.runtime.observer import Observer
from coalesce.runtime.options import check_options, made_policies
from coalesce.runtime.quarters import Resident
from coalesce.runtime.reply import Reply
from coalesce.runtime.station import health_of, Setup, Station
from coalesce.runtime.surroundings import Surroundings
from coalesce.runtime.tenancy import Tenancy, Wanted
from coalesce.runtime.terms import left_s, shapes_of, terms_of, until_s
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.policy import Policy


class Runtime:
    """Serves many tenants from threads of its own; every method may be called from any thread.

    Args:
      policy: what decides, or what makes one for each device; `Coalescing` unless given. See coalesce.scheduler.
      devices: JAX devices, each with a driver of its own; a family lives on one of them. None: JAX's default device.
      widths: how many lanes the executables of a family have, each at least 1, in any order.
      capacity: tenants of a family that there is room for at first; it grows by doubling, or by what there is memory
        for. None: by the size of one, and what is free.
      segments: how many a program is cut into, between which others may run. None: as few as cost and SLOs ask for.
      memory_limit: bytes on a device for weights and what lies between segments; unless given, what it says it has.
      reproducible: a tenant's requests run in executables of one width, the widest, of its program alone, and with the
        same kernels, however few lanes they have: a result does not depend on who else asks.
      executables: how many are kept for a device; those that ran the longest ago go first.
      compiled: a folder in which executables are kept for the next process, unless JAX has been given one; None: see
        coalesce.runtime.persistence; False: none.
      hang_s, stall_s: a bundle that takes longer is a device that hangs; an executable that does is done without.
      observers: told of everything that is decided and done; see coalesce.runtime.observer.
      clock: what time it is, in nanoseconds, for tests; it must never go back.

    Raises:
      InvalidInput: an option that means nothing.
      TuningError: the database of what was measured is broken.
    """

    def __init__(
        self,
        *,
        policy: Policy | Callable[[], Policy] = Coalescing,
        devices: Sequence[Any] | None = None,
        widths: Sequence[int] = (1, 2, 4, 8, 16, 32),
        capacity: int | None = None,
        segments: int | None = None,
        memory_limit: int | None = None,
        reproducible: bool = False,
        executables: int = 256,
        compiled: str | os.PathLike[str] | Literal[False] | None = None,
        hang_s: float = 60.0,
        stall_s: float = 600.0,
        observers: Sequence[Observer] = (),
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        counts = capacity, segments, memory_limit, executables
        check_options(policy, devices, widths, *counts, compiled, hang_s, stall_s, observers)
        policies, self._desk = made_policies(policy, devices), Desk(clock)
        self._accounts, self._process = Accounts(), Surroundings(compiled)
        if reproducible:  # cuts depend on who else is here
            widths, segments = (max(widths),), 1 if segments is None else segments
        errands, around = Errands(), self._process.around
        setup = Setup(tuple(sorted(widths)), capacity, segments, executables, hang_s, stall_s, around, errands)
        self._stations = list[Station]()
        self._tenancy, self._end = Tenancy(self._stations, errands), End(self._stations, errands, self._process.leave)
        self._over = ""  # why nothing is taken on any more
        try:
            for number, (at, own) in enumerate(zip(devices or [None], policies, strict=True)):
                device = Device(memory_limit, at, number, self._process.apart, reproducible)
                self._stations.append(Station(number, device, own, self._accounts, observers, clock, setup))
        except BaseException:  # a tuning database that is broken, say
            self.close(drain=False)
            raise
        self._process.end_with_interpreter(lambda: self.close(drain=False))
        self._process.end_in_a_fork(self._end_in_a_fork)

    # Tenants

    def add_tenant(
        self,
        name: str,
        fn: Callable[..., Any],
        params: Any,
        *,
        example: Sequence[Any] | None = None,
        examples: Sequence[Sequence[Any]] | None = None,
        slo: float,
        priority: int = 0,
        weight: float = 1.0,
        quota: int = 1024,
        shared: Any = None,
        verify: bool = False,
        device: Any = None,
        wait: bool = True,
    ) -> Future[None]:
        """Take on a tenant: `fn(params, *inputs) -> pytree`. Others are served meanwhile.

        Returns once a request of it can be served; wider executables are made after that. With `wait=False` at once,
        and the Future ends then.

        Args:
          example: the inputs of a request, as arrays or ShapeDtypeStructs.
          examples: of several request shapes, which read one copy of what their programs prepare alike.
          slo: seconds from submit to result, for requests without a deadline of their own.
          priority: larger goes first, strictly.
          weight: its share among tenants of its priority, where not everybody can be served.
          quota: the most requests that may wait.
          shared: a subtree of params that other tenants have too, as in `coalesce.trace`.
          verify: compare a fused run with the tenant alone, on its example; a tenant that is not within tolerance is
            served alone, with a warning.
          device: which of `devices` it lives on; that of its family otherwise, or one with room for it.

        Raises:
          InvalidInput: an argument is out of range, or there is a tenant of that name.
          TraceError: `fn` cannot be staged.
          CompileError: no executable could be made for it.
          OutOfDeviceMemory: its weights do not fit; says how many bytes are needed and free.
        """
        self._check_open()
        shapes, terms = shapes_of(name, example, examples), terms_of(name, slo, priority, weight, quota)
        added = self._tenancy.add(Wanted(name, fn, params, shapes, shared, terms, verify, device), wait)
        if wait:
            added.result()
        return added

    def update_tenant(self, name: str, params: Any, *, shared: Any = None) -> None:
        """Put other weights of the same shapes and dtypes into the place of a tenant's own, between two bundles.

        A request reads the old ones or the new ones, never some of each. Nothing is compiled.

        Raises:
          TenantClosed: there is no such tenant.
          InvalidInput: params are not of the tree, shapes and dtypes that it was added with.
        """
        self._check_open()
        self._tenancy.update(self._resident(name), params, shared)

    def remove_tenant(self, name: str, *, drain: bool = True, timeout: float | None = None) -> None:
        """Let a tenant go: what waits is served first, or with `drain=False` ends with TenantClosed.

        Returns when its place on the device is free; at once, if another thread is removing it.

        Raises:
          TenantClosed: there is no such tenant.
          TimeoutError: it has not gone after `timeout` seconds; it goes when its last request has ended.
        """
        until, resident = until_s("remove_tenant", timeout), self._tenancy.residents.get(name)
        if self._over or resident is None:  # one whose device is lost goes too
            raise self._why_nobody(name, None)
        self._desk.close_to(resident)
        self._tenancy.remove(resident, drain, None if until is None else timeout)

    def warm_up(self, timeout: float | None = None) -> None:
        """Wait until the executables are there that the present tenants can use; TimeoutError after so many seconds."""
        until = until_s("warm_up", timeout)
        for station in self._stations:
            station.foundry.wait_idle(left_s(until))

    # Requests

    def submit(self, name: str, *inputs: Any, deadline: float | None = None, priority: int = 0) -> Reply:
        """A request: inputs as the tenant was traced with. The Future ends with the result, in NumPy arrays.

        Inputs are read when the request runs; do not write to them before it has ended.

        Args:
          deadline: seconds from now; the tenant's SLO unless given.
          priority: on top of the tenant's own.

        Raises, here:
          TenantClosed, InvalidInput, Shutdown: no such tenant, inputs that are not of it, a closed runtime.
        The Future may raise:
          QueueFull, DeadlineExceeded: it was not taken on, or could not run in time.
          TenantFailure, DeviceError: it failed.
          TenantClosed, Shutdown: the tenant went, or the runtime was closed, before it ran.
        """
        resident = self._resident(name)
        reply = Reply(-1, resident.driver)
        reply.request = self._desk.send(resident, inputs, deadline, priority, reply, None)
        return reply

    async def infer(self, name: str, *inputs: Any, deadline: float | None = None, priority: int = 0) -> Any:
        """Await the result of a request in an event loop; see `submit`. Cancelling the task withdraws the request."""
        resident = self._resident(name)
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        number = self._desk.send(resident, inputs, deadline, priority, waiter, loop)
        try:
            return await waiter
        except asyncio.CancelledError:
            resident.driver.withdraw(number)
            raise

    def _resident(self, name: str) -> Resident:
        """Who can be asked."""
        try:
            resident = self._tenancy.residents.get(name)
        except TypeError:
            raise InvalidInput(f"tenant {name!r}: a name is a str, not a {type(name).__name__}") from None
        if self._over or resident is None or resident.driver.failure is not None:
            raise self._why_nobody(name, resident)
        return resident

    def _why_nobody(self, name: str, resident: Resident | None) -> Exception:
        self._check_open()
        if resident is None or resident.driver.failure is None:
            return TenantClosed(f"there is no tenant {name!r}; add_tenant adds one")
        return copy(resident.driver.failure)

    # What is known

    def stats(self) -> Stats:
        """What each tenant asked for, got and cost so far; a snapshot."""
        return self._accounts.stats()

    def health(self) -> Health:
        """Whether the runtime serves, and what it has; a snapshot."""
        return health_of(self._stations, len(self._tenancy.residents), bool(self._over), self._tenancy.alone)

    def explain(self, request: int | Reply) -> str:
        """What was decided about a request: its bundles, why they ran, and when. Of all that have not ended, and of the
        last 4,096 that have."""
        number = request.request if isinstance(request, Reply) else request
        found = filter(None, (station.explain(number) for station in self._stations))
        return next(found, f"request {number}: it is not remembered, or never was")

    # The end

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until every request that was submitted has ended, and its callbacks; False if not after so long."""
        return self._end.drain(until_s("drain", timeout))

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take on nothing more, serve what waits (or end it with Shutdown), and stop the threads. From a callback of a
        request it returns at once, and the rest follows.

        Another call meanwhile waits for the first, and may have it hurry: `drain=False` at once, or a shorter timeout.
        One in a signal handler that interrupts the first returns at once.

        Args:
          timeout: seconds after which what still waits ends with Shutdown. Callbacks that take longer, or with
            `drain=False` longer than some seconds, go on by themselves.

        Raises:
          InvalidInput: a timeout that is none; nothing is closed.
        """
        until = until_s("close", timeout)
        if any(threading.current_thread() in station.driver.threads for station in self._stations):
            threading.Thread(target=self.close, kwargs={"drain": drain, "timeout": timeout}, daemon=True).start()
            return
        self._over = self._over or "the runtime is closed"
        self._process.apart.close()
        self._end.close(drain, until)

    def _check_open(self) -> None:
        if self._over:
            raise Shutdown(self._over)

    def _end_in_a_fork(self) -> None:
        self._end.fork()
        self._over = "this process was forked off the runtime's; start it with spawn"

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)

    async def __aenter__(self) -> Runtime:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await asyncio.to_thread(self.close, drain=kind is None)
