"""Does low weight find the noise? A known share of the target tokens of held-out code is replaced by random ids.

Every weighting of :mod:`.methods` is called as training calls it, on signals of real models, and its weights are read
as a detector: the AUC with which a low weight tells a replaced token from a kept one. The raw score of each method is
read the same way, because the ties of `select` cap its weights' AUC. The reference is SmolLM2-135M fine-tuned on clean
code. The policies are a small decoder early in its training (far behind the reference) and SmolLM2-135M itself (close).
Methods that ask for the model that training began from get the small decoder as it was at the policy before; the first
of these, and SmolLM2, have just begun: they are it.
"""

import warnings
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from wmtp.data import Documents, PackedDataset, pack, python_functions
from wmtp.models import MTPDecoder, llama_mtp
from wmtp.pretrained import hf_tokenizer
from wmtp.weighting import Signals, any_weighting
from wmtp.weighting.targets import valid_targets

from .methods import METHODS
from .models import SMOLLM2, all_signals, all_targets, cut, kept, name_of, smollm2, train, with_noise
from .statistics import auc, interval, resamples

SEQ_LEN = 512  # of a packed row


@dataclass(frozen=True)
class NoiseSettings:
    """What the measurement depends on; the seed is of the noise, the small model and the bootstrap."""

    documents: int  # held-out functions
    reference_steps: int  # of 2 rows x 512 tokens, fine-tuning SmolLM2 on the reference split
    policies: dict[str, int]  # name -> steps of 2 x 512 tokens that the small policy has been trained for
    max_tokens: int = 192  # of a document
    share: float = 0.2  # of the targets that is replaced
    repeats: int = 500  # bootstrap
    seed: int = 0


REDUCED = NoiseSettings(
    documents=48, reference_steps=8, policies={"far behind, 20 steps": 20, "far behind, 60 steps": 60}
)
FULL = NoiseSettings(
    documents=128,
    reference_steps=32,
    policies={"far behind, 20 steps": 20, "far behind, 60 steps": 60, "between, 240 steps": 240},
)


def raw_scores(policy_ce: np.ndarray, policy_entropy: np.ndarray, reference_ce: np.ndarray) -> dict[str, np.ndarray]:
    """What the methods rank by, before a scope, a clip or a threshold: [N] each."""
    excess = policy_ce - reference_ce
    return {
        "excess": excess,
        "abs_excess": np.abs(excess),
        "relative_excess": excess / np.maximum(reference_ce, 1e-3),
        "reference": -reference_ce,
        "dft": -policy_ce,
        "entropy": policy_entropy,
    }


def run(settings: NoiseSettings, models: Path, *, fresh: bool = False) -> dict:
    """The whole measurement; ``models`` is a folder in which what was trained is kept, also under ``fresh``."""
    tokenizer = hf_tokenizer(SMOLLM2)
    vocab_size = tokenizer.vocab_size
    held_out = cut(python_functions(tokenizer, split="heldout", max_functions=settings.documents), settings.max_tokens)
    noisy, masks = zip(*(with_noise(d, settings.share, vocab_size, settings.seed) for d in held_out), strict=True)
    data = pack(Documents(held_out.name, noisy), SEQ_LEN, pad_id=tokenizer.pad_id)
    noise = _lay_out(data, {d.id: mask for d, mask in zip(noisy, masks, strict=True)})

    made = {
        name: partial(_small_policy, settings, steps, models, tokenizer) for name, steps in settings.policies.items()
    }
    made |= {"close": partial(smollm2, SEQ_LEN), "reference": partial(_reference, settings, models, tokenizer)}
    policies = {name: _kept_signals(settings, name, make, data, models) for name, make in made.items()}
    reference = policies.pop("reference")

    valid = valid_targets(data.labels.long(), 1, data.document_ids)  # [1, R, S]
    targets = valid[0].numpy()
    document = np.cumsum(np.r_[0, np.diff(_document_number(data)[targets]) != 0])
    before = np.zeros_like(noise)
    before[:, 1:] = noise[:, :-1]
    groups = {"all": targets[targets], "after noise": before[targets], "after clean": ~before[targets]}
    counts = resamples(document, settings.repeats, settings.seed)

    result = {"settings": asdict(settings), "targets": int(targets.sum()), "documents": int(document.max()) + 1}
    result["noise_share"] = float(noise[targets].mean())
    result["policies"] = {}
    steps = sorted(settings.policies, key=settings.policies.__getitem__)
    earlier = dict(zip(steps[1:], steps, strict=False))
    for name, policy in policies.items():
        initial = policies[earlier.get(name, name)]
        arrays = {
            **{name: figure for name, figure in policy.items() if name.startswith("policy")},
            "base_ce": initial["policy_ce"],
        }
        of_reference = {
            who: {"reference_ce": model["policy_ce"], "reference_mass": model["reference_mass"]}
            for who, model in (("trained", reference), ("initial", initial))
        }
        flat = [x[targets] for x in (policy["policy_ce"], policy["policy_entropy"], reference["policy_ce"])]
        detectors = {("score", key): score for key, score in raw_scores(*flat).items()}
        for key, method in METHODS.items():
            if not method.detects:
                continue
            signals = {k: torch.from_numpy(x) for k, x in (arrays | of_reference[method.reference]).items()}
            weights = _weights(method.weighting(), replace(data, signals=signals), valid, tokenizer)
            if weights is not None:
                detectors["weight", key] = weights[targets]
        result["policies"][name] = {
            "ce": _describe(flat, noise[targets]),
            "auc": _detect(detectors, noise[targets], groups, counts),
        }
    return result


