"""Coalesce: many tenants' JAX programs as one, with their equal work in shared superkernels.

    prog  = coalesce.trace(fn, params, *example_inputs, name="a")
    fused = coalesce.fuse([prog_a, prog_b, ...])
    ys    = fused([(x_a,), (x_b,), ...])

    with coalesce.Runtime() as rt:                    # tenants that come and go, requests by deadlines
        rt.add_tenant("a", fn, params, example=(x,), slo=0.010)
        y = rt.submit("a", x).result()

Names are loaded when they are first used, so that what needs no JAX (the scheduler) can be imported without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coalesce.captured import Captured as Captured
    from coalesce.compile import fuse as fuse
    from coalesce.errors import (
        CaptureError as CaptureError,
        CoalesceError as CoalesceError,
        CompileError as CompileError,
        DeadlineExceeded as DeadlineExceeded,
        DeviceError as DeviceError,
        InvalidInput as InvalidInput,
        OutOfDeviceMemory as OutOfDeviceMemory,
        PassError as PassError,
        PlanError as PlanError,
        PolicyError as PolicyError,
        QueueFull as QueueFull,
        ServingError as ServingError,
        Shutdown as Shutdown,
        StateLost as StateLost,
        TenantClosed as TenantClosed,
        TenantFailure as TenantFailure,
        TraceError as TraceError,
    )
    from coalesce.fused import Fused as Fused
    from coalesce.program import Program as Program
    from coalesce.report import Report as Report
    from coalesce.runtime.runtime import Runtime as Runtime
    from coalesce.tracing import trace as trace
    from coalesce.waiting import block_until_ready as block_until_ready

_HOME = {
    "trace": "coalesce.tracing",
    "block_until_ready": "coalesce.waiting",
    "fuse": "coalesce.compile",
    "Captured": "coalesce.captured",
    "Fused": "coalesce.fused",
    "Program": "coalesce.program",
    "Report": "coalesce.report",
    "Runtime": "coalesce.runtime.runtime",
    "CaptureError": "coalesce.errors",
    "CoalesceError": "coalesce.errors",
    "CompileError": "coalesce.errors",
    "DeadlineExceeded": "coalesce.errors",
    "DeviceError": "coalesce.errors",
    "InvalidInput": "coalesce.errors",
    "OutOfDeviceMemory": "coalesce.errors",
    "PassError": "coalesce.errors",
    "PlanError": "coalesce.errors",
    "PolicyError": "coalesce.errors",
    "QueueFull": "coalesce.errors",
    "ServingError": "coalesce.errors",
    "Shutdown": "coalesce.errors",
    "StateLost": "coalesce.errors",
    "TenantClosed": "coalesce.errors",
    "TenantFailure": "coalesce.errors",
    "TraceError": "coalesce.errors",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'coalesce' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOME)
