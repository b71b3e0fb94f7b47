"""What training a model takes, counted before it starts."""

import torch
from torch import Tensor, nn

from wmtp.models.load import local_tensor
from wmtp.models.nf4 import is_nf4, nf4_bytes

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters, over all processes."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def training_bytes(model: nn.Module) -> dict[str, dict[str, int]]:
    """Bytes that this process holds while it trains: weights by dtype, gradients, and AdamW's two moments.

    Activations, and the blocks that FSDP2 gathers for their computation, come on top.
    """
    weights: dict[str, int] = {}
    for parameter in model.parameters():
        name = "nf4" if is_nf4(parameter) else _NAMES.get(parameter.dtype, str(parameter.dtype).removeprefix("torch."))
        weights[name] = weights.get(name, 0) + _bytes(parameter)
    trained = sum(_bytes(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return {"weights": weights, "gradients": {"fp32": trained}, "AdamW's moments": {"fp32": 2 * trained}}


def describe_training(model: nn.Module, world_size: int) -> str:
    """Two lines: what is trained, and the memory of :func:`training_bytes`."""
    trained, total = parameter_counts(model)
    parts = {what: sum(by_dtype.values()) for what, by_dtype in training_bytes(model).items()}
    by_dtype = ", ".join(f"{name} {_gigabytes(n)}" for name, n in training_bytes(model)["weights"].items())
    each = "; ".join(f"{what} {_gigabytes(n)}" for what, n in parts.items())
    each = each.replace(";", f" ({by_dtype});", 1)
    return (
        f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})\n"
        f"memory of each process ({world_size} in all) without activations: about {_gigabytes(sum(parts.values()))}: "
        f"{each}"
    )


def _bytes(parameter: Tensor) -> int:
    if is_nf4(parameter):
        return nf4_bytes(parameter)
    return local_tensor(parameter).nbytes


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e7 else f"{count / 1e6:.3g} MB"
