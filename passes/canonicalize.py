"""Give each operation one spelling, so that equal work looks equal and dense work looks like a dot.

Before                                                     After
    a(%0:f32[1,1,8,4] | %1:f32[2,6,6,8])                       a(%0:f32[1,1,8,4] | %1:f32[2,6,6,8])
      %2:f32[2,3,3,4] = conv_general_dilated %1 %0 [           %2:f32[2,3,3,8] = slice %1 [... strides=(1,2,2,1)]
        dimension_numbers=NHWC,HWIO,NHWC                       %3:f32[8,4] = reshape %0
        window_strides=(2,2)]                                  %4:f32[2,3,3,4] = dot_general %2 %3
      -> %2                                                    -> %4

- dots: batch dimensions first, then free, then contracting on the left; batch, contracting, free on the right; an
  operand that depends on weights alone stands on the right.
- convolutions: channels last ([N, spatial, C] x [spatial, I, O] -> [N, spatial, O]); 1x1 kernels, with a stride or not,
  and kernels whose windows do not overlap (stride = kernel, as in a patch embedding) are dots.
- unit dimensions come and go through reshape alone; reshapes and transposes of themselves merge; what changes nothing
  goes.
- in commutative equations a literal, else a weight, stands on the right, else what more heavy ops in a row lead to:
  what is short, as a shortcut, is computed first, and can be read by the last kernel of what is long.

The rules per primitive are in canonical_rules; primitives without one stay as they are. preferred_element_type passes
through unchanged, and so does a precision that asks for more than a CPU or a GPU gives by itself. Gives: every heavy op
is in the form that `coalesce.heavy` reads.
"""

from __future__ import annotations

from coalesce.heavy import HEAVY
from coalesce.passes.canonical_rules import RULES
from coalesce.program import Program
from coalesce.rewrite import Rewriter


def canonicalize(program: Program) -> Program:
    weights = [i < program.n_weights for i in range(len(program.jaxpr.jaxpr.invars))]
    main = Rewriter(RULES, counted=HEAVY)(program.jaxpr, weights)
    return program if main is program.jaxpr else program.with_jaxpr(main)
