"""Products that may run in one launch, as a small program of their own: chained, or one after the other in the kernels
that are fastest for each alone, as far as those are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from coalesce.blocks import Blocks
from coalesce.bundle import Bundle, Pack
from coalesce.epilogues import epilogue_reads, result_of
from coalesce.heavy import HeavyOp
from coalesce.kernels import chained, FUSING, indexed_gemm, VERSION
from coalesce.kernels.epilogue import Epilogue
from coalesce.measuring.case import steps_of, work_of
from coalesce.passes.chain_products import Scope
from coalesce.tuning import Key, Tuned, tuned_on
from coalesce.tuning.candidates import Candidate
from coalesce.tuning.chains import APART, candidates, Chain, CHAINED

Read = jax.ShapeDtypeStruct | int  # an array, or the result of a product of the chain, by its number


@dataclass(frozen=True)
class Product:
    op: HeavyOp
    epilogue: Epilogue | None
    lhs: Read
    reads: tuple[Read, ...]  # of the epilogue
    written: bool
    steps: str


@dataclass(frozen=True)
class ChainCase:
    """One chain to tune, as a `Case`: its first product's operands go before what all others read."""

    key: Key
    chain: Chain
    products: tuple[Product, ...]
    times: int

    @property
    def steps(self) -> str:
        return "; ".join(product.steps for product in self.products)

    @property
    def lhs(self) -> jax.ShapeDtypeStruct:
        return self.arrays[0]

    def rhs(self, kernel: str) -> jax.ShapeDtypeStruct:
        return self.arrays[1]

    @property
    def reads(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return self.arrays[2:]

    @property
    def arrays(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What each product reads that none of the others computes: left operands, weights, and its epilogue's."""
        each = [own for p in self.products for own in (p.lhs, self.weights(p.op), *p.reads)]
        return tuple(own for own in each if not isinstance(own, int))

    def weights(self, op: HeavyOp) -> jax.ShapeDtypeStruct:
        row = indexed_gemm.layout(op).of(op.rhs.shape)
        return jax.ShapeDtypeStruct((self.key.width, *row), op.rhs.dtype)

    def candidates(self, platform: str, on_hopper: bool) -> list[Candidate]:
        return [] if platform == "cpu" else candidates(self.chain, self.key.rows)

    def usual(self, tuned: Tuned, platform: str) -> Candidate:
        """What runs it by what was tuned so far."""
        return APART, None

    def run(self, kernel: str, blocks: Blocks | None) -> Callable[..., Any]:
        """(lhs, rhs, *reads) -> what the chain leaves."""

        def as_one(*arrays: Any) -> Any:
            assert blocks, "a chain without blocks"
            links = [
                chained.Link(p.op, lhs, rhs, p.epilogue, given, p.written)
                for p, (lhs, rhs, *given) in zip(self.products, self.operands(arrays), strict=True)
            ]
            return [y for y in chained.run(links, blocks) if y is not None]

        def in_turn(*arrays: Any) -> Any:
            tuned, done = tuned_on(self.key.device), []
            for p, own, reads in zip(self.products, self.operands(arrays), self.numbers, strict=True):
                lhs, rhs, *given = [y if at is None else done[at] for y, at in zip(own, reads, strict=True)]
                done.append(alone(p, lhs, rhs, given, tuned, self.key))
            return [y for p, y in zip(self.products, done, strict=True) if p.written]

        return as_one if kernel == CHAINED else in_turn

    @property
    def numbers(self) -> list[list[int | None]]:
        """Of each product's operands, which product computes it."""
        each = [(p.lhs, None, *p.reads) for p in self.products]
        return [[own if isinstance(own, int) else None for own in reads] for reads in each]

    def operands(self, arrays: Sequence[Any]) -> list[list[Any]]:
        """Each product's left operand, weights, and its epilogue's; None is what another one computes."""
        left = iter(arrays)
        return [[next(left) if at is None else None for at in reads] for reads in self.numbers]


def alone(product: Product, lhs: Any, rhs: Any, given: Sequence[Any], tuned: Tuned, key: Key) -> Any:
    """In the kernel that is fastest for it, of those that read its weights as the chain does."""
    kernel = tuned.kernel(product.op, key.width, key.rows)
    kernel = kernel if kernel in ("indexed_gemm", "mosaic_gemm") else "indexed_gemm"
    blocks = tuned.blocks(product.op, key.width, key.rows, kernel)
    return FUSING[kernel].run(product.op, lhs, rhs, epilogue=product.epilogue, operands=given, blocks=blocks)


def chains_in(bundle: Bundle, device: str) -> list[ChainCase]:
    """What could be chained in a plan, each once."""
    scope = Scope(bundle)
    found: dict[Key, list[list[Pack]]] = {}
    chains: dict[Key, Chain] = {}
    for one in scope.chains():
        chain, width, rows = scope.size(one)
        key = Key(device, VERSION, str(chain), width, rows)
        chains[key] = chain
        found.setdefault(key, []).append(scope.launch(one, Blocks(64, 64, 64)))
    return [ChainCase(key, chains[key], products_of(same[0], key), len(same)) for key, same in found.items()]


def products_of(packs: Sequence[Pack], key: Key) -> tuple[Product, ...]:
    number: dict[Any, int] = {}
    products: list[Product] = []
    for i, pack in enumerate(packs):
        epilogue, arrays = work_of(pack, key)
        lhs = number.get(pack.members[0].eqn.invars[0])
        struct = jax.ShapeDtypeStruct((key.width, key.rows, *pack.op.lhs.shape), pack.op.lhs.dtype)
        reads = tuple(number.get(a, struct) for a, struct in zip(epilogue_reads(pack), arrays, strict=True))
        own = struct if lhs is None else lhs
        products.append(Product(pack.op, epilogue, own, reads, not pack.inner, steps_of(pack)))
        number[result_of(pack)] = i
    return tuple(products)
