"""Coalesce: many tenants' JAX programs as one, with their equal work in shared superkernels.

prog  = coalesce.trace(fn, params, *example_inputs, name="a")
fused = coalesce.fuse([prog_a, prog_b, ...])
ys    = fused([(x_a,), (x_b,), ...])
"""

from coalesce.compile import fuse as fuse, Fused as Fused
from coalesce.errors import (
    CoalesceError as CoalesceError,
    InvalidInput as InvalidInput,
    PassError as PassError,
    PlanError as PlanError,
    TraceError as TraceError,
)
from coalesce.program import Program as Program
from coalesce.report import Report as Report
from coalesce.trace import trace as trace
