"""Every error the library raises, one type a layer. A message says which tenant, which equation or argument, what was
expected and what to do.

    TraceError     a tenant's function cannot be staged, or a program without weights is called
    IRError        a program or bundle that is not well formed: a bug in a pass, never the user's
    PassError      a pass failed, or handed on something that is not well formed; names the passes before it
    PlanError      the programs and options given to `fuse` contradict each other
    CaptureError   a program cannot be a CUDA graph of its own
    TuningError    a tuning database cannot be read or written, or is none
    InvalidInput   the inputs of a call are not what the tenants were traced with
    ServingError   a request, or a tenant, that the runtime cannot serve; one type a cause, each with its status codes
"""


class CoalesceError(Exception):
    """Base of all."""


class TraceError(CoalesceError, TypeError):
    """A tenant's function cannot be staged to a program."""


class IRError(CoalesceError):
    """A program or bundle is not well formed."""


class PassError(CoalesceError):
    """A pass failed."""


class PlanError(CoalesceError, ValueError):
    """The programs and options given to `fuse` contradict each other."""


class CaptureError(CoalesceError, RuntimeError):
    """A program cannot be captured as a CUDA graph. It runs as it is where that is called instead."""


class TuningError(CoalesceError, ValueError):
    """A tuning database cannot be read or written, is none, or nothing could be measured."""


class InvalidInput(CoalesceError, ValueError):
    """The inputs of a call are not what the tenants were traced with."""

    grpc, http = "INVALID_ARGUMENT", 400


class ServingError(CoalesceError):
    """The runtime could not serve a request, or take on a tenant.

    `grpc` is the name of the status code that a gRPC server answers with, `http` the number of an HTTP server's.
    """

    grpc, http = "UNKNOWN", 500


class QueueFull(ServingError):
    """A tenant has as many requests waiting as its quota allows. Nothing was queued; send fewer, or later."""

    grpc, http = "RESOURCE_EXHAUSTED", 429


class DeadlineExceeded(ServingError, TimeoutError):
    """A request could not have been served by its deadline. It did not run."""

    grpc, http = "DEADLINE_EXCEEDED", 504


class TenantClosed(ServingError, LookupError):
    """There is no such tenant, or it was removed before the request ran."""

    grpc, http = "NOT_FOUND", 404


class TenantFailure(ServingError):
    """A tenant's own program raised while it ran, with nobody else's work beside it."""

    grpc, http = "INTERNAL", 500


class CompileError(ServingError):
    """No executable could be made for a tenant."""

    grpc, http = "FAILED_PRECONDITION", 500


class OutOfDeviceMemory(ServingError, MemoryError):
    """A tenant's weights, or what its program needs to run, do not fit on the device."""

    grpc, http = "RESOURCE_EXHAUSTED", 507


class DeviceError(ServingError):
    """The device failed, or does not answer."""

    grpc, http = "UNAVAILABLE", 503


class PolicyError(ServingError):
    """The policy does not answer, or the process that it has to itself has ended."""

    grpc, http = "UNAVAILABLE", 503


class StateLost(ServingError):
    """What a request had computed so far was lost with another bundle, which failed. Send it again."""

    grpc, http = "ABORTED", 503


class Shutdown(ServingError):
    """The runtime was closed before the request ran."""

    grpc, http = "UNAVAILABLE", 503
