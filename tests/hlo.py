"""Reading programs: the operations of StableHLO text, the instructions of optimised HLO text with their sizes."""

import re
from collections.abc import Callable, Container, Iterator, Sequence
from math import prod
from typing import NamedTuple

import coalesce
from coalesce.bundle import packs

# `%name = f32[2,3]{1,0} opcode(...)`, or with several results `%name = (f32[2,3]{1,0}, u32[]) opcode(...)`
INSTRUCTION = re.compile(r"= (\(.*?\)|\w+\[[\d,]*\](?:\{[^}]*\})?) ([\w-]+)\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")


class Instruction(NamedTuple):
    opcode: str
    elements: int  # of its largest result
    text: str


def operations(text: str) -> set[str]:
    """Of StableHLO, as in "gather"; some are printed in quotes, and some with their operands right behind them."""
    return set(re.findall(r"\bstablehlo\.(\w+)", text))


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction that has an array for a result, those inside fusions too."""
    for line in text.splitlines():
        found = INSTRUCTION.search(line)
        if found and (shapes := SHAPE.findall(found[1])):
            largest = max(prod(int(d) for d in shape.split(",") if d) for shape in shapes)
            yield Instruction(found[2], largest, line.strip())


def moves_of_size(text: str, elements: int) -> list[str]:
    """Instructions that make a copy at least as large as `elements`. In a fusion around a product there are none: it
    reads its operands tile by tile wherever they lie, and what its text concatenates is never written."""
    moves = {"copy", "copy-start", "concatenate", "gather", "transpose", "pad", "dynamic-slice"}
    written = "\n\n".join(block for block in text.split("\n\n") if not is_product(block))
    return [i.text for i in instructions(written) if i.opcode in moves and i.elements >= elements]


def is_product(computation: str) -> bool:
    """Whether it is what a fusion computes that a GEMM is part of."""
    fused = computation.lstrip().startswith("%gemm_fusion")
    return fused and any(i.opcode == "dot" for i in instructions(computation))


DEFINITION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\w+\[[\d,]*\](?:\{[^}]*\})?) ([\w-]+)\((.*)$")
REARRANGED = frozenset(
    """bitcast broadcast concatenate convert copy copy-done copy-start dynamic-slice gather get-tuple-element
    optimization-barrier pad reduce-precision reshape reverse slice transpose""".split()
)
NOT_WRITTEN = frozenset({"bitcast", "get-tuple-element", "optimization-barrier", "parameter"})


class Defined(NamedTuple):
    name: str
    opcode: str
    elements: int
    operands: list[str]
    called: str  # the computation of a fusion
    text: str


def computations(text: str) -> dict[str, list[Defined]]:
    """Of optimised HLO text, by name; that of the program is "ENTRY"."""
    found: dict[str, list[Defined]] = {}
    own: list[Defined] = []
    for line in text.splitlines():
        if line.rstrip().endswith("{") and " = " not in line.split("(")[0]:
            own = found["ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%")] = []
        elif match := DEFINITION.match(line):
            name, shape, opcode, rest = match.groups()
            elements = max([prod(int(d) for d in one.split(",") if d) for one in SHAPE.findall(shape)], default=0)
            called = re.search(r"calls=%?([\w.-]+)", rest)
            given = rest.partition(")")[0]
            names = [given.strip()] if opcode == "parameter" else re.findall(r"%([\w.-]+)", given)
            own.append(Defined(name, opcode, elements, names, called[1] if called else "", line.strip()))
    return found


def rearranged(text: str, parameters: Container[int], elements: int) -> list[str]:
    """Instructions that write once more what some of a program's parameters hold, in whatever order, at least so many
    elements of it: copies, pads, gathers and the like, also as all that a fusion does."""
    known = computations(text)

    def same(body: Sequence[Defined], given: Callable[[int], bool]) -> set[str]:
        """What is nothing but parameters, rearranged."""
        pure: set[str] = set()
        for own in body:
            if own.opcode == "parameter":
                if given(int(own.operands[0])):
                    pure.add(own.name)
            elif own.opcode in REARRANGED and any(name in pure for name in own.operands):
                pure.add(own.name)
            elif own.opcode == "fusion" and own.called in known:
                inner = known[own.called]
                within = same(inner, lambda n, own=own: own.operands[n] in pure)
                if inner[-1].name in within:
                    pure.add(own.name)
        return pure

    entry = known["ENTRY"]
    found = same(entry, lambda n: n in parameters)
    written = [own for own in entry if own.name in found and own.opcode not in NOT_WRITTEN]
    return [own.text for own in written if own.elements >= elements]


def weights_written_again(fused: coalesce.Fused) -> list[str]:
    """Of what its products multiply, down to the smallest of them, a tenant's."""
    smallest = min(prod(pack.op.rhs.shape) for pack in packs(fused.bundle.schedule))
    return rearranged(fused.as_text(), range(len(fused.bundle.arrays)), smallest)
