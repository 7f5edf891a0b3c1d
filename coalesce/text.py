"""The stable text form of jaxprs, ours and versioned by us: the format of goldens, `str(program)` and `explain()`.

    a(%0:f32[4,3] | %1:f32[2,4])
      %2:f32[2,3] = dot_general %1 %0 [dimensions=(1),(0);(),() precision=(HIGHEST,HIGHEST)]
      -> %2

Weights stand before the bar and request inputs after it. Names count up in the order of binding; regions of `scan`,
`while` and `cond` are indented below their equation and see outer names only through their own arguments.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax import lax
from jax.dtypes import float0
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J

# Parameters that say nothing about what is computed, or that a control-flow line spells in its own way.
HIDDEN = {
    "sharding", "out_sharding", "name", "linear", "reverse", "jaxpr", "branches", "cond_jaxpr", "body_jaxpr",
    "num_consts", "num_carry", "ft_in", "ft_out", "cond_nconsts", "body_nconsts", "_split_transpose", "unroll",
    "length", "np_printoptions", "logging_record", "in_tree", "static_args", "has_placeholders",
}  # fmt: skip


class Names:
    """Numbers variables in the order of binding; one object a printed program."""

    def __init__(self) -> None:
        self.of: dict[Any, str] = {}

    def __call__(self, atom: Any) -> str:
        if isinstance(atom, J.Literal):
            return scalar(J.literal_value(atom))
        if J.is_drop(atom):
            return "_"
        return self.of.setdefault(atom, f"%{len(self.of)}")

    def typed(self, var: Any) -> str:
        return f"{self(var)}:{J.short(var.aval)}"


def program_lines(name: str, jaxpr: ClosedJaxpr, n_weights: int, names: Names | None = None) -> Iterator[str]:
    names = names or Names()
    args = J.invars(jaxpr)
    weights, inputs = (", ".join(map(names.typed, part)) for part in (args[:n_weights], args[n_weights:]))
    yield f"{name}({weights} | {inputs})"
    yield from body_lines(jaxpr, names, "  ")


def body_lines(jaxpr: ClosedJaxpr, names: Names, indent: str) -> Iterator[str]:
    for eqn in jaxpr.jaxpr.eqns:
        yield indent + equation(eqn, names)
        yield from region_lines(eqn, names, indent + "  ")
    yield f"{indent}-> {', '.join(map(names, J.outvars(jaxpr)))}".rstrip()


def region_lines(eqn: J.Eqn, names: Names, indent: str) -> Iterator[str]:
    called = J.callee(eqn)
    pairs = [("call", called)] if called is not None else zip(J.region_labels(eqn), J.regions(eqn), strict=True)
    for label, region in pairs:
        yield f"{indent}{label}({', '.join(map(names.typed, J.invars(region)))})"
        yield from body_lines(region, names, indent + "  ")


def equation(eqn: J.Eqn, names: Names) -> str:
    outs = ", ".join("_" if J.is_drop(v) else names.typed(v) for v in eqn.outvars)
    ins = "".join(f" {names(a)}" for a in eqn.invars)
    text = params(eqn)
    return f"{outs + ' = ' if outs else ''}{eqn.primitive.name}{ins}{f' [{text}]' if text else ''}"


def params(eqn: J.Eqn) -> str:
    """The parameters that say what is computed, sorted by name, nothing that varies between runs or JAX versions."""
    shown = shown_params(eqn.params)
    if J.callee(eqn) is not None:
        return f"name={eqn.params['name']}" if "name" in eqn.params else ""
    match eqn.primitive.name:
        case "dot_general":
            (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
            shown = [s for s in shown if not s.startswith("dimension_numbers")]
            shown.insert(0, f"dimensions={value(lc)},{value(rc)};{value(lb)},{value(rb)}")
        case "scan":
            scan = J.as_scan(eqn)
            shown = [f"length={scan.length}", f"consts={len(scan.consts)}", f"carry={len(scan.init)}"]
            shown += ["reverse"] if scan.reverse else []
        case "while":
            loop = J.as_while(eqn)
            shown = [f"cond_consts={len(loop.cond_consts)}", f"body_consts={len(loop.body_consts)}"]
    return " ".join(shown)


def shown_params(params: Mapping[str, Any]) -> list[str]:
    return [
        f"{k}={value(v)}"
        for k, v in sorted(params.items())
        if k not in HIDDEN and says_something(v) and not is_default(k, v)
    ]


def says_something(v: Any) -> bool:
    return v is not None and v is not False and not (isinstance(v, tuple) and not v)


def is_default(key: str, v: Any) -> bool:
    """Whether a convolution parameter has the value that changes nothing."""
    return key in ("lhs_dilation", "rhs_dilation", "feature_group_count", "batch_group_count") and not np.any(
        np.asarray(v) != 1
    )


def value(v: Any) -> str:
    match v:
        case lax.ConvDimensionNumbers():
            return f"{conv_layout(v.lhs_spec, 'NC')},{conv_layout(v.rhs_spec, 'OI')},{conv_layout(v.out_spec, 'NC')}"
        case lax.GatherDimensionNumbers() | lax.ScatterDimensionNumbers():
            return f"({' '.join(f'{k}={value(getattr(v, k))}' for k in v._fields)})"
        case enum.Enum():
            return v.name
        case _ if hasattr(v, "tag") and hasattr(v, "name"):  # a PRNG implementation
            return str(v.name)
        case np.dtype():
            return v.name
        case bool() | int() | float() | str():
            return str(v)
        case tuple() | list():
            return f"({','.join(map(value, v))})"
        case _ if isinstance(v, type) and issubclass(v, np.generic):
            return np.dtype(v).name
        case _ if J.is_jaxpr(v):
            return "{" + "; ".join(line.strip() for line in body_lines(J.closed(v), Names(), "")) + "}"
        case _ if callable(v):
            return f"<{getattr(v, '__name__', type(v).__name__)}>"
        case np.ndarray() | np.generic():
            return scalar(v)
    return f"<{type(v).__name__}>" if " at 0x" in repr(v) else repr(v)


def conv_layout(spec: Sequence[int], names: str) -> str:
    letters = [""] * len(spec)
    letters[spec[0]], letters[spec[1]] = names[0], names[1]
    for i, dim in enumerate(spec[2:]):
        letters[dim] = "DHW"[3 - len(spec) + 2 + i] if len(spec) <= 5 else str(i)
    return "".join(letters)


def scalar(v: Any) -> str:
    array = np.asarray(v)
    if array.ndim:
        return f"<{array.dtype.name}{list(array.shape)}>"
    if array.dtype == float0:
        return "float0"  # what a derivative by an integer is: it has no value
    if array.dtype.kind in "biuc":
        return str(array.item())
    return f"{float(array):.9g}"
