"""Critic, stage 1: train a value model on correct and incorrect programs, on one process or many, CPU or CUDA.

    tune run --nproc_per_node 2 recipes/critic_stage1.py --config configs/tiny/critic_stage1.yaml
    torchrun --nproc_per_node 4 recipes/critic_stage1.py --config configs/codellama_7b/critic_stage1.yaml

The value model of the best held-out evaluation goes to `output_dir/value_model`; the full fine-tuning recipe takes it
as `value_model`, by this path or as `runs:/<MLflow run>/value_model`. `output_dir/report.md` says how well it tells
correct programs from incorrect ones, beside a rule that looks at their length alone.
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
from wmtp.critic import (
    BestWeights,
    PairDataset,
    critic_loss,
    critic_report,
    evaluate_pairs,
    hidden_states,
    length_report,
    pair_splits,
    pair_values,
    preview_pairs,
)
from wmtp.critic.rewards import reward_pairs
from wmtp.data import BatchStream
from wmtp.distributed import all_reduce_sum, end_world, gather_objects, on_rank_0, start_world
from wmtp.errors import clear_errors, ending
from wmtp.models import checkpoint_activations, init_lora, load_checkpoint, require_fit, shard_model, store_frozen
from wmtp.models.adapter_folder import describe_base, require_same_base
from wmtp.models.value import ValueModel, save_value_model
from wmtp.pretrained import hf_tokenizer, require_same_vocabulary, resolve_checkpoint
from wmtp.training.cached_states import keep_states
from wmtp.training.checkpoint import Checkpointer, checkpoint_to_resume, load_sharded, load_trainer, restore_rng
from wmtp.training.lr_schedule import build_schedule
from wmtp.training.optimizers import build_optimizer, parameter_groups
from wmtp.training.output_dir import check_output_dir, open_output
from wmtp.training.performance import StepMeter, build_profiler, model_flops
from wmtp.training.planning import plan_run
from wmtp.training.run_log import RunLog, builder_name
from wmtp.training.stopping import StopFlag, stopping

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECOMPUTE = {False: None, True: 1, "selective": "selective"}  # or a number of blocks
RESULTS = ("checkpoints", "best", "value_model", "report.md", "profiler")  # in output_dir, beside metrics.jsonl


class CriticStage1Recipe:
    """Order of events: read the config, `setup`, `train` (which evaluates and saves), `finish`, `cleanup`."""

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
        self._backbone = read.choice("backbone", {"frozen": "frozen", "lora": "lora", "full": "full"})
        self._lora_cfg = read.section("lora", optional=True)
        self._head = read.choice("head", {"linear": "linear", "mlp": "mlp"})
        self._cache_hidden = read.choice("cache_hidden", {**DTYPES, "none": None}, "none")

        self._dataset_cfg = read.section("dataset")
        self._heldout_fraction = read.number("heldout_fraction")
        self._test_fraction = read.number("test_fraction", None)
        self._balance_lengths = read.flag("balance_lengths", True)
        self._seq_len = read.integer("seq_len", minimum=2)
        self._reward_cfg = read.section("reward_model", optional=True)
        self._preview = read.integer("preview", 0)

        self._loss_name = read.get("loss")
        factors = {key: read.number(key, None) for key in ("gamma", "gae_lambda")}
        spread = read.get("reward_spread", None)
        self._loss = critic_loss(self._loss_name, spread, **factors)
        self._spread = {"spread": spread, **factors}
        self._full_loss_name = self._loss_name if spread is None else f"{self._loss_name} {spread}"
        self._score = read.choice("score", {"mean": "mean", "last": "last"}, "mean")

        self._batch_size = read.integer("batch_size", minimum=1)
        self._accumulation_steps = read.integer("gradient_accumulation_steps", 1, minimum=1)
        self._epochs = read.number("epochs", None, above=0)
        self._max_steps = read.integer("max_steps", None, minimum=1)
        self._optimizer_cfg = read.section("optimizer")
        self._head_lr = read.number("head_lr", None, above=0)
        self._decay_all = read.flag("decay_norms_and_embeddings", False)
        self._scheduler_cfg = read.section("lr_scheduler", optional=True)
        self._max_grad_norm = read.number("max_grad_norm", None, above=0)

        self._recompute = read.choice("activation_checkpointing", RECOMPUTE, False, or_whole=2)
        self._cpu_offload = read.flag("cpu_offload", False)
        self._hsdp_replicas = read.integer("hsdp_replicas", 1, minimum=1)
        self._timeout_minutes = read.number("timeout_minutes", 30.0, above=0)
        self._deterministic = read.flag("deterministic", False)

        self._log_every = read.integer("log_every", 1, minimum=1)
        self._eval_every = read.integer("eval_every", None, minimum=1)
        self._patience = read.integer("patience", None, minimum=1)
        self._save_every = read.integer("save_every", None, minimum=1)
        self._stop = StopFlag(read.number("max_minutes", None, above=0))
        self._keep_checkpoints = read.integer("keep_checkpoints", 2, minimum=1)
        self._value_model_dtype = read.choice("value_model_dtype", DTYPES, "fp32")
        self._log_model = read.flag("log_model", False)
        self._profiler_cfg = read.section("profiler", optional=True)
        self._peak_flops = read.number("peak_flops", None, above=0)
        self._tracking_cfg = read.section("tracking", optional=True)
        read.done()

        if (self._epochs is None) == (self._max_steps is None):
            raise ConfigError("set exactly one of epochs and max_steps")
        if (self._backbone == "lora") == (self._lora_cfg is None):
            raise ConfigError(f"set the section lora if, and only if, backbone is lora; backbone is {self._backbone}")
        if self._cache_hidden is not None and self._backbone != "frozen":
            raise ConfigError(f"cache_hidden keeps what a frozen backbone gives, backbone is {self._backbone}")
        if self._reward_cfg is not None and self._loss_name == "pairwise":
            raise ConfigError("loss pairwise reads no rewards: set reward_model to null, or loss to mse")
        if self._log_model and self._tracking_cfg is None:
            raise ConfigError("log_model is true, but tracking is null: there is no run to give the value model to")

    # ------------------------------------------------------------------------------------------------------------------
    # Set-up

    def setup(self) -> None:
        """Builds everything in the order in which a mistake is cheapest to find: files, data, then the model."""
        self._world = start_world(self._device_name, self._hsdp_replicas, self._timeout_minutes, self._deterministic)
        if self._cpu_offload and self._world.device.type == "cpu":
            raise ConfigError("cpu_offload needs device=cuda: on a CPU the parameters are there already")
        self._output = open_output(self._output_name, self._cfg, resume=self._resume)
        self._output_dir = self._output.folder
        self._log = RunLog(self._output, self._tracking_cfg, is_main=self._world.is_main)
        check_output_dir(self._output, "a run", results=RESULTS, overwrite=self._overwrite, resume=self._resume)
        resume_from = checkpoint_to_resume(self._output_dir, self._resume)
        torch.manual_seed(self._seed)

        self._tokenizer = build(self._tokenizer_cfg, where="tokenizer")
        path = None if self._checkpoint is None else resolve_checkpoint(self._checkpoint)
        if path is not None:
            require_same_vocabulary(self._tokenizer, hf_tokenizer(path), "backbone")
        self._data, self._heldout, self._test = self._build_data()
        ranks = {"rank": self._world.rank, "world_size": self._world.size}
        self._stream = BatchStream(self._data, batch_size=self._batch_size, **ranks, seed=self._seed)
        pairs_per_step = self._batch_size * self._world.size * self._accumulation_steps
        self._total_steps = self._max_steps or math.ceil(self._epochs * len(self._data) / pairs_per_step)
        plan_run(self._cfg, self._world, self._total_steps, self._log.info)
        self._profiler = build_profiler(self._profiler_cfg, self._output_dir, self._world, self._total_steps)

        self._model = self._build_model(path)
        groups = parameter_groups(self._model, self._model.value_head, self._head_lr, self._decay_all)
        self._torch_optimizer = build_optimizer(self._optimizer_cfg, groups)

        self._step, run_id = 0, None
        self._best = {"step": None, "accuracy": -math.inf, "evaluations_since": 0}
        base = describe_base(self._checkpoint, {"backbone_model": self._model_cfg}, seed=self._seed)
        self._frozen = {"backbone_weights": base.pop("base_weights"), **base}
        trained = {"trained": f"{self._backbone} backbone, {self._head} head", "loss": self._full_loss_name}
        self._identity = {**self._frozen, **trained}
        self._checkpointer = Checkpointer(
            self._output_dir, keep_last=self._keep_checkpoints, trained_only=True, output=self._output
        )
        self._best_weights = BestWeights(self._output_dir)
        if resume_from is not None:
            run_id = self._restore(resume_from)
        steps = {"step": self._step, "num_training_steps": self._total_steps}
        self._scheduler = build_schedule(self._scheduler_cfg, self._torch_optimizer, **steps, log=self._log.info)
        self._log.start(
            self._cfg,
            recipe=Path(__file__).stem,
            method="critic_stage1",
            dataset=builder_name(self._dataset_cfg),
            data_sha256=self._data.fingerprint,
            tags=self._frozen,
            step=self._step,
            resumed=resume_from is not None,
            run_id=run_id,
            replaces=RESULTS,
        )
        self._checkpointer.remove_torn()
        self._best_weights.forget_after(self._step)

    def _build_data(self) -> tuple[PairDataset, PairDataset, PairDataset | None]:
        """Builds training, held-out and test pairs: disjoint by problem, each balanced by length."""
        pairs = build(self._dataset_cfg, where="dataset")
        self._log.info(pairs.summary())
        fractions = {"heldout_fraction": self._heldout_fraction, "test_fraction": self._test_fraction}
        chosen = {"seq_len": self._seq_len, "balance": self._balance_lengths, "seed": self._seed}
        parts = pair_splits(self._tokenizer, pairs, **fractions, **chosen)
        for data in parts.values():
            self._log.info(data.summary())
        if self._reward_cfg is not None:
            model = build(self._reward_cfg, where="reward_model")
            for name, data in parts.items():
                parts[name], scored = reward_pairs(model, data, self._world.device)
                self._log.info(f"{name} part: {scored} programs scored now, the rewards of all are in {model.file}")
        if self._preview:
            self._log.info(preview_pairs(self._preview, parts["train"], self._tokenizer, **self._spread))
        found, needed = len(parts["train"]), self._batch_size * self._world.size
        if found < needed:
            raise ConfigError(
                f"there are {found} training pairs, fewer than batch_size {self._batch_size} x world size "
                f"{self._world.size} = {needed}; lower batch_size, use fewer processes, or give more pairs"
            )
        return parts["train"], parts["heldout"], parts.get("test")

    def _build_model(self, path: Path | None) -> ValueModel:
        """Builds the sharded value model. From a checkpoint it is built on the meta device, each rank reads its shard;
        adapters and head start from the seed alone, the same full tensors on every rank, then cut. What is frozen is
        stored in the dtype of the computation."""
        with torch.device("cpu" if path is None else "meta"):
            backbone = build(self._model_cfg, where="model")
            if self._backbone == "lora":
                build(self._lora_cfg, backbone, where="lora")
            elif self._backbone == "frozen":
                backbone.requires_grad_(False)
            elif not backbone.config.tie_word_embeddings:
                backbone.output.requires_grad_(False)  # the value does not depend on it
            model = store_frozen(ValueModel(backbone, self._head), self._dtype)
        largest = max(data.max_token_id for data in (self._data, self._heldout, self._test) if data is not None)
        require_fit(model, largest, self._seq_len)
        if self._recompute is not None and self._backbone != "frozen":
            checkpoint_activations(model, self._recompute)
        shard_model(model, self._world.mesh, param_dtype=self._dtype, cpu_offload=self._cpu_offload)
        if path is not None:
            model.to_empty(device="cpu" if self._cpu_offload else self._world.device)
            load_checkpoint(model.backbone, path)
        init_lora(model.backbone, seed=self._seed)
        model.value_head.init_weights(self._seed)
        return model

    def _restore(self, checkpoint: Path) -> str | None:
        """Continues where the checkpoint was saved; returns the MLflow run id."""
        state, changes = load_trainer(checkpoint, self._cfg)
        self._stream.load_state_dict(state["stream"])
        require_same_base(state["identity"], self._identity)
        load_sharded(checkpoint, self._model, self._torch_optimizer, trained_only=True, changes=changes)
        restore_rng(state["rng"], self._world.rank)
        self._step = self._checkpointer.saved_step = state["step"]
        self._best = state["best"]
        self._log.info(f"resumed {checkpoint} at step {self._step} of {self._total_steps}{changes}")
        return state["run_id"]

    # ------------------------------------------------------------------------------------------------------------------
    # Training

    def train(self) -> None:
        """Runs the loop. One optimizer step: micro-batches forward and backward, one division, clip, guard, update."""
        model, optimizer = self._model, self._torch_optimizer
        parameters = [p for p in model.parameters() if p.requires_grad]
        cached = {"dtype": self._cache_hidden, "model_key": f"{self._frozen} {self._dtype}", "world": self._world}
        cached |= {"folder": self._output_dir / "hidden_states", "batch_size": self._batch_size}
        self._hidden = keep_states(hidden_states, model, (self._data, self._heldout, self._test), **cached)
        flops = [model_flops(model, trunk=self._cache_hidden is None)]
        meter = StepMeter(self._world, self._dtype, flops, self._peak_flops)
        self._profiler.start(self._step)
        model.train()
        progress = tqdm(
            total=self._total_steps, initial=self._step, disable=not self._world.is_main, desc="train", unit="step"
        )
        while self._step < self._total_steps and not self._out_of_patience() and not self._stop.agreed:
            meter.start()
            sums = torch.zeros(5, dtype=torch.float64, device=self._world.device)  # as they are named below
            rows = []
            for number in range(1, self._accumulation_steps + 1):
                with meter.data_wait():
                    batch = self._stream.next_batch()
                values = self._values(batch, self._data)  # [P, 2, S]
                response = batch["response"].to(values.device)
                out = self._loss(values, response, batch["rewards"].to(values.device))
                # HSDP's replicas sum gradients once a step; shards in each micro-batch, or each would hold them whole.
                model.set_requires_all_reduce(number == self._accumulation_steps)
                # FSDP2 averages gradients over ranks; times the world size that is a sum, divided once below.
                (out.loss_sum * self._world.size).backward()
                tokens = batch["num_tokens"].sum().to(values.device)
                counts = [out.count, tokens, tokens * values.shape[-1]]  # and positions that attention may look at
                sums[:4] += torch.stack([out.loss_sum.detach(), *counts]).double()
                rows += batch["rows"]

            sums[4] = self._stop.wanted()
            loss_sum, count, tokens, positions, stop = all_reduce_sum(sums).tolist()
            self._stop.agree(stop)
            loss = loss_sum / count
            scale_grads(model, torch.tensor(1.0 / count, device=self._world.device))
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self._max_grad_norm or math.inf)
            grad_norm = float(grad_norm.full_tensor())
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                problems = sorted({str(self._data.problems[r]) for part in gather_objects(rows) for r in part})
                raise StopTraining(
                    f"step {self._step + 1}: loss {loss}, gradient norm {grad_norm}; the weights were not touched. "
                    f"Problems of the batch: {', '.join(problems[:8])}"
                )
            lr = optimizer.param_groups[-1]["lr"]  # the head's
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if self._scheduler is not None:
                self._scheduler.step()
            self._step += 1
            progress.update()
            progress.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}")

            last = self._step == self._total_steps
            if last or self._step % self._log_every == 0:
                metrics = {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": lr}
                metrics |= {"train/epoch": self._stream.epoch, **meter.metrics(tokens, positions / tokens)}
                self._log.metrics(metrics, self._step)
            if last or (self._eval_every and self._step % self._eval_every == 0):
                self._keep_best(self.evaluate(self._heldout))
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

    def _values(self, batch: dict, data: PairDataset) -> torch.Tensor:
        """Returns [P, 2, S] values of a batch of a data set, from its tokens or from the states kept of them."""
        states = self._hidden.get(data.fingerprint)
        return pair_values(self._model, batch, self._world.device, None if states is None else states.of(batch))

    def evaluate(self, data: PairDataset) -> dict[str, float]:
        """Computes pairwise accuracy with its interval, AUC and calibration over all pairs of a data set."""
        self._model.eval()
        judged = {"loss": self._loss_name, "score": self._score, "labels": self._data.rewards_are_labels}
        values = lambda batch: self._values(batch, data)
        return evaluate_pairs(values, data, batch_size=self._batch_size, **judged, world=self._world, seed=self._seed)

    def _keep_best(self, report: dict[str, float]) -> None:
        """Logs an evaluation; saves the weights if they are the best so far, else counts towards patience."""
        self._log.metrics({f"eval/{name}": value for name, value in report.items()}, self._step)
        if report["pairwise_accuracy"] > self._best["accuracy"]:
            self._best = {"step": self._step, "accuracy": report["pairwise_accuracy"], "evaluations_since": 0}
            self._checkpointer.wait()
            self._best_weights.save(self._step, self._model, self._checkpointer.folder)
        else:
            self._best["evaluations_since"] += 1

    def _out_of_patience(self) -> bool:
        return self._patience is not None and self._best["evaluations_since"] >= self._patience

    def save_checkpoint(self) -> None:
        """Starts saving all that a resumed run needs; the loop goes on while the shards are written."""
        trainer = {
            "stream": self._stream.state_dict(),
            "config": OmegaConf.to_container(self._cfg, resolve=True),
            "best": dict(self._best),
            "identity": self._identity,
            "run_id": self._log.run_id,
        }
        self._checkpointer.save(self._step, self._model, self._torch_optimizer, trainer)

    # ------------------------------------------------------------------------------------------------------------------
    # The result

    def finish(self) -> dict[str, dict[str, float]]:
        """Goes back to the best weights, reports on them, and writes the value model."""
        if self._best["step"] is None:  # it ended without an evaluation
            self._keep_best(self.evaluate(self._heldout))
        if self._out_of_patience():
            self._log.info(f"stopped at step {self._step}: no better for {self._patience} evaluations")
        self._best_weights.restore(self._best["step"], self._model)
        data = self._heldout if self._test is None else self._test
        reports = {
            "value_model": self.evaluate(data),
            "length_only": length_report(self._data.lengths, data.lengths, data.problems, seed=self._seed),
        }
        settings = {key: self._cfg.get(key) for key in ("backbone", "loss", "reward_spread", "gamma", "gae_lambda")}
        settings |= {"score": self._score, "best_step": self._best["step"], "data_hash": self._data.fingerprint}
        reward_model = None if self._reward_cfg is None else OmegaConf.to_container(self._reward_cfg, resolve=True)
        settings |= {"reward_model": reward_model, **self._frozen}
        folder = self._output_dir / "value_model"
        on_rank_0(lambda: shutil.rmtree(folder, ignore_errors=True))  # of this very run, resumed after its end
        dtype = self._value_model_dtype
        save_value_model(self._model, folder, tokenizer=self._tokenizer, settings=settings, dtype=dtype)
        self._output.upload(folder)
        if self._world.is_main:
            self._write_report(reports, data, folder)
        return reports

    def _write_report(self, reports: dict, data: PairDataset, folder: Path) -> None:
        facts = {
            "value model": f"{self._head} head, backbone {self._backbone}, best at step {self._best['step']}",
            "loss": self._full_loss_name,
            "training pairs": self._data.summary(),
            "pairs of this report": data.summary(),
        }
        report = self._output_dir / "report.md"
        report.write_text(critic_report(*reports.values(), facts, chosen_on_these=self._test is None))
        flat = {f"final/{who}/{name}": v for who, report in reports.items() for name, v in report.items()}
        self._log.metrics(flat, self._step)
        self._log.artifact(report)
        self._log.info(f"{report.read_text()}\nwrote {folder}")
        if self._log_model:
            self._log.artifact(folder)
            self._log.info(f"also as runs:/{self._log.run_id}/value_model")

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
    recipe = CriticStage1Recipe(cfg)
    recipe.setup()
    with ending(recipe.cleanup):
        recipe.train()
        recipe.finish()


if __name__ == "__main__":
    main()
