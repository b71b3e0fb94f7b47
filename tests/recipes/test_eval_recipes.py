"""The evaluation recipes end to end: real tasks, a real (tiny, random) model, the real sandbox, real processes."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from processes import run_recipe_file, start
from random_models import random_decoder
from services import new_store

from recipes.eval_mbpp import EvalMBPPRecipe
from runs import ROOT
from wmtp.config import build, load, read_command_line
from wmtp.data import packaged_functions, packaged_programs
from wmtp.eval.results_page import headline
from wmtp.generation import Request, Sampling, generate
from wmtp.models import export_hf, llama_mtp
from wmtp.pretrained import byte_tokenizer

RECIPES = {"eval_mbpp": "EvalMBPPRecipe", "eval_codecontests": "EvalCodeContestsRecipe"}


def run_here(cfg, recipe="eval_mbpp"):
    """Run a recipe in this process; its results."""
    module = __import__(f"recipes.{recipe}", fromlist=[RECIPES[recipe]])
    evaluation = getattr(module, RECIPES[recipe])(cfg)
    evaluation.setup()
    evaluation.evaluate()
    results = evaluation.report()
    evaluation._sandbox.close()
    return results


def files(output_dir):
    return {name: (Path(output_dir) / name).read_text() for name in ("samples.jsonl", "results.json")}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def gold(tmp_path):
    """Right and wrong programs for the packaged tasks of the tiny configs, in the field's format."""

    def write(recipe, number=8):
        if recipe == "eval_mbpp":
            pairs = [(f"packaged/{row['task_id']}", row["code"], row["wrong_code"]) for row in packaged_functions()]
        else:
            pairs = [
                (row["name"], row["solutions"]["solution"][0], row["incorrect_solutions"]["solution"][0])
                for row in packaged_programs()
            ]
        rows = [{"task_id": i, "solution": code} for i, *both in pairs[:number] for code in both]
        return write_jsonl(tmp_path / f"{recipe}.jsonl", rows)

    return write


def test_existing_samples_are_judged_without_a_model(tiny_config, gold):
    """One right and one wrong program a task: pass@1 is 1/2, pass@2 is 1, exactly."""
    cfg = tiny_config("eval_mbpp", samples=gold("eval_mbpp"), model=None, tokenizer=None, protocol=None)
    cfg.fixed_temperature, cfg.temperatures = None, [0.0]
    results = run_here(cfg)
    (at_unknown,) = results["temperatures"].values()
    assert at_unknown["metrics"]["pass_at_1"]["estimate"] == 0.5
    assert at_unknown["metrics"]["pass_at_2"]["estimate"] == 1.0
    assert results["verdicts"]["passed"] == 8 and results["excluded_harness_errors"] == 0
    rows = [json.loads(line) for line in (Path(cfg.output_dir) / "samples.jsonl").read_text().splitlines()]
    assert [row["verdict"] == "passed" for row in rows] == [True, False] * 8
    # What a run writes is what samples=FILE reads.
    again = tiny_config("eval_mbpp", samples=str(Path(cfg.output_dir) / "samples.jsonl"), output_dir="again")
    again.fixed_temperature, again.temperatures = None, [0.0]
    judged = run_here(again)
    assert judged["verdicts"] == results["verdicts"]
    assert not {"model", "checkpoint", "max_new_tokens"} & judged["settings"].keys()  # nobody knows who wrote them


