"""What the cost model knows about a device: one table of numbers, each with where it comes from.

Units: TFLOP/s (10^12), GB/s (10^9), bytes, microseconds. Rates are what large work reaches, not what a datasheet
promises. Where a device was not measured they are its datasheet's, scaled by what the H100 reached of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rates:
    """TFLOP/s of a large matrix product by arithmetic; None: no units for it, so it runs as float32."""

    f32: float
    f64: float
    tf32: float | None = None
    f16: float | None = None
    bf16: float | None = None
    int8: float | None = None


@dataclass(frozen=True)
class Tile:
    """The part of a result that one core computes at a time, and how much of the core's peak it reaches."""

    m: int
    n: int
    efficiency: float


@dataclass(frozen=True)
class Device:
    """See the H100 and the CPU below for what each number means there."""

    name: str
    platform: str  # as JAX names it: "cpu", "gpu"
    cores: int  # streaming multiprocessors of a GPU
    rates: Rates
    memory_gbs: float  # read plus write
    cache_gbs: float  # of what one kernel writes and the next one reads
    cache_bytes: int  # how much of that there may be; 0: all of it counts as memory traffic
    resident_bytes: int  # weights of a loop that its steps find in a cache again; 0: not known of any
    resident_gbs: float  # how fast they are read there
    overlap: float  # how much of the shorter of arithmetic and traffic hides behind the longer
    launch_us: float  # one more kernel in a program, before it has done any work
    call_us: float  # one more call of a program: what the device waits for it, if nothing else is queued
    dispatch_us: float  # one more call of a program, from the host, until it is back, without arguments and launches
    argument_us: float  # of the host: one more argument of a call
    graph_us: float  # of the host: one more kernel of a CUDA graph, none of which runs before all are launched
    single_us: float  # of the host: one more kernel outside of graphs, which runs as soon as it is launched
    pause_us: float  # from the end of an executable to the next one, which was launched long before
    hand_us: float  # and that much more, if that one reads what it leaves
    loop_us: float  # one more iteration of a loop, besides its body
    loop_wait: float  # how much longer, as a share, steps take that wait for another loop's
    conv_us: float  # one more convolution of the vendor's library, besides its product
    conv_efficiency: float  # what such a convolution reaches of the rate of a dot
    grouped_efficiency: float  # and one with feature groups
    taps_efficiency: float  # what a sum over a window's taps reaches of `rates.f32`, or of f64
    tiles: tuple[Tile, ...]
    k_step: int  # the contraction is taken in steps of so many
    splits: tuple[int, ...]  # parts into which the contraction may be cut where tiles are few
    margin: float  # what packing must be predicted to win, as a share of the time it changes: less may be an error

    @property
    def captured(self) -> Device:
        """For programs that are launched as CUDA graphs of our own, whose kernels and arguments cost the host nothing.
        Measured on an H200: five small kernels took 18 us until they were back, of many rounds in a row 13."""
        if self.platform != "gpu":
            return self
        return replace(self, dispatch_us=12.0, argument_us=0.0, graph_us=0.0, single_us=0.0, pause_us=0.0, hand_us=0.0)


# A larger tile reads less for each product. `Rates` is what the largest reach; 64x64 was fitted to float32 products of
# 3136x576x64, one a pack and 64 a pack, and the others follow the ratio of products to operands read.
GPU_TILES = (
    Tile(256, 128, 1.0),
    Tile(128, 256, 1.0),
    Tile(128, 128, 0.85),
    Tile(128, 64, 0.6),
    Tile(64, 128, 0.6),
    Tile(64, 64, 0.42),
    Tile(64, 32, 0.3),
    Tile(32, 64, 0.3),
    Tile(32, 32, 0.2),
)

H100 = Device(
    name="H100",
    platform="gpu",
    cores=132,  # datasheet (SXM5)
    # Measured: f32, tf32 and bf16 at 8192^3, where the datasheet says 67, 494 and 989. f16 has the units of bf16; f64
    # (datasheet 67) and int8 (1,979) scaled as tf32.
    rates=Rates(f32=50.0, f64=47.0, tf32=349.0, f16=640.0, bf16=640.0, int8=1400.0),
    memory_gbs=3000.0,  # measured copy; datasheet 3,350
    cache_gbs=3000.0,
    cache_bytes=0,  # part of what kernels hand on stays in the 50 MB L2, but packs of many lanes outgrow it
    # Measured on an H200: LSTMs and GRUs of 512 units, 25 steps. 34 MB of weights stay in the 50 MB L2, in bfloat16 42
    # too, and 50 do not. Beside launches they are read at 5,100 to 6,300 GB/s in float32, 4,300 to 5,600 in bfloat16.
    resident_bytes=36_000_000,
    resident_gbs=4500.0,
    overlap=1.0,
    launch_us=1.7,  # measured: 384 small kernels in one program took 850 us, their work and all
    call_us=41.0,  # measured: calls with two arguments, one after the other without waiting
    # Fitted to calls that were measured until they were back: with 19 arguments and 62 kernels 183 us, 97 of them for
    # the launch of a graph (520 without graphs); with 104 and 361 507 us as one program, 614 as two. An argument: calls
    # of 2 to 2,500 took 41 to 3,319 us.
    dispatch_us=107.0,
    argument_us=0.95,
    graph_us=0.9,
    single_us=7.0,
    # Estimates: cuts won 10 to 60 us less than was predicted without both, and two programs in turn 50 to 130.
    pause_us=20.0,
    hand_us=5.0,
    # Measured: 8 LSTMs of 25 steps, unrolled or not. Loops are no part of CUDA graphs: each iteration launches its own.
    loop_us=4.2,
    loop_wait=0.0,  # kernels run one after the other, whatever loop they belong to
    conv_us=15.0,  # measured: 16 small convolutions in one program, 16 to 28 us each, outside CUDA graphs
    conv_efficiency=0.5,  # of the same measurement
    grouped_efficiency=0.25,  # of the same, as one grouped convolution: from 10 to 250 TFLOP/s
    # Counted in what XLA compiles for 3x3 windows of bfloat16: 72 FLOPs of a thread take 350 to 430 instructions, where
    # each could be two FLOPs. To be measured.
    taps_efficiency=0.09,
    tiles=GPU_TILES,
    k_step=64,
    splits=(1, 2, 4, 8, 16),
    margin=0.05,  # an estimate
)

