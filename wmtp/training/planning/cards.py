"""What cards can do: from their makers' data sheets, and this machine's processor, measured."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from wmtp.config import ConfigError


@dataclass(frozen=True)
class Card:
    """A device: what it holds, and how fast it is at best.

    Attributes:
        memory: bytes.
        bf16, fp32: floating-point operations a second of dense products; fp32 without tensor cores.
        bandwidth: bytes a second between the processor and its memory.
        link: bytes a second that it receives from the other cards of its node, and sends at the same time.
        host: bytes a second that it receives from host memory, and sends at the same time.
        products: share of the peak that large products of matrices reach.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    host: float
    products: float

    @property
    def is_gpu(self) -> bool:
        return not self.name.startswith("CPU")


# NVIDIA's data sheets, of the SXM versions; memory as torch sees it, without the driver's part. An H200 reached that
# share of its peak in the step of docs/gpu.md; an H100 is the same processor; an A100's is what others report of it.
CARDS = {
    "a100_40gb": Card("A100 40 GB", 39.4 * 2**30, 312e12, 19.5e12, 1.555e12, 300e9, 32e9, 0.78),
    "a100_80gb": Card("A100 80 GB", 79.1 * 2**30, 312e12, 19.5e12, 2.039e12, 300e9, 32e9, 0.78),
    "h100_80gb": Card("H100 80 GB", 79.1 * 2**30, 989e12, 67e12, 3.35e12, 450e9, 64e9, 0.64),
    "h200_141gb": Card("H200 141 GB", 139.8 * 2**30, 989e12, 67e12, 4.8e12, 450e9, 64e9, 0.64),
}


def find_card(name: str) -> Card:
    """Returns a card by its name; ``cpu`` is this machine's processor, measured in about a second.

    Raises:
        ConfigError: no card of that name.
    """
    if name == "cpu":
        return _this_cpu()
    if name not in CARDS:
        raise ConfigError(f"gpu must be one of {', '.join(CARDS)} or cpu, got {name!r}")
    return CARDS[name]


def present_card(device: torch.device) -> Card:
    """Returns the card of this process: with its own memory and, if its name is unknown here, an A100's speed."""
    if device.type == "cpu":
        return _this_cpu()
    properties = torch.cuda.get_device_properties(device)
    known = next((card for card in CARDS.values() if card.name.split()[0] in properties.name), CARDS["a100_80gb"])
    return replace(known, name=properties.name, memory=properties.total_memory)


def _this_cpu() -> Card:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bf16, fp32 = (_product_rate(dtype) for dtype in (torch.bfloat16, torch.float32))
    block = torch.zeros(2**25)  # 128 MiB, more than caches hold
    seconds = _best(lambda: block.add_(1.0))
    bandwidth = 2 * block.nbytes / seconds
    return Card(f"CPU, {torch.get_num_threads()} threads", memory, bf16, fp32, bandwidth, bandwidth, bandwidth, 1.0)


def _product_rate(dtype: torch.dtype, size: int = 1024) -> float:
    matrix = torch.ones((size, size), dtype=dtype)
    return 2 * size**3 / _best(lambda: matrix @ matrix)


def _best(work: Callable[[], object], rounds: int = 5) -> float:
    """Returns the seconds of the fastest of some rounds."""
    found = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)
