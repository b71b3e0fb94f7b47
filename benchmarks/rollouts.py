"""Do values from rollouts know where a program is wrong, and does a model learn better by them?

    python benchmarks/rollouts.py [--out runs/rollouts] [--tasks 300] [--seeds 5] [--threads 1]
    python benchmarks/rollouts.py --write-docs       # the table of docs/validity.md from the results

Tiny tasks with tests (benchmarks/validity/tiny_tasks.py), a small model trained on programs of other such tasks until
it solves most of them, and programs with one planted wrong line. `recipes/score_rollouts.py` gives the faulty programs
their values. Beside it stand critics that stage 1's loss trains on pairs of right and faulty programs, in folds by
task, and what needs no critic. Then the model is fine-tuned on the faulty programs with the weights of each. Every part
is kept under --out, so a killed measurement goes on. One JSON line per figure: name, value, unit, against.
"""

import argparse
import hashlib
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
STEPS, TUNING_STEPS, TUNING_LR = 700, 40, 1e-3
SEQ_LEN, FOLDS, REPEATS = 256, 5, 2000
PROMPT = "wmtp.eval.docstring_protocol"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "rollouts")
    parser.add_argument("--tasks", type=int, default=200, help="with a planted fault; half as many are held out")
    parser.add_argument("--samples", type=int, default=8, help="completions from each line's end")
    parser.add_argument("--seeds", type=int, default=5, help="of the fine-tuning")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write-docs", action="store_true", help="only write docs/validity.md's table")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be >= 2 for an interval, got {args.seeds}")
    if args.write_docs:
        return write_docs(args.out, ROOT / "docs" / "validity.md")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    args.out = args.out.resolve()
    (args.out / "tuned").mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    study = Study(args)
    result = {"tasks": args.tasks, "samples": args.samples, "seeds": args.seeds, "steps": STEPS}
    result |= {"model": study.model_figures(), "faults": study.faults(), "learning": study.learning()}
    result["seconds"] = round(time.perf_counter() - started)
    (args.out / "result.json").write_text(json.dumps(result, indent=1))
    print_figures(result)


