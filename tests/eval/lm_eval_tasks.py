"""Run lm-eval on local tasks of all kinds, by its own `hf` model and by ours; print what each answered, as JSON.

Runs in a process that has the harness on its path: argv is an exported folder and a folder to write to.
"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

import wmtp.eval.lm_eval_model  # noqa: F401  # registers `wmtp`

DOCS = [
    {"q": "def f(x):", "choices": [" return x", "\n  pass "], "label": 0},
    {"q": "a trailing space ", "choices": ["c", " d"], "label": 1},
    {"q": "", "choices": ["no context", "if"], "label": 1},
    {"q": "longer than the context " * 6, "choices": ["c", " d" * 20], "label": 1},
    *({"q": q, "choices": [chr(i) for i in range(32, 127)], "label": 0} for q in (*"abcdefghijkl", "<bos>c")),
]
TASK = """task: {name}
output_type: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
target_delimiter: ''
{rest}
"""
TASKS = {
    "multiple_choice": "doc_to_text: '{{q}}'\ndoc_to_choice: choices\ndoc_to_target: label\n"
    "metric_list: [{metric: acc}]",
    "loglikelihood_rolling": "doc_to_text: ''\ndoc_to_target: '{{q}}{{choices[0]}}'\n"
    "metric_list: [{metric: bits_per_byte}]",
    "generate_until": "doc_to_text: '{{q}}x'\ndoc_to_target: x\nmetric_list: [{metric: exact_match}]\n"
    "generation_kwargs: {until: ['\\n', 'q'], max_gen_toks: 24, do_sample: false}",
}
MODELS = {
    "hf": ("hf", {"dtype": "float32", "device": "cpu"}),
    "wmtp": ("wmtp", {"device": "cpu", "batch_size": 3}),
    "heads": ("wmtp", {"device": "cpu", "num_drafts": 2}),
}


def main(export: str, folder: Path) -> None:
    docs = folder / "docs.jsonl"
    docs.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for kind, rest in TASKS.items():
        (folder / f"{kind}.yaml").write_text(TASK.format(name=f"local_{kind}", kind=kind, docs=docs, rest=rest))
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    answers = {}
    for name, (model, arguments) in MODELS.items():
        found = lm_eval.simple_evaluate(
            model, {"pretrained": export, **arguments}, [f"local_{kind}" for kind in TASKS],
            task_manager=tasks, log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
        answers[name] = {kind: [sample["resps"] for sample in found["samples"][f"local_{kind}"]] for kind in TASKS}
        answers[name]["config"] = {key: str(value) for key, value in found["config"].items()}
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
