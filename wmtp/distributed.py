"""The process group, the few collectives of a recipe's loop, and waits for slower ranks."""

import contextlib
import ctypes
import itertools
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wmtp.config import ConfigError
from wmtp.errors import UserError

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1
_SECONDS_TO_READ = 5.0
_BYTES_AT_ONCE = 4 << 20  # the store refuses values of more than 8 MiB
_arrivals = itertools.count(1)
_calls = itertools.count()


@dataclass(frozen=True)
class World:
    """This process's place among all processes."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # ("shard",), or ("replicate", "shard") for HSDP

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_world(device: str, replicas: int = 1, timeout_minutes: float = 30.0, deterministic: bool = False) -> World:
    """Joins the processes that torchrun or `tune run` started; without a launcher it makes a world of one process.

    Args:
        device: ``cpu`` (gloo), ``cuda`` (nccl for CUDA tensors, gloo for CPU ones), or ``auto``.
        replicas: number of HSDP replicas; parameters are sharded over world size / replicas processes, usually those
            of one node.
        timeout_minutes: how long a collective waits for other ranks before it gives up. gloo raises then, nccl ends the
            process; what may take long (saving, reading, what rank 0 does alone) waits without a limit instead.
        deterministic: the same operations give the same bits on CUDA, at some cost in speed.

    Raises:
        ConfigError: CUDA is requested but absent, or replicas do not divide the world size.
    """
    _end_with_launcher()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device is cuda, but torch sees no CUDA device; set device=cpu or device=auto")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if deterministic:
        _deterministic()
    current = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        alone: dict[str, Any] = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        # With its device, nccl connects here, and not in the first collective, which may be one of a few ranks.
        backend, bound = ("cpu:gloo,cuda:nccl", current) if device == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timeout, device_id=bound, **alone)
    size = dist.get_world_size()
    if size % replicas:
        raise ConfigError(f"hsdp_replicas must divide the world size {size}, got {replicas}")
    if replicas == 1:
        mesh = init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():  # those made for HSDP have torch's own timeout
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    return World(dist.get_rank(), size, current, mesh)


def _deterministic() -> None:
    """Makes torch choose operations whose result does not depend on the order in which threads finish.

    Attention's kernels follow by themselves (flash and memory-efficient have such a backward, cuDNN's is left out).
    nccl sums in one order as long as its processes sit on the same kind of machine.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's first product starts
    torch.use_deterministic_algorithms(True)
    # A pass over each gathered block, for nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    from torch._inductor import config as inductor  # only here: it takes a while

    inductor.deterministic = True  # no choice of kernels by how long they take


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Returns the sum over all ranks as a new float64 tensor, so that counts and long sums stay exact."""
    total = values.detach().double().clone()
    dist.all_reduce(total)
    return total


def gather_objects(value: T) -> list[T]:
    """Returns every rank's value, on every rank. It waits as :func:`wait_for_all` does."""
    wait_for_all()
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def wait_for_all() -> None:
    """Waits until every rank has called it, without a timeout.

    A collective gives up after the process group's timeout even if the slow rank is at work. This wait ends early only
    if a rank dies: the launcher then ends all processes. Python's signal handlers run during the wait.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return
    store, number = _store("arrivals"), next(_arrivals)
    with _while_rank_0_lives():
        store.add(str(number), 1)
        pause = 0.0005
        while store.add(str(number), 0) < size:
            time.sleep(pause)
            pause = min(0.2, 1.5 * pause)
        if dist.get_rank() == 0:
            store.delete_key(str(number - 1))  # no rank reads it any more


def on_rank_0(work: Callable[[], T]) -> T:
    """Calls `work` on rank 0, for as long as it takes, and returns its value on every rank.

    Args:
        work: returns a value that can be pickled.

    Raises:
        UserError: on the other ranks, if `work` raised on rank 0: the same error, or its message.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    store, others = _store(f"rank_0/{next(_calls)}"), dist.get_world_size() - 1
    if dist.get_rank() == 0:
        try:
            value = work()
        except BaseException as error:
            told = error if isinstance(error, UserError) else UserError(f"rank 0: {str(error) or type(error).__name__}")
            _tell(store, None, told)
            until = time.monotonic() + _SECONDS_TO_READ
            while store.add("read", 0) < others and time.monotonic() < until:
                time.sleep(0.05)  # this rank's end takes the others with it: each prints the reason first
            raise
        _tell(store, value, None)
        return value
    with _while_rank_0_lives():
        pause = 0.001
        while not store.check(["value"]):
            time.sleep(pause)
            pause = min(0.2, 1.5 * pause)
        parts = [f"part{i}" for i in range(int(store.get("value")))]
        value, told = pickle.loads(b"".join(map(store.get, parts)))
        if store.add("read", 1) == others:
            for key in ("value", *parts):
                store.delete_key(key)
    if told is not None:
        raise told
    return value


