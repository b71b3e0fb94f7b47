"""All weightings side by side: a model of 4.3 million parameters and four heads is fine-tuned with each of them.

All start from the same pretrained model and see the same rows in the same order, for the same number of steps at the
same learning rate; half of the documents have a fifth of their targets replaced by random ids (benchmarks/study/). Each
trained model is asked what it has learnt (cross-entropy on clean held-out code), what it has forgotten (on prose, which
it knew), how many of its heads' drafts greedy decoding accepts, and how many of its texts end. How well the weights
tell replaced tokens is read off the weights that training used.

The full form starts from docs/study.md's base model; the reduced one pretrains a smaller one of its own.
"""

import copy
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from wmtp.data import IGNORE, Documents, PackedDataset, pack, python_functions, tokenized
from wmtp.errors import UserError
from wmtp.generation import DecodingStats, Request, Sampling, generate
from wmtp.loss import Anchor
from wmtp.models import MTPDecoder, from_checkpoint, llama_mtp, load_checkpoint
from wmtp.numerics.paired import holm, mean_difference
from wmtp.pretrained import hf_tokenizer
from wmtp.training.acceptance import held_out_prompts
from wmtp.weighting import any_weighting

from .methods import CONTROL_PAIRS, CONTROLLED, METHODS, Method
from .models import all_signals, fine_tune, kept, name_of, signals, train
from .statistics import auc

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 256
NUM_HEADS = 4
MAX_BODY_LINES = 20  # as in benchmarks/study
PAIRS = (  # beside `uniform` and its controls, whom a method is held against
    ("select excess", "clean data, uniform"),
    ("select excess", "oracle"),
    ("protect(select excess)", "select excess"),
    ("asft 0.1", "dft, raw"),
    *((f"{name}, raw", name) for name in ("dft", "eaft", "profit", "infosft", "talr", "prift", "prift mass")),
)
ENDS = ("uniform", "select excess", "protect(select excess)")  # whose texts' ends are counted over more seeds
CONFIRMED = tuple(name for name in CONTROLLED if name != "token_cleaning")  # on seeds that nobody had seen
THIRD = 8  # steps at the start and at the end whose weights are read


@dataclass(frozen=True)
class SideBySideSettings:
    """What the measurement depends on."""

    seeds: tuple[int, ...]  # of the order of the data and of the random controls
    end_seeds: tuple[int, ...]  # of the comparison of ENDS
    methods: tuple[str, ...]
    fresh_seeds: tuple[int, ...]  # of the comparison of CONFIRMED with `uniform`
    study: str | None  # folder with docs/study.md's base/export and data; None: make both, smaller
    base_tokens: int = 0  # of the corpus that is then made
    base_steps: int = 0  # of 8 rows, of pretraining on it
    reference_steps: int = 60  # of 8 rows of clean functions of other modules
    documents: int = 1600  # of the training data
    steps: int = 24  # of fine-tuning
    batch_size: int = 2  # rows of 256 tokens, about 250 targets
    lr: float = 1e-3
    held_out: int = 80  # functions
    prompts: int = 32  # of them, continued greedily
    max_new_tokens: int = 96


REDUCED = SideBySideSettings(
    seeds=(0, 1),
    end_seeds=(0, 1),
    fresh_seeds=(),
    methods=(
        "uniform",
        "clean data, uniform",
        "oracle",
        "select excess",
        "protect(select excess)",
        "random_matched(select excess)",
        "dft, raw",
        "profit, raw",
        "sstoken",
    ),
    study=None,
    base_tokens=600_000,
    base_steps=150,
)
FULL = SideBySideSettings(
    seeds=(0, 1, 2, 3, 4),
    end_seeds=(0, 1, 2, 3, 4),
    fresh_seeds=tuple(range(5, 15)),
    methods=tuple(name for name, method in METHODS.items() if method.trains),
    study="runs/study",
)


