"""Do weights help a model that learns from noisy code? A small trained decoder is fine-tuned with every method.

A share of the target tokens of its fine-tuning data is replaced by random ids, in inputs and labels alike. All methods
start from the same weights and see the same rows in the same order for the same number of steps at the same learning
rate; they differ in their token weights alone. What counts is the cross-entropy on clean held-out code. The `oracle`
knows the noise and leaves it out of the loss, with `next too` also the token after it, whose context is broken; `clean`
is trained on the same documents without noise.

Four sets of modules, disjoint: the policy's own training, the reference's, the noisy fine-tuning, the held-out code.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from wmtp.data import IGNORE, Documents, PackedDataset, pack, python_functions
from wmtp.models import MTPDecoder, llama_mtp
from wmtp.pretrained import Tokenizer, byte_tokenizer
from wmtp.weighting import Weighting, dft, entropy, random_matched, rho1, shuffled, uniform

from .models import all_targets, cut, fine_tune, kept, signals, train, with_noise
from .statistics import interval, resamples, t_interval, weighted_mean

VOCAB_SIZE = 2048
SEQ_LEN = 256  # of a packed row, and of a document
BATCH_SIZE = 8  # rows
FRACTIONS = (0.35, 0.35, 0.1)  # of the modules, for the policy, the reference and the held-out code
REST = (0.8, 0.2, 0.0)  # its second part is what FRACTIONS leaves: the noisy fine-tuning


@dataclass(frozen=True)
class LearningSettings:
    """What the measurement depends on."""

    seeds: tuple[int, ...]  # of the noise, the data order and the random controls
    reference_steps: int  # of 8 rows x 256 tokens
    policies: dict[str, int]  # name -> steps of training before the fine-tuning
    methods: dict[str, tuple[str, ...]]  # policy -> names of weightings()
    steps: int  # of fine-tuning
    held_out: int | None = None  # functions; None: all
    lr: float = 1e-3
    share: float = 0.2  # of the target tokens that is replaced
    repeats: int = 1000  # bootstrap over held-out documents


def weightings() -> dict[str, Weighting]:
    """The methods by name; `clean` and the oracles are uniform weights on other data."""
    select = rho1(mode="select", score="excess", percentile=0.6)
    return {
        "uniform": uniform(),
        "clean": uniform(),
        "oracle": uniform(),
        "oracle, next too": uniform(),
        **{f"select excess, {p}": rho1(mode="select", score="excess", percentile=p) for p in (0.6, 0.7, 0.8)},
        "select abs_excess, 0.6": rho1(mode="select", score="abs_excess", percentile=0.6),
        "select reference, 0.6": rho1(mode="select", score="reference", percentile=0.6),
        "soft excess": rho1(mode="soft", score="excess"),
        "emphasis excess": rho1(mode="emphasis", score="excess"),
        "dft": dft(),
        "entropy, top 0.6": entropy(mode="select", percentile=0.6),
        "shuffled(select excess, 0.6)": shuffled(select),
        "random_matched(select excess, 0.6)": random_matched(select),
    }


REDUCED = LearningSettings(
    seeds=(0, 1, 2),
    reference_steps=300,
    policies={"far behind": 60},
    methods={
        "far behind": (
            "uniform",
            "clean",
            "oracle",
            "select excess, 0.6",
            "select excess, 0.7",
            "random_matched(select excess, 0.6)",
        )
    },
    steps=30,
    held_out=160,
)
FULL = LearningSettings(
    seeds=(0, 1, 2),
    reference_steps=500,
    policies={"far behind": 60, "close": 500},
    methods={
        "far behind": tuple(weightings()),
        "close": (
            "uniform",
            "clean",
            "oracle",
            "select excess, 0.6",
            "select reference, 0.6",
            "dft",
            "random_matched(select excess, 0.6)",
        ),
    },
    steps=30,
    held_out=200,
)


def run(settings: LearningSettings, folder: Path, *, fresh: bool = False) -> dict:
    """The whole measurement.

    Args:
        folder: where the trained models are kept, and the held-out CE of each finished run, so that a killed
            measurement goes on.
        fresh: fine-tune again; the models it starts from are kept all the same.
    """
    parts = folder / f"learning-{_hash(settings)}"
    if fresh:
        shutil.rmtree(parts, ignore_errors=True)
    tokenizer = code_tokenizer()
    held_out = _packed(tokenizer, _functions(tokenizer, "heldout", FRACTIONS, settings.held_out))
    tuning = _functions(tokenizer, "reference", REST)
    reference = _trained(settings, "reference", settings.reference_steps, folder, tokenizer)
    result = {"settings": asdict(settings), "held_out_documents": int(_documents(held_out)[0].max()) + 1}
    result |= {"held_out_targets": held_out.num_targets, "tuning_tokens": sum(len(d) for d in tuning), "policies": {}}
    result["reference_ce"] = _mean(_held_out_ce(reference, held_out))

    for policy, steps in settings.policies.items():
        start = _trained(settings, "policy", steps, folder, tokenizer).state_dict()
        model = _new(tokenizer, num_heads=2, seed=1)
        model.load_state_dict(start)
        before = _held_out_ce(model, held_out)
        runs: dict[str, list[np.ndarray]] = {name: [] for name in settings.methods[policy]}
        for seed in settings.seeds:
            data = _tuning_data(settings, tokenizer, tuning, reference, seed)
            for name in runs:
                path = parts / f"{policy}-{name}-{seed}.npy".replace(" ", "_")
                if not path.exists():
                    model.load_state_dict(start)
                    fine_tune(
                        model, data.get(name, data["noisy"]), weightings()[name], steps=settings.steps,
                        batch_size=BATCH_SIZE, lr=settings.lr, seed=seed, warmup=5,
                    )  # fmt: skip
                    parts.mkdir(parents=True, exist_ok=True)
                    np.save(path, _held_out_ce(model, held_out))
                    print(f"# {policy}, {name}, seed {seed}: {_mean(np.load(path)):.3f}", flush=True)
                runs[name].append(np.load(path))
        result["policies"][policy] = {"before": _mean(before)} | _summary(runs, settings)
    return result


def _summary(runs: dict[str, list[np.ndarray]], settings: LearningSettings) -> dict:
    """Mean CE of each method with its difference to uniform, paired by seed and by held-out document.

    A run is [D, 2]: sum of head 1's CE and number of targets of each held-out document.
    """
    counts = resamples(np.arange(len(runs["uniform"][0])), settings.repeats, seed=0)
    targets = runs["uniform"][0][:, 1]
    out = {}
    for name, of_seed in runs.items():
        differences = [_mean(a) - _mean(b) for a, b in zip(of_seed, runs["uniform"], strict=True)]
        gap = np.mean([a[:, 0] - b[:, 0] for a, b in zip(of_seed, runs["uniform"], strict=True)], axis=0)
        draws = weighted_mean(gap, counts) / weighted_mean(targets, counts)
        out[name] = {
            "ce": t_interval([_mean(a) for a in of_seed]),
            "minus_uniform_over_seeds": t_interval(differences),
            "minus_uniform_over_documents": [float(gap.sum() / targets.sum()), *interval(draws)],
            "by_seed": differences,
        }
    return {"methods": out}


def _tuning_data(settings, tokenizer: Tokenizer, tuning: Documents, reference: MTPDecoder, seed: int) -> dict:
    """The same documents with noise, clean, and with noise that is no target, nor what follows it (the oracles)."""
    noisy, masks = zip(*(with_noise(d, settings.share, tokenizer.vocab_size, seed) for d in tuning), strict=True)
    after = [m | np.r_[False, m[:-1]] for m in masks]
    versions = {"noisy": noisy, "clean": tuning.items}
    for name, hidden in (("oracle", masks), ("oracle, next too", after)):
        versions[name] = [replace(d, labels=np.where(h, IGNORE, d.labels)) for d, h in zip(noisy, hidden, strict=True)]
    out = {}
    for name, documents in versions.items():
        data = _packed(tokenizer, Documents(tuning.name, tuple(documents)))
        ce = signals(reference, data, batch_size=16)[0] if name == "noisy" else np.zeros(data.tokens.shape, np.float32)
        out[name] = replace(data, signals={"reference_ce": torch.from_numpy(ce)})
    return out


def _held_out_ce(model: MTPDecoder, data: PackedDataset) -> np.ndarray:
    """[D, 2]: sum of head 1's CE in nats, and number of targets, of each held-out document."""
    ce, _ = signals(model, data, batch_size=16)
    document, targets = _documents(data)
    return np.stack([np.bincount(document, x[targets]) for x in (ce, np.ones_like(ce))], axis=1)


