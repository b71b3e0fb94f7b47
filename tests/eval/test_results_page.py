"""Results and report: right counts, harness errors never held against the model, same bytes, and a page that holds."""

import json
import random
from dataclasses import replace
from itertools import combinations

import pytest
from markdown_it import MarkdownIt

from wmtp.eval import AssertionTask, StdioTask
from wmtp.eval.journal import Journal, read_journals
from wmtp.eval.results import check_samples, compare_results, evaluation_results
from wmtp.eval.results_page import headline, logged, results_page, write_results
from wmtp.eval.samples import Judgement, Sample
from wmtp.sandbox import StdioTest

TASKS = [AssertionTask(f"Mbpp/{i}", "", "", None, "", "", "", ("assert f()",)) for i in (2, 11, 100)]
PASSED, WRONG = Judgement("passed"), Judgement("wrong_answer", "test 1: AssertionError")


def judged(verdicts: dict[str, str], temperature: float = 0.2, **fields):
    """Samples and judgements; `verdicts` maps a task's number to letters, one a sample: p(assed) w(rong) h(arness)."""
    meaning = {"p": PASSED, "w": WRONG, "h": Judgement("harness_error", "worker died"), "t": Judgement("timeout")}
    samples, judgements = [], {}
    for number, letters in verdicts.items():
        for n, letter in enumerate(letters):
            sample = Sample(f"Mbpp/{number}", n, temperature, f"program {n}", f"completion {n}", "eos", **fields)
            samples.append(sample)
            judgements[sample.key] = meaning[letter]
    return samples, judgements


def test_scores_are_means_over_tasks_of_the_unbiased_estimate():
    samples, judgements = judged({"2": "pwww", "11": "pptt", "100": "wwww"})
    results = evaluation_results(TASKS, samples, judgements, ks=(1, 2))
    metrics = results["temperatures"]["0.2"]["metrics"]
    assert metrics["pass_at_1"]["estimate"] == pytest.approx((1 / 4 + 2 / 4 + 0) / 3)
    # The share of pairs of samples with a right one, counted by hand: 3 of 6, 5 of 6, 0 of 6.
    assert metrics["pass_at_2"]["estimate"] == pytest.approx((3 / 6 + 5 / 6 + 0) / 3)
    assert metrics["pass_at_1"]["low"] < metrics["pass_at_1"]["estimate"] < metrics["pass_at_1"]["high"]
    assert results["verdicts"] == {"passed": 3, "wrong_answer": 7, "timeout": 2}
    assert results["temperatures"]["0.2"]["per_task"][1] == {
        "task_id": "Mbpp/11", "n": 4, "correct": 2, "verdicts": {"passed": 2, "timeout": 2},
    }  # fmt: skip
    assert results["excluded_harness_errors"] == 0 and "WARNING" not in results_page(
        results, TASKS, samples, judgements
    )


def test_a_harness_error_counts_neither_for_nor_against_the_model_and_is_said_aloud():
    samples, judgements = judged({"2": "ph", "11": "wp", "100": "hh"})
    results = evaluation_results(TASKS, samples, judgements, ks=(1, 2))
    metrics = results["temperatures"]["0.2"]["metrics"]
    assert metrics["pass_at_1"]["estimate"] == pytest.approx((1 + 1 / 2) / 2) and metrics["pass_at_1"]["tasks"] == 2
    assert metrics["pass_at_2"]["estimate"] == 1 and metrics["pass_at_2"]["tasks"] == 1
    assert results["excluded_harness_errors"] == 3
    page = results_page(results, TASKS, samples, judgements)
    assert "WARNING: 3 of 6 samples are excluded: the judge itself failed on them" in page
    assert "WARNING: pass@1 at temperature 0.2 leaves out 1 of 3 tasks" in page
    assert "WARNING: pass@2 at temperature 0.2 leaves out 2 of 3 tasks" in page
    with pytest.raises(ValueError, match="pass_at_2: no task has 2 samples that the judge could judge"):
        evaluation_results(TASKS, *judged({"2": "ph", "11": "hp", "100": "hh"}), ks=(2,))


