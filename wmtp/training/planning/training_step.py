"""One optimizer step of a training config, simulated on one card of a cluster.

The step is the recipes' own, in their order. Blocks of a trunk are alike, so two shallow models tell what a deep one
holds and does: every figure of a phase is a constant and so much a block (a test holds it against the whole model). In
the backward pass that is so at its two ends, between which bytes rise or fall evenly: the blocks there are phases of
their own, as many as the period of recomputation, and the first ones besides, before which nothing is gathered ahead.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import DeviceMesh
from torchtune.modules.peft import disable_adapter
from torchtune.training import scale_grads

from wmtp.config import build
from wmtp.loss import HeadTraining, ReferenceReading, mtp_loss
from wmtp.models import checkpoint_activations, shard_model, store_frozen
from wmtp.models.nf4 import quantize_nf4, quantized_modules
from wmtp.models.parallel import GATHERED_LATE
from wmtp.models.value import ValueModel
from wmtp.numerics.products import as_on_cuda
from wmtp.training.optimizers import build_optimizer, parameter_groups
from wmtp.training.performance import ModelFlops, adapters_off_flops, model_flops
from wmtp.training.planning.simulation import Figures, Simulation, local_parts
from wmtp.weighting import any_weighting
from wmtp.weighting.targets import Targets

RECOMPUTE = {False: None, True: 1}  # else as wmtp.models.checkpoint_activations takes it
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# Of a config, all that a simulated step reads.
READ = ("model", "adapters", "backbone", "lora", "head", "weighting", "head_weights", "heads", "anchor",
        "reference_model", "value_model", "batch_size", "seq_len", "gradient_accumulation_steps", "tokens_per_step",
        "dtype", "compile", "activation_checkpointing", "optimizer", "extra_heads_lr", "head_lr",
        "decay_norms_and_embeddings", "max_grad_norm")  # fmt: skip


class SimulatedStep(NamedTuple):
    """What one card does in a step."""

    figures: Figures  # of each phase, once
    repeats: dict[str, float]  # how often a phase runs in a step, by the phase's beginning; of all others: ""
    tokens: float  # of a step, over all cards
    flops: float  # that the models need for a step (wmtp.training.performance)
    depths: tuple[int, int]  # blocks of the whole model's trunk and head 1, and of the frozen model's
    checkpoint: float  # bytes of what is trained and of the optimizer's state, of this card
    unit: str = "step"  # what is called a step here

    def times(self, phase: str) -> float:
        """Returns how often a phase runs in a step."""
        return self.repeats.get(phase.partition(" of ")[0], self.repeats[""])


def simulate_step(cfg: DictConfig, mesh: DeviceMesh, *, depth: int | None = None) -> SimulatedStep:
    """Simulates a steady optimizer step: the optimizer has its moments, and gradients of earlier micro-batches exist.

    Args:
        cfg: of `full_finetune_distributed_wmtp.py`, `lora_wmtp.py` or `critic_stage1.py`.
        mesh: of the simulated cluster.
        depth: blocks of every trunk that are simulated; None for all.

    Raises:
        ConfigError, UserError: a part that cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        # How many targets a weighting keeps is random, and the same each time. CUDA's generators are not touched.
        torch.default_generator.manual_seed(0)
        return _simulated((_Critic if "backbone" in cfg else _Finetuning)(cfg, mesh, depth))


def _simulated(step: "_Step") -> SimulatedStep:
    simulation, cfg = step.simulation, step.cfg
    with simulation:
        simulation.hold(list(step.model.parameters()), "weights")
        simulation.hold([list(frozen.parameters()) for frozen in step.frozen.values()], "frozen models")
        optimizer = _optimizer(cfg, step, simulation)
        if step.micro_batches <= 1:
            optimizer.zero_grad(set_to_none=True)
        simulation.reset()
        loss_sum = step.forward()
        with simulation.phase("backward", "activations"):
            (loss_sum * step.world_size).backward()
        simulation.fused = False
        with simulation.phase("optimizer", "optimizer"):
            loss_sum.tolist()  # with the step's other sums, which the recipe asks for together
            del loss_sum
            scale_grads(step.model, torch.tensor(1.0))
            norm = torch.nn.utils.clip_grad_norm_(step.trained, cfg.get("max_grad_norm") or math.inf)
            float(norm.full_tensor())  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    kept = [*step.trained, *(value for state in optimizer.state.values() for value in state.values())]
    size = sum(part.nbytes for tensor in kept if isinstance(tensor, Tensor) for part in local_parts(tensor))
    repeats = {"": float(step.micro_batches), "optimizer": 1.0}
    flops = step.micro_batches * step.flops
    return SimulatedStep(simulation.figures(), repeats, step.tokens, flops, step.depths, size)


