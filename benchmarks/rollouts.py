"""Do values from rollouts know where a program is wrong, and does a model learn better by them?

    python benchmarks/rollouts.py [--out runs/rollouts] [--tasks 160] [--seeds 5] [--threads 1]
    python benchmarks/rollouts.py --write-docs       # the tables of docs/validity.md from the results

Tiny tasks with tests (benchmarks/validity/tiny_tasks.py), a small model trained on programs of other such tasks, a few
of whose statements are wrong or in a rare form as people's are, and programs with one planted wrong line.
`recipes/score_rollouts.py` gives the faulty programs their values. Beside it stand critics that stage 1's loss trains
on pairs of right and faulty programs, in folds by task; which of them is used, and how it is read, is chosen inside the
training tasks of each fold. Then the model is fine-tuned on the faulty programs with the weights of each. Every part is
kept under --out, so a killed measurement goes on. One JSON line per figure: name, value, unit, against.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("top-1", "auc", "mean rank")
# The model's training, --steps too, was chosen by its loss and its greedy answers to held-out tasks.
TRAINING, LR = 12_000, 5e-3
TUNING_STEPS, TUNING_LR = 40, 1e-3
SEQ_LEN, FOLDS, REPEATS = 256, 5, 2000
PROMPT = "wmtp.eval.docstring_protocol"
SWAPPED = "pair critic, labels swapped"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "rollouts")
    parser.add_argument("--tasks", type=int, default=160, help="with a planted fault; half as many are held out")
    parser.add_argument("--samples", type=int, default=8, help="completions from each line's end")
    parser.add_argument("--steps", type=int, default=600, help="of the model's own training: fewer make a weaker one")
    parser.add_argument("--mistakes", type=float, default=0.04, help="share of the statements it reads that are wrong")
    parser.add_argument("--seeds", type=int, default=5, help="of the fine-tuning; 0: only where the fault is")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write-docs", action="store_true", help="only write docs/validity.md's tables, from --out")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="of --write-docs: other models' --out")
    args = parser.parse_args()
    if args.seeds < 0 or args.seeds == 1:
        parser.error(f"--seeds must be 0, or >= 2 for an interval, got {args.seeds}")
    if args.write_docs:
        from validity.rollout_tables import write_docs

        return write_docs([args.out, *args.others], ROOT / "docs" / "validity.md")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch
    from validity.rollout_tables import print_figures

    torch.set_num_threads(args.threads)
    args.out = args.out.resolve()
    (args.out / "tuned").mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    study = Study(args)
    result = {name: getattr(args, name) for name in ("tasks", "samples", "seeds", "steps", "mistakes")}
    result |= {"model": study.model_figures(), "faults": study.faults()}
    result |= {"learning": study.learning()} if args.seeds else {}
    result["seconds"] = round(time.perf_counter() - started)  # of this call: parts that were there cost nothing
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    print_figures(result)


class Study:
    """The measurement: tasks and model are made, or read where they were, when it is built."""

    def __init__(self, args) -> None:
        from validity.tiny_model import tiny_tokenizer
        from validity.tiny_tasks import planted, tiny_tasks

        self.args, self.out = args, args.out
        # The tuning set has rare forms as often as planted programs have: what they teach beside the fault is the same.
        tasks = tiny_tasks(2 * args.tasks, seed=1, first_id=1)
        pairs = [(task, pair) for task in tasks if (pair := planted(task, seed=0)) is not None][: args.tasks]
        self.pairs = [pair for _, pair in pairs]
        self.tasks = [task for task, _ in pairs]
        self.held_out = tiny_tasks(args.tasks // 2, seed=2, first_id=100_001)
        seen = {task.text for task in (*self.tasks, *self.held_out)}
        self.training = [task for task in tiny_tasks(TRAINING, seed=3, first_id=200_001) if task.text not in seen]
        for name, rows in (
            ("tasks", [task.row() for task in self.tasks]),
            ("held_out", [task.row() for task in self.held_out]),
            ("pairs", self.pairs),
            ("faulty", [{key: pair[key] for key in ("problem", "incorrect", "fault_line")} for pair in self.pairs]),
        ):
            (self.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.tokenizer = tiny_tokenizer(self.training)
        self.model = self._trained()
        self._scored_by_rollouts()
        self._score_lines()

    # ------------------------------------------------------------------------------------------------------------------
    # The model and its rollouts

    def _trained(self):
        """Returns the small model, trained on programs of tasks that nothing else here uses, few of them wrong."""
        from validity.tiny_model import new_model, train
        from validity.tiny_tasks import written

        from wmtp.models import export_hf, from_checkpoint, load_checkpoint

        folder = self.out / "model"
        if not folder.exists():
            model = new_model(self.tokenizer)
            programs = [(task, written(task, self.args.mistakes, seed=0)) for task in self.training]
            data = self._packed(self._documents(programs, "training"))
            train(model, data, steps=self.args.steps, lr=LR, seed=0, tell=100)
            export_hf(model, folder, tokenizer_source=self.tokenizer)
        model = from_checkpoint(str(folder), max_seq_len=256)
        load_checkpoint(model, folder)
        return model.eval()

    def _scored_by_rollouts(self) -> None:
        """Runs the recipe on the faulty programs."""
        if not (self.out / "values" / "manifest.json").exists():
            model = {"_component_": "wmtp.models.from_checkpoint", "path": str(self.out / "model"), "max_seq_len": 256}
            self._run(
                "score_rollouts", "values",
                checkpoint=str(self.out / "model"), model=model,
                tokenizer={"_component_": "wmtp.pretrained.hf_tokenizer", "path": str(self.out / "model")},
                tasks=self._tasks_section("tasks"),
                programs={
                    "_component_": "wmtp.eval.paired_programs",
                    "source": str(self.out / "faulty.jsonl"),
                },
                num_samples=self.args.samples, temperature=0.8, top_p=1.0, max_new_tokens=80, batch_size=64,
            )  # fmt: skip
        self.lines = [json.loads(line) for line in (self.out / "values" / "lines.jsonl").read_text().splitlines()]

    def _tasks_section(self, name: str) -> dict:
        source = str(self.out / f"{name}.jsonl")
        return {"_component_": "wmtp.eval.assertion_tasks", "source": source, "challenge_tests": True}

    def _run(self, recipe: str, output: str, **settings) -> None:
        from omegaconf import OmegaConf

        common = {"output_dir": str(self.out / output), "resume": "auto", "device": "cpu", "judges": 1}
        common |= {"protocol": {"_component_": PROMPT}, "limits": {"_component_": "wmtp.sandbox.Limits"}}
        file = self.out / f"{output.replace('/', '_')}.yaml"
        OmegaConf.save(OmegaConf.create(common | settings), file)
        command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), "--config", str(file)]
        subprocess.run(command, cwd=self.out, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})

    def model_figures(self) -> dict:
        manifest = json.loads((self.out / "values" / "manifest.json").read_text())
        report = (self.out / "values" / "report.md").read_text()
        tokens, seconds = map(int, re.search(r"sampled: (\d+) tokens in (\d+) s", report).groups())
        prefixes = {(line["program"].split()[0], i) for line in self.lines for i in range(len(line["lines"]))}
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "greedy_pass_rate": float(self._solved(self.model).mean()),
            "prompt_value": mean([line["prompt_value"] for line in self.lines]),
            "never_solved": mean([line["prompt_value"] == 0 for line in self.lines]),
            "completions": len(prefixes) * self.args.samples,
            "new_tokens": tokens,
            "seconds": seconds,
            "documents": manifest["data"]["documents"],
        }

    def _documents(self, programs, name: str, labels=None):
        from wmtp.data import Documents, document_from_text
        from wmtp.data.mbpp_rows import mbpp_prompt

        made = (
            document_from_text(self.tokenizer, mbpp_prompt(task.row()), code, f"{task.task_id} {name}")
            for task, code in programs
        )
        return Documents(name, tuple(made))

    def _packed(self, documents):
        from wmtp.data import pack

        return pack(documents, SEQ_LEN, pad_id=self.tokenizer.pad_id)

    def _solved(self, model, temperature: float = 0.0, samples: int = 1):
        """Returns for each held-out task the share of the model's programs that pass the judge."""
        import numpy as np

        from wmtp.eval import assertion_tasks, docstring_protocol
        from wmtp.generation import Request, Sampling, generate
        from wmtp.sandbox import Sandbox

        tasks, protocol = assertion_tasks(str(self.out / "held_out.jsonl"), challenge_tests=True), docstring_protocol()
        prompts = [tuple(protocol.prompt(task, self.tokenizer)) for task in tasks]
        keys = [(n, k) for n in range(len(tasks)) for k in range(samples)]
        requests = [Request(key, prompts[key[0]], key) for key in keys]
        found = generate(model, self.tokenizer, requests, Sampling(80, temperature, stop=protocol.stop), batch_size=64)
        programs = {done.id: protocol.program(tasks[done.id[0]], done.text) for done in found}
        with Sandbox(workers=1) as sandbox:
            outcomes = sandbox.judge([tasks[n].job(programs[n, k]) for n, k in keys])
        return np.array([outcome.verdict == "passed" for outcome in outcomes]).reshape(len(tasks), samples).mean(1)

    # ------------------------------------------------------------------------------------------------------------------
    # Where is the fault?

    def faults(self) -> dict:
        """Ranks the statements of every faulty program; returns each figure with its interval over programs."""
        import numpy as np
        from validity.statistics import hit_ranks, interval, resamples, weighted_mean

        figures = {}
        for name, of_program in self.scores.items():
            table = []
            for program, score in zip(self.programs, of_program, strict=True):
                top1, _, _, auc = hit_ranks(score, program.fault)
                table.append((top1, auc, 1 + (1 - auc) * (len(score) - 1)))
            figures[name] = np.array(table)
        counts = resamples(np.arange(len(self.lines)), REPEATS, seed=0)
        out = {}
        for name, table in figures.items():
            out[name] = {
                figure: [float(table[:, k].mean()), *interval(weighted_mean(table[:, k], counts))]
                for k, figure in enumerate(FIGURES)
            }
            gap = figures["rollouts"][:, 1] - table[:, 1]
            out[name]["rollouts' auc minus it"] = [float(gap.mean()), *interval(weighted_mean(gap, counts))]
        lines, chosen = mean([len(program.lines) for program in self.programs]), [str(kind) for kind in self.chosen]
        return {"programs": len(self.lines), "lines": lines, "chosen": chosen, "methods": out}

    def _score_lines(self) -> None:
        """Scores every statement by method, higher is more suspicious; keeps the pair critic's values for weights."""
        import numpy as np
        from validity.faults import FaultSettings, baselines, choose, drops, fit, position_prior

        from wmtp.numerics.keyed import text_hash

        self.programs = self._faulty_programs()
        states, data = self._states()
        fold = np.array([text_hash("fold", pair["problem"]) % FOLDS for pair in self.pairs])
        draw, self.scores, self.chosen, self.pair_values = np.random.default_rng(0), {}, [], {}
        settings = FaultSettings(seq_len=SEQ_LEN, max_pairs=None, critics=candidates(), epochs=30)
        for held in range(FOLDS):
            train, test = np.flatnonzero(fold != held), np.flatnonzero(fold == held)
            # Critic and rule of reading: by a fifth of the training tasks, on which that critic was not trained.
            kind, rule, _ = choose(list(settings.critics), settings, states, data, self.programs, train)
            self.chosen.append((kind, rule))
            print(f"# fold {held}: {kind}, rule {rule}", flush=True)
            critics = {"pair critic, chosen": kind, "pair critic, plain": settings.critics[0]}
            critics[SWAPPED] = replace(kind, swapped=1)
            values = {name: fit(critic, settings, states, data, train) for name, critic in critics.items()}
            prior = position_prior([self.programs[n] for n in train])
            for n in test:
                line, program = self.lines[n], self.programs[n]
                # The return is a line too; the def, the first, is none.
                falls = -np.diff([line["prompt_value"], *line["values"]])[1:]
                found = {
                    **{k: v for k, v in baselines(program, states, prior, n).items() if "entropy" not in k},
                    "rollouts": falls,
                    "rollouts, shuffled": draw.permutation(falls),
                }
                for name, value in values.items():
                    read = "end" if name == "pair critic, plain" else rule
                    found[name] = drops(value(n, 1), program, read)
                self.pair_values[n] = values["pair critic, chosen"](n, 1)
                for name, score in found.items():
                    self.scores.setdefault(name, [None] * len(self.lines))[n] = score

    def _faulty_programs(self):
        """Returns the programs' statements; the def is no candidate, so it is not among their lines."""
        import numpy as np
        from validity.faults import FaultyProgram

        from wmtp.critic.localise import line_of_tokens

        programs = []
        for pair in self.pairs:
            text = pair["incorrect"].split("\n")
            lines, of_token = np.arange(2, len(text) + 1), line_of_tokens(self.tokenizer, pair["incorrect"])
            programs.append(FaultyProgram(of_token, lines, tuple(text[1:]), pair["fault_line"] - 2, len(text)))
        return programs

    def _states(self):
        """Returns the model's states of each program's tokens behind its prompt, correct then faulty, and the pairs."""
        import numpy as np
        import torch
        from validity.states import States
        from validity.tiny_model import LAYERS

        from wmtp.critic import encode_pairs
        from wmtp.critic.pair_dataset import Pair, Pairs
        from wmtp.data.mbpp_rows import mbpp_prompt
        from wmtp.loss import token_cross_entropy

        items = tuple(
            Pair(pair["problem"], mbpp_prompt(task.row()), pair["correct"], pair["incorrect"], pair["fault_line"])
            for task, pair in zip(self.tasks, self.pairs, strict=True)
        )
        data = encode_pairs(self.tokenizer, Pairs("planted pairs", items), seq_len=256)
        hidden, ce, seen = {layer: [] for layer in LAYERS}, [], {}
        hooks = [
            self.model.layers[layer - 1].register_forward_hook(lambda _m, _i, out, at=layer: seen.__setitem__(at, out))
            for layer in LAYERS[:-1]
        ]
        with torch.no_grad():
            for both in data.documents:
                for document in both:
                    tokens, first = torch.from_numpy(document.tokens)[None].long(), len(document.prompt)
                    state = self.model.hidden_states(tokens)  # [1, 1, S, D]
                    seen[LAYERS[-1]] = state[0]
                    ce.append(token_cross_entropy(state, self.model.unembedding, tokens)[0, 0, first:].numpy())
                    for layer in LAYERS:
                        of_tokens = seen[layer][0, first:]
                        scale = of_tokens.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
                        hidden[layer].append((of_tokens * scale).numpy())
        for hook in hooks:
            hook.remove()
        length = data.lengths  # of the responses, EOS included
        start = (np.cumsum(length) - length.ravel()).reshape(length.shape)
        joined = {layer: np.concatenate(parts) for layer, parts in hidden.items()}
        return States(joined, np.concatenate(ce), np.zeros(sum(map(len, ce))), start, length), data

    # ------------------------------------------------------------------------------------------------------------------
    # Does a model learn better?

    def learning(self) -> dict:
        """Fine-tunes on the faulty programs with each method's weights; differences are paired by seed."""
        import numpy as np
        from validity.statistics import t_interval

        table: dict[str, list] = {}
        sets = self._tuning_sets()
        held_out = self._packed(self._documents([(task, task.code) for task in self.held_out], "held out"))
        for seed in range(self.args.seeds):
            for name, (data, weighting) in sets.items():
                path = self.out / "tuned" / f"{name}-{seed}.json".replace(" ", "_")
                if not path.exists():
                    model = self._tuned(data, weighting(), seed)
                    ce, passed = self._held_out_ce(model, held_out), float(self._solved(model, 1.0, 4).mean())
                    path.write_text(json.dumps([ce, passed]))
                    print(f"# {name}, seed {seed}: CE {ce:.4f}, pass rate {passed:.3f}", flush=True)
                table.setdefault(name, []).append(json.loads(path.read_text()))
        figures = {name: np.array(rows) for name, rows in table.items()}
        out = {}
        for name, rows in figures.items():
            gap = rows - figures["uniform"]
            out[name] = {
                "ce": t_interval(list(rows[:, 0])), "pass rate": t_interval(list(rows[:, 1])),
                "ce minus uniform": t_interval(list(gap[:, 0])), "pass rate minus uniform": t_interval(list(gap[:, 1])),
            }  # fmt: skip
        gaps = {
            other: [t_interval(list((figures["rollouts"] - figures[other])[:, k])) for k in (0, 1)]
            for other in figures
            if other != "rollouts"
        }
        before = [self._held_out_ce(self.model, held_out), float(self._solved(self.model, 1.0, 4).mean())]
        return {
            "methods": out, "rollouts minus": gaps, "before": before,
            "weights": self.line_weights, "steps": TUNING_STEPS,
        }  # fmt: skip

    def _tuning_sets(self) -> dict:
        """Returns data and weighting of each method: the faulty programs, or (clean) their right partners."""
        import numpy as np

        from wmtp.critic.rollouts import line_ends, value_column
        from wmtp.data import IGNORE, Documents, scored
        from wmtp.weighting import critic, shuffled, uniform

        by_rollouts = scored(self.tokenizer, source=str(self.out / "values"), checkpoint=str(self.out / "model"))
        correct = self._documents([(t, p["correct"]) for t, p in zip(self.tasks, self.pairs, strict=True)], "correct")
        columns: dict[str, list] = {"pair critic": [], "surprisal": [], "position": []}
        masked = []
        for n, (document, pair, program) in enumerate(zip(by_rollouts, self.pairs, self.programs, strict=True)):
            values = np.full(len(document), self.pair_values[n][0], np.float32)
            values[len(document.prompt) :] = self.pair_values[n]
            columns["pair critic"].append(values)
            places = line_ends(self.tokenizer, document, pair["incorrect"]).places
            for name, score in (("surprisal", "max surprisal"), ("position", "position")):  # values that fall by it
                values = -np.cumsum([0.0, 0.0, *self.scores[score][n]])
                columns[name].append(value_column(document, places, values))
            labels = document.labels.copy()
            labels[np.flatnonzero(program.line_of_token == program.fault + 2) + len(document.prompt)] = IGNORE
            masked.append(replace(document, labels=labels))
        valued = {"rollouts": by_rollouts}
        for name, column in columns.items():
            items = (replace(d, signals={"values": v}) for d, v in zip(by_rollouts, column, strict=True))
            valued[name] = Documents(name, tuple(items))
        self.line_weights = {name: self._line_weights(documents) for name, documents in valued.items()}
        sets = {name: self._packed(documents) for name, documents in valued.items()}
        rollouts = sets.pop("rollouts")
        return {
            "uniform": (rollouts, uniform),
            "rollouts": (rollouts, critic),
            "rollouts, shuffled": (rollouts, lambda: shuffled(critic())),
            **{name: (data, critic) for name, data in sets.items()},
            "pair critic, shuffled": (sets["pair critic"], lambda: shuffled(critic())),
            "oracle": (self._packed(Documents("oracle", tuple(masked))), uniform),
            "clean": (self._packed(correct), uniform),
        }

    def _line_weights(self, documents) -> list[float]:
        """Returns the mean weight of a token on the wrong line, on the right one in a rare form, and on the others."""
        import numpy as np

        from wmtp.data import Documents
        from wmtp.weighting import Signals, critic
        from wmtp.weighting.targets import valid_targets

        rows = []
        for document, pair, program in zip(documents, self.pairs, self.programs, strict=True):
            batch = self._packed(Documents(document.id, (document,))).batch([0])
            valid = valid_targets(batch["labels"], 1, batch["document_ids"])
            signals = Signals(batch["labels"], valid, batch["document_ids"], named=batch["signals"])
            start, line = len(document.prompt), program.line_of_token
            weights = critic()(signals)[0, start : start + len(line)].numpy()
            wrong, rare = line == pair["fault_line"], line == pair["odd_line"]
            rows.append([weights[at].mean() for at in (wrong, rare, ~(wrong | rare))])
        return np.mean(rows, axis=0).tolist()

    def _tuned(self, data, weighting, seed: int):
        from validity.tiny_model import train

        from wmtp.models import from_checkpoint, load_checkpoint

        model = from_checkpoint(str(self.out / "model"), max_seq_len=256)
        load_checkpoint(model, self.out / "model")
        train(model, data, steps=TUNING_STEPS, lr=TUNING_LR, seed=seed, weighting=weighting)
        return model

    def _held_out_ce(self, model, data) -> float:
        from validity.models import signals

        return float(signals(model, data, batch_size=16)[0].sum() / data.num_targets)


def candidates() -> tuple:
    """Pair critics to choose from; the first is what stage 1 trains by default."""
    from validity.faults import Critic
    from validity.tiny_model import LAYERS

    return (
        Critic(LAYERS[-1:], "pairwise", pairs="all"),
        Critic(LAYERS, "pairwise", pairs="all"),
        Critic(LAYERS, "pairwise", pairs="all", head="mlp"),
        Critic(LAYERS, "pairwise", pairs="all", tokens="diverging"),
    )


def mean(values) -> float:
    return float(sum(values) / len(values))


if __name__ == "__main__":
    main()