def test_the_oracle_is_labelled_and_the_headline_is_the_fixed_temperature():
    samples, judgements = judged({"2": "pw", "11": "ww", "100": "ww"}, 0.2)
    hot, hot_judgements = judged({"2": "pp", "11": "wp", "100": "ww"}, 0.8)
    samples, judgements = samples + hot, judgements | hot_judgements
    results = evaluation_results(TASKS, samples, judgements, ks=(1,), fixed_temperature=0.2)
    assert list(results["temperatures"]) == ["0.2", "0.8"] and results["fixed_temperature"] == "0.2"
    best = results["oracle"]["metrics"]["pass_at_1"]
    assert (best["temperature"], best["estimate"]) == ("0.8", pytest.approx(0.5))
    assert "chosen on the test score itself" in results["oracle"]["note"]
    page = results_page(results, TASKS, samples, judgements)
    assert "**pass@1 = 16.7 % (95 % interval 0.0 to 50.0), 3 tasks, 2 samples a task, temperature 0.2**" in page
    fixed, oracle = headline(results)
    assert f"**{fixed}**" in page and "50.0 % at the oracle temperature 0.8 (chosen on the test score itself" in oracle
    assert "| oracle* | 50.0 " in page and "chosen on the test score itself: optimistic" in page
    with pytest.raises(ValueError, match=r"fixed_temperature is null, but the samples have several .* of 0.2, 0.8$"):
        evaluation_results(TASKS, samples, judgements)
    with pytest.raises(
        ValueError, match=r"fixed_temperature is 0.5, but no sample has that temperature; set it to one of 0.2, 0.8$"
    ):
        check_samples(TASKS, samples, fixed_temperature=0.5)  # before anything is judged
    assert check_samples(TASKS, hot) == 0.8
    unknown = [replace(sample, temperature=None) for sample in hot]
    with pytest.raises(ValueError, match=r"is 0.8, but the samples do not say their temperature; set it to null"):
        check_samples(TASKS, unknown, fixed_temperature=0.8)


def test_stdio_figures_n_at_k_and_the_lenient_rule():
    stdio = [StdioTask(task.task_id, "", (), (StdioTest("", ""),), ()) for task in TASKS]
    samples, judgements = judged({"2": "pwwp", "11": "wwww", "100": "wwww"})
    for sample in samples:
        right = judgements[sample.key].verdict == "passed"
        # Task 2: both right samples and the first wrong one pass the public tests; task 11 is right leniently, once.
        public = right or (sample.task_id, sample.sample) == ("Mbpp/2", 1)
        lenient = right or (sample.task_id, sample.sample) == ("Mbpp/11", 0)
        judgements[sample.key] = replace(judgements[sample.key], passes_public=public, passes_lenient=lenient)
    results = evaluation_results(stdio, samples, judgements, ks=(1,), n_at_ks=((1, 2),))
    metrics = results["temperatures"]["0.2"]["metrics"]
    # Task 2, all pairs of its samples R W_public W R: one submission at random from those that pass the public tests.
    public, right = {0, 1, 3}, {0, 3}
    chances = [len(right & set(pair)) / len(public & set(pair)) for pair in combinations(range(4), 2)]
    assert metrics["1_at_2"]["estimate"] == pytest.approx(sum(chances) / 6 / 3)
    assert metrics["lenient_pass_at_1"]["estimate"] == pytest.approx((2 / 4 + 1 / 4) / 3)
    page = results_page(results, stdio, samples, judgements)
    assert "| temperature | pass@1 | 1@2 | lenient pass@1 |" in page
    # One sample whose judging stopped early: the lenient figure would be a guess, and is left out.
    judgements[samples[5].key] = replace(judgements[samples[5].key], passes_lenient=None)
    results = evaluation_results(stdio, samples, judgements, ks=(1,))
    assert list(results["temperatures"]["0.2"]["metrics"]) == ["pass_at_1"] and results["lenient_undecided"] == 1
    assert "judging of 1 samples stopped before" in headline(results)[0]
    with pytest.raises(ValueError, match="which only stdio tasks have"):
        evaluation_results(TASKS, *judged({"2": "p", "11": "p", "100": "w"}), n_at_ks=((1, 1),))


