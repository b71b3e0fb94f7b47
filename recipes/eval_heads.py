"""The heads of a multi-token-prediction model, one by one: how well each predicts held-out code, and what they save.

    tune run --nproc_per_node 2 recipes/eval_heads.py --config configs/smollm2_135m/eval_heads.yaml

For head k: cross-entropy, perplexity and top-1 accuracy of the k-th next token; beside it `teacher_forced`, the model's
own head 1 read k - 1 tokens later: what a head would reach if it had seen the tokens in between. Then decoding speed,
plain and self-speculative, on the held-out prompts, with the share of drafts that verification accepts.
"""

import json
from pathlib import Path

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from wmtp import config
from wmtp.config import ConfigError, ConfigReader, build
from wmtp.data import pack, validation_batches
from wmtp.distributed import all_reduce_sum, end_world, on_rank_0, start_world
from wmtp.errors import clear_errors, ending
from wmtp.eval.heads import head_sums, summarize_heads
from wmtp.generation import DecodingStats, Request, Sampling, generate
from wmtp.generation.requests import check_memory
from wmtp.loss import score_heads
from wmtp.models import load_checkpoint, require_fit
from wmtp.models.teacher_forced import TeacherForced
from wmtp.pretrained import model_tags, resolve_checkpoint
from wmtp.training.output_dir import check_output_dir, open_output
from wmtp.training.run_log import RunLog
from wmtp.training.stopping import stopping

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESULTS = ("heads.json",)  # what it leaves in output_dir