def _documents(data: PackedDataset) -> tuple[np.ndarray, np.ndarray]:
    """The number [N] of the document of every target, and where the targets are [R, S]."""
    ids = data.document_ids.numpy()
    targets = data.labels.numpy() != IGNORE
    targets[:, 0] = False
    targets[:, 1:] &= ids[:, 1:] == ids[:, :-1]
    number = ids + np.arange(len(data))[:, None] * (SEQ_LEN + 1)
    return np.unique(number[targets], return_inverse=True)[1], targets


def _hash(settings: LearningSettings) -> str:
    """Names what a finished run depends on, which is neither the number of seeds nor the list of methods."""
    what = {k: v for k, v in asdict(settings).items() if k not in ("seeds", "methods", "repeats")}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def _mean(ce: np.ndarray) -> float:
    return float(ce[:, 0].sum() / ce[:, 1].sum())


def _trained(settings: LearningSettings, who: str, steps: int, folder: Path, tokenizer: Tokenizer) -> MTPDecoder:
    """The reference (one head) or the policy (two), trained on clean code of its own modules."""
    num_heads, split, seed = (1, "reference", 2) if who == "reference" else (2, "train", 1)
    recipe = {"name": f"bpe-{who}", "steps": steps, "lr": 3e-3, "seed": seed, "vocab": tokenizer.vocab_hash()}

    def make(model: MTPDecoder) -> None:
        data = _packed(tokenizer, _functions(tokenizer, split, FRACTIONS))
        train(model, data, steps=steps, batch_size=BATCH_SIZE, lr=recipe["lr"], seed=seed, warmup=20)

    return kept(folder, recipe, _new(tokenizer, num_heads=num_heads, seed=seed), make)


