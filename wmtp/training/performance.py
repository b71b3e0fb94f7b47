"""How fast an optimizer step is: the operations that its models need, its rate, its wait for data, its memory.

Operations are counted as in PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): two a weight and token in the
forward pass, two for the gradient of the input, two for that of the weight, 6 N in all, and attention over the whole
row, 12 L H Q T. What is frozen costs less: no gradient of its weights, and none of its input where nothing before it is
trained. Not counted, as the model does not need it: recomputed activations, a second pass of head 1 for its weights.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune.modules.peft import DoRALinear, LoRALinear

from wmtp.config import build
from wmtp.distributed import World
from wmtp.models import MTPDecoder
from wmtp.training.run_log import RunLog

# Dense bfloat16 peaks of NVIDIA's data sheets, by a part of the device's name: the first that fits.
_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}


@dataclass(frozen=True)
class ModelFlops:
    """Operations of a model's training step, or of its forward pass where nothing of it is trained.

    Attributes:
        token: for each token: the projections.
        position: for each token and each position of its row, also outside a sliding window: attention.
        targets: for each target of head 1, head 2 and so on: the unembedding.
    """

    token: float
    position: float
    targets: tuple[float, ...] = ()

    def of(self, tokens: float, seq_len: float, targets: Sequence[float] = ()) -> float:
        """Operations of so many tokens in rows of ``seq_len``, and of so many targets of each head."""
        blocks = tokens * (self.token + seq_len * self.position)
        return blocks + sum(cost * number for cost, number in zip(self.targets, targets, strict=False))


def model_flops(model: Any, *, trunk: bool = True, trunk_gradient: Sequence[float] | None = None) -> ModelFlops:
    """Counts a decoder or a value model by what of it requires a gradient; not a number for any other model.

    Args:
        model: None costs nothing.
        trunk: whether it runs; False where its states are kept (of a value model: those of the whole backbone).
        trunk_gradient: H factors as in the decoder's forward pass; one of 0 saves gradients.
    """
    if hasattr(model, "value_head"):  # a ValueModel
        backbone, grad = _backbone(model.backbone, trunk, (1.0,) if trunk else ())
        layers = [layer for layer in (model.value_head.hidden, model.value_head.out) if layer is not None]
        head = sum(_linear(layer, grad or i > 0) for i, layer in enumerate(layers))
        return ModelFlops(backbone.token + head, backbone.position)
    if not isinstance(model, MTPDecoder):
        return ModelFlops(0 if model is None else math.nan, 0)
    factors = tuple(trunk_gradient or (1.0,) * model.num_future_tokens)
    blocks, grad = _backbone(model, trunk, factors)
    passes = [1 + grad + (model.unembedding.requires_grad and factor > 0) for factor in factors]
    return ModelFlops(blocks.token, blocks.position, tuple(2 * model.vocab_size * model.embed_dim * n for n in passes))


def adapters_off_flops(model: Any) -> ModelFlops:
    """Counts what an anchor asks of a model with adapters: trunk and head 1 without them, and its targets' logits."""
    sizes = [p.numel() for name, p in model.layers.named_parameters() if p.dim() == 2 and "lora_" not in name]
    position = sum(4 * block.attn.num_heads * block.attn.head_dim for block in model.layers)
    return ModelFlops(2 * sum(sizes), position, (2 * model.vocab_size * model.embed_dim,))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the dense bfloat16 peak of a device in operations a second; None where it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


