"""Starting the process group, and the few collectives a recipe's loop needs."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wmtp.config import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # ("shard",), or ("replicate", "shard") for HSDP

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_world(device: str, *, replicas: int = 1) -> World:
    """Join the processes that torchrun or `tune run` started; alone, a world of one, so a recipe has one path.

    Args:
        device: ``cpu`` (gloo), ``cuda`` (nccl for CUDA tensors, gloo for CPU ones), or ``auto``.
        replicas: number of HSDP replicas; parameters are sharded over world size / replicas processes, usually those
            of one node.

    Raises:
        ConfigError: CUDA asked for but absent, or replicas that do not divide the world size.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch sees no CUDA device; set device=cpu or device=auto")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    size = dist.get_world_size()
    if size % replicas:
        raise ConfigError(f"hsdp_replicas must divide the world size {size}, got {replicas}")
    if replicas == 1:
        mesh = init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
    current = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    return World(dist.get_rank(), size, current, mesh)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, as a new tensor; float64, so that counts and long sums stay exact."""
    total = values.detach().double().clone()
    dist.all_reduce(total)
    return total


def gather_objects(value: object) -> list:
    """Every rank's value, on every rank."""
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


class SharedCounters:
    """Whole numbers, from 0, that all ranks add to: work for whoever is free, and progress over all of them.

    Unlike a collective, a call waits for no other rank. All ranks make their sets of counters in the same order.
    """

    _sets = itertools.count()

    def __init__(self) -> None:
        prefix = f"wmtp/counters/{next(SharedCounters._sets)}"
        self._store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())

    def add(self, key: str, amount: int = 0) -> int:
        """Add to a counter and return its new value; without an amount, its value."""
        return self._store.add(key, amount)

    def take(self, key: str, stop: int) -> Iterator[int]:
        """Numbers 0, 1, ... below ``stop``, each given to exactly one of the ranks that iterate."""
        while (index := self.add(key, 1) - 1) < stop:
            yield index
