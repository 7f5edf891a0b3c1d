"""The combinatorial part of packing: which operations of several programs should run as one. Knows nothing of programs.

from coalesce.packing import align, Node, Problem
packing = align(Problem(nodes, before, gain, bonus))
"""

from coalesce.packing.align import align as align, Packing as Packing
from coalesce.packing.problem import Node as Node, Problem as Problem
