"""Full fine-tuning with token-weighted multi-token prediction, on one process or many, CPU or CUDA.

    tune run --nproc_per_node 2 recipes/full_finetune_distributed_wmtp.py --config configs/tiny/uniform.yaml
    torchrun --nproc_per_node 4 recipes/full_finetune_distributed_wmtp.py --config configs/meta_mtp_7b/rho1.yaml

Any key of the config can be overridden on the command line: `max_steps=20 weighting.percentile=0.7`.
The recipe is meant to be copied and edited: the loop is in `train`, plain PyTorch with FSDP2 underneath.
"""

import math
import shutil
from pathlib import Path

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.training import scale_grads
from tqdm import tqdm

from wmtp import config
from wmtp.config import ConfigError, ConfigReader, StopTraining, build
from wmtp.data import BatchStream
from wmtp.distributed import all_reduce_sum, end_world, on_rank_0, start_world
from wmtp.errors import clear_errors, ending
from wmtp.loss import HeadTraining, ReferenceReading, mtp_loss
from wmtp.models import checkpoint_activations, export_hf, load_checkpoint, require_fit, shard_model
from wmtp.pretrained import resolve_checkpoint
from wmtp.report.preview import preview
from wmtp.training.acceptance import HeldOutAcceptance
from wmtp.training.accumulation import Accumulation, num_training_steps
from wmtp.training.checkpoint import Checkpointer, checkpoint_to_resume, load_sharded, load_trainer, restore_rng
from wmtp.training.frozen_models import OFFLOAD, frozen_reference, frozen_signals, frozen_value_model
from wmtp.training.lr_schedule import build_schedule
from wmtp.training.optimizers import build_optimizer, parameter_groups
from wmtp.training.output_dir import check_output_dir, open_output
from wmtp.training.packed_data import packed_data
from wmtp.training.performance import StepMeter, build_profiler, model_flops
from wmtp.training.planning import plan_run
from wmtp.training.run_log import RunLog, builder_name
from wmtp.training.stopping import StopFlag, stopping
from wmtp.training.validation import epoch_cross_entropy, held_out_sets, validate
from wmtp.weighting import any_weighting
from wmtp.weighting.targets import moved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECOMPUTE = {False: None, True: 1, "selective": "selective"}  # or a number of blocks
RESULTS = ("checkpoints", "export", "held_out", "profiler", "token_weights")  # beside metrics.jsonl