def test_tasks_judged_inside_are_counted_apart_and_said_first():
    samples, judgements = judged({"2": "pw", "11": "pp", "100": "tt"})
    protected = evaluation_results(TASKS, samples, judgements)
    assert protected["judged_inside"] == {"tasks": 0, "task_ids": [], "verdicts": {}}
    assert "protected_metrics" not in protected["temperatures"]["0.2"]
    for key, judgement in judgements.items():
        if key[0] == "Mbpp/11":
            judgements[key] = replace(judgement, judged="inside")
    results = evaluation_results(TASKS, samples, judgements)
    assert results["judged_inside"] == {"tasks": 1, "task_ids": ["Mbpp/11"], "verdicts": {"passed": 2}}
    table = results["temperatures"]["0.2"]
    assert table["metrics"]["pass_at_1"]["estimate"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert table["protected_metrics"]["pass_at_1"]["estimate"] == pytest.approx((1 / 2 + 0) / 2)
    caution = (
        "CAUTION: 1 of 3 tasks are judged inside, with their tests in the program's process: a program can fool these. "
        "Without them pass@1 = 25.0 %."
    )
    assert headline(results)[0] == caution
    page = results_page(results, TASKS, samples, judgements)
    assert f"> {caution}" in page and "Of these judged inside: passed 2. Tasks: Mbpp/11." in page
    assert "### passed (judged inside): Mbpp/11" in page and "### passed: Mbpp/2" in page
    assert compare_results(protected, protected).estimate == 0 and headline(protected)[0].startswith("pass@1")
    with pytest.raises(ValueError, match="Mbpp/11 is judged inside in one of the runs and protected in the other"):
        compare_results(results, protected)
    assert compare_results(results, results).estimate == 0
    everything = evaluation_results(TASKS, samples, {k: replace(j, judged="inside") for k, j in judgements.items()})
    assert headline(everything)[0].endswith("There are no others.")


def test_what_keeps_two_evaluations_from_being_compared_is_in_what_is_logged():
    samples, judgements = judged({"2": "pw", "11": "pp", "100": "tt"})
    metrics, tags = logged(evaluation_results(TASKS, samples, judgements), "mbpp")
    assert metrics["eval/mbpp/tasks"] == metrics["eval/mbpp/of_tasks"] == 3 and metrics["eval/mbpp/samples"] == 6
    assert tags == {"wmtp.evaluated_tasks": "all", "wmtp.judged_inside": "0 of 3 tasks"}
    judgements = {key: replace(j, judged="inside") if key[0] == "Mbpp/11" else j for key, j in judgements.items()}
    metrics, tags = logged(evaluation_results(TASKS, samples, judgements, of_tasks=500), "mbpp")
    assert (metrics["eval/mbpp/tasks"], metrics["eval/mbpp/of_tasks"]) == (3, 500)
    assert metrics["eval/mbpp/tasks_judged_inside"] == 1 and metrics["eval/mbpp/protected_pass_at_1"] == 0.25
    assert metrics["eval/mbpp/pass_at_1_low"] <= metrics["eval/mbpp/pass_at_1"] == 0.5
    assert tags == {"wmtp.evaluated_tasks": "3 of 500", "wmtp.judged_inside": "1 of 3 tasks"}


def test_answers_that_end_early_or_define_another_name_are_said():
    tasks = [replace(task, entry_point="f") for task in TASKS]
    texts = ["def f():\n    return (", "def f():\n    return 2\ndef g():\n    return (", "def my_f(): pass"]
    samples = [Sample(task.task_id, 0, None, text) for task, text in zip(tasks, texts, strict=True)]
    judgements = {sample.key: WRONG for sample in samples}
    results = evaluation_results(tasks, samples, judgements, settings={"samples": "s.jsonl", "sanitize": "auto"})
    first = {"task_id": "Mbpp/100", "sample": 0, "asked": "f", "defined": ["my_f"]}
    assert results["unfinished"] == {"cut_off": 1, "undefined": {"samples": 1, "first": first}}
    cut, undefined = headline(results)[:2]
    assert cut.startswith("WARNING: 1 of 3 samples (33.3 %) fail and end in the middle: raise max_new_tokens")
    assert "(task Mbpp/100: f, sample 0 defines my_f): ask for the name in the prompt, or try sanitize=off" in undefined
    passed = evaluation_results(tasks, samples, {sample.key: PASSED for sample in samples})
    assert "unfinished" not in passed
    by_limit = [replace(samples[0], solution="def f(): pass", finish_reason="length"), *samples[1:]]
    assert evaluation_results(tasks, by_limit, judgements)["unfinished"]["cut_off"] == 1
    by_itself = [replace(samples[0], finish_reason="eos"), *samples[1:]]
    assert "cut_off" not in evaluation_results(tasks, by_itself, judgements)["unfinished"]


def test_base_tests_are_reported_beside_base_and_plus():
    samples, judgements = judged({"2": "pw", "11": "pp", "100": "tt"})
    for n, sample in enumerate(samples):  # every program passes the base tests, save the last
        judgements[sample.key] = replace(judgements[sample.key], passes_base=n < 5)
    results = evaluation_results(TASKS, samples, judgements, ks=(1, 2))
    metrics = results["temperatures"]["0.2"]["metrics"]
    assert list(metrics) == ["pass_at_1", "pass_at_2", "base_pass_at_1", "base_pass_at_2"]
    assert metrics["pass_at_1"]["estimate"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert metrics["base_pass_at_1"]["estimate"] == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert headline(results)[2].startswith("base pass@1 = 83.3 %")
    assert "Base: the dataset's own tests alone" in results_page(results, TASKS, samples, judgements)


def test_failure_classes_and_tokens():
    samples, judgements = judged({"2": "pp", "11": "ww", "100": "ww"}, tokens=30, forwards=10)
    samples[-1] = replace(samples[-1], finish_reason="length", tokens=40)
    for sample, detail in zip(samples[3:], ["test 0: NameError: x", "SyntaxError: '(' was never", "odd"], strict=True):
        judgements[sample.key] = Judgement("exception", detail)
    results = evaluation_results(TASKS, samples, judgements)
    assert results["exceptions"] == {"NameError": 1, "SyntaxError": 1, "other": 1}
    assert results["cut_at_max_tokens"] == {"exception": 1}
    assert results["tokens"] == {"total": 190, "per_sample": 190 / 6, "forwards": 60, "per_forward": 190 / 60}
    page = results_page(results, TASKS, samples, judgements)
    assert "| exception | 3 | 50.0 % | 1 |" in page and "Tokens a forward pass: 3.167" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, j: (s[:-2], j), "no sample at temperature 0.2 for 1 of 3 tasks, the first is Mbpp/100"),
        (lambda s, j: (s, {k: v for k, v in j.items() if k != s[0].key}), "sample 0 of task Mbpp/2 was not judged"),
        (lambda s, j: ([*s, replace(s[0], task_id="Mbpp/3")], j), "a sample is of task Mbpp/3, which is none of the 3"),
        (
            lambda s, j: (s[:-1], j),
            "need k samples of every task, got k = 2; task Mbpp/100 has 1 at temp",
        ),
        (lambda s, j: (s, j | {s[0].key: Judgement("great")}), "verdict 'great' is none of passed, wrong_answer"),
        (lambda s, j: ([], j), "nothing to report: 3 tasks, 0 samples"),
    ],
)
def test_incomplete_evaluations_are_refused(change, message):
    samples, judgements = change(*judged({"2": "pp", "11": "ww", "100": "ww"}))
    with pytest.raises(ValueError, match=message):
        evaluation_results(TASKS, samples, judgements, ks=(2,))


