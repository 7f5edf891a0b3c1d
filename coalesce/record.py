"""Why a heavy op is packed with others, or alone: what `align` decided, kept for explain()."""

from __future__ import annotations

from dataclasses import dataclass

Place = tuple[int, str]  # (family, site)


@dataclass(frozen=True)
class Launched:
    """One kernel launch for packs of different shapes."""

    packs: tuple[Place, ...]
    launch_us: float
    apart_us: float  # the packs in launches of their own

    @property
    def gain_us(self) -> float:
        return self.apart_us - self.launch_us

    def __str__(self) -> str:
        where = " and ".join(f"family {f} at {site}" for f, site in self.packs)
        return f"one launch of {where}: {self.launch_us:.1f} us against {self.apart_us:.1f} apart"


@dataclass(frozen=True)
class Record:
    """The decision about one heavy op of a family, for all of its lanes. Times are predicted, in microseconds."""

    alone_us: float  # as a superkernel of its own family
    reason: str = ""  # why it shares its superkernel with no other family; empty if it does
    company: tuple[Place, ...] = ()  # (family, site) of those that it shares its superkernel with
    shape: str = ""  # what they are padded to
    waste: float = 0.0  # share of this op's FLOPs in the superkernel that is padding, 0 to 1
    packed_us: float = 0.0  # the whole superkernel
    parts_us: float = 0.0  # its members one by one
    movement_us: float = 0.0  # padding and stacking operands; 0 if they arrive stacked
    tails_us: float = 0.0  # what one elementwise kernel behind it saves, where there was one a member
    launched: Launched | None = None  # the launch that its superkernel shares with others

    @property
    def gain_us(self) -> float:
        return self.parts_us - self.packed_us - self.movement_us

    def __str__(self) -> str:
        if self.launched is not None:
            return str(self.launched) if self.reason else f"{self.shared}; {self.launched}"
        return self.shared

    @property
    def shared(self) -> str:
        if self.reason:
            return f"{self.reason} (alone {self.alone_us:.1f} us)"
        others = " and ".join(f"family {f} at {site}" for f, site in self.company)
        padding = f", {self.waste:.1%} padding" if self.waste else ""
        times = f"{self.packed_us:.1f} us and {self.movement_us:.1f} of movement against {self.parts_us:.1f} apart"
        tails = f", and {self.tails_us:.1f} of elementwise kernels" if self.tails_us else ""
        return f"with {others} as {self.shape}{padding}: {times}{tails}"
