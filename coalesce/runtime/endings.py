"""Why a request ended without a result, as the error that its caller gets."""

from __future__ import annotations

from coalesce.errors import (
    DeadlineExceeded,
    DeviceError,
    OutOfDeviceMemory,
    QueueFull,
    ServingError,
    Shutdown,
    StateLost,
    TenantClosed,
    TenantFailure,
)
from coalesce.runtime.ticket import Ticket
from coalesce.scheduler.commands import Reason


def error_of(ticket: Ticket, reason: Reason, now_ns: int) -> ServingError:
    request = ticket.request
    who = f"tenant {request.tenant!r}, request {request.id}"
    allowed_ms = (request.deadline_ns - request.arrival_ns) / 1e6
    waited_ms = (now_ns - request.arrival_ns) / 1e6
    match reason:
        case Reason.QUEUE_FULL:
            return QueueFull(f"{who}: {reason.value}; send later, or give the tenant a larger quota")
        case Reason.INFEASIBLE:
            return DeadlineExceeded(
                f"{who}: {reason.value}, {allowed_ms:.3g} ms from submit; allow more time, or send less"
            )
        case Reason.EXPIRED if allowed_ms <= 0:
            return DeadlineExceeded(f"{who}: its deadline had passed {abs(allowed_ms):.3g} ms before submit")
        case Reason.EXPIRED:
            return DeadlineExceeded(f"{who}: {reason.value}: it had {allowed_ms:.3g} ms and waited {waited_ms:.3g} ms")
        case Reason.UNKNOWN_TENANT | Reason.TENANT_CLOSED:
            return TenantClosed(f"{who}: {reason.value}; add_tenant adds one")
        case Reason.FAILED:
            cause = ticket.failure
            kind = type(cause) if isinstance(cause, OutOfDeviceMemory | StateLost) else TenantFailure
            error = kind(f"{who}: {reason.value}: {type(cause).__name__}: {cause}")
            error.__cause__ = cause
            return error
        case Reason.DEVICE:
            return DeviceError(f"{who}: {reason.value}")
        case Reason.SHUTDOWN:
            return Shutdown(f"{who}: {reason.value}")
        case Reason.CANCELLED:
            return ServingError(f"{who}: {reason.value}")
