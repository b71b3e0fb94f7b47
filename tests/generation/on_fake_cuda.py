"""Decoding on tensors that say they are on CUDA and hold nothing: what the host waits for, and the bytes held."""

import weakref
from collections import Counter

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_WAITS = {"nonzero", "masked_select", "_unique2"}


class FakeCUDA(TorchDispatchMode):
    """Counts each wait of the host for the device, and the most bytes that the device held at once.

    What comes to the host is zeros: the first token, no draft accepted.
    """

    def __init__(self):
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._sizes = {}
        self.waits, self.held, self.peak = Counter(), 0, 0

    def __enter__(self):
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._fake.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        if name == "_local_scalar_dense" and args[0].is_cuda:
            self.waits[name] += 1
            return 1
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            super().__enter__()  # inference mode hands over operations that are made of others
            try:
                return func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        if name == "_to_copy" and kwargs.get("device", args[0].device).type != args[0].device.type:
            to_host, dtype = kwargs["device"].type == "cpu", kwargs.get("dtype") or args[0].dtype
            if to_host or not kwargs.get("non_blocking"):
                self.waits["to the host" if to_host else "from the host"] += 1
            if to_host:
                with _disable_current_modes():
                    return torch.zeros(args[0].shape, dtype=dtype)
            out = torch.empty(args[0].shape, dtype=dtype, device=kwargs["device"])
        else:
            out = func(*args, **kwargs)
        masks = any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1:2]))
        if name in _WAITS or (name.startswith("index") and masks):
            self.waits[name] += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage):
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._gone, key)
            self._sizes[key] = storage.nbytes()
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)

    def _gone(self, key):
        self.held -= self._sizes.pop(key)