def shape_of(cfg: DictConfig, read: Collection[str]) -> DictConfig:
    """Returns what a simulated step reads of a config (`READ`): configs that share it have one plan."""
    plain = DictConfig(OmegaConf.to_container(cfg, resolve=True))
    shape = OmegaConf.masked_copy(plain, [key for key in read if key in plain])
    if "lr" in shape.get("optimizer", ()):
        shape.optimizer.lr = 1e-3  # how far weights move changes nothing
    return shape


def recompute(cfg: DictConfig) -> int | str | None:
    """Returns which activations are computed again, as `wmtp.models.checkpoint_activations` takes it; None: none."""
    value = cfg.get("activation_checkpointing", False)
    return RECOMPUTE.get(value, value)


def period(cfg: DictConfig) -> int:
    """Returns the number of blocks after which the pattern of recomputation begins anew."""
    every = recompute(cfg)
    return every if isinstance(every, int) else 1


def two_depths(cfg: DictConfig) -> tuple[int, int]:
    """Returns the depths of two shallow models with all phases of the backward pass, in the whole one's pattern."""
    least, every = GATHERED_LATE + 2 * period(cfg) + 2, period(cfg)
    if every > 1:
        with torch.device("meta"):
            least += (len(build(cfg.model, where="model").layers) - least) % every
    return least, least + every


def _optimizer(cfg: DictConfig, step: "_Step", simulation: Simulation) -> torch.optim.Optimizer:
    """Builds the optimizer, and lets it make its moments from gradients of zero, which stay."""
    optimizer = build_optimizer(cfg.optimizer, step.groups())
    with simulation.phase("", "gradients"):
        for parameter in step.trained:
            parameter.grad = torch.zeros_like(parameter)
    with simulation.phase("", "optimizer"):
        optimizer.step()
    return optimizer