def test_samples_of_some_tasks_as_people_have_them(tiny_config, tmp_path):
    """Fenced golds of three of eight tasks, out of a pipe, by two processes; and the same without sanitising."""
    rows = [
        {"task_id": row["task_id"], "solution": f"Here it is:\n```python\n{row['code']}\n```\nIt isn't hard."}
        for row in packaged_functions()[:3]
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    os.mkfifo(tmp_path / "pipe")
    common = {"fixed_temperature": None, "pass_at": [1], "tasks__only": "with_samples"}
    cfg = tiny_config("eval_mbpp", samples=str(tmp_path / "pipe"), **common)
    OmegaConf.save(cfg, tmp_path / "c.yaml")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=(content,)).start()
    start(run_recipe_file, "eval_mbpp", str(tmp_path / "c.yaml"), size=2, log=tmp_path / "log.txt").join()
    results = json.loads(files(cfg.output_dir)["results.json"])
    assert (results["verdicts"], results["tasks"], results["of_tasks"]) == ({"passed": 3}, 3, 8)
    assert results["settings"]["sanitize"] == "auto"
    assert "> Only 3 of 8 tasks are judged, those with samples" in (Path(cfg.output_dir) / "report.md").read_text()
    sample = json.loads(files(cfg.output_dir)["samples.jsonl"].splitlines()[0])
    assert (
        sample["raw"] == rows[0]["solution"] and sample["solution"].strip() == packaged_functions()[0]["code"].strip()
    )
    before = files(cfg.output_dir)
    cfg.resume, cfg.samples = True, write_jsonl(tmp_path / "file.jsonl", rows)  # the content decides
    assert run_here(cfg)["verdicts"] == {"passed": 3}
    assert files(cfg.output_dir)["samples.jsonl"] == before["samples.jsonl"]

    off = tiny_config("eval_mbpp", samples=cfg.samples, output_dir=str(tmp_path / "off"), sanitize=False, **common)
    results = run_here(off)
    assert results["verdicts"] == {"exception": 3} and results["settings"]["sanitize"] == "off"
    warning = "WARNING: 3 of 3 samples (100.0 %) are no Python programs: they hold Markdown fences"
    assert any(line.startswith(warning) for line in headline(results))


@pytest.mark.parametrize("benchmark", ["mbpp", "humaneval", "mbppplus", "livecodebench", "bigcodebench"])
def test_the_configs_for_samples_need_a_file_and_name_no_model(benchmark):
    config = ["--config", str(ROOT / "configs" / "eval" / f"{benchmark}_samples.yaml")]
    cfg = read_command_line([*config, "samples=FILE"])
    EvalMBPPRecipe(cfg)
    assert not {"model", "checkpoint", "tokenizer"} & set(cfg)
    assert cfg.output_dir == f"runs/eval/{benchmark}_samples"
    with pytest.raises(ValueError, match="or samples=FILE to judge samples"):
        EvalMBPPRecipe(read_command_line(config))


