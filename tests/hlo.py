"""Reading optimised HLO text: instructions with their result sizes."""

import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

# `%name = f32[2,3]{1,0} opcode(...)`
INSTRUCTION = re.compile(r"= (\w+)\[([\d,]*)\](?:\{[^}]*\})? ([\w-]+)\(")


class Instruction(NamedTuple):
    opcode: str
    elements: int
    text: str


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction with one array for a result, those inside fusions too."""
    for line in text.splitlines():
        found = INSTRUCTION.search(line)
        if found:
            shape = [int(d) for d in found[2].split(",") if d]
            yield Instruction(found[3], prod(shape), line.strip())


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
