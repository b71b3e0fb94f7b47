"""Evaluation on programs that read stdin and write stdout (CodeContests, files of its shape), on one process or many.

    tune run --nproc_per_node 2 recipes/eval_codecontests.py --config configs/tiny/eval_codecontests.yaml
    tune run --nproc_per_node 4 recipes/eval_codecontests.py --config configs/meta_mtp_7b/eval_codecontests.yaml

A sample passes when its output equals the expected one in every public, private and generated test, token by token;
DeepMind's lenient comparison is reported beside it, and n@k: n submissions chosen out of k samples by the public tests.

`samples=FILE` judges samples that exist (JSON lines of task_id and solution or completion) and needs no model;
`prompts=FILE` writes what any server has to be asked for them. Each process holds the whole model and takes the next
task when it is free. Samples and verdicts are kept as they arrive: a killed run goes on with `resume=true` and gives
the same result. Model-written code runs in the sandbox only.
"""

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported
import torch
from omegaconf import DictConfig, OmegaConf

from wmtp import config
from wmtp.config import ConfigError, ConfigReader, build
from wmtp.data.packaged import PACKAGED_TASKS
from wmtp.distributed import SharedCounters, end_world, gather_objects, on_rank_0, start_world, wait_for_all
from wmtp.errors import as_user_error, clear_errors, ending
from wmtp.eval.journal import Journal, read_journals
from wmtp.eval.judging import Judging
from wmtp.eval.prompts import write_prompts
from wmtp.eval.results import check_samples, evaluation_results
from wmtp.eval.results_page import headline, logged, results_page, write_results, write_tasks
from wmtp.eval.samples import Sample, find_samples, read_samples, write_samples
from wmtp.generation import DecodingStats, Request, Sampling, check_decoder, generate
from wmtp.generation.kv_memory import check_kv_memory
from wmtp.models import load_checkpoint
from wmtp.pretrained import model_tags, resolve_checkpoint
from wmtp.sandbox import Sandbox
from wmtp.training.output_dir import check_output_dir, open_output
from wmtp.training.run_log import RunLog
from wmtp.training.stopping import stopping

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What it leaves in output_dir.
RESULTS = ("journals", "samples.jsonl", "tasks.jsonl", "results.json", "report.md", "timings.json")


