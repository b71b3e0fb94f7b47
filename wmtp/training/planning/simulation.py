"""A simulated process of a training run or an evaluation: the real code, on tensors without data.

Tensors of more than a few numbers a token are fake (torch's FakeTensorMode): they have a shape, a dtype and bytes, and
no values. Small ones, such as targets, weights and cross-entropies, are real, and random where a fake one is read: the
host's decisions (how many targets a weighting keeps, whether a loss is finite) are taken as in a run. So the recipe's
own loss, weighting, FSDP2, recomputation and optimizer run unchanged, with torch's fake process group of any size, and
every byte, operation, collective and wait of the host for the device is counted as it happens.

A fake tensor is labelled as one of the CPU, because autograd cannot run on a device that is absent. What our code does
otherwise on CUDA asks :func:`wmtp.numerics.products.on_cuda`, which a simulation answers for a GPU.
"""

import contextlib
import functools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from wmtp.numerics.products import on_cuda

_FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "empty_strided"}
_FACTORIES |= {f"new_{name}" for name in _FACTORIES}
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "resize_", "set_", "_unsafe_view"}
_FREE |= {"_record_function_enter_new", "_record_function_exit"}
_OVERWRITING = {"copy_", "fill_", "zero_"}  # what is written is not read
_PICKING = {"embedding", "index_select", "gather", "index"}  # of the first operand, so much as there is in the result
_PLACING = {"index_copy_", "index_put_", "_index_put_impl_"}  # in the first operand, so much as the others hold
_COUNTS = {"all", "sum", "max"}  # true, or one, where their operand has no numbers
_COMPARISONS = {"eq", "le", "ge", "bitwise_and"}  # that make masks of [B, S, S]
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}

Figures = dict[tuple[str, ...], float]


@dataclass
class Work:
    """What a part of a step does on one device."""

    flops: Counter = field(default_factory=Counter)  # of products of matrices and of attention, by dtype
    moved: int = 0  # bytes read and written
    calls: int = 0  # kernels


