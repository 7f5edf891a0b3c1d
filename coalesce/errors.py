"""Every error the library raises, one type a layer. A message says which tenant, which equation or argument, what was
expected and what to do.

    TraceError     a tenant's function cannot be staged, or a program without weights is called
    IRError        a program or bundle that is not well formed: a bug in a pass, never the user's
    PassError      a pass failed, or handed on something that is not well formed; names the passes before it
    PlanError      the programs and options given to `fuse` contradict each other
    TuningError    a tuning database cannot be read or written, or is none
    InvalidInput   the inputs of a call are not what the tenants were traced with
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


class TuningError(CoalesceError, ValueError):
    """A tuning database cannot be read or written, is none, or nothing could be measured."""


class InvalidInput(CoalesceError, ValueError):
    """The inputs of a call are not what the tenants were traced with."""