def test_a_killed_and_resumed_run_gives_the_same_bytes(tmp_path):
    samples, judgements = judged({"2": "pwh", "11": "pww", "100": "www"}, tokens=3)
    hot, hot_judgements = judged({"2": "www", "11": "pwp", "100": "wpw"}, 0.8, tokens=3)
    samples, judgements = samples + hot, judgements | hot_judgements
    settings = {"model": "m"}

    def report(folder, found, timings):
        samples = list(found.samples.values())
        sandbox = {"layers": ["seccomp"], "missing": []}
        options = {"fixed_temperature": 0.2, "settings": settings, "sandbox": sandbox}
        results = evaluation_results(TASKS, samples, found.judgements, ks=(1, 2), **options)
        prompts = {"Mbpp/2": "prompt"}
        page = results_page(results, TASKS, samples, found.judgements, prompts=prompts, timings=timings)
        write_results(folder, results, page, timings)
        return [(folder / name).read_bytes() for name in ("results.json", "report.md")]

    with Journal(tmp_path / "whole", 0, settings) as journal:
        for sample in samples:
            journal.add_sample(sample)
            journal.add_judgement(sample, judgements[sample.key])
    whole = report(tmp_path / "a", read_journals(tmp_path / "whole", settings), {"seconds": 10.0})
    order = random.Random(1).sample(samples, len(samples))
    for rank, part in ((2, order[:6]), (0, order[6:])):
        with Journal(tmp_path / "cut", rank, settings) as journal:
            for sample in part:
                journal.add_sample(sample)
    with (tmp_path / "cut" / "journal-00000.jsonl").open("ab") as file:
        file.write(b'{"sample": {"task')  # killed here
    with Journal(tmp_path / "cut", 0, settings) as journal:
        for sample in order:
            journal.add_judgement(sample, judgements[sample.key])
    resumed = report(tmp_path / "b", read_journals(tmp_path / "cut", settings), {"seconds": 25.0})
    assert whole[0] == resumed[0]
    assert whole[1].split(b"## Timings")[0] == resumed[1].split(b"## Timings")[0]
    assert json.loads((tmp_path / "b" / "timings.json").read_text()) == {"seconds": 25.0}
    assert json.loads(whole[0])["settings"] == settings


