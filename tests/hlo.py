"""Reading programs: the operations of StableHLO text, the instructions of optimised HLO text with their sizes."""

import re
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

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