# The H100's chip with faster memory: datasheet 4,800 GB/s, scaled as the H100's to 4,300; ResNet-50 gained less.
H200 = replace(H100, name="H200", memory_gbs=4000.0, cache_gbs=4000.0)

A100 = replace(
    H100,
    name="A100",
    cores=108,  # datasheet (SXM4, 80 GB), as the rest
    rates=Rates(f32=14.6, f64=13.8, tf32=110.0, f16=202.0, bf16=202.0, int8=440.0),  # 19.5, 19.5, 156, 312, 312, 624
    memory_gbs=1820.0,  # 2,039
    cache_gbs=1820.0,
    resident_bytes=28_000_000,  # of 40 MB
    resident_gbs=2700.0,
)

V100 = replace(
    H100,
    name="V100",
    cores=80,  # datasheet (SXM2), as the rest
    rates=Rates(f32=11.7, f64=5.5, f16=81.0),  # 15.7, 7.8, 125
    memory_gbs=810.0,  # 900
    cache_gbs=810.0,
    resident_bytes=4_300_000,  # of 6 MB
    resident_gbs=1200.0,
)

# A small server share: two cores with AVX-512, measured there (JAX 0.10 to 0.12) while nothing else ran. Absolute times
# scale with the cores; what packing wins, which is little, hardly does.
CPU = Device(
    name="CPU",
    platform="cpu",
    cores=2,
    rates=Rates(f32=0.47, f64=0.23, bf16=0.8),
    memory_gbs=42.0,  # weights, read once
    cache_gbs=200.0,  # stacks and elementwise work of up to 12 MB
    cache_bytes=12_000_000,
    resident_bytes=0,
    resident_gbs=200.0,
    overlap=0.5,  # operands are repacked before the product, from memory that the product then finds in a cache
    launch_us=0.5,
    call_us=100.0,  # an estimate: 30 were measured for a call itself, the rest is threads that hand it on
    dispatch_us=30.0,  # measured, of a call of few arguments
    argument_us=0.0,  # a tenth
    graph_us=0.0,  # no graphs: a kernel runs as soon as there is a thread for it
    single_us=0.0,  # the host is the device
    pause_us=0.0,
    hand_us=0.0,
    loop_us=0.0,  # about 0.5, which two loops that run at once on two threads win as well
    # An LSTM and a GRU of 64 to 768 in one loop, with nothing packed in it, took 1.10 to 1.14 times as long, and up to
    # 1.6 times once the weights of both outgrew the cache that those of one fit.
    loop_wait=0.2,
    conv_us=10.0,
    conv_efficiency=0.95,
    grouped_efficiency=0.06,  # a plain loop, not a product
    taps_efficiency=0.05,  # 3x3 of 14x14x384 and 24x24x144, 4 lanes: 24 to 40 GFLOP/s beside other work
    tiles=(Tile(8, 16, 1.0),),
    k_step=8,
    splits=(1,),
    margin=0.1,  # packs of all models that were to win less, 0.2% of a round, lost 2.5% of it
)

DEVICES: Mapping[str, Device] = {device.name: device for device in (H100, H200, A100, V100, CPU)}


def device_of(platform: str, kind: str | None = None) -> Device:
    """The entry for JAX's platform and `device_kind`, as in ("gpu", "NVIDIA H100 80GB HBM3").

    A GPU that the table does not name is taken for an H100. Any other platform is taken for the CPU, where packing pays
    least: better to leave ops alone than to pack them by another device's numbers.
    """
    if platform not in ("gpu", "cuda", "rocm"):
        return CPU
    gpus = [device for device in DEVICES.values() if device.platform == "gpu"]
    return next((device for device in gpus if device.name in (kind or "").upper()), H100)