def _tell(store: dist.Store, value: object, error: UserError | None) -> None:
    whole = pickle.dumps((value, error))
    starts = range(0, len(whole), _BYTES_AT_ONCE)
    for i, start in enumerate(starts):  # bytes are taken; the stubs say str
        store.set(f"part{i}", whole[start : start + _BYTES_AT_ONCE])  # type: ignore[arg-type]
    store.set("value", str(len(starts)))


def end_world() -> None:
    """Leaves the process group once all ranks have called it."""
    wait_for_all()
    dist.destroy_process_group()


def tell_failure() -> None:
    """Tells the other ranks that this one ends with an error, before the launcher ends them."""
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the store is gone with its launcher
            _store("ending").set("failed", "1")


def a_rank_failed() -> bool:
    """Returns whether a rank has ended with an error."""
    try:
        return dist.is_initialized() and _store("ending").check(["failed"])
    except RuntimeError:
        return True


@contextlib.contextmanager
def _while_rank_0_lives() -> Iterator[None]:
    """Turns errors of the process group's store into a UserError: without a launcher the store ends with rank 0."""
    try:
        yield
    except dist.DistError as error:
        raise UserError("rank 0 has ended, and this rank cannot go on without it; see what rank 0 said") from error


def _store(name: str) -> dist.PrefixStore:
    return dist.PrefixStore(f"wmtp/{name}", dist.distributed_c10d._get_default_store())


def _end_with_launcher() -> None:
    """Lets the kernel end this process when the launcher that started it dies by any signal.

    torchrun's workers have sessions of their own: a killed launcher would leave them training, beside the next run in
    the same folder. A process that was started without a launcher outlives its shell, as `nohup` users expect.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The launcher may have died before that call: an orphan's parent is init, unless the launcher itself is process 1.
    if os.getppid() == 1 and not _runs_python(1):
        os.kill(os.getpid(), signal.SIGKILL)


def _runs_python(pid: int) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/exe", "/proc/self/exe")
    except OSError:
        return False


class SharedCounters:
    """Integer counters, from 0, that all ranks add to: to share out work and to sum progress.

    Unlike a collective, a call waits for no other rank. All ranks create their counters in the same order.
    """

    _sets = itertools.count()

    def __init__(self) -> None:
        self._store = _store(f"counters/{next(SharedCounters._sets)}")

    def add(self, key: str, amount: int = 0) -> int:
        """Adds to a counter and returns its new value."""
        with _while_rank_0_lives():
            return self._store.add(key, amount)

    def take(self, key: str, stop: int) -> Iterator[int]:
        """Yields the numbers 0, 1, ... below ``stop``, each on exactly one of the ranks that iterate."""
        while (index := self.add(key, 1) - 1) < stop:
            yield index


def share_out(items: Sequence[T], work: Callable[[T], None]) -> None:
    """Calls ``work`` with each of the items, on whichever rank is free for the next one; waits until all are done.

    Args:
        items: the same on every rank.

    Raises:
        UserError: on every rank, if ``work`` raised it on one.
    """
    fault = None
    try:
        for index in SharedCounters().take("item", len(items)):
            work(items[index])
    except UserError as error:
        fault = error
    for found in gather_objects(fault):
        if found is not None:
            raise found