class Simulation(TorchDispatchMode):
    """Counts what one process of a run holds, computes, moves and waits for, while its code runs inside.

        simulation = Simulation(small=4 * batch * seq)
        with simulation.mode:
            model = ...                      # sharded, of fake tensors
        with simulation, simulation.phase("forward", "activations"):
            ...

    Args:
        small: tensors of at most so many numbers are real.

    Attributes:
        held: bytes now, by kind.
        peaks: by phase, the bytes by kind when it held the most.
        work: by phase and kind of operation: ``product``, ``attention``, ``elementwise``, ``copy`` (of FSDP2).
        sent: bytes that this process receives or sends, by phase and collective.
        waits: places at which the host waits for the device, by phase and operation.
    """

    def __init__(self, small: int) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._small = small
        self._storages: dict[int, tuple[int, str]] = {}
        self._stand_ins: dict[tuple, Tensor] = {}
        self._kind, self._phase = "other", ""
        self.fused = False  # within a compiled block: its elementwise operations are counted by who compiles it
        self.held: Counter = Counter()
        self._total = 0
        self.reset()

    def reset(self) -> None:
        """Forgets work and peak; what is held stays."""
        self.work: dict[tuple[str, str], Work] = defaultdict(Work)
        self.sent: Counter = Counter()
        self.collectives: Counter = Counter()
        self.waits: Counter = Counter()
        self.peaks: dict[str, Counter] = {}
        self._highest: Counter = Counter()

    def figures(self) -> Figures:
        """Returns all that was counted since :meth:`reset`, by what it is, phase, and kind or operation."""
        found: Figures = {}
        for phase, kinds in self.peaks.items():
            found |= {("held", phase, kind): size for kind, size in kinds.items()}
        for (phase, kind), work in self.work.items():
            found |= {("flops", phase, kind, str(dtype)): flops for dtype, flops in work.flops.items()}
            found |= {("moved", phase, kind): work.moved, ("calls", phase, kind): work.calls}
        for name in ("sent", "collectives", "waits"):
            found |= {(name, *key): number for key, number in getattr(self, name).items()}
        return found

    # ------------------------------------------------------------------------------------------------------------------
    # What surrounds the simulated code

    @contextlib.contextmanager
    def phase(self, name: str, kind: str) -> Iterator[None]:
        """Names what runs, and the kind of what it allocates."""
        before = self._phase, self._kind
        self.enter(name, kind)
        try:
            yield
        finally:
            self.enter(*before)

    def enter(self, phase: str, kind: str) -> None:
        """Begins a phase, until the next one or the end of the one around."""
        self._phase, self._kind = phase, kind
        self._new_peak()

    @contextlib.contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """Names the kind of what is allocated."""
        with self.phase(self._phase, name):
            yield

    def add(self, moved: int, calls: int, kind: str = "elementwise") -> None:
        """Counts work; elementwise is what is not seen."""
        work = self.work[self._phase, kind]
        work.moved += moved
        work.calls += calls

    def hold(self, tensors: Any, kind: str) -> None:
        """Counts what tensors hold as one kind, from now on."""
        for tensor in tree_leaves(tensors):
            for part in local_parts(tensor):
                self._see(part, kind)
                key = part.untyped_storage()._cdata
                size, before = self._storages[key]
                self._storages[key] = size, kind
                self.held[before] -= size
                self.held[kind] += size

    def __enter__(self) -> "Simulation":
        self._patches = contextlib.ExitStack()
        for name, kind in (
            ("foreach_all_gather", "gathered weights"),
            ("foreach_all_gather_copy_out", "gathered weights"),
            ("foreach_reduce", "gathered gradients"),
        ):
            self._patches.enter_context(self._within(fsdp, name, kind))
        self._patches.enter_context(self._resizes())
        self._patches.enter_context(self._lists())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _within(self, module: Any, name: str, kind: str) -> Any:
        """Names the kind of what a function of a module allocates."""
        original = getattr(module, name)

        def named(*args: Any, **kwargs: Any) -> Any:
            with self.kind(kind):
                result = original(*args, **kwargs)
            if name == "foreach_reduce":  # its first argument are the parameters, which have their gradients now
                self.hold([p.sharded_param.grad for p in args[0] if p.sharded_param.grad is not None], "gradients")
            return result

        return patch.object(module, name, named)

    def _resizes(self) -> Any:
        """Sees FSDP2 free and allocate gathered weights, which it does by the size of their storages."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self._storages:
                self._set(storage._cdata, size, self._storages[storage._cdata][1])
            return result

        return patch.object(torch.UntypedStorage, "resize_", resize_)

    def _lists(self) -> Any:
        """Sees tensors become lists, which is no operation."""
        original = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            if on_cuda(tensor):
                self.waits[self._phase, "tolist"] += 1
            return original(tensor)

        return patch.object(Tensor, "tolist", tolist)

    # ------------------------------------------------------------------------------------------------------------------
    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and not args[0].fake_mode.in_kernel_invocation:  # every second call
            return args[0].fake_device
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented
        space, name, is_view, is_mutable = _facts(func)
        if space == "prim" or _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # DTensor looks at shapes, by a mode of its own: nothing happens
        if torch.is_inference_mode_enabled():  # without autograd, what is made of other operations comes whole
            super().__enter__()
            try:
                parts = func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
            if parts is not NotImplemented:
                return parts
        inputs = _tensors((*args, *kwargs.values()))
        if any(isinstance(t, FakeTensor) for t in inputs) or self._makes_large(name, args, inputs):
            all_fake = all(isinstance(t, FakeTensor) for t in inputs)
            fake = (args, kwargs) if all_fake else tree_map_only(Tensor, self._stand_in, (args, kwargs))
            out = self.mode.dispatch(func, types, *fake)
            if is_mutable:
                out = _written(func, out, args, kwargs)
            elif not is_view:
                out = self._real_where_small(out, inputs, torch.ones if name in _COUNTS else torch.zeros)
        else:
            out = func(*args, **kwargs)
        if is_view:
            return out
        outputs = _tensors((out,))
        for tensor in outputs:
            self._see(tensor, self._kind)
        if name not in _FREE:
            self._count(func, space, name, args, out, inputs, outputs)
        return out

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """Returns a fake tensor for a real one: one for all of its shape, where the mode would make one each time."""
        if isinstance(tensor, FakeTensor) or tensor.ndim == 0:  # which may be a number, of no dtype of its own
            return tensor
        key = tensor.shape, tensor.stride(), tensor.dtype
        if key not in self._stand_ins:
            with self.mode:
                self._stand_ins[key] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return self._stand_ins[key]

    def _makes_large(self, name: str, args: Any, inputs: list[Tensor]) -> bool:
        """Returns whether an operation on real tensors makes one that has to be fake: a factory, or by broadcasting."""
        if name in _FACTORIES:
            size = args[1] if name.startswith("new_") else args[0]
            return isinstance(size, list | tuple) and prod(size) > self._small
        return name in _COMPARISONS and prod(torch.broadcast_shapes(*(t.shape for t in inputs))) > self._small

    def _real_where_small(self, out: Any, inputs: list[Tensor], whole: Callable) -> Any:
        """Gives small results values, by `whole` if they are no floats; what is in an input's memory stays as it is."""
        if isinstance(out, Tensor) and out.numel() > self._small:
            return out
        known = {t.untyped_storage()._cdata for t in inputs}

        def real(tensor: Any) -> Any:
            if not isinstance(tensor, FakeTensor) or tensor.numel() > self._small:
                return tensor
            if tensor.untyped_storage()._cdata in known:
                return tensor
            if tensor.dtype.is_floating_point:
                return torch.rand(tensor.shape, dtype=tensor.dtype) + 0.5
            return whole(tensor.shape, dtype=tensor.dtype)

        return real(out) if isinstance(out, Tensor) else tree_map(real, out)

    def _count(
        self, func: Any, space: str, name: str, args: Any, out: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        read = inputs[1:] if name in _OVERWRITING | _PICKING | _PLACING else inputs
        written = read if name in _PLACING else outputs * 2 if name in _PICKING else outputs
        moved = sum(t.numel() * t.element_size() for t in (*read, *written))
        if (name in _WAITS or (name.startswith("index") and _indexes_by_mask(args))) and on_cuda(inputs[0]):
            self.waits[self._phase, name] += 1
        if space in ("c10d", "_c10d_functional"):
            self.collectives[self._phase, name] += 1
            self.sent[self._phase, name] += max((t.numel() * t.element_size() for t in inputs), default=0)
            return
        packet, flops, kind = func._overloadpacket, 0, "elementwise"
        if "scaled_dot_product" in name:
            kind, flops = "attention", _attention_flops(name, args)
        elif packet in flop_registry:
            kind, flops = "product", flop_registry[packet](*(t for t in args if isinstance(t, Tensor)), out_val=out)
        elif space == "fsdp" or name == "split_with_sizes_copy":
            kind = "copy"
        if kind == "elementwise" and self.fused:
            return
        self.add(moved, 1, kind)
        if flops:
            self.work[self._phase, kind].flops[min(inputs, key=lambda t: t.element_size()).dtype] += flops

    # ------------------------------------------------------------------------------------------------------------------
    # Bytes

    def _see(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._storages.get(key)
        if known is None:
            weakref.finalize(storage, self._gone, key)
        if known is None or known[0] != size:
            self._set(key, size, kind if known is None else known[1])

    def _set(self, key: int, size: int, kind: str) -> None:
        before = self._storages.get(key, (0, kind))[0]
        self._storages[key] = size, kind
        self.held[kind] += size - before
        self._total += size - before
        self._new_peak()

    def _gone(self, key: int) -> None:
        size, kind = self._storages.pop(key, (0, ""))
        self.held[kind] -= size
        self._total -= size

    def _new_peak(self) -> None:
        if self._total > self._highest[self._phase]:
            self._highest[self._phase], self.peaks[self._phase] = self._total, self.held.copy()


def local_parts(tensor: Any) -> list[Tensor]:
    """Returns the tensors that hold a tensor's bytes on this process."""
    if isinstance(tensor, DTensor):
        return local_parts(tensor._local_tensor)
    if hasattr(tensor, "__tensor_flatten__") and not isinstance(tensor, FakeTensor):
        return [part for name in tensor.__tensor_flatten__()[0] for part in local_parts(getattr(tensor, name))]
    return [tensor] if isinstance(tensor, Tensor) else []


@functools.cache
def _facts(func: Any) -> tuple[str, str, bool, bool]:
    """Returns an operation's namespace and name, and whether it is a view, and whether it writes in place."""
    space, name = func._schema.name.split("::")
    return space, name, func.is_view, func._schema.is_mutable


def _tensors(values: Any) -> list[Tensor]:
    """Returns the tensors of an operation's arguments or results: they are nested in lists at most."""
    found = []
    for value in values:
        found += [value] if isinstance(value, Tensor) else _tensors(value) if isinstance(value, list | tuple) else []
    return found


def _written(func: Any, out: Any, args: Any, kwargs: dict) -> Any:
    """Returns what an operation that writes in place returns: the very tensors it was given."""
    if not any(result.alias_info for result in func._schema.returns):
        return out
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    written = [given[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return written[0] if len(func._schema.returns) == 1 else tuple(written)


def _indexes_by_mask(args: Any) -> bool:
    return any(isinstance(t, Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:2]))


def _attention_flops(name: str, args: Any) -> int:
    """Operations of attention: over the whole row with a mask, half of them where the kernel is causal."""
    backward = name.endswith("_backward")
    shapes = [tensor.shape for tensor in args[: 4 if backward else 3]]
    causal = args[7] if backward else len(args) > 4 and args[4]
    flops = sdpa_backward_flop_count(*shapes) if backward else sdpa_flop_count(*shapes)
    return flops // 2 if causal else flops


def fake_world(size: int, replicas: int = 1) -> DeviceMesh:
    """Returns the mesh of so many simulated processes, of which this one is the first."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    return mesh_of(dist.distributed_c10d._get_default_group(), size, replicas)


def mesh_of(group: dist.ProcessGroup, size: int, replicas: int = 1) -> DeviceMesh:
    """Returns a mesh, sharded or replicated and sharded, of a group that sends nothing.

    Its dimensions have names of their own: meshes of equal names are equal, and within a run torch's caches of DTensor
    operations would hand the simulated mesh, which sends nothing, to the run's own gradients.
    """
    if replicas == 1:
        return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("simulated_shard",))
    ranks = torch.arange(size).reshape(replicas, -1)
    return DeviceMesh.from_group(
        [group, group], "cpu", mesh=ranks, mesh_dim_names=("simulated_replicate", "simulated_shard")
    )