def _new(tokenizer: Tokenizer, *, num_heads: int, seed: int) -> MTPDecoder:
    torch.manual_seed(seed)
    return llama_mtp(
        vocab_size=tokenizer.vocab_size,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=192,
        intermediate_dim=512,
        max_seq_len=SEQ_LEN,
        num_future_tokens=num_heads,
        tie_word_embeddings=True,
    )


def _functions(tokenizer, split: str, fractions: tuple[float, ...], most: int | None = None) -> Documents:
    documents = python_functions(tokenizer, split=split, fractions=fractions, max_functions=most)
    return all_targets(cut(documents, SEQ_LEN))


def _packed(tokenizer: Tokenizer, documents: Documents) -> PackedDataset:
    return pack(documents, SEQ_LEN, pad_id=tokenizer.pad_id)


def code_tokenizer() -> Tokenizer:
    """Byte-level BPE of VOCAB_SIZE ids, learned on the policy's training modules: a small softmax makes small steps."""
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(), trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **names), name="code_tokenizer")


def _texts() -> Iterator[str]:
    tokenizer = byte_tokenizer()
    for document in python_functions(tokenizer, split="train", fractions=FRACTIONS):
        yield tokenizer.decode([i for i in document.tokens.tolist() if i != tokenizer.eos_id])