class FullFinetuneRecipeWMTP:
    """Order of events: read the config, `setup`, `train` (which evaluates and saves), `export`, `cleanup`."""

    def __init__(self, cfg: DictConfig) -> None:
        """Reads and checks every key; nothing is built or written yet."""
        self._cfg = cfg
        read = ConfigReader(cfg)
        self._output_name = str(read.get("output_dir"))
        self._resume = read.choice("resume", {False: "no", True: "yes", "auto": "auto"}, False)
        self._overwrite = read.flag("overwrite", False)
        self._seed = read.integer("seed", 0)
        self._device_name = read.choice("device", {"cpu": "cpu", "cuda": "cuda", "auto": "auto"}, "auto")
        self._dtype = read.choice("dtype", DTYPES)

        self._model_cfg = read.section("model")
        self._checkpoint = read.get("checkpoint", None)
        self._tokenizer_cfg = read.section("tokenizer")
        self._dataset_cfg = read.section("dataset")
        self._eval_dataset_cfg = read.section("eval_dataset", optional=True)
        self._seq_len = read.integer("seq_len", minimum=2)
        self._rows = {"packed": read.flag("packed", True), "workers": read.integer("data_workers", 4, minimum=1)}
        self._rows["cache"] = read.text("data_cache", "auto", null=True)
        self._preview = read.integer("preview", 0)

        self._weighting_cfg = read.section("weighting")
        self._head_weights = read.numbers("head_weights", None, distinct=False)
        self._heads_cfg = read.section("heads", optional=True)
        self._anchor_cfg = read.section("anchor", optional=True)
        self._reference_cfg = read.section("reference_model", optional=True)
        self._reference_checkpoint = read.get("reference_checkpoint", None)
        self._value_model_path = read.get("value_model", None)
        self._refresh_policy_ce = read.choice("refresh_policy_ce", {"step": "step", "epoch": "epoch"}, "step")

        self._batch_size = read.integer("batch_size", minimum=1)
        self._accumulation_steps = read.integer("gradient_accumulation_steps", None, minimum=1)
        self._tokens_per_step = read.integer("tokens_per_step", None, minimum=1)
        self._epochs = read.number("epochs", None, above=0)
        self._max_steps = read.integer("max_steps", None, minimum=1)
        self._optimizer_cfg = read.section("optimizer")
        self._extra_heads_lr = read.number("extra_heads_lr", None, above=0)
        self._decay_all = read.flag("decay_norms_and_embeddings", False)
        self._scheduler_cfg = read.section("lr_scheduler", optional=True)
        self._max_grad_norm = read.number("max_grad_norm", None, above=0)

        self._recompute = read.choice("activation_checkpointing", RECOMPUTE, False, or_whole=2)
        self._compile = read.flag("compile", False)
        self._cpu_offload = read.choice("cpu_offload", OFFLOAD, False)
        self._hsdp_replicas = read.integer("hsdp_replicas", 1, minimum=1)
        self._timeout_minutes = read.number("timeout_minutes", 30.0, above=0)
        self._deterministic = read.flag("deterministic", False)

        self._log_every = read.integer("log_every", 1, minimum=1)
        self._eval_every = read.integer("eval_every", None, minimum=1)
        accept = [read.integer("accept_prompts", 0, minimum=0), read.integer("accept_tokens", 64, minimum=1)]
        self._acceptance = HeldOutAcceptance(*accept)
        self._save_every = read.integer("save_every", None, minimum=1)
        self._stop = StopFlag(read.number("max_minutes", None, above=0))
        self._keep_checkpoints = read.integer("keep_checkpoints", 2, minimum=1)
        self._export_dtype = read.choice("export_dtype", {**DTYPES, "none": None}, "bf16")
        self._token_view_cfg = read.section("token_view", optional=True)
        self._profiler_cfg = read.section("profiler", optional=True)
        self._peak_flops = read.number("peak_flops", None, above=0)
        self._tracking_cfg = read.section("tracking", optional=True)
        read.done()

        if (self._accumulation_steps is None) == (self._tokens_per_step is None):
            raise ConfigError("set exactly one of gradient_accumulation_steps and tokens_per_step")
        if (self._epochs is None) == (self._max_steps is None):
            raise ConfigError("set exactly one of epochs and max_steps")

    # ------------------------------------------------------------------------------------------------------------------
    # Set-up

    def setup(self) -> None:
        """Builds everything in the order in which a mistake is cheapest to find: files, data, then models."""
        self._world = start_world(self._device_name, self._hsdp_replicas, self._timeout_minutes, self._deterministic)
        if self._cpu_offload and self._world.device.type == "cpu":
            raise ConfigError("cpu_offload needs device=cuda: on a CPU the parameters are there already")
        self._output = open_output(self._output_name, self._cfg, resume=self._resume)
        self._output_dir = self._output.folder
        self._log = RunLog(self._output, self._tracking_cfg, is_main=self._world.is_main)
        check_output_dir(self._output, "a run", results=RESULTS, overwrite=self._overwrite, resume=self._resume)
        self._resume_from = checkpoint_to_resume(self._output_dir, self._resume)
        torch.manual_seed(self._seed)

        self._weighting = any_weighting(build(self._weighting_cfg, where="weighting"))
        self._heads = build(self._heads_cfg, where="heads") or HeadTraining()
        self._heads.require_teacher(self._reference_cfg)
        self._anchor = build(self._anchor_cfg, where="anchor")
        if self._anchor is not None:
            self._anchor.require_model(self._reference_cfg)
        self._token_view = build(self._token_view_cfg, where="token_view")
        if self._token_view is not None:
            self._token_view.check(self._weighting.needs)
        self._tokenizer = build(self._tokenizer_cfg, where="tokenizer")
        self._data = self._pack(self._dataset_cfg, "dataset")
        self._eval_data = held_out_sets(self._eval_dataset_cfg, self._pack)
        models = {"reference_model": self._reference_cfg, "value_model": self._value_model_path}
        self._frozen_signals = frozen_signals(self._weighting.needs, self._data, models)
        self._weighting.prepare(self._tokenizer, self._data)
        self._reading = ReferenceReading(self._frozen_signals, self._heads.soft_targets, self._anchor)
        ranks = {"rank": self._world.rank, "world_size": self._world.size}
        self._stream = BatchStream(self._data, batch_size=self._batch_size, **ranks, seed=self._seed)
        step = {"micro_batches": self._accumulation_steps, "target_tokens": self._tokens_per_step}
        step["rows_per_micro_batch"] = self._batch_size * self._world.size
        self._total_steps = num_training_steps(self._max_steps, self._epochs, self._data, **step)
        plan_run(self._cfg, self._world, self._total_steps, self._log.info)
        self._profiler = build_profiler(self._profiler_cfg, self._output_dir, self._world, self._total_steps)

        self._model = self._build_model()
        fitting = {"model": self._model, "num_steps": self._total_steps}
        self._heads.prepare(self._model.num_future_tokens, self._head_weights, self._world.device, **fitting)
        into = {"dtype": self._dtype, "cpu_offload": "frozen" in self._cpu_offload}
        self._reference = None
        if self._reading.asked:
            named = self._reference_cfg, self._reference_checkpoint, self._tokenizer, self._data, self._world
            self._reference = frozen_reference(*named, **into, compile=self._compile, log=self._log.info)
        path = self._value_model_path if "values" in self._frozen_signals else None
        self._value_model = frozen_value_model(path, self._tokenizer, self._seq_len, self._world, **into)
        self._epoch_ce = None  # with refresh_policy_ce=epoch: {"epoch": number, "ce": [1 or H, rows, S]}
        groups = parameter_groups(self._model, self._model.extra_heads, self._extra_heads_lr, self._decay_all)
        self._torch_optimizer = build_optimizer(self._optimizer_cfg, groups)

        self._step, run_id = 0, None
        self._checkpointer = Checkpointer(self._output_dir, keep_last=self._keep_checkpoints, output=self._output)
        if self._resume_from is not None:
            run_id = self._restore(self._resume_from)
        steps = {"step": self._step, "num_training_steps": self._total_steps}
        self._scheduler = build_schedule(self._scheduler_cfg, self._torch_optimizer, **steps, log=self._log.info)
        self._log.start(
            self._cfg,
            recipe=Path(__file__).stem,
            method=builder_name(self._weighting_cfg),
            dataset=builder_name(self._dataset_cfg),
            data_sha256=self._data.fingerprint,
            tags={"wmtp.rows_sha256": self._data.rows_sha256},
            step=self._step,
            resumed=self._resume_from is not None,
            run_id=run_id,
            replaces=RESULTS,
        )
        self._checkpointer.remove_torn()

    def _pack(self, section: DictConfig, where: str):
        data = packed_data(section, self._tokenizer, where, self._seq_len, **self._rows)
        self._log.info(f"{where}: {data.summary(self._weighting.needs)}")
        return data

    def _build_model(self):
        """Builds the sharded model. From a checkpoint it is built on the meta device, each rank reads its own shard;
        without one it starts random, from one seed on every rank: the same full model, then cut."""
        path = None if self._checkpoint is None else resolve_checkpoint(self._checkpoint)
        with torch.device("cpu" if path is None else "meta"):
            model = build(self._model_cfg, where="model")
        require_fit(model, self._data.max_token_id, self._seq_len, "model")
        if self._recompute is not None:
            checkpoint_activations(model, self._recompute)
        if self._compile:
            for block in (*model.layers, *model.extra_heads):
                block.compile()
        offload = "model" in self._cpu_offload
        shard_model(model, self._world.mesh, param_dtype=self._dtype, cpu_offload=offload)
        if path is not None:
            load_checkpoint(model, path, device="cpu" if offload else self._world.device, log=self._log.info)
        return model

    def _restore(self, checkpoint: Path) -> str | None:
        """Continues where the checkpoint was saved; returns the MLflow run id."""
        state, changes = load_trainer(checkpoint, self._cfg)
        self._stream.load_state_dict(state["stream"])
        load_sharded(checkpoint, self._model, self._torch_optimizer, changes=changes)
        self._weighting.load_state_dict(state["weighting"])
        self._heads.load_state_dict(state.get("heads", {}))
        self._acceptance.load_state_dict(state.get("acceptance", {}))
        self._epoch_ce = state["epoch_ce"] if self._refresh_policy_ce == "epoch" else None
        restore_rng(state["rng"], self._world.rank)
        self._step = self._checkpointer.saved_step = state["step"]
        self._log.info(f"resumed {checkpoint} at step {self._step} of {self._total_steps}{changes}")
        return state["run_id"]

    # ------------------------------------------------------------------------------------------------------------------
    # Training

    def train(self) -> None:
        """Runs the loop. One optimizer step: micro-batches forward and backward, one division, clip, guard, update."""
        model, optimizer = self._model, self._torch_optimizer
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self._preview:
            shown = {"tokenizer": self._tokenizer, "batch_size": self._batch_size, "step": self._step}
            self._log.info(preview(self._preview, model, self._data, self._next_batch, self._weighting, **shown))
        if self._eval_data and self._step == 0:
            self.evaluate()
        flops = [model_flops(model, trunk_gradient=self._heads.at(self._step).get("trunk_gradient"))]
        flops += [model_flops(frozen) for frozen in (self._reference, self._value_model)]
        meter = StepMeter(self._world, self._dtype, flops, self._peak_flops)
        self._profiler.start(self._step)
        model.train()
        progress = tqdm(
            total=self._total_steps, initial=self._step, disable=not self._world.is_main, desc="train", unit="step"
        )
        while self._step < self._total_steps and not self._stop.agreed:
            self._score_epoch()
            accumulated = Accumulation(self._stream, self._accumulation_steps, self._tokens_per_step)
            meter.start()
            while not accumulated.full:
                with meter.data_wait():
                    batch = accumulated.next_batch()
                batch = self._next_batch(batch)
                out = model(
                    batch["tokens"],
                    document_ids=batch["document_ids"],
                    loss_fn=mtp_loss,
                    labels=batch["labels"],
                    weighting=self._weighting,
                    signals=batch["signals"],
                    targets=batch["targets"],
                    **batch.get("found", {}),
                    step=self._step,
                    **self._heads.at(self._step),
                )
                # HSDP's replicas sum gradients once a step; shards in each micro-batch, or each would hold them whole.
                model.set_requires_all_reduce(accumulated.full)
                # FSDP2 averages gradients over ranks; times the world size that is a sum, divided once below.
                (out.loss_sum * self._world.size).backward()
                accumulated.add(batch, out)

            sums = accumulated.sums(self._stop)
            if sums.num_targets == 0:
                raise StopTraining(f"step {self._step + 1}: no target token; {accumulated.documents(self._data)}")
            loss = sums.loss_sum / sums.num_targets
            scale_grads(model, torch.tensor(1.0 / sums.num_targets, device=self._world.device))
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm or math.inf)
            grad_norm = float(grad_norm.full_tensor())
            accumulated.require_finite(loss, grad_norm, self._step + 1, self._data)  # before the weights are touched
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if self._scheduler is not None:
                self._scheduler.step()
            self._weighting.end_step(all_reduce_sum)
            self._heads.end_step(all_reduce_sum)
            self._step += 1
            progress.update()
            progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}")

            if self._step % self._log_every == 0 or self._step == self._total_steps:
                metrics = {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": lr}
                metrics["train/targets"] = self._stream.num_targets
                metrics |= {f"train/ce_head{k}": ce for k, ce in enumerate(sums.ce, start=1)}
                metrics |= {f"train/{name}": kl for name, kl in sums.divergence.items()}
                metrics |= {f"weights/{name}": value for name, value in accumulated.weight_statistics().items()}
                metrics |= meter.metrics(sums.tokens, self._seq_len, sums.targets)
                self._log.metrics(metrics, self._step)
            if self._token_view is not None and self._step % self._token_view.every == 0 and self._world.is_main:
                shown = self._data, accumulated.batches[0], accumulated.outs[0], self._step, self._weighting_cfg
                self._log.page(*self._token_view.page(self._tokenizer, *shown))
            last = self._step == self._total_steps
            if self._eval_data and (last or (self._eval_every and self._step % self._eval_every == 0)):
                self.evaluate()
                model.train()
                self._stop.ask_all()
            if self._save_every and self._step % self._save_every == 0:
                self.save_checkpoint()
            self._profiler.step()
        self._profiler.stop(self._log)
        progress.close()
        if self._step and self._checkpointer.saved_step != self._step:  # however it ended
            self.save_checkpoint()
        self._checkpointer.wait()
        self._stop.end(f"after step {self._step} of {self._total_steps}")

    @torch.no_grad()
    def _next_batch(self, batch: dict) -> dict:
        """Moves a batch to the device and adds what frozen models, or the epoch's start, say about its tokens."""
        batch = moved(batch, self._world.device)
        inputs = self._inputs(batch)
        if self._reference is not None:
            named = {k: batch[k] for k in ("labels", "targets")}
            found = self._reference(**inputs, loss_fn=self._reading, **named)
            batch["signals"] |= found.pop("signals")
            batch["found"] = found
        if self._value_model is not None:
            batch["signals"]["values"] = self._value_model(**inputs)
        if self._epoch_ce is not None:
            batch["signals"]["policy_ce"] = self._epoch_ce["ce"][:, batch["rows"]].to(self._world.device)
        return batch

    def _inputs(self, batch: dict) -> dict:
        """Returns what a model reads of a batch."""
        return {key: batch[key].to(self._world.device) for key in ("tokens", "document_ids")}

    def _score_epoch(self) -> None:
        """Scores every row by the policy as an epoch begins, with refresh_policy_ce=epoch; kept until the next one."""
        if self._refresh_policy_ce == "epoch" and "policy_ce" in self._weighting.needs:
            heads = self._model.num_future_tokens if self._weighting.per_head else 1
            scored = {"heads": heads, "batch_size": self._batch_size, "world": self._world}
            kept, epoch = self._epoch_ce, int(self._stream.epoch)
            self._epoch_ce = epoch_cross_entropy(kept, epoch, self._model, self._data, self._inputs, **scored)

    # ------------------------------------------------------------------------------------------------------------------
    # Evaluation, checkpoints, export

    def evaluate(self) -> None:
        """Logs the held-out CE of each head, in nats per target, over each set of eval_dataset and each document."""
        choices = {"choices": self._acceptance.prompts > 0}
        found = validate(self._model, self._eval_data, self._inputs, self._batch_size, self._world, **choices)
        when = {"first": self._step == 0, "last": self._step == self._total_steps, "log": self._log.info}
        measured = self._model, self._eval_data, self._tokenizer, self._world
        found.metrics.update(self._acceptance.measure(*measured, **when))
        self._log.held_out(found, self._step)

    def save_checkpoint(self) -> None:
        """Starts saving all that a resumed run needs; the loop goes on while the shards are written."""
        trainer = {
            "stream": self._stream.state_dict(),
            "config": OmegaConf.to_container(self._cfg, resolve=True),
            "weighting": self._weighting.state_dict(),
            "heads": self._heads.state_dict(),
            "acceptance": self._acceptance.state_dict(),
            "epoch_ce": self._epoch_ce,
            "run_id": self._log.run_id,
        }
        self._checkpointer.save(self._step, self._model, self._torch_optimizer, trainer)

    def export(self) -> None:
        """Writes the model as an HF folder: head 1 for `transformers`, the other heads beside it."""
        if self._export_dtype is None:
            return
        folder = self._output_dir / "export"
        on_rank_0(lambda: shutil.rmtree(folder, ignore_errors=True))  # of this very run, resumed after its end
        export_hf(self._model, folder, tokenizer_source=self._tokenizer, dtype=self._export_dtype)
        self._log.exported(folder, self._step)

    def cleanup(self, status: str = "FINISHED") -> None:
        """Ends the MLflow run and leaves the process group."""
        self._log.close(status)
        if status == "FINISHED":
            self._checkpointer.close()
            end_world()
        self._output.close(fail=status == "FINISHED")


@clear_errors()
@stopping()
@config.parse
def main(cfg: DictConfig) -> None:
    recipe = FullFinetuneRecipeWMTP(cfg)
    recipe.setup()
    with ending(recipe.cleanup):
        recipe.train()
        recipe.export()


if __name__ == "__main__":
    main()
