"""Full fine-tuning with token-weighted multi-token prediction, on one process or many, CPU or CUDA.

    tune run --nproc_per_node 2 recipes/full_finetune_distributed_wmtp.py --config configs/tiny/uniform.yaml
    torchrun --nproc_per_node 4 recipes/full_finetune_distributed_wmtp.py --config configs/meta_mtp_7b/rho1.yaml

Any key of the config can be overridden on the command line: `max_steps=20 weighting.percentile=0.7`.
The recipe is meant to be copied and edited: the loop is in `train`, plain PyTorch with FSDP2 underneath.
"""

import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config
from torchtune.training import scale_grads
from tqdm import tqdm

from wmtp.checkpoint import Checkpointer, latest_checkpoint, load_sharded, load_trainer, restore_rng
from wmtp.config import ConfigError, ConfigReader, StopTraining, build, check_output_dir, clear_errors
from wmtp.data import BatchStream, held_out_batches, hf_tokenizer, pack, require_same_vocabulary
from wmtp.distributed import all_reduce_sum, gather_objects, start_world
from wmtp.loss import mtp_loss, token_cross_entropy, weighted_mtp_cross_entropy
from wmtp.models import checkpoint_activations, export_hf, load_checkpoint, resolve_checkpoint, shard_model
from wmtp.tracking import environment_tags
from wmtp.weighting import weight_statistics

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FullFinetuneRecipeWMTP:
    """Order of events: read the config, `setup`, `train` (which evaluates and saves), `export`, `cleanup`."""

    def __init__(self, cfg: DictConfig) -> None:
        """Read and check every key; nothing is built or written yet."""
        self._cfg = cfg
        read = ConfigReader(cfg)
        self._output_dir = Path(read.get("output_dir"))
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
        self._packed = read.flag("packed", True)

        self._weighting_cfg = read.section("weighting")
        self._head_weights = read.get("head_weights", None)
        self._reference_cfg = read.section("reference_model", optional=True)
        self._reference_checkpoint = read.get("reference_checkpoint", None)

        self._batch_size = read.integer("batch_size", minimum=1)
        self._accumulation_steps = read.integer("gradient_accumulation_steps", None, minimum=1)
        self._tokens_per_step = read.integer("tokens_per_step", None, minimum=1)
        self._epochs = read.number("epochs", None, above=0)
        self._max_steps = read.integer("max_steps", None, minimum=1)
        self._optimizer_cfg = read.section("optimizer")
        self._extra_heads_lr = read.number("extra_heads_lr", None, above=0)
        self._scheduler_cfg = read.section("lr_scheduler", optional=True)
        self._max_grad_norm = read.number("max_grad_norm", None, above=0)

        self._activation_checkpointing = read.flag("activation_checkpointing", False)
        self._compile = read.flag("compile", False)
        self._cpu_offload = read.flag("cpu_offload", False)
        self._hsdp_replicas = read.integer("hsdp_replicas", 1, minimum=1)

        self._log_every = read.integer("log_every", 1, minimum=1)
        self._eval_every = read.integer("eval_every", None, minimum=1)
        self._save_every = read.integer("save_every", None, minimum=1)
        self._keep_checkpoints = read.integer("keep_checkpoints", 2, minimum=1)
        self._export_dtype = read.choice("export_dtype", {**DTYPES, "none": None}, "bf16")
        self._tracking_cfg = read.section("tracking", optional=True)
        read.done()

        if (self._accumulation_steps is None) == (self._tokens_per_step is None):
            raise ConfigError("set exactly one of gradient_accumulation_steps and tokens_per_step")
        if (self._epochs is None) == (self._max_steps is None):
            raise ConfigError("set exactly one of epochs and max_steps")

    # ------------------------------------------------------------------------------------------------------------------
    # Set-up

    def setup(self) -> None:
        """Build everything in the order in which a mistake is cheapest to find: files, data, then models."""
        self._world = start_world(self._device_name, replicas=self._hsdp_replicas)
        if self._cpu_offload and self._world.device.type == "cpu":
            raise ConfigError("cpu_offload needs device=cuda: on a CPU the parameters are there already")
        self._resume_from = self._check_output_dir()
        torch.manual_seed(self._seed)

        self._weighting = build(self._weighting_cfg, where="weighting")
        self._tokenizer = build(self._tokenizer_cfg, where="tokenizer")
        self._data = self._pack(self._dataset_cfg, "dataset")
        self._eval_data = None if self._eval_dataset_cfg is None else self._pack(self._eval_dataset_cfg, "eval_dataset")
        self._stream = BatchStream(
            self._data,
            batch_size=self._batch_size,
            rank=self._world.rank,
            world_size=self._world.size,
            seed=self._seed,
        )
        self._total_steps = self._count_steps()

        self._model = self._build_model(self._model_cfg, self._checkpoint, "model")
        heads = self._model.num_future_tokens
        self._head_weights = self._check_head_weights(heads)
        self._reference = self._build_reference()
        self._torch_optimizer = build(self._optimizer_cfg, self._parameter_groups(), where="optimizer")
        self._scheduler = None
        if self._scheduler_cfg is not None:
            self._scheduler = build(
                self._scheduler_cfg, self._torch_optimizer, where="lr_scheduler", num_training_steps=self._total_steps
            )

        self._step, self._start_step, run_id = 0, 0, None
        self._checkpointer = Checkpointer(self._output_dir, keep_last=self._keep_checkpoints)
        if self._resume_from is not None:
            run_id = self._restore(self._resume_from)
        self._start_tracking(run_id)

    def _check_output_dir(self) -> Path | None:
        """The checkpoint to resume from, or None; refuses to write over a run, or into a folder that is none."""
        check_output_dir(self._output_dir, "a run", overwrite=self._overwrite, resume=self._resume)
        if self._resume == "no":
            return None
        checkpoint = latest_checkpoint(self._output_dir)
        if self._resume == "yes" and checkpoint is None:
            raise ConfigError(f"resume=true, but {self._output_dir}/checkpoints holds no complete checkpoint")
        return checkpoint

    def _pack(self, section: DictConfig, where: str):
        documents = build(section, self._tokenizer, where=where)
        return pack(documents, self._seq_len, packed=self._packed, pad_id=self._tokenizer.pad_id)

    def _count_steps(self) -> int:
        if self._max_steps is not None:
            return self._max_steps
        if self._tokens_per_step is not None:
            return math.ceil(self._epochs * self._data.num_targets / self._tokens_per_step)
        rows_per_step = self._batch_size * self._world.size * self._accumulation_steps
        return math.ceil(self._epochs * len(self._data) / rows_per_step)

    def _build_model(self, section: DictConfig, checkpoint: str | None, where: str, *, frozen: bool = False):
        """A sharded model. From a checkpoint it is built on the meta device and each rank reads only its own shard;
        without one it starts random, from one seed on every rank: the same full model, then cut."""
        path = None if checkpoint is None else resolve_checkpoint(checkpoint)
        with torch.device("cpu" if path is None else "meta"):
            model = build(section, where=where)
        if model.vocab_size <= self._data.max_token_id:
            raise ConfigError(
                f"{where} has {model.vocab_size} token ids, the dataset uses id {self._data.max_token_id}; "
                "use the tokenizer of the model's checkpoint"
            )
        if self._seq_len > model.max_seq_len:
            raise ConfigError(f"seq_len {self._seq_len} is longer than {where}.max_seq_len {model.max_seq_len}")
        if frozen:
            model.requires_grad_(False).eval()
        elif self._activation_checkpointing:
            checkpoint_activations(model)
        if self._compile:
            for block in (*model.layers, *model.extra_heads):
                block.compile()
        shard_model(model, self._world.mesh, param_dtype=self._dtype, cpu_offload=self._cpu_offload)
        if path is not None:
            load_checkpoint(model, path, device="cpu" if self._cpu_offload else self._world.device)
        return model

    def _build_reference(self):
        """The frozen reference model that runs beside the policy, or None where the weighting or the data need none."""
        if not self._weighting.needs_reference:
            return None
        if self._data.has_reference_ce:
            if self._reference_cfg is not None:
                raise ConfigError("the dataset has a reference_ce column and reference_model is set; keep one of them")
            return None
        if self._reference_cfg is None or self._reference_checkpoint is None:
            raise ConfigError(
                "this weighting needs a reference: set reference_model and reference_checkpoint, or use a dataset with "
                "a reference_ce column"
            )
        require_same_vocabulary(self._tokenizer, hf_tokenizer(resolve_checkpoint(self._reference_checkpoint)))
        return self._build_model(self._reference_cfg, self._reference_checkpoint, "reference_model", frozen=True)

    def _check_head_weights(self, heads: int) -> torch.Tensor | None:
        if self._head_weights is None:
            return None
        values = list(self._head_weights)
        if len(values) != heads or any(v < 0 for v in values) or sum(values) == 0:
            raise ConfigError(f"head_weights must be {heads} numbers >= 0, not all 0, got {values}")
        return torch.tensor(values, dtype=torch.float32, device=self._world.device)

    def _parameter_groups(self) -> list[dict]:
        """What is trained; the extra heads in a group of their own where they have their own learning rate."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        if self._extra_heads_lr is None:
            return [{"params": trained}]
        heads = set(self._model.extra_heads.parameters())
        if not heads:
            raise ConfigError("extra_heads_lr is set, but model.num_future_tokens is 1; set extra_heads_lr=null")
        trunk = [p for p in trained if p not in heads]
        return [{"params": trunk}, {"params": [p for p in trained if p in heads], "lr": self._extra_heads_lr}]

    def _restore(self, checkpoint: Path) -> str | None:
        """Continue where the checkpoint was saved; returns the MLflow run id."""
        state = load_trainer(checkpoint)
        self._stream.load_state_dict(state["stream"])
        load_sharded(checkpoint, self._model, self._torch_optimizer)
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        restore_rng(state["rng"], self._world.rank)
        self._step = self._start_step = state["step"]
        self._say(f"resumed {checkpoint} at step {self._step}")
        return state["run_id"]

    def _start_tracking(self, run_id: str | None) -> None:
        """From here on the run exists on disk: everything before could fail without a trace."""
        self._tracker = None
        self._metrics_file = self._output_dir / "metrics.jsonl"
        gather_objects(None)  # every rank has checked the folder before rank 0 changes it
        if not self._world.is_main:
            return
        if self._tracking_cfg is not None:
            self._tracker = build(self._tracking_cfg, where="tracking", run_id=run_id)
            self._tracker.log_config(self._cfg)
            data = {"data_hash": self._data.fingerprint, "world_size": self._world.size}
            self._tracker.log_tags({**environment_tags(), **data})
            self._say(f"tracking in {self._tracker.where}")
        if self._start_step == 0:  # a new run, or one that overwrite=true replaces
            for name in ("checkpoints", "export"):
                shutil.rmtree(self._output_dir / name, ignore_errors=True)
            self._metrics_file.unlink(missing_ok=True)
        self._output_dir.mkdir(parents=True, exist_ok=True)
        self._checkpointer.remove_torn()
        OmegaConf.save(self._cfg, self._output_dir / "config.yaml", resolve=True)
        if self._metrics_file.exists():  # what was logged after the checkpoint is about to happen again
            lines = self._metrics_file.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self._start_step]
            self._metrics_file.write_text("".join(kept))

    # ------------------------------------------------------------------------------------------------------------------
    # Training

    def train(self) -> None:
        """The loop. One optimizer step: micro-batches forward and backward, one division, clip, guard, update."""
        model, optimizer = self._model, self._torch_optimizer
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self._eval_data is not None and self._step == 0:
            self._log(self.evaluate())
        model.train()
        progress = tqdm(
            total=self._total_steps, initial=self._step, disable=not self._world.is_main, desc="train", unit="step"
        )
        while self._step < self._total_steps:
            started = time.perf_counter()
            window = []  # (rows, loss output) of each micro-batch of this step
            tokens_seen = 0
            while not self._window_full(window):
                batch = self._next_batch(self._stream.next_batch())
                out = model(
                    batch["tokens"],
                    document_ids=batch["document_ids"],
                    loss_fn=mtp_loss,
                    labels=batch["labels"],
                    weighting=self._weighting,
                    reference_ce=batch["reference_ce"],
                    head_weights=self._head_weights,
                )
                # FSDP2 averages gradients over ranks; times the world size that is a sum, divided once below.
                (out.loss_sum * self._world.size).backward()
                tokens_seen += int((batch["document_ids"] >= 0).sum())
                window.append((batch["rows"], out))

            totals = self._totals(window, tokens_seen)
            if totals["num_targets"] == 0:
                raise StopTraining(f"step {self._step + 1}: the batch has no target token; {self._names(window)}")
            loss = totals["loss_sum"] / totals["num_targets"]
            scale_grads(model, torch.tensor(1.0 / totals["num_targets"], device=self._world.device))
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm or math.inf)
            grad_norm = float(grad_norm.full_tensor())
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise StopTraining(
                    f"step {self._step + 1}: loss {loss}, gradient norm {grad_norm}; the weights were not touched. "
                    f"{self._names(window)}"
                )
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if self._scheduler is not None:
                self._scheduler.step()
            self._step += 1
            progress.update()
            progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}")

            if self._step % self._log_every == 0 or self._step == self._total_steps:
                seconds = time.perf_counter() - started
                metrics = {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": lr}
                metrics |= {f"train/ce_head{k}": ce for k, ce in enumerate(totals["ce"], start=1)}
                metrics |= {f"weights/{name}": value for name, value in self._weight_statistics(window).items()}
                self._log({**metrics, "train/tokens_per_second": totals["tokens"] / seconds})
            last = self._step == self._total_steps
            if self._eval_data is not None and (last or (self._eval_every and self._step % self._eval_every == 0)):
                self._log(self.evaluate())
                model.train()
            if self._save_every and (last or self._step % self._save_every == 0):
                self.save_checkpoint()
        progress.close()
        self._checkpointer.wait()

    def _window_full(self, window: list) -> bool:
        """Whether the step has all its micro-batches: so many, or so many target tokens over all ranks."""
        if self._accumulation_steps is not None:
            return len(window) == self._accumulation_steps
        if not window:
            return False
        return all_reduce_sum(sum(out.valid[0].sum() for _, out in window)).item() >= self._tokens_per_step

    def _next_batch(self, batch: dict) -> dict:
        """Move a batch to the device and add the reference's CE where a reference runs beside the policy."""
        batch = {key: v.to(self._world.device) if torch.is_tensor(v) else v for key, v in batch.items()}
        batch.setdefault("reference_ce", None)
        if self._reference is not None:
            with torch.no_grad():
                batch["reference_ce"] = self._reference(
                    batch["tokens"],
                    document_ids=batch["document_ids"],
                    loss_fn=token_cross_entropy,
                    labels=batch["labels"],
                )[0]
        return batch

    def _totals(self, window: list, tokens_seen: int) -> dict:
        """Sums over the step's micro-batches and all ranks, in one collective."""
        outs = [out for _, out in window]
        ce = sum(out.ce.double().sum(dim=(1, 2)) for out in outs)  # [H]
        count = sum(out.valid.sum(dim=(1, 2)) for out in outs).double()  # [H]
        scalars = [sum(out.loss_sum.double() for out in outs), sum(out.num_targets.double() for out in outs)]
        tokens = torch.tensor(tokens_seen, dtype=torch.float64, device=ce.device)
        sums = all_reduce_sum(torch.cat([torch.stack([*scalars, tokens]), ce, count])).tolist()
        heads = len(ce)
        return {
            "loss_sum": sums[0],
            "num_targets": sums[1],
            "tokens": sums[2],
            "ce": [s / max(n, 1) for s, n in zip(sums[3 : 3 + heads], sums[3 + heads :], strict=True)],
        }

    def _weight_statistics(self, window: list) -> dict[str, float]:
        """Over all target tokens of the step, on all ranks."""
        mine = torch.cat([out.target_weights() for _, out in window]).cpu()
        everyone = torch.cat(gather_objects(mine))
        return weight_statistics(everyone, torch.ones_like(everyone, dtype=torch.bool))

    def _names(self, window: list) -> str:
        """The documents of the micro-batches whose loss is not finite (of all, if every loss is), over all ranks."""
        bad = [rows for rows, out in window if not bool(torch.isfinite(out.loss_sum))]
        everyone = gather_objects((bad, [rows for rows, _ in window]))
        batches = [rows for bad, _ in everyone for rows in bad] or [rows for _, all_ in everyone for rows in all_]
        ids = [name for rows in batches for row in rows for name in self._data.row_ids(int(row))]
        return f"Documents of the batch: {', '.join(ids[:8])}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}"

    # ------------------------------------------------------------------------------------------------------------------
    # Evaluation, checkpoints, export

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out CE of each head, in nats per target token, over all of eval_dataset."""
        self._model.eval()
        heads = self._model.num_future_tokens
        sums = torch.zeros(2, heads, dtype=torch.float64, device=self._world.device)
        for batch in held_out_batches(self._eval_data, self._batch_size, self._world.rank, self._world.size):
            tokens, labels, document_ids = (
                batch[key].to(self._world.device) for key in ("tokens", "labels", "document_ids")
            )
            out = self._model(tokens, document_ids=document_ids, loss_fn=weighted_mtp_cross_entropy, labels=labels)
            sums += torch.stack([part.double().sum(dim=(1, 2)) for part in (out.ce, out.valid)])
        ce, count = all_reduce_sum(sums)
        return {f"eval/ce_head{k}": (ce[k - 1] / count[k - 1]).item() for k in range(1, heads + 1)}

    def save_checkpoint(self) -> None:
        """Start saving all that a resumed run needs; the loop goes on while the shards are written."""
        trainer = {
            "stream": self._stream.state_dict(),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "run_id": self._tracker.run_id if self._tracker else None,
        }
        self._checkpointer.save(self._step, self._model, self._torch_optimizer, trainer)

    def export(self) -> None:
        """Write the model as an HF folder: head 1 for `transformers`, the other heads beside it."""
        if self._export_dtype is None:
            return
        folder = self._output_dir / "export"
        if self._world.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # of this very run, resumed after its end
        gather_objects(None)
        export_hf(self._model, folder, tokenizer_source=self._tokenizer, dtype=self._export_dtype)
        self._say(f"exported to {folder}")

    def _log(self, metrics: dict[str, float]) -> None:
        if not self._world.is_main:
            return
        with self._metrics_file.open("a") as file:
            file.write(json.dumps({"step": self._step, **metrics}) + "\n")
        evaluated = {key: value for key, value in metrics.items() if key.startswith("eval/")}
        if evaluated:
            self._say(f"step {self._step}: " + "  ".join(f"{k} {v:.4f}" for k, v in evaluated.items()))
        if self._tracker:
            self._tracker.log_metrics(metrics, self._step)

    def _say(self, line: str) -> None:
        if self._world.is_main:
            tqdm.write(line, file=sys.stderr)

    def cleanup(self, status: str = "FINISHED") -> None:
        """End the MLflow run and leave the process group."""
        if self._tracker:
            self._tracker.close(status)
        if status == "FINISHED":
            self._checkpointer.close()
            torch.distributed.destroy_process_group()


@config.parse
def main(cfg: DictConfig) -> None:
    with clear_errors():
        recipe = FullFinetuneRecipeWMTP(cfg)
        recipe.setup()
        try:
            recipe.train()
            recipe.export()
        except BaseException:
            recipe.cleanup("FAILED")
            raise
        recipe.cleanup()


if __name__ == "__main__":
    sys.exit(main())
