"""Prometheus metrics of one runtime.

    metrics = Metrics()
    with Runtime(observers=[metrics]) as rt:
        metrics.watch(rt.health)
        metrics.serve(9464)                    # or metrics.text(), in a server of your own

Being told is a few additions; what Prometheus wants to see is made when it asks, of copies: no lock is taken for it,
since whoever serves would wait until the last line was written, or for ever. A tenant's series end when it was removed
and its last request has ended.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy

try:
    from prometheus_client import CollectorRegistry, generate_latest, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as e:
    raise ImportError("Prometheus metrics need prometheus-client: pip install 'coalesce-jax[metrics]'") from e

from coalesce.observing.counted import Device, Tenant
from coalesce.runtime.health import Health
from coalesce.runtime.observer import Finished, Observer
from coalesce.runtime.ticket import Ending, Ticket
from coalesce.scheduler.commands import Command, Dispatch, Quarantine, Readmit, Reason
from coalesce.scheduler.events import CatalogChanged, Event, Submitted, TenantAdded, TenantRemoved


class Metrics(Observer, Collector):
    """`registry` holds these metrics and nothing else; register more there, or register this in a registry of yours."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._tenants: dict[str, Tenant] = {}
        self._owners: dict[int, str] = {}  # the tenants of requests that have not ended
        self._device = Device()
        self._devices = {0: self._device}
        self._health: Callable[[], Health] | None = None
        self._lock = threading.RLock()  # of those who count, on threads of the runtime unless it has ended
        self.registry.register(self)

    def on(self, device: int) -> Metrics:
        own = copy(self)
        own._device = self._devices.setdefault(device, Device())
        return own

    def watch(self, health: Callable[[], Health]) -> None:
        """Also show what `Runtime.health` says, asked whenever the metrics are."""
        self._health = health

    def text(self) -> str:
        """In Prometheus' text format."""
        return generate_latest(self.registry).decode()

    def serve(self, port: int = 0, address: str = "127.0.0.1") -> tuple[int, Callable[[], None]]:
        """Answer scrapes over HTTP from a thread, at any free port if it is 0; returns the port, and what ends it."""
        server, thread = start_http_server(port, address, registry=self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, stop

    # What the runtime tells

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        with self._lock:
            self._note(event)
            for command in commands:
                if isinstance(command, Dispatch):
                    self._move([i for lanes in command.lanes for i in lanes], 1)
                elif isinstance(command, Quarantine | Readmit):
                    self._of(command.tenant).quarantined = isinstance(command, Quarantine)

    def _note(self, event: Event) -> None:
        if isinstance(event, Submitted):
            for request in event.requests:
                self._owners[request.id] = request.tenant
                self._of(request.tenant).submitted += 1
        elif isinstance(event, TenantAdded):
            self._tenants.setdefault(event.tenant.name, Tenant()).leaving = False
        elif isinstance(event, TenantRemoved):
            self._of(event.name).leaving = True
            self._forget_if_done(event.name)
        elif isinstance(event, CatalogChanged):
            self._device.executables = Counter(sum(e.width for e in own.entries) for own in event.catalog.executables)

    def _move(self, requests: Sequence[int], count: int) -> None:
        for i in requests:
            self._of(self._owners.get(i, "")).in_flight += count

    def rejected(self, ticket: Ticket, reason: Reason, now_ns: int) -> None:
        with self._lock:
            self._end(ticket, reason.name.lower())

    def finished(self, bundle: Finished) -> None:
        width, lanes, expected_ns = bundle.width, bundle.lanes, bundle.dispatch.l50_ns
        took_s = bundle.took_ns / 1e9
        each_s = took_s / width
        of_tenant = bundle.lanes_of_tenants()
        with self._lock:
            self._device.bundles[width, lanes] += 1
            self._device.failed += bundle.error is not None
            self._device.busy_s += took_s
            if bundle.error is None and expected_ns:
                self._device.ratio.add(bundle.took_ns / expected_ns)
            for name, count in of_tenant.items():
                tenant = self._of(name)
                tenant.in_flight -= count
                tenant.device_s += count * each_s
                tenant.padding_s += count * each_s * (width - lanes) / lanes

    def ended(self, endings: Sequence[Ending], now_ns: int) -> None:
        with self._lock:
            for ending in endings:
                request = ending.ticket.request
                self._of(request.tenant).latency.add((now_ns - request.arrival_ns) / 1e9)
                self._end(ending.ticket, "ok" if now_ns <= request.deadline_ns else "late")

    def _end(self, ticket: Ticket, outcome: str) -> None:
        name = ticket.request.tenant
        self._owners.pop(ticket.request.id, None)
        self._of(name).outcomes[outcome] += 1
        self._forget_if_done(name)

    def _forget_if_done(self, name: str) -> None:
        tenant = self._of(name)
        if tenant.leaving and not tenant.pending:
            self._tenants.pop(name, None)

    def _of(self, name: str) -> Tenant:
        """What is told of a tenant that is not here is forgotten."""
        return self._tenants.get(name) or Tenant()

    # What Prometheus asks

    def collect(self) -> Iterator[Metric]:
        tenants = {name: own.copied() for name, own in self._tenants.copy().items()}
        devices = {number: own.copied() for number, own in self._devices.copy().items()}
        yield from [*tenant_metrics(tenants), *device_metrics(devices)]
        if self._health is not None:
            yield from health_metrics(self._health())



def tenant_metrics(tenants: Mapping[str, Tenant]) -> list[Metric]:
    by = ["tenant"]
    submitted = CounterMetricFamily("coalesce_requests_submitted", "Requests that were sent.", labels=by)
    ended = CounterMetricFamily(
        "coalesce_requests", "Requests that ended, by how: ok and late have a result.", labels=["tenant", "outcome"]
    )
    latency = HistogramMetricFamily(
        "coalesce_request_latency_seconds", "From submit to result, of requests that have one.", labels=by
    )
    device = CounterMetricFamily("coalesce_device_seconds", "Device time of a tenant's lanes.", labels=by)
    padding = CounterMetricFamily(
        "coalesce_padding_seconds", "Its part of the device time of lanes that nobody used.", labels=by
    )
    waiting = GaugeMetricFamily("coalesce_requests_waiting", "Requests that wait for a bundle.", labels=by)
    running = GaugeMetricFamily("coalesce_requests_running", "Requests that are lanes of a bundle.", labels=by)
    apart = GaugeMetricFamily(
        "coalesce_tenant_quarantined", "1 while a tenant runs alone, being slow or failing.", labels=by
    )
    for name, own in tenants.items():
        submitted.add_metric([name], own.submitted)
        for outcome, count in own.outcomes.items():
            ended.add_metric([name, outcome], count)
        latency.add_metric([name], *own.latency.sample())
        device.add_metric([name], own.device_s)
        padding.add_metric([name], own.padding_s)
        waiting.add_metric([name], own.pending - own.in_flight)
        running.add_metric([name], own.in_flight)
        apart.add_metric([name], own.quarantined)
    return [submitted, ended, latency, device, padding, waiting, running, apart]


def device_metrics(devices: Mapping[int, Device]) -> list[Metric]:
    by = ["device"]
    bundles = CounterMetricFamily(
        "coalesce_bundles", "Bundles that left a device, by room and lanes used.", labels=[*by, "width", "lanes"]
    )
    failed = CounterMetricFamily("coalesce_bundles_failed", "Bundles that raised.", labels=by)
    busy = CounterMetricFamily("coalesce_device_busy_seconds", "Time that bundles took.", labels=by)
    ratio = HistogramMetricFamily(
        "coalesce_bundle_actual_to_predicted_ratio", "Time on the device over the expected median.", labels=by
    )
    executables = GaugeMetricFamily("coalesce_executables", "Executables that are offered.", labels=[*by, "width"])
    for number, own in devices.items():
        device = str(number)
        for (width, lanes), count in own.bundles.items():
            bundles.add_metric([device, str(width), str(lanes)], count)
        failed.add_metric([device], own.failed)
        busy.add_metric([device], own.busy_s)
        ratio.add_metric([device], *own.ratio.sample())
        for width, count in sorted(own.executables.items()):
            executables.add_metric([device, str(width)], count)
    return [bundles, failed, busy, ratio, executables]


def health_metrics(health: Health) -> list[Metric]:
    return [
        GaugeMetricFamily("coalesce_serving", "1 while requests are taken.", value=health.ok),
        GaugeMetricFamily("coalesce_executables_compiling", "Executables on their way.", value=health.compiling),
        GaugeMetricFamily(
            "coalesce_executables_failed", "Executables that could not be made.", value=len(health.failed)
        ),
        GaugeMetricFamily("coalesce_weight_bytes", "Of weights, with room to come.", value=health.weight_bytes),
    ]