class EvalHeadsRecipe:
    """Order of events: read the config, `setup`, `evaluate`, `measure_speed`, `report`, `cleanup`."""

    def __init__(self, cfg: DictConfig) -> None:
        """Reads and checks every key; nothing is built or written yet."""
        self._cfg = cfg
        read = ConfigReader(cfg)
        self._output_name = str(read.get("output_dir"))
        self._overwrite = read.flag("overwrite", False)
        self._seed = read.integer("seed", 0)
        self._device_name = read.choice("device", {"cpu": "cpu", "cuda": "cuda", "auto": "auto"}, "auto")
        self._dtype = read.choice("dtype", DTYPES, "fp32")
        self._checkpoint = read.get("checkpoint", None)
        self._model_cfg = read.section("model")
        self._tokenizer_cfg = read.section("tokenizer")
        self._dataset_cfg = read.section("dataset")
        self._seq_len = read.integer("seq_len", minimum=2)
        self._batch_size = read.integer("batch_size", 1, minimum=1)
        self._speed_prompts = read.integer("speed_prompts", 8)
        self._speed_batch_size = read.integer("speed_batch_size", 1, minimum=1)
        self._max_new_tokens = read.integer("max_new_tokens", 64, minimum=1)
        self._kv_memory = read.num_bytes("kv_memory", None)
        self._compile = read.flag("compile", False)
        self._tracking_cfg = read.section("tracking", optional=True)
        read.done()

    def setup(self) -> None:
        """Builds everything in the order in which a mistake is cheapest to find: files, data, then the model."""
        self._world = start_world(self._device_name)
        self._output = open_output(self._output_name, self._cfg)
        self._output_dir = self._output.folder
        self._log = RunLog(self._output, self._tracking_cfg, is_main=self._world.is_main)
        check_output_dir(self._output, "a run", results=RESULTS, overwrite=self._overwrite)
        path = None if self._checkpoint is None else resolve_checkpoint(self._checkpoint)
        self._tokenizer = build(self._tokenizer_cfg, where="tokenizer")
        self._documents = build(self._dataset_cfg, self._tokenizer, where="dataset")
        self._data = pack(self._documents, self._seq_len, packed=True, pad_id=self._tokenizer.pad_id)
        self._data.require_read((), "the heads' CE")
        self._log.info(f"dataset: {self._data.summary()}")
        torch.manual_seed(self._seed)
        with torch.device("cpu" if path is None else "meta"):
            self._model = build(self._model_cfg, where="model").to(self._dtype)
        require_fit(self._model, self._data.max_token_id, self._seq_len)
        if self._speed_prompts and self._model.num_future_tokens > 1:
            self._check_speed()
        if path is None:
            self._log.info("checkpoint=null: the model's weights are random")
            self._model.to(self._world.device)
        else:
            load_checkpoint(self._model, path, device=self._world.device, log=self._log.info)
        self._model.requires_grad_(False).eval()
        tags = on_rank_0(lambda: model_tags(path))
        self._log.start(
            self._cfg,
            recipe=Path(__file__).stem,
            method="eval",
            dataset="heads",
            data_sha256=self._data.fingerprint,
            tags={**tags, "wmtp.evaluation": "heads"},
            replaces=RESULTS,
        )

    def _check_speed(self) -> None:
        """Finds what measuring speed would find only after the whole evaluation."""
        longest = self._model.max_seq_len
        if self._max_new_tokens >= longest:
            raise ConfigError(
                f"max_new_tokens {self._max_new_tokens} leaves no room for a prompt in model.max_seq_len {longest}; "
                "lower it, or set speed_prompts=0"
            )
        requests = self._speed_requests()
        if not requests:
            raise ConfigError("no document of dataset has a prompt to measure speed with; set speed_prompts=0")
        if self._kv_memory is not None:
            sampling, num_drafts = Sampling(self._max_new_tokens), self._model.num_future_tokens - 1
            for request in requests:
                check_memory(request, self._model, sampling, num_drafts, self._kv_memory)

    def _speed_requests(self) -> list[Request]:
        """Returns the prompts that speed is measured with, cut off where they leave no room for an answer."""
        prompted = [document for document in self._documents if document.prompt][: self._speed_prompts]
        room = self._model.max_seq_len - self._max_new_tokens
        return [Request(document.id, document.prompt[:room], (self._seed, document.id, 0)) for document in prompted]

    @torch.no_grad()
    def evaluate(self) -> dict[str, dict[str, float]]:
        """Figures of the trained heads and of the teacher-forced baseline, over all target tokens of the dataset."""
        heads = self._model.num_future_tokens
        # The baseline reads head 1 alone; both see the same rows, so they are compared target by target.
        views = {"heads": (self._model, {}), "teacher_forced": (TeacherForced(self._model, heads), {"num_heads": 1})}
        sums = {name: torch.zeros(3, heads, dtype=torch.float64, device=self._world.device) for name in views}
        batches = list(validation_batches(self._data, self._batch_size, self._world.rank, self._world.size))
        for batch in tqdm(batches, disable=not self._world.is_main, desc="heads", unit="batch"):
            tokens, labels, document_ids = (
                batch[key].to(self._world.device) for key in ("tokens", "labels", "document_ids")
            )
            for name, (model, options) in views.items():
                scores = model(tokens, document_ids=document_ids, loss_fn=score_heads, labels=labels, **options)
                sums[name] += head_sums(scores)
        return {name: summarize_heads(all_reduce_sum(total)) for name, total in sums.items()}

    def measure_speed(self) -> dict[str, dict[str, float]]:
        """Times greedy decoding of the same prompts with 0 (plain) to H - 1 drafts a forward, in turn, on rank 0."""
        if not self._world.is_main or self._speed_prompts == 0 or self._model.num_future_tokens == 1:
            return {}
        requests, sampling = self._speed_requests(), Sampling(self._max_new_tokens)
        contenders = range(self._model.num_future_tokens)
        stats, texts = [DecodingStats() for _ in contenders], [{} for _ in contenders]
        parts = [
            (requests[start : start + self._speed_batch_size], stats)
            for start in range(0, len(requests), self._speed_batch_size)
        ]
        if self._compile:  # uncounted: every contender compiles
            parts.insert(0, (parts[0][0], [DecodingStats() for _ in contenders]))
        for part, counts in parts:  # in turn, so that a slow moment slows all
            for num_drafts in contenders:
                for done in generate(
                    self._model, self._tokenizer, part, sampling,
                    batch_size=self._speed_batch_size, num_drafts=num_drafts,
                    kv_memory=self._kv_memory, compile=self._compile, stats=counts[num_drafts],
                ):  # fmt: skip
                    texts[num_drafts][done.id] = done.text
        figures = {}
        for num_drafts, counts in enumerate(stats):
            seconds = [s.prefill_seconds + s.decode_seconds for s in (counts, stats[0])]
            name = "plain" if num_drafts == 0 else f"drafts_{num_drafts}"
            figures[name] = {
                "tokens_per_second": counts.new_tokens / seconds[0],
                "speedup": counts.new_tokens / seconds[0] / (stats[0].new_tokens / seconds[1]),
                "tokens_per_forward": counts.tokens_per_forward,
                "same_text_share": sum(texts[num_drafts][i] == t for i, t in texts[0].items()) / len(requests),
                **{f"acceptance_head{k}": share for k, share in counts.acceptance().items()},
            }
        return figures

    def report(self, quality: dict, speed: dict) -> None:
        """Prints the table, writes heads.json, logs to MLflow."""
        if not self._world.is_main:
            return
        told = {"data_sha256": self._data.fingerprint, "max_new_tokens": self._max_new_tokens}
        settings = {**told, "speed_prompts": self._speed_prompts}  # in which two evaluations must agree
        found = {"settings": settings, **quality, "speed": speed}
        (self._output_dir / "heads.json").write_text(json.dumps(found, indent=1) + "\n")
        lines = [
            f"{'head':>4}  {'CE':>8}  {'perplexity':>10}  {'accuracy':>8}  {'teacher-forced CE':>17}  {'accuracy':>8}"
        ]
        ours, bound = quality["heads"], quality["teacher_forced"]
        for k in range(1, self._model.num_future_tokens + 1):
            ce, perplexity, accuracy = (ours[f"{name}_head{k}"] for name in ("ce", "perplexity", "accuracy"))
            lines.append(
                f"{k:>4}  {ce:8.4f}  {perplexity:10.2f}  {accuracy:8.4f}  "
                f"{bound[f'ce_head{k}']:17.4f}  {bound[f'accuracy_head{k}']:8.4f}"
            )
        for name, figures in speed.items():
            lines.append(f"{name:>8}  " + "  ".join(f"{figure} {value:.3f}" for figure, value in figures.items()))
        lines.append(f"wrote {self._output_dir}/heads.json")
        for line in lines:
            self._log.info(line)
        views = (*quality.items(), *speed.items())
        flat = {f"eval/heads/{view}/{name}": value for view, figures in views for name, value in figures.items()}
        self._log.result(flat, self._output_dir / "heads.json")

    def cleanup(self, status: str = "FINISHED") -> None:
        """Ends the MLflow run and leaves the process group."""
        self._log.close(status)
        if status == "FINISHED":
            end_world()
        self._output.close(fail=status == "FINISHED")


@clear_errors()
@stopping(resumes=False)
@config.parse
def main(cfg: DictConfig) -> None:
    recipe = EvalHeadsRecipe(cfg)
    recipe.setup()
    with ending(recipe.cleanup):
        recipe.report(recipe.evaluate(), recipe.measure_speed())


if __name__ == "__main__":
    main()