def packed_tokens(rows: int, seq_len: int) -> dict[str, Tensor]:
    """Returns a batch of two documents a row, as packed rows have several: attention has its mask."""
    tokens = torch.arange(rows * seq_len).reshape(rows, seq_len) % 97
    return {"tokens": tokens, "document_ids": (torch.arange(seq_len) >= seq_len // 2).long().expand(rows, seq_len)}


def cut_down(decoder: Any, depth: int | None) -> None:
    """Leaves a decoder's first blocks and head 1, so many in all; None leaves it as it is."""
    if depth is not None and depth < len(decoder.layers):
        decoder.layers = nn.ModuleList([*decoder.layers[: depth - 1], decoder.layers[-1]])


def _decoder(model: Any) -> Any:
    return model.backbone if isinstance(model, ValueModel) else model


class _Step:
    """The models and the batch of a training step."""

    model: Any
    micro_batches: float
    tokens: float

    def __init__(self, cfg: DictConfig, mesh: DeviceMesh, depth: int | None, rows: int, seq_len: int) -> None:
        self.cfg, self.mesh, self.depth = cfg, mesh, depth
        self.world_size = mesh.size()
        # Real are the figures of each target and each head, and nothing that is as wide as a model.
        self.simulation = Simulation(small=8 * rows * seq_len)
        self.frozen: dict[str, nn.Module] = {}
        self.flops, self.depths = 0.0, (0, 0)
        self.batch = packed_tokens(rows, seq_len)

    def groups(self) -> list[dict[str, Any]]:
        """Returns the optimizer's parameter groups, as the recipe has them."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """Runs the models on the batch, and returns the sum of the loss."""
        raise NotImplementedError

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def place(
        self, model: nn.Module, recompute: int | str | None = None, needed: Sequence[ModelFlops] = ()
    ) -> nn.Module:
        """Cuts a model on the meta device down to the depth, shards it, and gives it fake weights.

        Args:
            needed: the operations that it needs in a step; by default as it is.
        """
        decoder = _decoder(model)
        rows, seq_len = self.batch["tokens"].shape
        targets = [rows * seq_len] * decoder.num_future_tokens
        self.flops += sum(each.of(rows * seq_len, seq_len, targets) for each in needed or [model_flops(model)])
        self.depths = (self.depths[0] or len(decoder.layers), len(decoder.layers))
        cut_down(decoder, self.depth)
        fused = None
        if self.cfg.get("compile") and not any(True for _ in quantized_modules(model)):  # 4 bits: as if it were off
            from wmtp.training.planning.compiled import fused_traffic  # Inductor takes seconds to import

            fused = fused_traffic(decoder.layers[0], rows, seq_len, decoder.embed_dim, DTYPES[self.cfg.dtype])
        if recompute is not None:
            checkpoint_activations(model, recompute)
        shard_model(model, self.mesh, param_dtype=DTYPES[self.cfg.dtype])
        with self.simulation.mode:
            model.to_empty(device="cpu")
            for name, module in quantized_modules(model):
                module.weight = quantize_nf4(module.get_parameter("weight"), name)
        if fused is not None:
            for block in (*decoder.layers, *decoder.extra_heads):
                self._compile(block, *fused)
        return model

    def _compile(self, block: nn.Module, forward: tuple[int, int], backward: tuple[int, int]) -> None:
        """Counts a block's elementwise work as its compiled kernels do it."""
        simulation, again = self.simulation, isinstance(block, CheckpointWrapper)

        def begin(*_: Any) -> None:
            simulation.fused = True

        def end(module: nn.Module, args: Any, output: Tensor) -> None:
            simulation.fused = False
            simulation.add(*forward)
            if output.requires_grad:
                output.register_hook(in_backward)

        def in_backward(gradient: Tensor) -> None:
            simulation.fused = True
            simulation.add(*backward)
            if again:
                simulation.add(*forward)

        block.register_forward_pre_hook(begin)
        block.register_forward_hook(end)

    def mark_backward(self, model: nn.Module) -> None:
        """Makes phases of the ends of the backward pass: the gradient that reaches a block begins its phase."""
        decoder = _decoder(model)
        trunk = len(decoder.layers) - 1
        for number, block in enumerate((*decoder.layers, *decoder.extra_heads)):
            name = "blocks"
            if number >= trunk:
                name = "heads"
            elif number <= GATHERED_LATE + period(self.cfg):
                name = f"block {number + 1}"
            elif number >= trunk - period(self.cfg):
                name = f"block {trunk - number} from the end"
            block.register_forward_hook(self._marks(f"backward of {name}"))

    def _marks(self, name: str) -> Callable:
        def mark(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: self.simulation.enter(name, "activations"))

        return mark


_STEP = 10**6 + 1  # none at which the weights are checked


class _Finetuning(_Step):
    """A step of full fine-tuning or of LoRA, with token weights."""

    def __init__(self, cfg: DictConfig, mesh: DeviceMesh, depth: int | None) -> None:
        super().__init__(cfg, mesh, depth, cfg.batch_size, cfg.seq_len)
        self.weighting = any_weighting(build(cfg.weighting, where="weighting"))
        self.weighting.rehearse()
        with torch.device("meta"):
            model = build(cfg.model, where="model")
            if cfg.get("adapters") is not None:
                store_frozen(build(cfg.adapters, model, where="adapters", seed=0), DTYPES[cfg.dtype])
        self.heads = build(cfg.get("heads"), where="heads") or HeadTraining()
        self.heads.prepare(model.num_future_tokens, cfg.get("head_weights"), "cpu", model=model)
        self.anchor = build(cfg.get("anchor"), where="anchor")
        needed = [model_flops(model, trunk_gradient=self.heads.at(0).get("trunk_gradient"))]
        needed += [adapters_off_flops(model)] * (self.anchor is not None and cfg.get("adapters") is not None)
        self.model = self.place(model, recompute(cfg), needed).train()
        self.mark_backward(self.model)
        beside = self.anchor if cfg.get("adapters") is None else None
        self.reading = ReferenceReading(self.weighting.needs, self.heads.soft_targets, beside)
        self._freeze("reference_model", lambda model: model, asked=self.reading.asked)
        self._freeze("value_model", lambda model: ValueModel(model, "mlp"), asked="values" in self.weighting.needs)
        rows = cfg.batch_size * self.world_size
        self.micro_batches = cfg.get("gradient_accumulation_steps") or math.ceil(
            cfg.tokens_per_step / (rows * cfg.seq_len)
        )
        self.tokens = self.micro_batches * rows * cfg.seq_len

    def _freeze(self, key: str, shaped: Callable, *, asked: bool) -> None:
        """Places a frozen model beside the policy, if it is asked something and the config names one."""
        if not asked or self.cfg.get(key) is None:
            return
        section = (
            self.cfg[key] if key == "reference_model" else OmegaConf.merge(self.cfg.model, {"num_future_tokens": 1})
        )
        with torch.device("meta"):
            model = shaped(build(section, where=key))  # type: ignore[arg-type]
        self.frozen[key] = self.place(model.requires_grad_(False).eval().to(DTYPES[self.cfg.dtype]))

    def groups(self) -> list[dict[str, Any]]:
        decay_all = bool(self.cfg.get("decay_norms_and_embeddings"))
        return parameter_groups(self.model, self.model.extra_heads, self.cfg.get("extra_heads_lr"), decay_all)

    def forward(self) -> Tensor:
        simulation, labels = self.simulation, self.batch["tokens"].clone()
        labels[:, : labels.shape[1] // 16] = -100
        with as_on_cuda(False):
            targets = Targets(labels, self.batch["document_ids"])
        named = {name: torch.rand(labels.shape) for name in self.weighting.needs if not name.startswith("policy")}
        scored, read = {"labels": labels, "targets": targets}, {}
        for key, model in self.frozen.items():
            with simulation.phase("frozen models", "activations"), torch.no_grad():
                if key == "reference_model":
                    read = model(**self.batch, loss_fn=self.reading, **scored)
                    named |= read.pop("signals")
                else:
                    named["values"] = model(**self.batch)
        if self.anchor is not None and self.cfg.get("adapters") is not None:
            with simulation.phase("adapters off", "activations"), torch.no_grad(), disable_adapter(self.model):
                read["anchor"] = self.model(**self.batch, num_heads=1, loss_fn=self.anchor.of_adapted)
        with simulation.phase("forward", "activations"):
            out = self.model(
                **self.batch,
                loss_fn=self._loss,
                labels=labels,
                weighting=self.weighting,
                signals=named,
                targets=targets,
                **read,
                **self.heads.at(_STEP),
                step=_STEP,
            )
        return out.loss_sum

    def _loss(self, *args: Any, **kwargs: Any) -> Any:
        with self.simulation.phase("loss", "loss"):
            return mtp_loss(*args, **kwargs)


class _Critic(_Step):
    """A step of the critic: two programs of each pair."""

    def __init__(self, cfg: DictConfig, mesh: DeviceMesh, depth: int | None) -> None:
        super().__init__(cfg, mesh, depth, 2 * cfg.batch_size, cfg.seq_len)
        with torch.device("meta"):
            backbone = build(cfg.model, where="model")
            if cfg.backbone == "lora":
                build(cfg.lora, backbone, where="lora")
            elif cfg.backbone == "frozen":
                backbone.requires_grad_(False)
            elif not backbone.config.tie_word_embeddings:
                backbone.output.requires_grad_(False)
            model = store_frozen(ValueModel(backbone, cfg.head), DTYPES[cfg.dtype])
        self.model = self.place(model, recompute(cfg) if cfg.backbone != "frozen" else None).train()
        self.mark_backward(self.model)
        self.micro_batches = cfg.gradient_accumulation_steps
        self.tokens = self.micro_batches * 2 * cfg.batch_size * cfg.seq_len * self.world_size

    def groups(self) -> list[dict[str, Any]]:
        decay_all = bool(self.cfg.get("decay_norms_and_embeddings"))
        return parameter_groups(self.model, self.model.value_head, self.cfg.get("head_lr"), decay_all)

    def forward(self) -> Tensor:
        with self.simulation.phase("forward", "activations"):
            return self.model(**self.batch).float().sum()