def run(settings: SideBySideSettings, folder: Path, *, fresh: bool = False, finished: bool = False) -> dict:
    """The whole measurement.

    Args:
        folder: where the models are kept, and each finished run, so that a killed measurement goes on and a method that
            is added later costs its own runs alone.
        fresh: fine-tune again.
        finished: take only the runs that are kept: of each method the first seeds, and none that has fewer than two.
    """
    parts = folder / f"side_by_side-{_hash(settings)}"
    if fresh:
        shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True, exist_ok=True)
    bench = _Bench(settings, folder)
    before = _kept(parts / "before.npz", lambda: bench.measure(bench.policy()))

    def path(name: str, seed: int) -> Path:
        return parts / f"{name}-{seed}.npz".replace(" ", "_")

    def found(name: str, seed: int) -> dict:
        return _kept(path(name, seed), lambda: bench.run(METHODS[name], seed), say=True)

    runs: dict[str, list[dict]] = {name: [] for name in settings.methods}
    for number, seed in enumerate(settings.seeds):
        for name, of in runs.items():
            if len(of) == number and (not finished or path(name, seed).exists()):
                of.append(found(name, seed))
    runs = {name: of for name, of in runs.items() if len(of) > 1}
    ends = {name: [found(name, seed) for seed in settings.end_seeds] for name in ENDS}
    confirming = () if finished or not settings.fresh_seeds else ("uniform", *CONFIRMED)
    confirmed = {name: [found(name, seed) for seed in settings.fresh_seeds] for name in confirming}
    how = {"finished": True} if finished else {}
    return {"settings": asdict(settings) | how} | summary(before, runs, ends, confirmed)


def _kept(path: Path, make: Callable[[], dict], *, say: bool = False) -> dict[str, np.ndarray]:
    if not path.exists():
        started = time.process_time()
        found = make()
        found["cpu_seconds"] = np.float64(time.process_time() - started)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, **found)
        partial.rename(path)
        if say:
            print(f"# {path.stem}: {_mean(found['code']):.3f}, {found['cpu_seconds']:.0f} CPU seconds", flush=True)
    with np.load(path) as arrays:
        return dict(arrays)


def summary(
    before: dict, runs: dict[str, list[dict]], ends: dict[str, list[dict]], confirmed: dict[str, list[dict]]
) -> dict:
    """Means over seeds, and differences that are paired by seed, and by document or prompt.

    Intervals are of 95 %, over seeds and documents (:func:`wmtp.numerics.paired.mean_difference`); `p` is adjusted by
    Holm over the methods of its column, of a method and its controls over all such differences, and on fresh seeds over
    the methods that run there.

    Args:
        before, runs, ends, confirmed: what :meth:`_Bench.measure` gave: of the model that training starts from, and of
            each run, in the order of the seeds; where one of two methods has fewer seeds, the first ones are compared.
    """
    figures: dict[str, dict] = {}
    uniform = runs["uniform"]
    for name, found in runs.items():
        pairs = list(zip(found, uniform, strict=False))
        out: dict = {text: _t([_mean(run[text]) for run in found]) for text in ("code", "prose")}
        out |= {f"{text} minus uniform": _gap(pairs, text) for text in ("code", "prose")}
        if all(run["forwards"] for run in (*found, *uniform)):  # else texts end with their first token: no drafts
            out["accept length"] = _t([_accept_length(run) for run in found])
            gaps = np.array([[_accept_length(a) - _accept_length(b)] for a, b in pairs])
            out["accept length minus uniform"] = _difference(gaps)
        out["to the limit"] = _t([float(run["limit"].mean()) for run in found])
        out["to the limit minus uniform"] = _difference(np.array([a["limit"] * 1.0 - b["limit"] for a, b in pairs]))
        if "auc" in found[0] and METHODS[name].data == "noisy":  # prompts, where they are targets, have no noise
            out["auc"] = [_t([float(run["auc"][i]) for run in found]) for i in (0, 1)]
            out["mean weight"] = float(np.mean([run["mean_weight"] for run in found]))
        out["code by seed"] = [round(_mean(run["code"]), 5) for run in found]
        figures[name] = out
    compared = {}
    for name, other in (*CONTROL_PAIRS, *PAIRS):
        if name in runs and other in runs:
            both = list(zip(runs[name], runs[other], strict=False))
            compared[f"{name} minus {other}"] = {
                "seeds": len(both),
                **{text: _gap(both, text) for text in ("code", "prose")},
                "to the limit": _difference(np.array([a["limit"] * 1.0 - b["limit"] for a, b in both])),
            }
    controlled = [compared[key] for pair in CONTROL_PAIRS if (key := " minus ".join(pair)) in compared]
    again = {
        name: {text: _gap(list(zip(found, confirmed["uniform"], strict=True)), text) for text in ("code", "prose")}
        for name, found in confirmed.items()
        if name != "uniform"
    }
    for family in (controlled, list(again.values())):
        for text in ("code", "prose"):
            for found, p in zip(family, holm([found[text]["p"] for found in family]), strict=True):
                found[text]["p"] = p
    for column in ("code minus uniform", "prose minus uniform", "accept length minus uniform"):
        named = [name for name in figures if name != "uniform" and column in figures[name]]
        for name, p in zip(named, holm([figures[name][column]["p"] for name in named]), strict=True):
            figures[name][column]["p"] = p
    return {
        "before": {"code": _mean(before["code"]), "prose": _mean(before["prose"])}
        | {"accept length": _accept_length(before), "to the limit": float(before["limit"].mean())},
        "held_out": {text: [len(before[text]), int(before[text][:, 1].sum())] for text in ("code", "prose")},
        "prompts": len(before["limit"]),
        "cpu_seconds": float(sum(run["cpu_seconds"] for of in (runs, confirmed) for run in chain(*of.values()))),
        "methods": figures,
        "pairs": compared,
        "ends": _ends(ends),
        "confirmed": again,
    }