@contextlib.contextmanager
def completion_server(model, tokenizer):
    """An engine behind OpenAI's /v1/completions, which knows nothing of tasks; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/completions" and not asked.keys() & {"task_id", "token_ids", "messages"}
            sampling = Sampling(asked["max_tokens"], asked["temperature"], asked["top_p"], tuple(asked["stop"]))
            requests = [Request(n, tuple(asked["prompt"]), (asked["seed"], n)) for n in range(asked["n"])]
            done = generate(model, tokenizer, requests, sampling, batch_size=4)
            reply = {"choices": [{"text": c.text, "finish_reason": c.finish_reason} for c in done]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/v1"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_answers_of_a_server_to_the_prompts_written_are_judged_as_those_generated_here(tiny_config, tmp_path, recipe):
    """With the script of docs/evaluation.md, greedily: a server draws other random numbers."""
    greedy = {"max_new_tokens": 24, "temperatures": [0.0], "fixed_temperature": None}
    cfg = tiny_config(recipe, **greedy)
    direct = run_here(cfg, recipe)
    prompts, answers = str(tmp_path / "prompts.jsonl"), str(tmp_path / "answers.jsonl")
    asking = tiny_config(recipe, prompts=prompts, model=None, output_dir=str(tmp_path / "unused"), **greedy)
    module = __import__(f"recipes.{recipe}", fromlist=[RECIPES[recipe]])
    evaluation = getattr(module, RECIPES[recipe])(asking)
    evaluation.write_prompts()
    assert not Path(asking.output_dir).exists()  # no run, and no model
    first = json.loads(Path(prompts).read_text().splitlines()[0])
    assert byte_tokenizer().encode_prompt(first["prompt"]) == first["token_ids"] and first["n"] == cfg.num_samples

    (script,) = re.findall(
        r"```python\n(import json, sys.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL
    )
    torch.manual_seed(cfg.seed)
    with completion_server(build(cfg.model, where="model").eval(), byte_tokenizer()) as url:
        subprocess.run([sys.executable, "-c", script, prompts, answers, url, "tiny"], check=True)
    judged = tiny_config(recipe, samples=answers, sanitize="off", output_dir=str(tmp_path / "judged"), **greedy)
    results = run_here(judged, recipe)
    (table,), (expected,) = (found["temperatures"].values() for found in (results, direct))
    for figure in ("metrics", "verdicts", "cut_at_max_tokens"):  # nobody says how many tokens a server computed
        assert table[figure] == expected[figure]
    programs = [
        [(row["task_id"], row["solution"], row["verdict"]) for row in map(json.loads, text.splitlines())]
        for text in (files(c.output_dir)["samples.jsonl"] for c in (cfg, judged))
    ]
    assert programs[0] == programs[1]

    with pytest.raises(ValueError, match=r"^prompts=.*prompts.jsonl is there already; name another file, or set overw"):
        evaluation.write_prompts()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"prompts": ".", "samples": "s.jsonl"}, "prompts=FILE writes what to sample, samples=FILE judges what came"),
        ({"prompts": "p.jsonl", "protocol": None}, "prompts=FILE needs tokenizer and protocol"),
        ({"prompts": "."}, "prompts=. is a folder; name a file to write"),
        ({"prompts": "s3://bucket/p.jsonl"}, "prompts must be a local file, got s3://bucket/p.jsonl"),
        ({"prompts": ""}, "prompts must be one text, got ''"),
        ({"prompts": "/dev/null/p.jsonl"}, "/dev/null can be no folder: /dev/null is a file"),
    ],
)
def test_prompts_that_cannot_be_written_are_refused_in_one_line(tiny_config, overrides, message):
    with pytest.raises(ValueError) as error:
        EvalMBPPRecipe(tiny_config("eval_mbpp", **overrides)).write_prompts()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_programs_with_stdin_are_judged_and_n_at_k_uses_the_public_tests(tiny_config, gold):
    cfg = tiny_config("eval_codecontests", samples=gold("eval_codecontests", 4))
    cfg.pass_at, cfg.n_at_k = [1, 2], [[1, 2]]
    (table,) = run_here(cfg, "eval_codecontests")["temperatures"].values()
    assert table["metrics"]["pass_at_1"]["estimate"] == 0.5
    # Both programs pass the public tests or only the right one does: the one submission is right with 1/2 or 1.
    assert 0.5 <= table["metrics"]["1_at_2"]["estimate"] <= 1.0


def test_every_end_token_of_the_checkpoint_ends_an_answer(tiny_config, tmp_path):
    """Each byte is an end token of a checkpoint: answers are empty, plain and self-speculative, and so are programs."""
    sizes = OmegaConf.to_container(load(ROOT / "configs" / "tiny" / "eval_mbpp.yaml").model)
    sizes.pop("_component_")
    export_hf(random_decoder(**sizes), tmp_path / "model", tokenizer_source=byte_tokenizer())
    generation = tmp_path / "model" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": list(range(256))}))
    for num_drafts in (0, 1):
        cfg = tiny_config("eval_mbpp", output_dir=f"drafts_{num_drafts}", num_drafts=num_drafts, tasks__limit=2)
        cfg.checkpoint = str(tmp_path / "model")
        run_here(cfg)
        rows = [json.loads(line) for line in files(cfg.output_dir)["samples.jsonl"].splitlines()]
        assert len(rows) == 8
        assert {(row["completion"], row["finish_reason"], row["tokens"]) for row in rows} == {("", "eos", 1)}


@pytest.mark.long
def test_processes_kills_and_batch_sizes_do_not_change_the_result(tiny_config, tmp_path):
    """Sampled by one process; by two with another batch size; and by two that are killed with SIGKILL on the way, then
    resumed by one: the same bytes."""
    common = {"num_samples": 8, "temperatures": [0.8], "fixed_temperature": None}
    alone = tiny_config("eval_mbpp", output_dir=str(tmp_path / "alone"), **common)
    run_here(alone)

    two = tiny_config("eval_mbpp", output_dir=str(tmp_path / "two"), batch_size=3, **common)
    OmegaConf.save(two, tmp_path / "two.yaml")
    start(run_recipe_file, "eval_mbpp", str(tmp_path / "two.yaml"), size=2, log=tmp_path / "two.txt").join()
    assert files(two.output_dir) == files(alone.output_dir)

    killed = tiny_config("eval_mbpp", output_dir=str(tmp_path / "killed"), batch_size=1, **common)
    OmegaConf.save(killed, tmp_path / "killed.yaml")
    processes = start(run_recipe_file, "eval_mbpp", str(tmp_path / "killed.yaml"), size=2, log=tmp_path / "log.txt")
    while processes.running() and _journaled(killed.output_dir) < 5:
        time.sleep(0.002)
    workers = [psutil.Process(pid) for pid in processes.pids]
    family = [*workers, *(child for worker in workers for child in worker.children(recursive=True))]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # a judged program that ended since
            member.kill()
    psutil.wait_procs(family)
    there = _journaled(killed.output_dir)
    assert 5 <= there < 64
    killed.resume, killed.batch_size = True, 8
    run_here(killed)
    assert files(killed.output_dir) == files(alone.output_dir)


def _journaled(output_dir):
    return sum(path.read_text().count('"sample": {') for path in Path(output_dir).glob("journals/*.jsonl"))


def test_more_samples_are_added_to_those_that_are_there(tiny_config):
    cfg = tiny_config("eval_mbpp", num_samples=1, pass_at=[1], temperatures=[0.8])
    run_here(cfg)
    first = (Path(cfg.output_dir) / "samples.jsonl").read_text()
    cfg.num_samples, cfg.resume = 2, True
    run_here(cfg)
    rows = (Path(cfg.output_dir) / "samples.jsonl").read_text().splitlines(keepends=True)
    assert len(rows) == 16 and "".join(row for row in rows if json.loads(row)["sample"] == 0) == first
    cfg.seed = 1
    with pytest.raises(ValueError, match="seed"):
        run_here(cfg)


def test_mlflow_holds_the_figures_and_the_report(tiny_config, gold, tmp_path):
    uri = new_store(tmp_path)
    cfg = tiny_config("eval_mbpp", samples=gold("eval_mbpp"), temperatures=[0.0], fixed_temperature=None)
    cfg.tracking = {"_component_": "wmtp.tracking.MLflowLogger", "experiment": "e", "tracking_uri": uri}
    cfg.tracking.artifact_location = str(tmp_path / "artifacts")
    cfg.resume = "auto"  # which finds nothing: a new run
    recipe = EvalMBPPRecipe(cfg)
    recipe.setup()
    recipe.evaluate()
    recipe.report()
    recipe._log.close()
    recipe._sandbox.close()
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.data.metrics["eval/packaged_functions/pass_at_1"] == 0.5
    assert run.data.metrics["eval/packaged_functions/tasks"] == run.data.metrics["eval/packaged_functions/of_tasks"]
    assert run.data.tags["wmtp.evaluated_tasks"] == "all" and run.data.tags["wmtp.judged_inside"].startswith("0 of ")
    assert {a.path for a in client.list_artifacts(run.info.run_id)} - {"git_diff.patch"} == {
        "config.yaml", "report.md", "results.json", "samples.jsonl", "tasks.jsonl"
    }  # fmt: skip
    told = {"wmtp.git_commit", "wmtp.data_sha256", "wmtp.sandbox", "mlflow.note.content"}
    assert told <= set(run.data.tags) and f"samples of {cfg.samples}" in run.data.tags["mlflow.note.content"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_sample": 3}, "unknown key 'num_sample' in config; did you mean 'num_samples'"),
        ({"pass_at": [1, 5]}, "pass_at 5 needs as many samples a task, num_samples is 2"),
        ({"temperatures": [-1.0]}, "temperatures must be different numbers >= 0"),
        ({"temperatures": 0.8}, "temperatures must be different numbers >= 0, in a list, got 0.8"),
        ({"temperatures": [0.8, 0.8]}, "temperatures must be different numbers"),
        ({"pass_at": 1}, "pass_at must be different whole numbers >= 1, in a list, got 1"),
        ({"pass_at": [1.5]}, "pass_at must be different whole numbers"),
        ({"fixed_temperature": 0.3}, "fixed_temperature 0.3 is not among temperatures"),
        ({"fixed_temperature": None}, "set fixed_temperature"),
        ({"num_drafts": 5}, "num_drafts must be a whole number between 0 and the model's extra heads"),
        ({"tokenizer": None}, "or samples=FILE"),
        ({"kv_memory": -1}, "kv_memory must be a number of bytes >= 1 or a size such as 20GB, got -1"),
        ({"kv_memory": "much"}, "kv_memory must be a number of bytes >= 1 or a size such as 20GB, got 'much'"),
        ({"kv_memory": "100KB"}, "the prompt of task packaged/1 has "),
        ({"top_p": 0.0}, "top_p must be a number > 0"),
        ({"model__max_seq_len": 64}, "leaves no room for an answer in model.max_seq_len 64"),
        ({"model__vocab_size": 100}, "the tokenizer has 259 ids, the model 100"),
        ({"checkpoint": "no/such/model"}, "no/such/model"),
        ({"tokenizer": {"_component_": "wmtp.pretrained.hf_tokenizer", "path": "."}}, "tokenizer.json"),
        ({"limits__cpu_seconds": -1.0}, "cpu_seconds"),
        ({"resume": True}, "holds no evaluation to go on with; set resume=false or auto"),
        ({"protocol___component_": "wmtp.eval.alphacode_protocol"}, "for programs that read stdin"),
        ({"samples": "no/such/file.jsonl", "tasks": {"_component_": "no.such"}}, "samples=no/such/file.jsonl does not"),
        ({"sanitize": "on"}, "sanitize must be one of auto, off"),
        ({"tasks__only": "some"}, "tasks.only must be one of all, with_samples, got 'some'"),
        ({"tasks__only": "with_samples"}, "tasks.only=with_samples needs samples=FILE"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_no_trace(tiny_config, overrides, message):
    cfg = tiny_config("eval_mbpp", **overrides)
    with pytest.raises((ValueError, OSError)) as error:
        run_here(cfg)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(cfg.output_dir).exists()


@pytest.mark.parametrize("pairs", [[1, 4], 4, [[1, 2, 3]]])
def test_n_at_k_must_be_pairs(tiny_config, pairs):
    with pytest.raises(ValueError, match=r"n_at_k must be a list of pairs \[n, k\]"):
        run_here(tiny_config("eval_codecontests", n_at_k=pairs), "eval_codecontests")


def test_a_given_sample_that_was_kept_but_not_judged_is_judged_once(tiny_config, gold):
    cfg = tiny_config("eval_mbpp", samples=gold("eval_mbpp"), temperatures=[0.0], fixed_temperature=None)
    results = run_here(cfg)
    (journal,) = Path(cfg.output_dir).glob("journals/*.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lost = [line for line in lines if "judged" in line][-3:]  # as if killed before these verdicts
    write_jsonl(journal, [line for line in lines if line not in lost])
    cfg.resume = True
    assert run_here(cfg)["verdicts"] == results["verdicts"]
    judged = [line["judged"] for line in map(json.loads, journal.read_text().splitlines()) if "judged" in line]
    assert len(judged) == 16 and sorted(judged) == sorted(line["judged"] for line in lines if "judged" in line)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            '{"task_id": "packaged/1", "solution": "a"}\n{"task_id": "packaged/1", \n',
            r"samples.jsonl:2: malformed JSON",
        ),
        ('{"task_id": "packaged/99", "solution": "a"}\n', r"samples.jsonl:1.*packaged/99"),
        ('{"task_id": "packaged/1"}\n', r"samples.jsonl:1: needs a solution .* or a completion"),
        ('{"task_id": "packaged/1", "solution": "a"}\n', r"no sample for 7 of 8 tasks, .*tasks.only=with"),
    ],
)
def test_bad_samples_are_named_by_file_and_line(tiny_config, tmp_path, rows, message):
    path = tmp_path / "samples.jsonl"
    path.write_text(rows)
    cfg = tiny_config("eval_mbpp", samples=str(path))
    with pytest.raises(ValueError, match=message):
        run_here(cfg)
    assert not Path(cfg.output_dir).exists()


def test_bad_tasks_are_named_by_file_and_line(tiny_config, tmp_path):
    row = {"task_id": 11, "text": "t", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}
    for rows, message in (
        ([row | {"test_list": []}], r"tasks.jsonl:1.*test_list"),
        ([row, row], r"tasks.jsonl:2: task_id 'Mbpp/11' is also that of .*tasks.jsonl:1"),
    ):
        source = write_jsonl(tmp_path / "tasks.jsonl", rows)
        cfg = tiny_config("eval_mbpp", tasks={"_component_": "wmtp.eval.mbpp_tasks", "source": source, "split": "test"})
        with pytest.raises(ValueError, match=message):
            run_here(cfg)


def test_an_evaluation_is_never_overwritten_unless_told(tiny_config, gold):
    cfg = tiny_config("eval_mbpp", samples=gold("eval_mbpp"), temperatures=[0.0], fixed_temperature=None)
    run_here(cfg)
    before = {p: p.read_bytes() for p in Path(cfg.output_dir).rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="already holds an evaluation; set resume=true"):
        run_here(cfg)
    assert {p: p.read_bytes() for p in Path(cfg.output_dir).rglob("*") if p.is_file()} == before
    cfg.overwrite = True
    cfg.tracking = {"_component_": "wmtp.tracking.MLflowLogger", "experiment": "e", "tracking_uri": "nowhere://x"}
    with pytest.raises(ValueError, match="tracking_uri"):
        run_here(cfg)
    assert {p: p.read_bytes() for p in Path(cfg.output_dir).rglob("*") if p.is_file()} == before
    cfg.tracking, cfg.name = None, "replaced"
    run_here(cfg)
    assert (Path(cfg.output_dir) / "report.md").read_text().startswith("# replaced")


def test_what_speed_cannot_be_measured_with_is_refused_before_the_evaluation(tiny_config, tmp_path):
    from recipes.eval_heads import EvalHeadsRecipe

    text = tmp_path / "text.jsonl"
    write_jsonl(text, [{"prompt": "", "completion": "def f(x):\n    return x\n" * 9}])
    plain = {"_component_": "wmtp.data.prompt_completion", "source": str(text)}
    for overrides, message in (
        ({"max_new_tokens": 4096}, "max_new_tokens 4096 leaves no room for a prompt in model.max_seq_len 4096; lower"),
        ({"dataset": plain}, "no document of dataset has a prompt to measure speed with; set speed_prompts=0"),
        ({"kv_memory": 1000}, "keys and values, and kv_memory is 1e-06 GB; raise it, lower max_new_tokens"),
    ):
        cfg = tiny_config("eval_heads")
        cfg.update(overrides)
        with pytest.raises(ValueError, match=message):
            EvalHeadsRecipe(cfg).setup()
        assert not Path(cfg.output_dir).exists()


def test_eval_heads_gives_each_heads_figures_beside_the_baselines(tiny_config):
    from recipes.eval_heads import EvalHeadsRecipe

    recipe = EvalHeadsRecipe(tiny_config("eval_heads"))
    recipe.setup()
    quality, speed = recipe.evaluate(), recipe.measure_speed()
    recipe.report(quality, speed)
    heads, bound = quality["heads"], quality["teacher_forced"]
    assert heads["ce_head1"] == pytest.approx(bound["ce_head1"]) and heads["accuracy_head1"] == bound["accuracy_head1"]
    assert heads["ce_head2"] != pytest.approx(bound["ce_head2"])  # an untrained head 2 is not head 1 one token later
    assert bound["ce_head2"] == pytest.approx(
        bound["ce_head1"], abs=0.02
    )  # the same predictions, but for a few targets
    assert speed["plain"]["tokens_per_forward"] == 1.0 and speed["plain"]["speedup"] == 1.0
    assert speed["drafts_1"]["same_text_share"] == 1.0 and speed["drafts_1"]["tokens_per_forward"] >= 1.0
    written = json.loads((recipe._output_dir / "heads.json").read_text())
    assert written["heads"] == heads and written["settings"]["data_sha256"] == recipe._data.fingerprint


def test_heads_that_a_checkpoint_lacks_are_told_beside_their_figures(tiny_config, tmp_path, capfd):
    from recipes.eval_heads import EvalHeadsRecipe

    shape = {key: value for key, value in tiny_config("eval_heads").model.items() if key != "_component_"}
    one, folder = llama_mtp(**shape | {"num_future_tokens": 1}), tmp_path / "one"
    export_hf(one, folder, tokenizer_source=byte_tokenizer(), dtype=torch.float32)
    EvalHeadsRecipe(tiny_config("eval_heads", checkpoint=str(folder), model__num_future_tokens=3)).setup()
    assert f"heads 2 to 3 are new, {folder} lacks them: head_init copies" in "".join(capfd.readouterr())


def judge_file(tiny_config, folder, rows, programs, **options):
    """The tiny evaluation of samples, on tasks of a file."""
    cfg = tiny_config("eval_mbpp", samples=write_jsonl(folder / "samples.jsonl", programs), pass_at=[1], **options)
    cfg.tasks = {"_component_": "wmtp.eval.assertion_tasks", "source": write_jsonl(folder / "tasks.jsonl", rows)}
    cfg.model = cfg.tokenizer = cfg.protocol = cfg.fixed_temperature = None
    return cfg


def test_tests_that_the_judge_cannot_express_are_refused_or_flagged_everywhere(tiny_config, tmp_path):
    row = {"text": "t", "code": "def f(x): return x", "test_list": ["assert f(1) == 1"]}
    rows = [row | {"task_id": "a"}, row | {"task_id": "b", "test_list": ["assert f.__code__.co_varnames == ('x',)"]}]
    programs = [{"task_id": name, "solution": f"def f({x}): return {x}"} for name in "ab" for x in "xy"]
    cfg = judge_file(tiny_config, tmp_path, rows, programs)
    with pytest.raises(ValueError, match=r"1 of 2 tasks cannot be judged \(b: .*set tests=inside .*exclude=\[b\]"):
        run_here(cfg)
    assert not Path(cfg.output_dir).exists()
    cfg.tests = "inside"
    results = run_here(cfg)
    assert results["judged_inside"] == {"tasks": 1, "task_ids": ["b"], "verdicts": {"passed": 1, "wrong_answer": 1}}
    (table,) = results["temperatures"].values()
    assert table["metrics"]["pass_at_1"]["estimate"] == 0.75
    assert table["protected_metrics"]["pass_at_1"]["estimate"] == 1.0
    samples = [json.loads(line) for line in files(cfg.output_dir)["samples.jsonl"].splitlines()]
    assert [(s["task_id"], s["verdict"], s["judged"]) for s in samples] == [
        ("a", "passed", "protected"), ("a", "passed", "protected"),
        ("b", "passed", "inside"), ("b", "wrong_answer", "inside"),
    ]  # fmt: skip
    assert "CAUTION: 1 of 2 tasks are judged inside" in (Path(cfg.output_dir) / "report.md").read_text()
    # A run that judged other tasks inside is not continued.
    (journal,) = Path(cfg.output_dir).glob("journals/*.jsonl")
    journal.write_text(journal.read_text().replace('"judged_inside": ["b"]', '"judged_inside": ["a"]'))
    cfg.resume = True
    with pytest.raises(
        ValueError, match=r"of an evaluation with other settings: judged_inside \['a'\] -> \['b'\]; use"
    ):
        run_here(cfg)


def test_mbpp_plus_finds_the_program_that_recites_the_tests_shown(tiny_config, tmp_path):
    tests = [f"assert double({x}) == {2 * x}" for x in (1, 2, 3)]
    plus = "inputs = [[1], [50], [-7]]\nfor inp, exp in zip(inputs, [2, 100, -14]):\n    assert double(*inp) == exp\n"
    code = "def double(x): return 2 * x"
    row = {"task_id": 11, "prompt": "Double it.", "code": code, "test_list": tests, "test": plus, "test_imports": []}
    cheat = "def double(x): return {1: 2, 2: 4, 3: 6}.get(x)"
    wrong = "def double(x): return x"
    programs = [{"task_id": 11, "solution": text} for text in (code, cheat, wrong, cheat)]
    (table,) = run_here(judge_file(tiny_config, tmp_path, [row], programs))["temperatures"].values()
    figures = {name: figure["estimate"] for name, figure in table["metrics"].items()}
    assert figures == pytest.approx({"pass_at_1": 0.25, "base_pass_at_1": 0.75})


def test_a_solutions_own_time_sets_the_limit_once_for_all_runs(tiny_config, tmp_path):
    """As EvalPlus has it: a program may take some times as long as the task's own, which is measured once."""
    spin = "import time\ndef f(x):\n end = time.process_time() + {}\n while time.process_time() < end: pass\n return x"
    rows = [
        {"task_id": 1, "text": "quick", "code": "def f(x): return x", "test_list": ["assert f(1) == 1"]},
        {"task_id": 2, "text": "slow", "code": spin.format(0.3), "test_list": ["assert f(1) == 1"]},
    ]
    programs = [{"task_id": number, "solution": spin.format(0.8)} for number in (1, 2)]
    cfg = judge_file(tiny_config, tmp_path, rows, programs, gt_time_limit_factor=4, min_time_limit=0.4)
    results = run_here(cfg)
    assert results["verdicts"] == {"passed": 1, "timeout": 1}
    gold = results["settings"]["gold_seconds"]
    assert gold["Mbpp/1"] < 0.1 and 0.3 <= gold["Mbpp/2"] < 0.6
    quick, slow = map(json.loads, (Path(cfg.output_dir) / "tasks.jsonl").read_text().splitlines())
    assert (quick["task_id"], quick["n"], quick["correct"], quick["judged"]) == ("Mbpp/1", 1, 0, "protected")
    assert quick["limit_seconds"] == 0.4 and slow["limit_seconds"] == 4 * gold["Mbpp/2"] == 4 * slow["gold_seconds"]
    assert [row["samples"][0]["verdict"] for row in (quick, slow)] == ["timeout", "passed"]
    assert slow["samples"][0]["sample"] == 0 and 0.8 <= slow["samples"][0]["cpu_seconds"] < 1.2
    before = files(cfg.output_dir)
    cfg.resume = True  # whose own measurement does not count
    run_here(cfg)
    assert files(cfg.output_dir) == before
    cfg.min_time_limit = 0.5
    with pytest.raises(ValueError, match=r"of an evaluation with other settings: min_time_limit 0.4 -> 0.5; use"):
        run_here(cfg)


