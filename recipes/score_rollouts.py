"""Values of programs from rollouts: at each line's end, the share of sampled completions that pass the task's tests.

    tune run --nproc_per_node 2 recipes/score_rollouts.py --config configs/tiny/score_rollouts.yaml
    torchrun --nproc_per_node 4 recipes/score_rollouts.py --config configs/codellama_7b/score_rollouts.yaml

At the end of the prompt and of each line of a program, `num_samples` completions are sampled, which share the prefix's
keys and values, and judged; their pass rate is the value there, and the whole program's own verdict is the last value
(wmtp.critic.rollouts). output_dir is then a scored dataset with a column `values`, which `wmtp.data.scored` reads for
the weighting `critic`; `programs.jsonl` holds all programs that were judged, labelled, which `critic_stage1.py` takes
as `wmtp.critic.pairs.jsonl_pairs`; `lines.jsonl` and report.md are for people.

Each process holds the whole model and takes the next prefix when it is free. A completion's random numbers depend on
the seed, its task, the prefix's tokens and its own number alone: so two programs that begin alike share their values
there, and the result is the same at any number of processes, up to rounding. Completions and verdicts are kept as they
arrive: a killed run goes on with `resume=true`. Model-written code runs in the sandbox only.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported
import torch
from omegaconf import DictConfig, OmegaConf

from wmtp import config
from wmtp.config import ConfigError, ConfigReader, build
from wmtp.critic.rollouts import WITHIN_LINE, line_ends, line_row, prefix_id, rollout_report, value_column
from wmtp.data.documents import document_from_text
from wmtp.data.packaged import PACKAGED_TASKS
from wmtp.data.scored_dataset import MANIFEST, part_path, write_column_manifest, write_part
from wmtp.distributed import SharedCounters, end_world, gather_objects, on_rank_0, start_world, wait_for_all
from wmtp.errors import UserError, as_user_error, clear_errors, ending
from wmtp.eval.golds import settle_tests
from wmtp.eval.journal import Journal, read_journals
from wmtp.eval.judging import Judging
from wmtp.eval.samples import Sample
from wmtp.files import write_whole
from wmtp.generation import DecodingStats, Request, Sampling, check_decoder, generate
from wmtp.generation.kv_memory import check_kv_memory
from wmtp.models import load_checkpoint
from wmtp.pretrained import hf_tokenizer, model_tags, require_same_vocabulary, resolve_checkpoint
from wmtp.sandbox import Sandbox
from wmtp.training.output_dir import check_output_dir, open_output
from wmtp.training.planning import plan_run
from wmtp.training.run_log import RunLog
from wmtp.training.stopping import stopping

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESULTS = ("journals", MANIFEST, "data", "programs.jsonl", "lines.jsonl", "report.md")  # what it leaves in output_dir
DOCUMENTS_PER_PART = 4096


class ScoreRolloutsRecipe:
    """Order of events: read the config, `setup`, `roll_out` (sample and judge at once), `report`, `cleanup`."""

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

        self._checkpoint = read.get("checkpoint", None)
        self._model_cfg = read.section("model")
        self._tokenizer_cfg = read.section("tokenizer")
        self._tasks_cfg = read.section("tasks")
        self._programs_cfg = read.section("programs")
        self._protocol_cfg = read.section("protocol")
        self._within_line = read.choice("within_line", {name: name for name in WITHIN_LINE}, "linear")

        self._num_samples = read.integer("num_samples", 8, minimum=1)
        self._temperature = read.number("temperature", 0.8, above=0)
        self._top_p = read.number("top_p", 1.0, above=0, maximum=1)
        self._max_new_tokens = read.integer("max_new_tokens", 256, minimum=1)
        self._batch_size = read.integer("batch_size", 8, minimum=1)
        self._kv_memory = read.num_bytes("kv_memory", None)
        self._num_drafts = read.integer("num_drafts", 0)
        self._compile = read.flag("compile", False)

        self._tests = read.choice("tests", {"protected": "protected", "inside": "inside"}, "protected")
        self._limits_cfg = read.section("limits")
        self._judges = read.integer("judges", None, minimum=1)
        self._allow_unsafe = read.flag("allow_unsafe", False)
        self._tracking_cfg = read.section("tracking", optional=True)
        read.done()

    # ------------------------------------------------------------------------------------------------------------------
    # Set-up

    def setup(self) -> None:
        """Builds everything in the order in which a mistake is cheapest to find: files, programs, model, judge."""
        self._world = start_world(self._device_name)
        self._output = open_output(self._output_name, self._cfg, resume=self._resume)
        self._output_dir = self._output.folder
        self._log = RunLog(self._output, self._tracking_cfg, is_main=self._world.is_main)
        resumed = self._check_output_dir()
        self._tasks = build(self._tasks_cfg, where="tasks")
        self._programs = build(self._programs_cfg, self._tasks, where="programs")
        used = {program.task.task_id for program in self._programs}
        self._tasks = tuple(task for task in self._tasks if task.task_id in used)
        self._limits = build(self._limits_cfg, where="limits")
        self._tokenizer = build(self._tokenizer_cfg, where="tokenizer")
        self._protocol = build(self._protocol_cfg, where="protocol")
        self._prompts = {task.task_id: self._protocol.render(task) for task in self._tasks}
        if not all(isinstance(prompt, str) for prompt in self._prompts.values()):
            raise ConfigError(
                f"protocol {self._protocol.name} asks in messages, but here a program goes on from the prompt as text; "
                "set protocol to one that shows a text, such as wmtp.eval.docstring_protocol"
            )
        path = None if self._checkpoint is None else resolve_checkpoint(self._checkpoint)
        if path is not None:
            require_same_vocabulary(self._tokenizer, hf_tokenizer(path), "model")
        self._model = self._build_model(path)
        self._read_programs()

        # `judges` processes run model-written code for this process; by default the host's cores are shared out.
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = self._judges or max(1, (os.cpu_count() or 1) // local_processes)
        with as_user_error(ValueError, RuntimeError):  # a kernel that offers too little; judges that do not start
            self._sandbox = Sandbox(
                workers=workers, limits=self._limits, hidden=[PACKAGED_TASKS], allow_unsafe=self._allow_unsafe
            )
        self._tasks = settle_tests(
            self._tasks, self._sandbox, tests=self._tests, limits=self._limits, log=self._log.info
        )
        self._task_of = {task.task_id: task for task in self._tasks}
        self._settings = self._what_decides_a_verdict(path)
        journals = self._output_dir / "journals"
        kept = on_rank_0(lambda: read_journals(journals, self._settings)) if resumed else None
        names = {(sample.task_id, None) for sample in self._whole_programs()}
        names |= {(name, self._temperature) for name in self._prefixes}  # an earlier run may have had other programs
        self._samples = {k: s for k, s in (kept.samples if kept else {}).items() if k[:2] in names}
        self._judgements = {k: j for k, j in (kept.judgements if kept else {}).items() if j.verdict != "harness_error"}
        self._tell_cost()
        self._log.start(
            self._cfg,
            recipe=Path(__file__).stem,
            method="score_rollouts",
            dataset=self._programs_cfg["_component_"].rpartition(".")[2],
            data_sha256=self._settings["tasks_sha256"],
            tags={**self._model_tags, "wmtp.sandbox": "; ".join(self._sandbox.layers)},
            resumed=resumed,
            replaces=RESULTS,
        )
        wait_for_all()
        self._journal = Journal(journals, self._world.rank, self._settings)

    def _check_output_dir(self) -> bool:
        """Refuses to write over values, or into any other folder; returns whether a run goes on there."""
        there = check_output_dir(self._output, "a run", results=RESULTS, overwrite=self._overwrite, resume=self._resume)
        if self._resume == "yes" and not there:
            raise ConfigError(
                f"resume=true, but {self._output_dir} holds no run to go on with; set resume=false or auto"
            )
        return there and self._resume != "no"

    def _build_model(self, path: Path | None) -> torch.nn.Module:
        """Builds the whole model on this process's device, its weights in the dtype of the computation."""
        torch.manual_seed(self._seed)
        with torch.device("cpu" if path is None else "meta"):
            model = build(self._model_cfg, where="model").to(self._dtype)
        check_decoder(model, self._num_drafts)
        if self._tokenizer.vocab_size > model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {self._tokenizer.vocab_size} ids, the model {model.vocab_size}; "
                "use the tokenizer of the model's checkpoint"
            )
        if path is None:
            self._log.info("checkpoint=null: the model's weights are random")
            model.to(self._world.device)
        else:
            load_checkpoint(model, path, device=self._world.device, log=self._log.info)
        return model.requires_grad_(False).eval()

    def _read_programs(self) -> None:
        """Tokenizes the programs and finds their prefixes, each once; leaves out what the context has no room for."""
        self._documents, self._ends, kept, longest = [], [], [], self._model.max_seq_len
        self._prefixes: dict[str, tuple[str, tuple[int, ...], str]] = {}  # by name: task, tokens, text after the prompt
        for program in self._programs:
            task_id = program.task.task_id
            document = document_from_text(self._tokenizer, self._prompts[task_id], program.text, program.id)
            if len(document) > longest:
                continue
            ends, prompt = line_ends(self._tokenizer, document, program.text), len(document.prompt)
            for tokens in ends.prefixes(document):
                text = self._tokenizer.decode(list(tokens[prompt:]))
                self._prefixes.setdefault(prefix_id(task_id, tokens), (task_id, tokens, text))
            kept.append(program)
            self._documents.append(document)
            self._ends.append(ends)
        if left_out := len(self._programs) - len(kept):
            self._log.info(
                f"left out: {left_out} programs that are longer than model.max_seq_len {longest} with their prompt"
            )
        if not kept:
            raise ConfigError(f"all {left_out} programs are longer than model.max_seq_len {longest}; raise it")
        self._programs = tuple(kept)
        self._longest = max((tokens for _, tokens, _ in self._prefixes.values()), key=len)
        if self._kv_memory is not None:
            new_tokens = min(self._max_new_tokens, longest - len(self._longest))
            check_kv_memory(
                self._kv_memory, self._model, len(self._longest), new_tokens,
                num_drafts=self._num_drafts, name="the longest prefix",
            )  # fmt: skip

    def _what_decides_a_verdict(self, path: Path | None) -> dict:
        """Returns the settings that a resumed run must share, or it would mix the values of two models or judges."""
        keys = ["seed", "tasks", "protocol", "limits", "dtype", "checkpoint", "model", "tokenizer", "top_p"]
        keys += ["temperature", "max_new_tokens", "num_drafts"]
        settings = OmegaConf.to_container(OmegaConf.masked_copy(self._cfg, keys), resolve=True)
        settings["tasks_sha256"] = _sha256([task.job("") for task in self._tasks])
        settings["prompts_sha256"] = _sha256(self._prompts)
        self._model_tags = {} if path is None else on_rank_0(lambda: model_tags(path))
        settings["checkpoint_sha256"] = self._model_tags.get("wmtp.model_sha256")
        return settings

    def _tell_cost(self) -> None:
        """Says what is to be sampled and judged, and by the planner how long that takes at most."""
        units = self._units()
        missing = sum(map(len, units))
        tokens = missing * self._max_new_tokens
        prefilled = sum(len(self._prefixes[name][1]) for name in {unit[0][0] for unit in units})
        line = (
            f"{len(self._programs)} programs of {len(self._tasks)} tasks: {len(self._prefixes)} different prefixes x "
        )
        line += (
            f"{self._num_samples} completions of at most {self._max_new_tokens} tokens; to do: {missing} completions, "
        )
        line += f"at most {tokens} new tokens after {prefilled} of prefixes"
        self._log.info(line + (f", {len(self._samples)} samples are there" if self._samples else ""))
        if tokens:
            cfg = self._cfg.copy()
            cfg.prompt_tokens = min(len(self._longest), self._model.max_seq_len - self._max_new_tokens)
            plan_run(cfg, self._world, None, self._log.info, tokens=tokens)

    # ------------------------------------------------------------------------------------------------------------------
    # Rollouts

    def roll_out(self) -> None:
        """Samples what is missing, judges it meanwhile; a finished sample goes to the journal, then to the judge."""
        self._stats, self._seconds = DecodingStats(), 0.0
        counters = SharedCounters()
        given = {sample.key: sample for sample in self._whole_programs()}
        to_judge = [s for key, s in (self._samples | given).items() if key not in self._judgements]
        units = self._units()
        total = len(to_judge) + sum(map(len, units))
        self._judging = Judging(
            self._sandbox, self._journal, counters, total=total, name="rollouts", show=self._world.is_main
        )
        for index in counters.take("judge", len(to_judge)):
            if to_judge[index].key not in self._samples:
                self._journal.add_sample(to_judge[index])
            self._submit(to_judge[index])
        started = time.perf_counter()
        sampling = Sampling(self._max_new_tokens, self._temperature, self._top_p, self._protocol.stop)
        for done in generate(
            self._model, self._tokenizer, self._requests(units, counters), sampling,
            batch_size=self._batch_size, num_drafts=self._num_drafts, kv_memory=self._kv_memory,
            compile=self._compile, stats=self._stats,
        ):  # fmt: skip
            name, number = done.id
            task_id, _, prefix = self._prefixes[name]
            completion = self._completed(prefix, done.text)
            program = self._protocol.extract(self._task_of[task_id], completion)
            cost = (len(done.tokens), done.forwards)
            sample = Sample(name, number, self._temperature, program, completion, done.finish_reason, *cost)
            self._journal.add_sample(sample)
            self._submit(sample)
        self._seconds = time.perf_counter() - started
        self._judging.finish()

    def _units(self) -> list[list[tuple[str, int]]]:
        """Returns what is still to sample, a list for each prefix: its completions share the prefix's prefill."""
        units = []
        for name in self._prefixes:
            missing = [n for n in range(self._num_samples) if (name, self._temperature, n) not in self._samples]
            for start in range(0, len(missing), self._batch_size):
                units.append([(name, n) for n in missing[start : start + self._batch_size]])
        return units

    def _requests(self, units: list, counters: SharedCounters) -> Iterator[Request]:
        """Yields this rank's requests, unit by unit when there is room. Random numbers depend on the key alone."""
        for index in counters.take("sample", len(units)):
            for name, number in units[index]:
                yield Request((name, number), self._prefixes[name][1], (self._seed, name, number))

    def _completed(self, prefix: str, text: str) -> str:
        """Returns prefix and sampled text, cut where a stop string ends that the prefix may have begun."""
        whole = prefix + text
        starts = (whole.find(stop, max(0, len(prefix) - len(stop) + 1)) for stop in self._protocol.stop)
        return whole[: min((at for at in starts if at >= 0), default=len(whole))]

    def _whole_programs(self) -> list[Sample]:
        """Returns the given programs as samples, which are judged and not sampled."""
        samples = []
        for program, document in zip(self._programs, self._documents, strict=True):
            name = prefix_id(program.task.task_id, document.tokens)
            solution = self._protocol.extract(program.task, program.text)
            samples.append(Sample(name, 0, None, solution, program.text))
        return samples

    def _submit(self, sample: Sample) -> None:
        task = self._task_of[sample.task_id.rpartition(" ")[0]]
        self._judging.submit(task, sample, task.job(sample.solution, limits=self._limits))

    # ------------------------------------------------------------------------------------------------------------------
    # Results

    def report(self) -> dict | None:
        """Merges all ranks' journals on rank 0 and writes the values; returns the manifest."""
        self._journal.close()
        stats = gather_objects({**self._stats.as_dict(), "seconds": self._seconds})
        if not self._world.is_main:
            return None
        kept = read_journals(self._output_dir / "journals", self._settings)
        passed = {k: j.verdict == "passed" for k, j in kept.judgements.items() if j.verdict != "harness_error"}
        columns, rows, programs = [], [], []
        value_of = {name: self._value(name, passed) for name in self._prefixes}
        for program, document, ends, whole in zip(
            self._programs, self._documents, self._ends, self._whole_programs(), strict=True
        ):
            if whole.key not in passed:
                raise UserError(f"{program.id}: the judge failed on the program itself; resume=true judges it again")
            names = [prefix_id(program.task.task_id, tokens) for tokens in ends.prefixes(document)]
            values = [*(value_of[name] for name in names), float(passed[whole.key])]
            columns.append(value_column(document, ends.places, values, self._within_line))
            rows.append(line_row(document, ends, values, program.fault_line))
            programs.append(whole)
        numbers = range(self._num_samples)
        keys = [(name, self._temperature, number) for name in self._prefixes for number in numbers]
        programs += [kept.samples[key] for key in keys if key in passed]
        cut_off = sum(kept.samples[key].finish_reason == "length" for key in keys) / len(keys)
        manifest = self._write(columns, rows, programs, passed)
        self._log_results(manifest, rows, stats, cut_off)
        return manifest

    def _value(self, name: str, passed: dict) -> float:
        """Returns the pass rate of a prefix's completions; those on which the judge itself failed do not count."""
        keys = [(name, self._temperature, number) for number in range(self._num_samples)]
        found = [passed[key] for key in keys if key in passed]
        if not found:
            raise UserError(f"the judge failed on every completion of {name}; resume=true judges them again")
        return sum(found) / len(found)

    def _write(self, columns: list, rows: list[dict], programs: list[Sample], passed: dict) -> dict:
        """Writes the scored dataset, the labelled programs (each once) and the values by line."""
        binding = {
            "column": "values",
            "tokenizer": {"vocab_hash": self._tokenizer.vocab_hash()},
            "model": {"checkpoint_sha256": self._settings["checkpoint_sha256"], "section": self._settings["model"]},
            "seq_len": self._model.max_seq_len,
            "rollouts": self._settings | {"num_samples": self._num_samples, "within_line": self._within_line},
        }
        entries = []
        for number, start in enumerate(range(0, len(columns), DOCUMENTS_PER_PART)):
            some = slice(start, start + DOCUMENTS_PER_PART)
            path = part_path(self._output_dir, number)
            entries.append(write_part(path, self._documents[some], {"values": columns[some]}, binding))
        labelled = {}
        for sample in programs:
            task_id = sample.task_id.rpartition(" ")[0]
            row = {"problem": task_id, "prompt": self._prompts[task_id], "completion": sample.completion}
            labelled.setdefault((task_id, sample.completion), row | {"is_correct": passed[sample.key]})
        for file, lines in (("programs.jsonl", labelled.values()), ("lines.jsonl", rows)):
            write_whole(self._output_dir / file, "".join(json.dumps(line) + "\n" for line in lines))
        return write_column_manifest(self._output_dir, binding, entries)

    def _log_results(self, manifest: dict, rows: list[dict], stats: list[dict], cut_off: float) -> None:
        metrics, page = rollout_report(rows, stats, self._num_samples, cut_off)
        write_whole(self._output_dir / "report.md", page)
        self._log.info(f"{page}\nwrote {self._output_dir / MANIFEST}, programs.jsonl, lines.jsonl, report.md")
        files = (self._output_dir / name for name in (MANIFEST, "report.md", "lines.jsonl"))
        self._log.result(metrics, *files, tags={"wmtp.data_sha256": manifest["data"]["sha256"]})

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
    recipe = ScoreRolloutsRecipe(cfg)
    recipe.setup()
    with ending(recipe.cleanup):
        recipe.roll_out()
        recipe.report()


if __name__ == "__main__":
    main()