def _ends(runs: dict[str, list[dict]]) -> dict:
    """Share of texts that run to the limit, and its differences, over seeds and prompts."""
    limits = {name: np.array([run["limit"] * 1.0 for run in found]) for name, found in runs.items()}
    shares = {name: _difference(limit)["mean"] for name, limit in limits.items()}
    gaps = {f"{a} minus {b}": _difference(limits[a] - limits[b]) for a, b in zip(ENDS[1:], ENDS[:-1], strict=True)}
    return {
        "shares": shares,
        "gaps": gaps | {f"{ENDS[2]} minus {ENDS[0]}": _difference(limits[ENDS[2]] - limits[ENDS[0]])},
    }


def _gap(pairs: list[tuple[dict, dict]], text: str) -> dict:
    targets = pairs[0][0][text][:, 1]
    return _difference(np.array([(a[text][:, 0] - b[text][:, 0]) / targets for a, b in pairs]), targets)


def _difference(gaps: np.ndarray, weights: np.ndarray | None = None) -> dict:
    if not gaps.any():
        return {"mean": [0.0, 0.0, 0.0], "p": 1.0}
    found = mean_difference(gaps, weights)
    interval = found.interval()
    return {"mean": [interval.estimate, interval.low, interval.high], "p": found.p_value()}


def _t(values: list[float]) -> list[float]:
    interval = mean_difference(np.array(values)[:, None]).interval()
    return [interval.estimate, interval.low, interval.high]


def _mean(ce: np.ndarray) -> float:
    return float(ce[:, 0].sum() / ce[:, 1].sum())


def _accept_length(run: dict) -> float:
    return float(run["new_tokens"] / max(1, run["forwards"]))