def test_livecodebench_outputs_are_judged_and_its_problems_have_no_time_of_their_own(tiny_config, tmp_path):
    cases = lambda kind, *pairs: json.dumps([{"input": a, "output": b, "testtype": kind} for a, b in pairs])
    problem = {"question_content": "?", "starter_code": "", "metadata": "{}", "private_test_cases": "[]"}
    rows = [
        {**problem, "question_id": "1873_A", "public_test_cases": cases("stdin", ("2\n", "4\n"))},
        {
            **problem,
            "question_id": "2777",
            "starter_code": "class Solution:\n    def twice(self, x: int) -> int:\n        ",
            "metadata": '{"func_name": "twice"}',
            "public_test_cases": cases("functional", ("2", "4"), ("3", "6")),
        },
    ]
    outputs = [
        {"question_id": "2777", "code_list": ["class Solution:\n  def twice(self, x): return 2 * x", "x"]},
        {"question_id": "1873_A", "code_list": ["print(2 * int(input()))", "print(4.0)"]},
    ]
    cfg = judge_file(tiny_config, tmp_path, rows, outputs)
    cfg.tasks._component_ = "wmtp.eval.live_code_bench"
    results = run_here(cfg)
    assert results["verdicts"] == {"passed": 3, "exception": 1} and results["judged_inside"]["tasks"] == 0
    assert list(results["temperatures"]["unknown"]["metrics"]) == ["pass_at_1"]
    cfg.gt_time_limit_factor, cfg.overwrite = 4, True
    with pytest.raises(ValueError, match=r"gt_time_limit_factor is 4.0, but task 1873_A has no solution whose"):
        run_here(cfg)
