"""Reading programs: the operations of StableHLO text, the instructions of optimised HLO text with their sizes."""

import re
from collections.abc import Container, Iterator, Sequence
from math import prod
from typing import NamedTuple

import coalesce
from coalesce.bundle import arguments, packs

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


DEFINITION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (\(.*?\)|\w+\[[\d,]*\](?:\{[^}]*\})?) ([\w-]+)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
REARRANGED = frozenset(
    """broadcast concatenate convert copy copy-done copy-start dynamic-slice dynamic-update-slice gather pad
    reduce-precision reshape reverse slice transpose""".split()
)
PASSED_ON = frozenset({"bitcast", "optimization-barrier"})
Same = bool | list[bool]  # of a tuple each of its elements


class Defined(NamedTuple):
    name: str
    opcode: str
    elements: int
    operands: list[str]
    called: list[str]  # computations: of a fusion, a call, the body of a loop, branches
    index: int  # of an element of a tuple
    is_root: bool
    text: str


def computations(text: str) -> dict[str, list[Defined]]:
    """Of optimised HLO text, by name; that of the program is "ENTRY"."""
    found: dict[str, list[Defined]] = {}
    own: list[Defined] = []
    for line in text.splitlines():
        if line.rstrip().endswith("{") and " = " not in line.split("(")[0]:
            own = found["ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%")] = []
        elif match := DEFINITION.match(line):
            root, name, shape, opcode, rest = match.groups()
            elements = max([prod(int(d) for d in one.split(",") if d) for one in SHAPE.findall(shape)], default=0)
            given = rest.partition(")")[0]
            names = [given.strip()] if opcode == "parameter" else re.findall(r"%([\w.-]+)", given)
            called = CALLED.findall(rest) if opcode in ("fusion", "call", "while", "conditional", "async-start") else []
            called += [one.strip().lstrip("%") for own in BRANCHES.findall(rest) for one in own.split(",")]
            index = re.search(r"index=(\d+)", rest)
            own.append(
                Defined(name, opcode, elements, names, called, int(index[1]) if index else 0, bool(root), line.strip())
            )
    return found


def rearranged(text: str, parameters: Container[int], elements: int) -> list[str]:
    """Instructions that write once more what some of a program's parameters hold, in whatever order, at least so many
    elements of it: copies, pads, gathers and the like, also as all that a fusion does, also in loops and branches."""
    known = computations(text)
    found: list[str] = []

    def walk(body: Sequence[Defined], given: Sequence[Same], writes: bool) -> Same:
        """What of the root is nothing but parameters, rearranged. What is inside of a fusion is not written."""
        same: dict[str, Same] = {}
        root: Same = False
        for own in body:
            if own.opcode == "parameter":
                same[own.name] = given[int(own.operands[0])] if int(own.operands[0]) < len(given) else False
                continue
            of = [same.get(name, False) for name in own.operands]
            if own.opcode == "tuple":
                same[own.name] = [one is True for one in of]
            elif own.opcode == "get-tuple-element":
                first = of[0] if of else False
                same[own.name] = first[own.index] if isinstance(first, list) else first
            elif own.called:
                branches, is_written = own.opcode == "conditional", own.opcode != "fusion"
                each = [
                    walk(known[name], of[i + 1 : i + 2] if branches else of, is_written)
                    for i, name in enumerate(own.called)
                    if name in known
                ]
                same[own.name] = each[0] if each else False
                if writes and own.opcode == "fusion" and own.elements >= elements and any_of(same[own.name]):
                    found.append(own.text)
            elif own.opcode in PASSED_ON:
                same[own.name] = of[0] if of else False
            elif own.opcode in REARRANGED and any(one is True for one in of):
                same[own.name] = True
                if writes and own.elements >= elements:
                    found.append(own.text)
            if own.is_root:
                root = same.get(own.name, False)
        return root

    entry = known["ENTRY"]
    count = sum(own.opcode == "parameter" for own in entry)
    walk(entry, [n in parameters for n in range(count)], True)
    return found


def any_of(same: Same) -> bool:
    return any(same) if isinstance(same, list) else same


def weights_written_again(fused: coalesce.Fused) -> list[str]:
    """Of what its products multiply, down to the smallest of them, a tenant's."""
    smallest = min(prod(pack.op.rhs.shape) for pack in packs(fused.bundle.schedule))
    return rearranged(fused.as_text(), range(len(arguments(fused.bundle))), smallest)
