"""Why a request ended without a result, as the error that its caller gets."""

from __future__ import annotations

from typing import NamedTuple

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
from coalesce.scheduler.request import Request
from coalesce.scheduler.tuples import made


class Untimely(NamedTuple):
    """Why a request has no place, in words that are made when somebody asks for them: past capacity most requests end
    so, and few are read."""

    request: Request
    reason: Reason
    now_ns: int

    def __str__(self) -> str:
        request, reason, now_ns = self
        allowed_ms = (request.deadline_ns - request.arrival_ns) / 1e6
        waited_ms = (now_ns - request.arrival_ns) / 1e6
        who = who_asked(request)
        if reason is Reason.QUEUE_FULL:
            return f"{who}: {reason.value}; send later, or give the tenant a larger quota"
        if reason is Reason.INFEASIBLE:
            return f"{who}: {reason.value}, {allowed_ms:.3g} ms from submit; allow more time, or send less"
        if allowed_ms <= 0:
            return f"{who}: its deadline had passed {abs(allowed_ms):.3g} ms before submit"
        return f"{who}: {reason.value}: it had {allowed_ms:.3g} ms and waited {waited_ms:.3g} ms"


def who_asked(request: Request) -> str:
    return f"tenant {request.tenant!r}, request {request.id}"


def told_to(request: Request, why: ServingError) -> ServingError:
    """Why all end, for one of them: an error that is raised again and again keeps what everybody had who raised it."""
    return type(why)(f"{who_asked(request)}: {why}")


def error_of(ticket: Ticket, reason: Reason, now_ns: int) -> ServingError:
    if reason is Reason.INFEASIBLE or reason is Reason.EXPIRED:
        return DeadlineExceeded(made(Untimely, (ticket.request, reason, now_ns)))
    who = who_asked(ticket.request)
    match reason:
        case Reason.QUEUE_FULL:
            return QueueFull(Untimely(ticket.request, reason, now_ns))
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