class EvalCodeContestsRecipe:
    """Order of events: read the config, `setup`, `evaluate` (generate and judge at once), `report`, `cleanup`."""

    def __init__(self, cfg: DictConfig) -> None:
        """Reads and checks every key; nothing is built or written yet."""
        self._cfg = cfg
        read = ConfigReader(cfg)
        self._output_name = str(read.get("output_dir"))
        self._resume = read.choice("resume", {False: "no", True: "yes", "auto": "auto"}, False)
        self._overwrite = read.flag("overwrite", False)
        self._seed = read.integer("seed", 0)
        self._device_name = read.choice("device", {"cpu": "cpu", "cuda": "cuda", "auto": "auto"}, "auto")
        self._dtype = read.choice("dtype", DTYPES, "fp32")

        self._name = read.get("name")
        self._tasks_cfg = read.section("tasks").copy()
        self._only_sampled = read.choice("tasks.only", {"all": False, "with_samples": True}, "all")
        self._tasks_cfg.pop("only", None)  # which is the recipe's own
        self._samples_file = read.text("samples", None)
        self._prompts_file = read.text("prompts", None)
        self._sanitize = read.choice("sanitize", {"auto": "auto", "off": "off", False: "off"}, "auto")  # YAML's off
        self._checkpoint = read.get("checkpoint", None)
        self._model_cfg = read.section("model", optional=True)
        self._tokenizer_cfg = read.section("tokenizer", optional=True)
        self._protocol_cfg = read.section("protocol", optional=True)

        self._num_samples = read.integer("num_samples", 1, minimum=1)
        self._temperatures = read.numbers("temperatures", [0.0], minimum=0)
        self._fixed_temperature = read.number("fixed_temperature", None, minimum=0)
        self._top_p = read.number("top_p", 1.0, above=0, maximum=1)
        self._max_new_tokens = read.integer("max_new_tokens", 512, minimum=1)
        self._batch_size = read.integer("batch_size", 8, minimum=1)
        self._kv_memory = read.num_bytes("kv_memory", None)
        self._num_drafts = read.integer("num_drafts", 0)
        self._compile = read.flag("compile", False)

        self._ks = read.numbers("pass_at", [1], minimum=1, whole=True)
        self._n_at_ks = read.get("n_at_k", [])
        self._machine_factor = read.number("machine_factor", 2.0, above=0)
        self._stop_at_first_failure = read.flag("stop_at_first_failure", True)
        self._resamples = read.integer("bootstrap_resamples", 10_000, minimum=1)
        self._limits_cfg = read.section("limits")
        self._judges = read.integer("judges", None, minimum=1)
        self._allow_unsafe = read.flag("allow_unsafe", False)
        self._tracking_cfg = read.section("tracking", optional=True)
        read.done()

        if self._prompts_file is not None:
            if self._samples_file is not None:
                raise ConfigError("prompts=FILE writes what to sample, samples=FILE judges what came back: set one")
            if None in (self._tokenizer_cfg, self._protocol_cfg):
                raise ConfigError("prompts=FILE needs tokenizer and protocol, which say what a model is shown")
        elif self._samples_file is None and None in (self._model_cfg, self._tokenizer_cfg, self._protocol_cfg):
            raise ConfigError(
                "set model, tokenizer and protocol to sample from a model, or samples=FILE to judge samples"
            )
        if self._only_sampled and self._samples_file is None:
            raise ConfigError("tasks.only=with_samples needs samples=FILE, whose tasks it means")
        pairs = isinstance(self._n_at_ks, Sequence) and all(
            isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(n, int) for n in pair)
            for pair in self._n_at_ks
        )
        if not pairs:
            raise ConfigError(f"n_at_k must be a list of pairs [n, k], got {self._n_at_ks!r}")
        self._n_at_ks = [tuple(pair) for pair in self._n_at_ks]
        most = max([*self._ks, *(k for _, k in self._n_at_ks)])
        if self._samples_file is None and most > self._num_samples:
            raise ConfigError(f"k = {most} needs as many samples a task, num_samples is {self._num_samples}")
        if self._fixed_temperature is None and len(self._temperatures) > 1 and self._samples_file is None:
            raise ConfigError("with several temperatures, set fixed_temperature to the one the headline reports")
        unsampled = self._fixed_temperature is not None and self._fixed_temperature not in self._temperatures
        if unsampled and self._samples_file is None:
            raise ConfigError(
                f"fixed_temperature {self._fixed_temperature} is not among temperatures {self._temperatures}"
            )

    # ------------------------------------------------------------------------------------------------------------------
    # Set-up

    def write_prompts(self) -> None:
        """Writes the prompts for a server to answer, and nothing else: there is no run, and no model."""
        world = start_world("cpu")
        tasks, tokenizer = build(self._tasks_cfg, where="tasks"), build(self._tokenizer_cfg, where="tokenizer")
        protocol = build(self._protocol_cfg, where="protocol")
        count = on_rank_0(
            lambda: write_prompts(
                self._prompts_file, tasks, protocol, tokenizer,
                num_samples=self._num_samples, temperatures=self._temperatures, top_p=self._top_p,
                max_new_tokens=self._max_new_tokens, seed=self._seed, overwrite=self._overwrite,
            )
        )  # fmt: skip
        if world.is_main:
            print(f"wrote {count} prompts to {self._prompts_file}; judge their answers with samples=FILE")
        end_world()

    def setup(self) -> None:
        """Builds everything in the order in which a mistake is cheapest to find: files, tasks, the judge, the model."""
        self._world = start_world(self._device_name)
        self._output = open_output(self._output_name, self._cfg, resume=self._resume)
        self._output_dir = self._output.folder
        self._log = RunLog(self._output, self._tracking_cfg, is_main=self._world.is_main)
        resumed = self._check_output_dir()
        if self._samples_file is not None:
            on_rank_0(lambda: find_samples(self._samples_file))
        self._tasks = build(self._tasks_cfg, where="tasks")
        self._limits = build(self._limits_cfg, where="limits")
        self._model = self._prompts = None
        self._of_tasks = len(self._tasks)
        if self._samples_file is not None:
            self._given = on_rank_0(self._read_samples)
            if self._only_sampled:
                sampled = {sample.task_id for sample in self._given}
                self._tasks = tuple(task for task in self._tasks if task.task_id in sampled)
            check_samples(
                self._tasks, self._given, ks=self._ks, n_at_ks=self._n_at_ks, fixed_temperature=self._fixed_temperature
            )
        else:
            self._given = []
            self._tokenizer = build(self._tokenizer_cfg, where="tokenizer")
            self._protocol = build(self._protocol_cfg, where="protocol")
            self._prompts = {task.task_id: self._protocol.prompt(task, self._tokenizer) for task in self._tasks}
            self._model = self._build_model()
        # `judges` processes run model-written code for this process; by default the host's cores are shared out.
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = self._judges or max(1, (os.cpu_count() or 1) // local_processes)
        with as_user_error(ValueError, RuntimeError):  # a kernel that offers too little; judges that do not start
            self._sandbox = Sandbox(
                workers=workers, limits=self._limits, hidden=[PACKAGED_TASKS], allow_unsafe=self._allow_unsafe
            )

        self._settings = self._what_decides_a_sample()
        journals = self._output_dir / "journals"
        kept = on_rank_0(lambda: read_journals(journals, self._settings)) if resumed else None
        self._log.start(
            self._cfg,
            recipe=Path(__file__).stem,
            method="eval",
            dataset=self._name,
            data_sha256=self._settings["tasks_sha256"],
            tags={**self._model_tags, "wmtp.evaluation": self._name, "wmtp.sandbox": "; ".join(self._sandbox.layers)},
            resumed=resumed,
            replaces=RESULTS,
        )
        wait_for_all()
        self._samples = dict(kept.samples) if kept else {}
        self._judgements = dict(kept.judgements) if kept else {}
        self._journal = Journal(journals, self._world.rank, self._settings)
        if self._samples:
            self._log.info(f"resumed with {len(self._samples)} samples, {len(self._judgements)} of them judged")

    def _check_output_dir(self) -> bool:
        """Refuses to write over an evaluation, or into any other folder; returns whether one goes on there."""
        there = check_output_dir(
            self._output, "an evaluation", results=RESULTS, overwrite=self._overwrite, resume=self._resume
        )
        if self._resume == "yes" and not there:
            raise ConfigError(
                f"resume=true, but {self._output_dir} holds no evaluation to go on with; set resume=false or auto"
            )
        return there and self._resume != "no"

    def _read_samples(self) -> list[Sample]:
        """Reads the samples to judge; a protocol, where there is one, cuts their completions as it does a model's."""
        protocol = None if self._protocol_cfg is None else build(self._protocol_cfg, where="protocol")
        return read_samples(
            self._samples_file, self._tasks,
            protocol=protocol, clean=self._sanitize == "auto", some_tasks=self._only_sampled, log=self._log.info,
        )  # fmt: skip

    def _build_model(self) -> torch.nn.Module:
        """Builds the whole model on this process's device, its weights in the dtype of the computation."""
        path = None if self._checkpoint is None else resolve_checkpoint(self._checkpoint)
        torch.manual_seed(self._seed)
        with torch.device("cpu" if path is None else "meta"):
            model = build(self._model_cfg, where="model").to(self._dtype)
        check_decoder(model, self._num_drafts)
        if self._tokenizer.vocab_size > model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self._tokenizer.vocab_size} ids, the model {model.vocab_size}; "
                "use the tokenizer of the model's checkpoint"
            )
        for task_id, prompt in self._prompts.items():
            if len(prompt) >= model.max_seq_len:
                raise ConfigError(
                    f"the prompt of task {task_id} has {len(prompt)} tokens and leaves no room for an answer in "
                    f"model.max_seq_len {model.max_seq_len}; raise it, leave the task out, or use a shorter protocol"
                )
            if self._kv_memory is not None:
                new_tokens = min(self._max_new_tokens, model.max_seq_len - len(prompt))
                check_kv_memory(
                    self._kv_memory, model, len(prompt), new_tokens,
                    num_drafts=self._num_drafts, name=f"the prompt of task {task_id}",
                )  # fmt: skip
        if path is None:
            self._log.info("checkpoint=null: the model's weights are random")
            model.to(self._world.device)
        else:
            load_checkpoint(model, path, device=self._world.device, log=self._log.info)
        return model.requires_grad_(False).eval()

    def _what_decides_a_sample(self) -> dict:
        """Returns the settings that a resumed run must share, or it would mix two evaluations."""
        keys: tuple[str, ...] = ("seed", "tasks", "protocol", "limits", "machine_factor", "stop_at_first_failure")
        if self._samples_file is None:  # else nothing is known of the model, whatever the config says of one
            keys += ("dtype", "checkpoint", "model", "tokenizer", "top_p", "max_new_tokens", "num_drafts")
        settings = OmegaConf.to_container(OmegaConf.masked_copy(self._cfg, list(keys)), resolve=True)
        settings["tasks_sha256"] = _sha256([self._job(task, "") for task in self._tasks])
        settings["sanitize"] = self._sanitize
        settings |= {"samples": self._samples_file, "samples_sha256": _sha256(self._given)}
        settings["prompts_sha256"] = _sha256(self._prompts)
        self._model_tags = {}
        if self._model is not None and self._checkpoint is not None:
            self._model_tags = on_rank_0(lambda: model_tags(resolve_checkpoint(self._checkpoint)))
            settings["checkpoint_sha256"] = self._model_tags["wmtp.model_sha256"]
        return settings

    # ------------------------------------------------------------------------------------------------------------------
    # Evaluation

    def evaluate(self) -> None:
        """Generates what is missing, judges it meanwhile; a finished sample goes to the journal, then to the judge."""
        self._tasks_by_id = {task.task_id: task for task in self._tasks}
        self._stats, self._seconds = DecodingStats(), 0.0
        self._counters = SharedCounters()
        temperatures = self._temperatures if self._samples_file is None else []
        there = self._samples | {sample.key: sample for sample in self._given}
        to_judge = [sample for key, sample in there.items() if key not in self._judgements]
        to_generate = {t: self._units(t) for t in temperatures}
        total = len(to_judge) + sum(len(unit) for units in to_generate.values() for unit in units)
        self._judging = Judging(
            self._sandbox, self._journal, self._counters, total=total, name=self._name, show=self._world.is_main
        )

        for index in self._counters.take("judge", len(to_judge)):
            if to_judge[index].key not in self._samples:
                self._journal.add_sample(to_judge[index])
            self._submit(to_judge[index])
        started = time.perf_counter()
        for temperature, units in to_generate.items():
            sampling = Sampling(self._max_new_tokens, temperature, self._top_p, self._protocol.stop)
            requests = self._requests(units, f"generate at {temperature}")
            for done in generate(
                self._model, self._tokenizer, requests, sampling,
                batch_size=self._batch_size, num_drafts=self._num_drafts, kv_memory=self._kv_memory,
                compile=self._compile, stats=self._stats,
            ):  # fmt: skip
                task_id, number = done.id
                program = self._protocol.program(self._tasks_by_id[task_id], done.text)
                cost = (len(done.tokens), done.forwards)
                sample = Sample(task_id, number, temperature, program, done.text, done.finish_reason, *cost)
                self._journal.add_sample(sample)
                self._submit(sample)
        self._seconds = time.perf_counter() - started
        self._judging.finish()

    def _units(self, temperature: float) -> list[list[tuple[str, int]]]:
        """Returns what is still to generate, a list for each task: its samples share the prompt's prefill."""
        units = []
        for task in self._tasks:
            missing = [n for n in range(self._num_samples) if (task.task_id, temperature, n) not in self._samples]
            for start in range(0, len(missing), self._batch_size):
                units.append([(task.task_id, n) for n in missing[start : start + self._batch_size]])
        return units

    def _requests(self, units: list, counter: str):
        """Yields this rank's requests, unit by unit when there is room. Random numbers depend on the key alone."""
        for index in self._counters.take(counter, len(units)):
            for task_id, number in units[index]:
                yield Request((task_id, number), tuple(self._prompts[task_id]), (self._seed, task_id, number))

    def _submit(self, sample: Sample) -> None:
        task = self._tasks_by_id[sample.task_id]
        self._judging.submit(task, sample, self._job(task, sample.solution))

    def _job(self, task, program: str):
        """Returns a job with the problem's own limits, widened for this machine; else with the config's."""
        return task.job(
            program,
            machine_factor=self._machine_factor,
            limits=self._limits,
            stop_at_first_failure=self._stop_at_first_failure,
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Results

    def report(self) -> dict | None:
        """Merges all ranks' journals on rank 0; returns the results, which go to files, report and MLflow."""
        self._journal.close()
        timings = gather_objects({**self._stats.as_dict(), "seconds": self._seconds})
        if not self._world.is_main:
            return None
        kept = read_journals(self._output_dir / "journals", self._settings)
        samples = [s for s in kept.samples.values() if self._samples_file is not None or self._wanted(s)]
        results = evaluation_results(
            self._tasks, samples, kept.judgements,
            ks=self._ks, n_at_ks=self._n_at_ks, fixed_temperature=self._fixed_temperature,
            seed=self._seed, resamples=self._resamples,
            settings=self._settings, of_tasks=self._of_tasks,
            sandbox={"layers": self._sandbox.layers, "missing": self._sandbox.missing},
        )  # fmt: skip
        write_samples(self._output_dir / "samples.jsonl", samples, kept.judgements)
        write_tasks(self._output_dir / "tasks.jsonl", results, samples, kept.judgements, kept.cpu_seconds)
        prompts = None if self._prompts is None else {i: self._tokenizer.decode(p) for i, p in self._prompts.items()}
        of_ranks = {"ranks": timings}
        page = results_page(
            results, self._tasks, samples, kept.judgements, title=self._name, prompts=prompts, timings=of_ranks
        )
        write_results(self._output_dir, results, page, of_ranks)
        for line in headline(results):
            self._log.info(line)
        self._log.info(f"wrote {self._output_dir}/report.md, results.json, samples.jsonl, tasks.jsonl")
        metrics, tags = logged(results, self._name)
        files = (self._output_dir / name for name in ("report.md", "results.json", "samples.jsonl", "tasks.jsonl"))
        self._log.result(metrics, *files, tags=tags)
        return results

    def _wanted(self, sample: Sample) -> bool:
        """Returns whether this config asks for a sample; others stay in the journal and out of the result."""
        return sample.temperature in self._temperatures and sample.sample < self._num_samples

    def cleanup(self, status: str = "FINISHED") -> None:
        """Ends the judge's processes and the MLflow run, and leaves the process group."""
        self._sandbox.close()
        self._log.close(status)
        if status == "FINISHED":
            end_world()
        self._output.close(fail=status == "FINISHED")


def _sha256(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "backslashreplace")).hexdigest()


@clear_errors()
@stopping()
@config.parse
def main(cfg: DictConfig) -> None:
    recipe = EvalCodeContestsRecipe(cfg)
    if cfg.get("prompts") is not None:
        return recipe.write_prompts()
    recipe.setup()
    with ending(recipe.cleanup):
        recipe.evaluate()
        recipe.report()


if __name__ == "__main__":
    main()