class _Bench:
    """Models and data of the measurement; what only a new run needs is made when the first one asks for it."""

    def __init__(self, settings: SideBySideSettings, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self._study = folder / f"study-{settings.base_tokens}" if settings.study is None else ROOT / settings.study
        self._origin = {"study": settings.study, "base": [settings.base_tokens, settings.base_steps]}  # of the base
        self._origin["reference"] = settings.reference_steps
        self._ready = False

    def policy(self) -> MTPDecoder:
        """The model as it is before fine-tuning."""
        self._prepare()
        self._model.load_state_dict(self._start)
        return self._model.eval()

    def run(self, method: Method, seed: int) -> dict[str, np.ndarray]:
        """Fine-tunes with a method, and measures."""
        settings = self._settings
        model, data = self.policy(), self._data[method.data]
        if method.reference == "initial":
            own = {name: self._data["initial"][name] for name in ("reference_ce", "reference_mass")}
            data = replace(data, signals={**data.signals, **own})
        weighting = any_weighting(method.weighting())
        weighting.prepare(self._tokenizer, data)
        seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"first": [], "last": []}
        means = []

        def watch(step, batch, out) -> None:
            if out.weights is None:
                return
            targets = out.valid[0]
            weights = out.weights[targets].numpy()
            means.append(float(weights.mean()))
            for third, inside in (("first", step < THIRD), ("last", step >= settings.steps - THIRD)):
                if inside:
                    seen[third].append((weights, batch["signals"]["noise"][targets].numpy() > 0))

        fine_tune(
            model, data, weighting, steps=settings.steps, batch_size=settings.batch_size, lr=settings.lr, seed=seed,
            warmup=4, loss=None if method.anchor is None else self._anchored(method.anchor), watch=watch,
        )  # fmt: skip
        found = self.measure(model)
        if means:
            thirds = [[np.concatenate(column) for column in zip(*parts, strict=True)] for parts in seen.values()]
            found["auc"] = np.array([auc(-weights, noise) for weights, noise in thirds])
            found["mean_weight"] = np.float64(np.mean(means))
        return found

    def _anchored(self, weight: float) -> Callable[[dict], dict]:
        """What the loss needs of the initial policy for an anchor, as a function of a batch."""
        anchor, initial = Anchor(weight), copy.deepcopy(self._model).eval()
        initial.load_state_dict(self._start)

        def states(batch: dict) -> dict:
            with torch.no_grad():
                return {
                    "anchor": initial(
                        batch["tokens"],
                        document_ids=batch["document_ids"],
                        num_heads=1,
                        loss_fn=lambda hidden, unembedding, **_: anchor.of_model(hidden, unembedding),
                    )
                }

        return states

    def measure(self, model: MTPDecoder) -> dict[str, np.ndarray]:
        """CE of head 1 on each held-out document, and what greedy decoding with all heads makes of the prompts.

        Returns:
            ``code``, ``prose`` [D, 2]: sum of CE in nats, and number of targets; ``limit`` [P] bool: the text did not
            end; ``new_tokens`` and ``forwards`` after each text's first token; ``verified``, ``accepted``: drafts of
            heads 2 to 4.
        """
        settings = self._settings
        found = {name: _by_document(signals(model, data, batch_size=16)[0], data) for name, data in self._held.items()}
        stats = DecodingStats()
        requests = [Request(i, tuple(prompt), ()) for i, prompt in enumerate(self._prompts)]
        limit = np.zeros(len(requests), bool)
        for done in generate(
            model, self._tokenizer, requests, Sampling(settings.max_new_tokens), batch_size=len(requests),
            num_drafts=NUM_HEADS - 1, stats=stats,
        ):  # fmt: skip
            limit[done.id] = done.finish_reason == "length"
        heads = range(2, NUM_HEADS + 1)
        return found | {
            "limit": limit,
            "new_tokens": np.int64(stats.new_tokens - stats.first_tokens),
            "forwards": np.int64(stats.row_forwards),
            "verified": np.array([stats.verified.get(k, 0) for k in heads]),
            "accepted": np.array([stats.accepted.get(k, 0) for k in heads]),
        }

    def _prepare(self) -> None:
        if self._ready:
            return
        settings, data = self._settings, self._study / "data"
        if settings.study is not None and not (self._study / "base" / "export").is_dir():
            raise UserError(
                f"side_by_side needs the base model of docs/study.md in {self._study / 'base' / 'export'}; make it "
                "with the first two commands there (half an hour on 2 cores), or run the reduced form"
            )
        if not (data / "train_clean.jsonl").exists():
            command = [sys.executable, str(ROOT / "benchmarks" / "study" / "make_data.py"), "--out", str(data)]
            subprocess.run([*command, "--tokens", str(settings.base_tokens)], check=True)
        self._tokenizer = hf_tokenizer(data / "tokenizer")
        self._model = self._base(data)
        self._start = {name: value.clone() for name, value in self._model.state_dict().items()}
        functions = python_functions(
            self._tokenizer, split="heldout", max_functions=settings.held_out, max_body_lines=MAX_BODY_LINES
        )
        prose = tokenized(self._tokenizer, source=str(data / "prose_heldout.jsonl"))
        self._held = {"code": self._pack(functions), "prose": self._pack(prose)}
        self._prompts = held_out_prompts(self._held["code"], settings.prompts)
        self._data = self._training_data(data)
        self._ready = True

    def _pack(self, documents) -> PackedDataset:
        return pack(documents, SEQ_LEN, pad_id=self._tokenizer.pad_id)

    def _training_data(self, folder: Path) -> dict:
        """The versions of the training rows, with what the reference and the initial model say of their targets."""

        def first(file: str) -> PackedDataset:
            documents = tokenized(self._tokenizer, source=str(folder / file))
            return self._pack(Documents(documents.name, documents.items[: self._settings.documents]))

        noisy, clean = first("train.jsonl"), first("train_clean.jsonl")
        if not torch.equal(noisy.document_ids, clean.document_ids):
            raise UserError(f"{folder}: train.jsonl and train_clean.jsonl are not the same documents; make them again")
        columns = {"noise": noisy.signals["noise"]}
        initial = self._scored("initial", lambda: self._model.eval(), noisy)
        trained = self._scored("trained", self._reference, noisy)
        columns |= {name: trained[name] for name in ("reference_ce", "reference_mass")}
        columns["base_ce"] = initial["reference_ce"]
        prompts = torch.where(noisy.document_ids >= 0, noisy.tokens, IGNORE)
        weight = torch.where(noisy.labels == IGNORE, 0.3, 1.0)
        return {
            "noisy": replace(noisy, signals=columns),
            "clean": replace(clean, signals=columns),
            "prompts": replace(noisy, labels=prompts, signals={**columns, "weight": weight}),
            "initial": initial,
        }

    def _scored(self, who: str, make: Callable[[], MTPDecoder], data: PackedDataset) -> dict[str, torch.Tensor]:
        of = {**self._origin, "who": who, "rows": data.rows_sha256}
        path = self._folder / f"side-by-side-scores-{name_of(of)}.npz"
        if not path.exists():
            found = all_signals(make(), data, batch_size=16)
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.savez(file, reference_ce=found["policy_ce"], reference_mass=found["reference_mass"])
            partial.rename(path)
        with np.load(path) as arrays:
            return {name: torch.from_numpy(column) for name, column in arrays.items()}

    def _base(self, data: Path) -> MTPDecoder:
        if self._settings.study is not None:
            export = str(self._study / "base" / "export")
            model = from_checkpoint(export, num_future_tokens=NUM_HEADS)
            load_checkpoint(model, export)
            return model.eval()
        recipe = {"name": "side-by-side-base", "steps": self._settings.base_steps, "tokens": self._settings.base_tokens}
        recipe |= {"lr": 3e-3, "vocab": self._tokenizer.vocab_hash()}
        torch.manual_seed(0)
        model = llama_mtp(
            vocab_size=self._tokenizer.vocab_size, num_layers=6, num_heads=6, num_kv_heads=2, embed_dim=192,
            intermediate_dim=512, max_seq_len=512, num_future_tokens=NUM_HEADS, tie_word_embeddings=True,
        )  # fmt: skip

        def make(model: MTPDecoder) -> None:
            corpus = self._pack(tokenized(self._tokenizer, source=str(data / "pretrain.jsonl.gz")))
            train(model, corpus, steps=recipe["steps"], batch_size=8, lr=recipe["lr"], seed=0, warmup=20)

        return kept(self._folder, recipe, model, make)

    def _reference(self) -> MTPDecoder:
        """The base's first head after some steps on clean functions of other modules."""
        steps = self._settings.reference_steps
        recipe = {"name": "side-by-side-reference", **self._origin, "steps": steps}

        def make(model: MTPDecoder) -> None:
            documents = python_functions(self._tokenizer, split="reference", max_body_lines=MAX_BODY_LINES)
            train(model, self._pack(documents), steps=steps, batch_size=8, lr=1e-3, seed=0, warmup=4)

        model = llama_mtp(
            vocab_size=self._tokenizer.vocab_size, num_layers=6, num_heads=6, num_kv_heads=2, embed_dim=192,
            intermediate_dim=512, max_seq_len=512, num_future_tokens=1, tie_word_embeddings=True,
        )  # fmt: skip
        model.load_state_dict({name: self._start[name] for name in model.state_dict()})
        return kept(self._folder, recipe, model, make)


def _by_document(ce: np.ndarray, data: PackedDataset) -> np.ndarray:
    """[D, 2]: sum of CE and number of targets of each document, from CE [R, S]."""
    ids, labels = data.document_ids.numpy(), data.labels.numpy()
    targets = labels != IGNORE
    targets[:, 0] = False
    targets[:, 1:] &= ids[:, 1:] == ids[:, :-1]
    number = np.unique((ids + np.arange(len(data))[:, None] * (SEQ_LEN + 1))[targets], return_inverse=True)[1]
    return np.stack([np.bincount(number, x[targets]) for x in (ce, np.ones_like(ce))], axis=1)


def _hash(settings: SideBySideSettings) -> str:
    """Names what a finished run depends on, which is neither the number of seeds nor the list of methods."""
    what = {k: v for k, v in asdict(settings).items() if k not in ("seeds", "end_seeds", "fresh_seeds", "methods")}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