class Study:
    """The measurement: tasks and model are made, or read where they were, when it is built."""

    def __init__(self, args) -> None:
        from validity.tiny_tasks import planted, tiny_tasks

        self.args, self.out = args, args.out
        # The tuning set has rare forms as often as planted programs have: what they teach beside the fault is the same.
        tasks = tiny_tasks(2 * args.tasks, seed=1, first_id=1)
        pairs = [(task, pair) for task in tasks if (pair := planted(task, seed=0)) is not None][: args.tasks]
        self.pairs = [pair for _, pair in pairs]
        self.tasks = [task for task, _ in pairs]
        self.held_out = tiny_tasks(args.tasks // 2, seed=2, first_id=100_001)
        seen = {task.text for task in (*self.tasks, *self.held_out)}
        self.training = [task for task in tiny_tasks(8000, seed=3, first_id=200_001) if task.text not in seen]
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

    # ------------------------------------------------------------------------------------------------------------------
    # The model and its rollouts

    def _trained(self):
        """Returns the small model, trained on right programs of tasks that nothing else here uses."""
        from wmtp.models import export_hf, from_checkpoint, load_checkpoint

        folder = self.out / "model"
        if not folder.exists():
            model = new_model(self.tokenizer)
            data = self._packed(self._documents([(task, task.code) for task in self.training], "training"))
            train(model, data, steps=STEPS, lr=6e-3, seed=0, tell=50)
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
        samples = self.args.samples
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "greedy_pass_rate": float(self._solved(self.model).mean()),
            "prompt_value": mean([line["prompt_value"] for line in self.lines]),
            "never_solved": mean([line["prompt_value"] == 0 for line in self.lines]),
            "prefixes": len(
                {(line["program"].split()[0], i) for line in self.lines for i in range(len(line["lines"]))}
            ),
            "samples": samples,
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

    def _solved(self, model):
        """Returns for each held-out task whether the model's greedy program passes the judge."""
        import numpy as np

        from wmtp.eval import assertion_tasks, docstring_protocol
        from wmtp.generation import Request, Sampling, generate
        from wmtp.sandbox import Sandbox

        tasks, protocol = assertion_tasks(str(self.out / "held_out.jsonl"), challenge_tests=True), docstring_protocol()
        requests = [Request(n, tuple(protocol.prompt(task, self.tokenizer)), ()) for n, task in enumerate(tasks)]
        found = generate(model, self.tokenizer, requests, Sampling(80, stop=protocol.stop), batch_size=32)
        programs = {done.id: protocol.program(tasks[done.id], done.text) for done in found}
        with Sandbox(workers=1) as sandbox:
            outcomes = sandbox.judge([task.job(programs[n]) for n, task in enumerate(tasks)])
        return np.array([outcome.verdict == "passed" for outcome in outcomes])

    # ------------------------------------------------------------------------------------------------------------------
    # Where is the fault?

    def faults(self) -> dict:
        """Ranks the statements of every faulty program; returns each figure with its interval over programs."""
        import numpy as np
        from validity.statistics import hit_ranks, interval, resamples, weighted_mean

        scores, self.pair_values = self._line_scores()
        figures = {}
        for name, of_program in scores.items():
            table = []
            for line, score in zip(self.lines, of_program, strict=True):
                at = line["lines"].index(line["fault_line"]) - 1  # the def is no candidate
                top1, _, _, auc = hit_ranks(score, at)
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
        return {"programs": len(self.lines), "lines": mean([len(s) for s in scores["random"]]), "methods": out}

    def _line_scores(self):
        """Returns scores of the statements by method, higher is more suspicious, and the pair critics' values [T]."""
        import numpy as np
        from validity.faults import _rank, position_prior

        programs = self._faulty_programs()
        states, data = self._states()
        fold = np.array([int(hashlib.sha256(p["problem"].encode()).hexdigest(), 16) % FOLDS for p in self.pairs])
        values = {name: self._critic_values(kind, states, data, fold) for name, kind in critics().items()}
        draw, scores = np.random.default_rng(0), {name: [] for name in ("random", "rollouts", "rollouts, shuffled")}
        for n, (line, program) in enumerate(zip(self.lines, programs, strict=True)):
            falls = -np.diff([line["prompt_value"], *line["values"]])[1:]  # without the def's
            prior = position_prior([p for i, p in enumerate(programs) if fold[i] != fold[n]])
            bins = ((np.arange(len(program.lines)) + 0.5) / len(program.lines) * len(prior)).astype(int)
            length = np.array([float(len(text.strip())) for text in program.text])[1:]
            ce = states.ce[states.rows(n, 1)][: len(program.line_of_token)]
            of_line = [ce[program.line_of_token == number] for number in program.lines[1:]]
            found = {
                "random": np.zeros(len(falls)),
                "position": prior[bins][1:],
                "length + position": _rank(length) + _rank(prior[bins][1:]),
                "mean surprisal": np.array([x.mean() for x in of_line]),
                "max surprisal": np.array([x.max() for x in of_line]),
                "rollouts": falls,
                "rollouts, shuffled": draw.permutation(falls),
            }
            for name, (value, rule) in values.items():
                found[name] = line_falls(value[n], program, rule)[1:]
            for name, score in found.items():
                scores.setdefault(name, []).append(score)
        return scores, {name: value for name, (value, _) in values.items()}

    def _faulty_programs(self):
        import numpy as np
        from validity.faults import FaultyProgram

        from wmtp.critic.localise import line_of_tokens

        programs = []
        for pair in self.pairs:
            text = pair["incorrect"].split("\n")
            lines, of_token = np.arange(1, len(text) + 1), line_of_tokens(self.tokenizer, pair["incorrect"])
            programs.append(FaultyProgram(of_token, lines, tuple(text), pair["fault_line"] - 1, len(text)))
        return programs

    def _states(self):
        """Returns the model's states of each program's tokens behind its prompt, correct then faulty, and the pairs."""
        import numpy as np
        import torch
        from validity.states import States

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
        return States(joined, np.concatenate(ce), np.zeros(0), start, length), data

    def _critic_values(self, kind, states, data, fold):
        """Returns each faulty program's values [T + 1] by a critic of the other folds, and the better rule of reading.

        The rule is chosen by the critic's own training programs, which flatters it if anything.
        """
        import numpy as np
        from validity.faults import FaultSettings, fit
        from validity.statistics import hit_ranks

        settings = FaultSettings(seq_len=256, max_pairs=None, critics=(), epochs=30)
        values, programs = {}, self._faulty_programs()
        auc = {"end": [], "token": []}
        for held in range(FOLDS):
            value = fit(kind, settings, states, data, np.flatnonzero(fold != held))
            for n in range(len(data)):
                if fold[n] == held:
                    values[n] = value(n, 1)
                else:
                    for rule in auc:
                        fall = line_falls(value(n, 1), programs[n], rule)[1:]
                        auc[rule].append(hit_ranks(fall, programs[n].fault - 1)[-1])
        return [values[n] for n in range(len(data))], max(auc, key=lambda rule: np.mean(auc[rule]))

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
                    ce, passed = self._held_out_ce(model, held_out), float(self._solved(model).mean())
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
        before = self._held_out_ce(self.model, held_out)
        return {"methods": out, "rollouts minus": gaps, "before": [before, self.model_figures()["greedy_pass_rate"]]}

    def _tuning_sets(self) -> dict:
        """Returns data and weighting of each method: the faulty programs, or (clean) their right partners."""
        import numpy as np

        from wmtp.data import IGNORE, Documents, scored
        from wmtp.weighting import critic, shuffled, uniform

        by_rollouts = scored(self.tokenizer, source=str(self.out / "values"), checkpoint=str(self.out / "model"))
        correct = self._documents([(t, p["correct"]) for t, p in zip(self.tasks, self.pairs, strict=True)], "correct")
        best = max(critics(), key=lambda name: self.faults_of(name))
        by_pairs, masked = [], []
        for document, value, program in zip(by_rollouts, self.pair_values[best], self._faulty_programs(), strict=True):
            values = np.full(len(document), value[0], np.float32)
            values[len(document.prompt) :] = value
            by_pairs.append(replace(document, signals={"values": values}))
            labels = document.labels.copy()
            at = np.flatnonzero(program.line_of_token == program.fault + 1) + len(document.prompt)
            labels[at] = IGNORE
            masked.append(replace(document, labels=labels))
        pairs, oracle = Documents("pair critic", tuple(by_pairs)), Documents("oracle", tuple(masked))
        rollouts, paired, faultless = map(self._packed, (by_rollouts, pairs, oracle))
        return {
            "uniform": (rollouts, uniform),
            "rollouts": (rollouts, critic),
            "rollouts, shuffled": (rollouts, lambda: shuffled(critic())),
            "pair critic": (paired, critic),
            "pair critic, shuffled": (paired, lambda: shuffled(critic())),
            "oracle": (faultless, uniform),
            "clean": (self._packed(correct), uniform),
        }

    def faults_of(self, name: str) -> float:
        if not hasattr(self, "_faults"):
            self._faults = self.faults()
        return self._faults["methods"][name]["auc"][0]

    def _tuned(self, data, weighting, seed: int):
        from wmtp.models import from_checkpoint, load_checkpoint

        model = from_checkpoint(str(self.out / "model"), max_seq_len=256)
        load_checkpoint(model, self.out / "model")
        train(model, data, steps=TUNING_STEPS, lr=TUNING_LR, seed=seed, weighting=weighting)
        return model

    def _held_out_ce(self, model, data) -> float:
        from validity.models import signals

        return float(signals(model, data, batch_size=16)[0].sum() / data.num_targets)


LAYERS = (1, 2, 3)  # the last is the state that the language model's head reads


def critics() -> dict:
    from validity.faults import Critic

    return {
        "pair critic, plain": Critic(LAYERS[-1:], "pairwise", pairs="all"),
        "pair critic, all layers, mlp": Critic(LAYERS, "pairwise", head="mlp", pairs="all"),
    }


def train(model, data, *, steps: int, lr: float, seed: int, weighting=None, tell: int | None = None) -> None:
    """The recipe's training step, on one process and without anything that a measurement does not need."""
    import torch
    from validity.models import schedule

    from wmtp.data import BatchStream
    from wmtp.loss import mtp_loss
    from wmtp.weighting import uniform

    stream = BatchStream(data, batch_size=8, rank=0, world_size=1, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    weighting = uniform() if weighting is None else weighting
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps, warmup=steps // 20)
        batch = stream.next_batch()
        out = model(
            batch["tokens"], document_ids=batch["document_ids"], loss_fn=mtp_loss, labels=batch["labels"],
            weighting=weighting, signals=batch["signals"], step=step,
        )  # fmt: skip
        loss = out.loss_sum / out.num_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if tell and (step + 1) % tell == 0:
            print(f"# step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def line_falls(values, program, rule: str):
    from validity.faults import drops

    return drops(values, program, rule)


def mean(values) -> float:
    return float(sum(values) / len(values))


def new_model(tokenizer):
    import torch

    from wmtp.models import llama_mtp

    torch.manual_seed(0)
    return llama_mtp(
        vocab_size=tokenizer.vocab_size, num_layers=3, num_heads=4, num_kv_heads=4, embed_dim=64,
        intermediate_dim=192, max_seq_len=256, num_future_tokens=1, tie_word_embeddings=True,
    )  # fmt: skip


def tiny_tokenizer(tasks):
    """Byte-level BPE of 512 ids, learned on the training tasks."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from wmtp.data.mbpp_rows import mbpp_prompt
    from wmtp.pretrained import Tokenizer

    backend = Backend(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((mbpp_prompt(task.row()) + task.code for task in tasks[:2000]), trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **names), name="tiny_tasks")


# ----------------------------------------------------------------------------------------------------------------------
# What is read


def print_figures(result: dict) -> None:
    from figures import report

    for name, figures in result["faults"]["methods"].items():
        against = f"AUC of the faulty line, 95 % {show(figures['auc'])}"
        report(f"rollouts, faults: {name}", figures["auc"][0], "AUC", against)
    for name, figures in result["learning"]["methods"].items():
        against = f"clean held-out CE minus uniform's, 95 % {show(figures['ce minus uniform'], 4, sign=True)}"
        report(f"rollouts, learning: {name}", figures["ce minus uniform"][0], "nats", against)


def tables(result: dict) -> str:
    """Returns the tables of docs/validity.md."""
    model, faults, learning = result["model"], result["faults"], result["learning"]
    lines = [
        f"{faults['programs']} faulty programs with {faults['lines']:.1f} statements on average, "
        f"{result['samples']} completions at each line's end. The model ({model['parameters'] / 1e6:.1f} million "
        f"parameters) solves {model['greedy_pass_rate']:.0%} of held-out tasks greedily; its mean pass rate at the "
        f"prompts is {model['prompt_value']:.2f}, and 0 in {model['never_solved']:.0%} of the tasks. The faulty line "
        "among the statements, 95 % interval over programs:",
        "",
        "| ranked by | top-1 | AUC | mean rank | rollouts' AUC minus it |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, figures in sorted(faults["methods"].items(), key=lambda item: item[1]["auc"][0]):
        gap = show(figures["rollouts' auc minus it"], sign=True)
        lines.append(f"| {name} | {' | '.join(show(figures[f]) for f in FIGURES)} | {gap} |")
    ce, passing = learning["before"]
    lines += [
        "",
        f"Fine-tuning on these programs, {TUNING_STEPS} steps, {result['seeds']} seeds; before it CE {ce:.4f} and "
        f"pass rate {passing:.3f}. Student's t over seeds, paired with uniform:",
        "",
        "| weights | clean held-out CE | minus uniform | pass rate | minus uniform |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, figures in sorted(learning["methods"].items(), key=lambda item: item[1]["ce"][0]):
        of_ce = f"{show(figures['ce'], 4)} | {show(figures['ce minus uniform'], 4, sign=True)}"
        of_tasks = f"{show(figures['pass rate'])} | {show(figures['pass rate minus uniform'], sign=True)}"
        lines.append(f"| {name} | {of_ce} | {of_tasks} |")
    lines += ["", "Rollouts minus, paired by seed:", "", "| | CE | pass rate |", "| --- | --- | --- |"]
    for name, (of_ce, of_tasks) in learning["rollouts minus"].items():
        lines.append(f"| {name} | {show(of_ce, 4, sign=True)} | {show(of_tasks, sign=True)} |")
    return "\n".join(lines)


def show(triple, digits: int = 3, sign: bool = False) -> str:
    kind = f"{'+' if sign else ''}.{digits}f"
    return f"{triple[0]:{kind}} [{triple[1]:{kind}}, {triple[2]:{kind}}]"


def write_docs(out: Path, page: Path) -> None:
    """Fills the page's block of tables.

    Raises:
        FileNotFoundError: there is no result.
        ValueError: the page lacks the block.
    """
    shown = tables(json.loads((out / "result.json").read_text()))
    pattern = r"(<!-- rollouts tables -->\n).*?(<!-- end -->)"
    text, count = re.subn(pattern, lambda m: f"{m[1]}\n{shown}\n\n{m[2]}", page.read_text(), flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{page} must have one block <!-- rollouts tables --> ... <!-- end -->")
    page.write_text(text)


if __name__ == "__main__":
    main()