def fences(page: str) -> list[str]:
    """The code blocks of a page as a CommonMark parser sees them."""
    return [token.content for token in MarkdownIt().parse(page) if token.type == "fence"]


HOSTILE = [
    "# not a heading\n```\n## nor this\n```\n",
    "````\n`````` \n~~~\n</code></pre>",
    "```python\nx\n",
    "\x1b[2J\x1b]0;title\x07 wiped\r\nsecond\rthird \u2028 \u202e \ud800",
    "`" * 40,
    "\n\n   \n",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_model_text_stays_inside_its_block(text):
    samples, judgements = judged({"2": "w", "11": "p", "100": "p"})
    samples[0] = replace(samples[0], completion=text)
    judgements[samples[0].key] = Judgement("exception", text.replace("\n", " ") or "detail")
    page = results_page(
        evaluation_results(TASKS, samples, judgements), TASKS, samples, judgements, prompts={"Mbpp/2": text}
    )
    page.replace("\ud800", "").encode()  # what is left of a lone surrogate is its escape
    assert "\ud800" not in page and not any(c < " " and c != "\n" for c in page)
    blocks = fences(page)
    assert len(blocks) == 6  # detail, prompt, completion; two passed completions; settings
    visible = [line for line in text.splitlines() if line.isprintable() and line.strip()]
    assert all(line in blocks[2] for line in visible)
    headings = [t.content for t in MarkdownIt().parse(page) if t.type == "inline" and "not" in t.content.lower()]
    assert not any("not a heading" in heading for heading in headings)


def test_long_text_is_cut_and_says_so():
    samples, judgements = judged({"2": "w", "11": "p", "100": "p"})
    samples[0] = replace(samples[0], completion="a" * 10_000)
    results = evaluation_results(TASKS, samples, judgements)
    page = results_page(results, TASKS, samples, judgements, prompts={"Mbpp/2": "b" * 5000 + "END"})
    assert "[... 8500 characters left out ...]" in page and "[... 4403 characters left out ...]\nbbb" in page
    assert "bbbEND\n" in page and len(page) < 8000


def test_protections_are_listed_and_missing_ones_are_said_at_the_top():
    samples, judgements = judged({"2": "w", "11": "p", "100": "p"})
    sandbox = {"layers": ("seccomp", "rlimits"), "missing": ("landlock: the kernel has none",)}
    results = evaluation_results(TASKS, samples, judgements, sandbox=sandbox)
    page = results_page(
        results, TASKS, samples, judgements, title="MBPP of a|b", timings={"tokens per second": 12.3456}
    )
    assert page.startswith("# MBPP of a\\|b\n\n> Protections not in use: landlock: the kernel has none.")
    assert "In use: seccomp; rlimits." in page and '"tokens per second": 12.3456' in page
    assert "Not recorded." in results_page(evaluation_results(TASKS, samples, judgements), TASKS, samples, judgements)


def test_two_runs_are_compared_task_by_task():
    ours = evaluation_results(TASKS, *judged({"2": "pp", "11": "pw", "100": "ww"}))
    theirs = evaluation_results(list(reversed(TASKS)), *judged({"2": "pw", "11": "pw", "100": "ww"}))
    ours, theirs = json.loads(json.dumps([ours, theirs]))
    difference = compare_results(ours, theirs)
    assert difference.estimate == pytest.approx(0.5 / 3) and difference.low == 0 < difference.high
    assert compare_results(ours, theirs, k=2).estimate == 0
    fewer = evaluation_results(TASKS[:2], *judged({"2": "pp", "11": "pw"}))
    with pytest.raises(ValueError, match="have 3 and 2: task Mbpp/100 is in one of them only"):
        compare_results(ours, fewer)