def _weights(method, data: PackedDataset, valid: torch.Tensor, tokenizer) -> np.ndarray | None:
    """[R, S] weights as training would call for them; None of a method that asks for more, or gives all the same."""
    weighting = any_weighting(method)
    if not weighting.needs <= data.signals.keys():
        return None
    weighting.prepare(tokenizer, data)
    with warnings.catch_warnings(action="ignore"):  # scores without spread, where the reference is the policy
        named = {name: x[None] if name.startswith("policy") else x for name, x in data.signals.items()}
        weights = weighting(Signals(data.labels.long(), valid, data.document_ids.long(), named))
    return None if weights is None else weights.numpy()


def _kept_signals(settings: NoiseSettings, who: str, make, data: PackedDataset, folder: Path) -> dict[str, np.ndarray]:
    """What a model says of each target, kept in ``folder``, so that a method that is added later costs no forward."""
    what = {k: v for k, v in asdict(settings).items() if k != "repeats"} | {"of": who, "rows": data.rows_sha256}
    path = folder / f"signals-{name_of(what)}.npz"
    if not path.exists():
        found = all_signals(make(), data)
        partial_path = path.with_suffix(".partial")
        with partial_path.open("wb") as file:
            np.savez(file, **found)
        partial_path.rename(path)
        print(f"# signals of {who}", flush=True)
    with np.load(path) as kept_arrays:
        return dict(kept_arrays)


def _detect(detectors: dict, noise: np.ndarray, groups: dict, counts: np.ndarray) -> dict:
    """AUC of every detector in every group of targets with its interval, and its differences to the signed excess."""
    out: dict = {"score": {}, "weight": {}}
    for group, member in groups.items():
        draws = {}
        for (kind, key), low_is_noise in detectors.items():
            value = auc(-low_is_noise[member], noise[member])
            draws[kind, key] = auc(-low_is_noise[member], noise[member], counts[:, member])
            out[kind].setdefault(key, {})[group] = [value, *interval(draws[kind, key])]
        if group == "all":
            against = {"score": "excess", "weight": "soft excess"}
            for kind, key in detectors:
                gain = draws[kind, against[kind]] - draws[kind, key]
                out[kind][key]["excess minus this"] = [float(gain.mean()), *interval(gain)]
    return out


def _describe(flat: list[np.ndarray], noise: np.ndarray) -> dict:
    """What explains an AUC: mean CE of policy and reference on kept and replaced tokens, and deciles of the excess."""
    policy_ce, _, reference_ce = flat
    excess = policy_ce - reference_ce
    return {
        kind: {
            "policy": float(policy_ce[which].mean()),
            "reference": float(reference_ce[which].mean()),
            "excess_deciles": np.quantile(excess[which], np.linspace(0, 1, 11)).tolist(),
        }
        for kind, which in (("kept", ~noise), ("replaced", noise))
    }


def _lay_out(data: PackedDataset, masks: dict[str, np.ndarray]) -> np.ndarray:
    """Each document's mask at its place in the packed rows: [R, S] bool."""
    out = np.zeros(data.tokens.shape, bool)
    for row in range(len(data)):
        for number, name in enumerate(data.row_ids(row)):
            place = np.flatnonzero(data.document_ids[row].numpy() == number)
            out[row, place] = masks[name][: len(place)]
    return out


def _document_number(data: PackedDataset) -> np.ndarray:
    """[R, S] a number of its own for each document of the data set."""
    return (data.document_ids.long() + torch.arange(len(data))[:, None] * (SEQ_LEN + 1)).numpy()


def _reference(settings: NoiseSettings, models: Path, tokenizer) -> MTPDecoder:
    """SmolLM2-135M after a short next-token fine-tune on clean code of other modules."""
    recipe = {"name": "smollm2-reference", "steps": settings.reference_steps, "lr": 5e-5, "seed": settings.seed}

    def make(model: MTPDecoder) -> None:
        documents = all_targets(cut(python_functions(tokenizer, split="reference"), 256))
        data = pack(documents, SEQ_LEN, pad_id=tokenizer.pad_id)
        train(model, data, steps=recipe["steps"], batch_size=2, lr=recipe["lr"], seed=recipe["seed"], warmup=2)

    return kept(models, recipe, smollm2(SEQ_LEN), make)


def _small_policy(settings: NoiseSettings, steps: int, models: Path, tokenizer) -> MTPDecoder:
    """A decoder of four blocks with SmolLM2's vocabulary, trained from nothing for so many steps on the train split."""
    recipe = {"name": "small-policy", "steps": steps, "lr": 2e-3, "seed": settings.seed, "embed_dim": 192}
    torch.manual_seed(settings.seed)
    model = llama_mtp(
        vocab_size=tokenizer.vocab_size,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=recipe["embed_dim"],
        intermediate_dim=512,
        max_seq_len=SEQ_LEN,
        tie_word_embeddings=True,
    )

    def make(model: MTPDecoder) -> None:
        documents = all_targets(cut(python_functions(tokenizer, split="train"), 256))
        data = pack(documents, SEQ_LEN, pad_id=tokenizer.pad_id)
        train(model, data, steps=steps, batch_size=2, lr=recipe["lr"], seed=recipe["seed"])

    return kept(models, recipe, model, make)
