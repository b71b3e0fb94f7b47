"""Random numbers that depend only on a key: the same on every machine, at any world size and in any order."""

import hashlib

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's constants, as int64
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def text_hash(*texts: str) -> int:
    """Returns a number in [0, 2^64) that depends only on the texts: for splits, orders and seeds."""
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """Returns a generator that depends only on the seed and a parameter's name, so that all ranks draw one tensor."""
    return torch.Generator().manual_seed(text_hash(f"{seed} {name}") >> 1)


def splitmix64(seeds: Tensor, count: int) -> Tensor:
    """Returns the first ``count`` outputs of SplitMix64 (Steele, Lea and Flood 2014) for each seed: int64 [..., count].

    Integer arithmetic, the same on every device.
    """
    return mix64(seeds[..., None] + torch.arange(1, count + 1, device=seeds.device) * GOLDEN)


def mix64(x: Tensor) -> Tensor:
    """Returns SplitMix64's finaliser of int64 numbers, a bijection; products wrap around."""
    for bits, factor in _FACTORS:
        x = _xor_shift(x, bits).mul_(factor)
    return _xor_shift(x, 31)


def top53(x: Tensor) -> Tensor:
    """Returns the highest 53 bits of int64 numbers, in [0, 2^53): float64 holds them exactly."""
    return _shift(x, 11)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    return _shift(x, bits).bitwise_xor_(x)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Returns the logical right shift: torch's own keeps the sign."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)