class StepMeter:
    """Measures this process's optimizer steps. Nothing here waits for the device: what a recipe logs already has.

    Args:
        world: this process among all.
        dtype: of the computation.
        models: what each model costs that runs in a step.
        peak: operations a second that one device can do; None to know it by the device's name.
        clock: seconds.
    """

    def __init__(
        self,
        world: World,
        dtype: torch.dtype,
        models: Sequence[ModelFlops],
        peak: float | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._world, self._models, self._clock = world, models, clock
        self._peak = peak or peak_flops(world.device, dtype)
        self.start()

    def start(self) -> None:
        """Marks the beginning of a step."""
        self._started, self._waited = self._clock(), 0.0

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Measures what the step waits for: the next batch."""
        begun = self._clock()
        yield
        self._waited += self._clock() - begun

    def metrics(self, tokens: float, seq_len: float, targets: Sequence[float] = ()) -> dict[str, float]:
        """Figures of the step, up to now: ``train/tokens``, ``train/tokens_per_second`` and the like.

        Args:
            tokens: that all processes have trained on in this step, padding not counted.
            seq_len: positions of their rows.
            targets: target tokens of each head, over all processes.
        """
        seconds = self._clock() - self._started
        found = {"train/tokens": float(tokens), "train/tokens_per_second": tokens / seconds}
        found["train/data_wait"] = self._waited / seconds
        found["train/peak_memory_gib"] = self._peak_memory() / 2**30
        rate = sum(model.of(tokens, seq_len, targets) for model in self._models) / seconds / self._world.size
        if math.isfinite(rate):
            found |= {"train/tflops": rate / 1e12} | ({"train/mfu": rate / self._peak} if self._peak else {})
        return found

    def _peak_memory(self) -> int:
        """Returns bytes: on CUDA the most allocated since the last call; on a CPU the process's largest size."""
        device = self._world.device
        if device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak


class NoProfiler:
    """Stands where no profile is asked for; :class:`wmtp.training.profiler.Profiler` has the same methods."""

    def start(self, step: int) -> None: ...
    def step(self) -> None: ...
    def stop(self, log: RunLog) -> None: ...


def build_profiler(section: DictConfig | None, output_dir: Path, world: World, num_training_steps: int) -> Any:
    """Builds the config's profiler; without a section, one that does nothing."""
    return build(section, output_dir, world, num_training_steps, where="profiler") or NoProfiler()


def _backbone(model: MTPDecoder, trunk: bool, factors: Sequence[float]) -> tuple[ModelFlops, bool]:
    """Returns the cost of trunk and heads, as many as factors, and whether something up to the last norm is trained."""
    token = position = 0.0
    grad = _trained(model.tok_embeddings) and trunk
    for block in model.layers[:-1] if trunk else ():
        cost, grad = _block(block, grad)
        token, position = token + cost.token, position + cost.position
    ends = [grad]
    for k, (block, factor) in enumerate(zip(model.heads, factors, strict=False)):
        cost, end = _block(block, ends[-1] if model.config.looped_heads and k > 1 else grad and factor > 0)
        token, position, ends = token + cost.token, position + cost.position, [*ends, end]
    return ModelFlops(token, position), any(ends) or (bool(factors) and _trained(model.norm))


def _block(block: Any, grad: bool) -> tuple[ModelFlops, bool]:
    """Returns the cost of one block, and whether its output has a gradient.

    Args:
        grad: whether its input has one.
    """
    attn, mlp = block.attn, block.mlp
    stages = [[block.sa_norm], [attn.q_proj, attn.k_proj, attn.v_proj, attn.q_norm, attn.k_norm], [attn.output_proj]]
    stages += [[block.sa_post_norm, block.mlp_norm], [mlp.w1, mlp.w3], [mlp.w2], [block.mlp_post_norm]]
    token = position = 0
    for number, stage in enumerate(stages):
        token += sum(_linear(layer, grad) for layer in stage if hasattr(layer, "weight"))
        grad = grad or any(map(_trained, stage))
        if number == 1:  # scores and their sum of values: two products, four in the backward pass
            position = 4 * attn.num_heads * attn.head_dim * (3 if grad else 1)
    return ModelFlops(token, position), grad


def _linear(layer: Any, grad: bool) -> int:
    """Operations of a linear layer for one token: forward, gradient of the input (where it has one), of the weight."""
    if isinstance(layer, LoRALinear | DoRALinear):
        base = 2 * layer.in_dim * layer.out_dim * (1 + grad)
        return base + _linear(layer.lora_a, grad) + _linear(layer.lora_b, True)
    return 2 * layer.in_features * layer.out_features * (1 + grad + layer.weight.requires_grad)


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
