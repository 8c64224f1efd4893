"""One table of devices: what each can do at best, and where the figure comes from. Everything modelled starts here."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Mapping, Sequence

TERA, GIGA = 1e12, 1e9
MIB = 2**20

_A100 = "NVIDIA A100 datasheet (June 2021) and Ampere architecture white paper"
_H100 = "NVIDIA H100 datasheet and Hopper architecture white paper; figures without sparsity"
_H200 = "NVIDIA H200 datasheet; compute as H100 SXM; figures without sparsity"
_L4 = "NVIDIA L4 datasheet and Ada architecture white paper; figures without sparsity"


@dataclasses.dataclass(frozen=True)
class Device:
    """Ceilings of one device.

    `flops`: FLOP/s (int8: operations/s) of dense matrix products by dtype, at the boost clock. `bandwidth`: bytes/s of memory.
    `special`: tanh or exp instructions a second (16 a clock and SM on NVIDIA GPUs; CUDA C++ Programming Guide, arithmetic
    instructions); on a CPU SiLU evaluations, which PyTorch vectorises. `lanes`: instructions of one thread a second (four
    schedulers an SM issue one for 32 threads each clock; same guide), 0 where that is no limit. `launch`: seconds that one more
    kernel costs inside a CUDA graph, on a CPU one more operator. `source`: where the figures come from, `measured` where a run
    replaced them.

    Only a run can tell two more: `products`, (FLOPs, seconds) of square matrix products by the vendor's library, launch
    included; and `chains`, (seconds to start and finish, seconds a step of 64 keys) of one attention program alone on the GPU,
    by kind of bias, with `resident` such programs on an SM.
    """

    name: str
    arch: str
    flops: dict[str, float]
    bandwidth: float
    memory: float
    sms: int
    special: float
    l2: float
    shared_per_sm: float
    launch: float
    source: str
    measured: bool = False
    lanes: float = 0.0
    products: tuple[tuple[float, float], ...] = ()
    chains: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    resident: int = 1

    def ridge(self, dtype: str) -> float:
        """FLOP per byte above which a matrix product is bound by arithmetic, not by memory."""
        return self.peak(dtype) / self.bandwidth

    def peak(self, dtype: str) -> float:
        """FLOP/s of that dtype. Raises ValueError naming those there are."""
        if dtype not in self.flops:
            raise ValueError(f"{self.name} has no figure for dtype {dtype!r}; use one of {', '.join(self.flops)}")
        return self.flops[dtype]

    def product_seconds(self, flops: float) -> float:
        """Seconds of a square product of as many FLOPs, launch included, between the two measured sizes nearest to it.

        Below the smallest it takes as long as that one, above the largest it runs at that one's rate.
        """
        (smallest, quickest), *_ = self.products
        if flops <= smallest:
            return quickest
        for (size, seconds), (larger, slower) in itertools.pairwise(self.products):
            if flops <= larger:
                power = math.log(slower / seconds) / math.log(larger / size)
                return seconds * (flops / size) ** power
        size, seconds = self.products[-1]
        return seconds * flops / size

    def with_ceilings(
        self, *, dtype: str, flops: float | None = None, bandwidth: float | None = None, launch: float | None = None,
        products: Sequence[tuple[float, float]] = (), chains: Mapping[str, tuple[float, float]] | None = None,
        resident: int | None = None, source: str,
    ) -> Device:  # fmt: skip
        """The same device with ceilings that a run reached (cuBLAS, a copy, empty kernels) instead of the datasheet's."""
        return dataclasses.replace(
            self,
            flops=self.flops | ({dtype: flops} if flops else {}),
            bandwidth=bandwidth or self.bandwidth,
            launch=launch or self.launch,
            products=tuple(sorted(products)) or self.products,
            chains=dict(chains or self.chains),
            resident=resident or self.resident,
            source=source,
            measured=True,
        )


def _nvidia(name, arch, bf16, fp32, int8, bandwidth, memory, sms, clock, l2, shared, source) -> Device:
    flops = {
        "bf16": bf16 * TERA,
        "fp16": bf16 * TERA,
        "tf32": bf16 / 2 * TERA,
        "fp32": fp32 * TERA,
        "int8": int8 * TERA,
    }
    special, lanes = (width * sms * clock * GIGA for width in (16, 128))
    return Device(
        name, arch, flops, bandwidth * GIGA, memory * GIGA, sms, special, l2 * MIB, shared * 1024, launch=1.5e-6, source=source,
        lanes=lanes,
    )  # fmt: skip


DEVICES = {
    device.name: device
    for device in (
        _nvidia("A100-SXM4-40GB", "sm_80", 312, 19.5, 624, 1555, 40, 108, 1.410, 40, 164, _A100),
        _nvidia("A100-SXM4-80GB", "sm_80", 312, 19.5, 624, 2039, 80, 108, 1.410, 40, 164, _A100),
        _nvidia("A100-PCIe-40GB", "sm_80", 312, 19.5, 624, 1555, 40, 108, 1.410, 40, 164, _A100),
        _nvidia("A100-PCIe-80GB", "sm_80", 312, 19.5, 624, 1935, 80, 108, 1.410, 40, 164, _A100),
        _nvidia("H100-SXM5-80GB", "sm_90", 989.4, 66.9, 1978.9, 3350, 80, 132, 1.830, 50, 228, _H100),
        _nvidia("H200-SXM-141GB", "sm_90", 989.4, 66.9, 1978.9, 4800, 141, 132, 1.830, 50, 228, _H200),
        _nvidia("L4-24GB", "sm_89", 121, 30.3, 242, 300, 24, 58, 2.040, 48, 100, _L4),
    )
}
"""Datasheet figures. The launch cost of 1.5 microseconds is an assumption that `with_ceilings` replaces by a measured one."""


def device(name: str) -> Device:
    """The device of that name; "cpu" measures this machine. Raises ValueError naming the known ones."""
    if name == "cpu":
        return this_cpu()
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is unknown: use cpu or one of {', '.join(DEVICES)}")
    return DEVICES[name]


@functools.lru_cache
def this_cpu(size: int = 1024) -> Device:
    """This machine's CPU as measured now (about a second): a float32 product, a copy, SiLU in cache, the smallest operator.

    A ceiling is what can be reached, so each is the fastest sample: the median would hold whatever else the machine does.
    """
    import torch

    from hstu_lab.environment import device_name
    from hstu_lab.measure import measure, peak_copy_bandwidth

    a, cached, one = torch.randn(size, size), torch.randn(size // 4, size // 4), torch.ones(1)
    product = measure(lambda: a @ a, name="matmul", repeats=5, device="cpu")
    silu = measure(lambda: torch.nn.functional.silu(cached), name="silu", repeats=5, min_time=0.05, device="cpu")
    launch = measure(lambda: torch.add(one, 1), name="smallest operator", repeats=20, min_time=0.02, device="cpu")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    copy, threads = peak_copy_bandwidth("cpu"), torch.get_num_threads()
    return Device(
        f"{'CPU' if torch.cuda.is_available() else device_name()}, {threads} thread{'s' * (threads > 1)}",
        "cpu",
        {"fp32": 2 * size**3 / product.min},
        copy.work["bytes"] / copy.min,
        memory,
        1,
        cached.numel() / silu.min,
        0,
        0,
        launch.min,
        "measured here",
        True,
    )
