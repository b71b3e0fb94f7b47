"""Does a critic's value fall at the faulty line? Critics on frozen SmolLM2 states, ConDefects, folds by task.

The critic sees pairs of a correct and a faulty program and never a line number. Tasks are dealt into folds; the critic
of a fold is trained on the other folds' tasks and ranks the lines of the fold's faulty programs by how far its value
falls there, so every faulty program is held out once. Which layer, loss, tokens, head and rule of reading are used is
chosen inside the training tasks, on a part of them that this critic was not trained on. Beside it stand the plain
critics that stage 1 trains (last layer, linear head), and what needs no critic.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from wmtp.critic.localise import line_of_tokens
from wmtp.critic.losses import critic_loss
from wmtp.critic.metrics import pair_wins
from wmtp.critic.pair_dataset import PairDataset, balance_lengths, encode_pairs
from wmtp.critic.pairs import condefects_pairs
from wmtp.models.value import ValueHead
from wmtp.numerics.keyed import text_hash
from wmtp.pretrained import hf_tokenizer

from .models import SMOLLM2
from .states import States, frozen_states
from .statistics import hit_ranks, interval, resamples, value_drop_by_line, weighted_mean

FIGURES = ("top-1", "top-3", "top-5", "auc")
POSITION_BINS = 10


@dataclass(frozen=True)
class Critic:
    """A way to train a value head on frozen states.

    Attributes:
        layers: outputs of so many blocks, side by side; 30 is the normed state that the language model's head reads.
        loss: ``pairwise``, or ``mse`` with the reward spread evenly.
        tokens: ``response``: all of a program | ``diverging``: from the pair's first differing token on.
        head: ``linear`` | ``mlp``.
        pairs: ``balanced``: what stage 1 leaves for training | ``repeated``: all, those of the rarer sign of the
            length difference repeated until both signs are equally many in each bin of its size | ``all``: as they are.
        swapped: a control: in half of the training pairs, drawn at random, the faulty program is called correct; which
            half is the number's draw, 0 is none.
    """

    layers: tuple[int, ...]
    loss: str
    tokens: str = "response"
    head: str = "linear"
    pairs: str = "balanced"
    swapped: int = 0


@dataclass(frozen=True)
class FaultSettings:
    """What the measurement depends on; the seed is of lengths' balance, batches and the bootstrap."""

    seq_len: int  # longer programs are left out
    max_pairs: int | None
    critics: tuple[Critic, ...]  # to choose from
    rules: tuple[str, ...] = ("end", "token")
    folds: int = 5
    epochs: int = 5
    lr: float = 1e-3
    weight_decay: float = 0.1
    controls: int = 3  # draws of the critics with swapped labels
    repeats: int = 2000
    seed: int = 0

    @staticmethod
    def source() -> str:
        root = Path(__file__).resolve().parents[2]
        return str(Path(os.environ.get("WMTP_DATA", root.parent / "shared" / "data")) / "condefects")


PLAIN = {
    "critic, plain pairwise": Critic((30,), "pairwise"),
    "critic, plain pairwise, mlp": Critic((30,), "pairwise", head="mlp"),
    "critic, plain mse": Critic((30,), "mse"),
}
BALANCED, ALL = "critic, chosen, lengths balanced", "critic, chosen, all pairs"
SWAPPED = ", labels swapped"
_STATES = ((10,), (20,), (30,), (10, 20, 30))
REDUCED = FaultSettings(seq_len=128, max_pairs=400, critics=tuple(Critic(layers, "pairwise") for layers in _STATES))
FULL = FaultSettings(
    seq_len=192,
    max_pairs=None,
    critics=(
        *(Critic(layers, "pairwise") for layers in _STATES),
        Critic((10, 20, 30), "mse"),
        Critic((10, 20, 30), "pairwise", tokens="diverging"),
    ),
)


def run(settings: FaultSettings, folder: Path, *, fresh: bool = False) -> dict:
    """The whole measurement; ``folder`` keeps the frozen states, also under ``fresh``."""
    tokenizer = hf_tokenizer(SMOLLM2)
    data = encode_pairs(tokenizer, condefects_pairs(settings.source()), seq_len=settings.seq_len)
    if settings.max_pairs is not None:
        order = sorted(range(len(data)), key=lambda i: text_hash("sample", data.pairs[i].incorrect))
        data = data.take(sorted(order[: settings.max_pairs]))
    kept = set(balance_lengths(data, seed=settings.seed).pairs)
    balanced = np.array([pair in kept for pair in data.pairs])
    layers = tuple(sorted({layer for c in (*settings.critics, *PLAIN.values()) for layer in c.layers}))
    states = frozen_states(data, layers, folder)
    programs = [_faulty_program(tokenizer, data, i) for i in range(len(data))]

    fold = np.array([text_hash("fold", problem) % settings.folds for problem in data.problems])
    scores: dict[str, dict[int, np.ndarray]] = {}  # method -> pair -> [non-blank lines]
    wins: dict[str, np.ndarray] = {}
    chosen = []
    for held in range(settings.folds):
        # Accuracy is read where length tells nothing; lines are ranked in every program.
        train, test = np.flatnonzero(fold != held), np.flatnonzero(fold == held)
        readable = [i for i in test if programs[i] is not None]
        prior = position_prior([programs[i] for i in train if programs[i] is not None])
        for i in readable:
            for name, score in baselines(programs[i], states, prior, i).items():
                scores.setdefault(name, {})[i] = score
        critics = {name: (critic, "end") for name, critic in PLAIN.items()}
        for name, pairs in ((BALANCED, "repeated"), (ALL, "all")):
            candidates = [replace(critic, pairs=pairs) for critic in settings.critics]
            critic, rule, record = choose(candidates, settings, states, data, programs, train)
            critics[name] = (critic, rule)
            for draw in range(1, settings.controls + 1):
                critics[f"{name}{SWAPPED} {draw}"] = (replace(critic, swapped=draw), rule)
            chosen.append({"fold": held, **asdict(critic), "rule": rule, "validation": record})
            print(f"# fold {held}: {critic}, rule {rule}", flush=True)
        for name, (critic, rule) in critics.items():
            value = fit(critic, settings, states, data, train)
            for i in readable:
                scores.setdefault(name, {})[i] = drops(value(i, 1), programs[i], rule)
            compared = test[balanced[test]]
            both = np.array([[value(i, side).mean() for side in (0, 1)] for i in compared])
            wins.setdefault(name, np.full(len(data), np.nan))[compared] = pair_wins(both)

    known = np.array(sorted(scores["random"]))
    for name in (BALANCED, ALL, "line length"):
        scores[f"{name} + position"] = {i: _rank(scores[name][i]) + _rank(scores["position"][i]) for i in known}
    figures = {n: np.array([hit_ranks(s[i], programs[i].fault) for i in known]) for n, s in scores.items()}
    for name in (BALANCED, ALL):  # a single draw may find much or little by chance: the control is their mean
        for measured in (figures, wins):
            draws = [measured.pop(f"{name}{SWAPPED} {draw}") for draw in range(1, settings.controls + 1)]
            measured[name + SWAPPED] = np.mean(draws, axis=0)
    unequal = data.lengths[:, 0] != data.lengths[:, 1]
    counts = resamples(data.problems[known], settings.repeats, settings.seed)
    pair_counts = resamples(data.problems[balanced], settings.repeats, settings.seed)
    return {
        "settings": asdict(settings),
        "pairs": len(data),
        "balanced_pairs": int(balanced.sum()),
        "correct_is_longer": float((data.lengths[:, 0] > data.lengths[:, 1])[unequal].mean()),
        "tasks": len(set(data.problems)),
        "skipped": data.skipped,
        "tokens": int(states.length.sum()),
        "faulty_programs": len(known),
        "lines": float(np.mean([len(programs[i].lines) for i in known])),
        "chosen": chosen,
        "pairwise_accuracy": {
            name: [float(w[balanced].mean()), *interval(weighted_mean(w[balanced], pair_counts))]
            for name, w in wins.items()
        },
        "methods": {name: _table(name, figures, counts) for name in figures},
    }


def _table(name: str, figures: dict[str, np.ndarray], counts: np.ndarray) -> dict:
    """Each figure with its interval over tasks, and its paired differences to random, position and its own control."""
    out = {}
    others = {"position": "position", "random": "random"} | (
        {"control": name + SWAPPED} if name in (BALANCED, ALL) else {}
    )
    for k, figure in enumerate(FIGURES):
        values = figures[name][:, k]
        out[figure] = [float(values.mean()), *interval(weighted_mean(values, counts))]
        for other, baseline in others.items():
            gap = values - figures[baseline][:, k]
            out[f"{figure} minus {other}"] = [float(gap.mean()), *interval(weighted_mean(gap, counts))]
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Programs and what needs no critic


@dataclass(frozen=True)
class FaultyProgram:
    """A faulty program whose faulty line is known."""

    line_of_token: np.ndarray  # [T] from 1, without EOS
    lines: np.ndarray  # numbers of the non-blank lines, from 1
    text: tuple[str, ...]  # the non-blank lines
    fault: int  # index of the faulty one among them
    num_lines: int


def _faulty_program(tokenizer, data: PairDataset, i: int) -> FaultyProgram | None:
    """None where the faulty line is unknown or blank, or the program has a single line."""
    pair = data.pairs[i]
    text = pair.incorrect.removesuffix("\n").split("\n")
    lines = np.array([n for n, line in enumerate(text, start=1) if line.strip()])
    fault = np.flatnonzero(lines == pair.fault_line)
    if not len(fault) or len(lines) < 2:
        return None
    kept = tuple(text[n - 1] for n in lines)
    line_of_token = line_of_tokens(tokenizer, pair.incorrect)
    return FaultyProgram(line_of_token, lines, kept, int(fault[0]), max(len(text), int(line_of_token[-1])))


def position_prior(programs: list[FaultyProgram]) -> np.ndarray:
    """How often the faulty line lies in each tenth of the non-blank lines, relative to the lines there: [10]."""
    faults, lines = np.ones(POSITION_BINS), np.full(POSITION_BINS, float(POSITION_BINS))
    for program in programs:
        bins = _bins(len(program.lines))
        np.add.at(lines, bins, 1)
        faults[bins[program.fault]] += 1
    return faults / lines


def _bins(count: int) -> np.ndarray:
    return ((np.arange(count) + 0.5) / count * POSITION_BINS).astype(int)


def baselines(program: FaultyProgram, states: States, prior: np.ndarray, i: int) -> dict[str, np.ndarray]:
    """Scores of the non-blank lines without a critic, higher is more suspicious: [L] each."""
    rows = states.rows(i, 1)
    ce, entropy = (x[rows][: len(program.line_of_token)] for x in (states.ce, states.entropy))

    def per_line(values: np.ndarray, gather) -> np.ndarray:
        at = [values[program.line_of_token == n] for n in program.lines]
        return np.array([gather(v) if len(v) else np.nan for v in at])

    return {
        "random": np.zeros(len(program.lines)),
        "position": prior[_bins(len(program.lines))],
        "line length": np.array([float(len(line.strip())) for line in program.text]),
        "mean surprisal": per_line(ce, np.mean),
        "max surprisal": per_line(ce, np.max),
        "mean entropy": per_line(entropy, np.mean),
        "max entropy": per_line(entropy, np.max),
    }


def _rank(scores: np.ndarray) -> np.ndarray:
    """Share of the other entries below each one, ties half: [L] in [0, 1]."""
    return np.array([hit_ranks(scores, i)[-1] for i in range(len(scores))])


# ----------------------------------------------------------------------------------------------------------------------
# Critics


def choose(
    candidates: list[Critic],
    settings: FaultSettings,
    states: States,
    data: PairDataset,
    programs: list[FaultyProgram | None],
    train: np.ndarray,
) -> tuple[Critic, str, list[dict]]:
    """The critic and rule with the best AUC on a fifth of the training tasks, trained on the other four."""
    part = np.array([text_hash("validation", data.problems[i]) % 5 == 0 for i in train])
    validation = [i for i in train[part] if programs[i] is not None]
    record = []
    for critic in candidates:
        value = fit(critic, settings, states, data, train[~part])
        values = {i: value(i, 1) for i in validation}
        for rule in settings.rules:
            auc = np.mean([hit_ranks(drops(values[i], programs[i], rule), programs[i].fault)[-1] for i in validation])
            record.append({**asdict(critic), "rule": rule, "auc": float(auc)})
    best = max(range(len(record)), key=lambda n: record[n]["auc"])
    return candidates[best // len(settings.rules)], record[best]["rule"], record


def training_pairs(kind: str, data: PairDataset, rows: np.ndarray, seed: int) -> np.ndarray:
    """The pairs a critic is trained on, see :class:`Critic`."""
    if kind == "all":
        return rows
    if kind == "balanced":
        kept = set(balance_lengths(data.take(rows), seed=seed).pairs)
        return np.array([i for i in rows if data.pairs[i] in kept])
    difference = data.lengths[rows, 0] - data.lengths[rows, 1]
    bins = np.ceil(np.log2(np.maximum(np.abs(difference), 1)))  # those of balance_lengths: 1, 2, 3 to 4, 5 to 8, ...
    out = [rows[difference == 0]]
    for size in np.unique(bins[difference != 0]):
        longer, shorter = (rows[(bins == size) & (np.sign(difference) == sign)] for sign in (1, -1))
        most = max(len(longer), len(shorter))
        if len(longer) and len(shorter):
            out += [np.resize(longer, most), np.resize(shorter, most)]
    return np.concatenate(out)


def drops(values: np.ndarray, program: FaultyProgram, rule: str) -> np.ndarray:
    """How far the value falls at each non-blank line; values [T + 1] end with EOS, which belongs to no line."""
    per_line = value_drop_by_line(values[:-1], program.line_of_token, rule=rule, num_lines=program.num_lines)
    return per_line[program.lines - 1]


def fit(critic: Critic, settings: FaultSettings, states: States, data: PairDataset, rows: np.ndarray):
    """A function (pair, side) -> values [T], of a head trained on the pairs `rows`.

    Features are standardised by the training tokens' mean and deviation; the losses are those of stage 1.
    """
    rows = training_pairs(critic.pairs, data, rows, settings.seed)

    def raw(at: slice | np.ndarray) -> Tensor:
        parts = [states.hidden[layer][at].astype(np.float32) for layer in critic.layers]
        return torch.from_numpy(np.concatenate(parts, axis=-1))  # [n, D] for each layer, side by side

    sample = torch.cat([raw(states.rows(i, 1)) for i in rows[:: max(1, len(rows) // 200)]])
    mean, deviation = sample.mean(0), sample.std(0)
    head = ValueHead(sample.shape[1], critic.head)

    def features(at: slice | np.ndarray) -> Tensor:
        return (raw(at) - mean) / (deviation + 1e-3)

    loss_fn = critic_loss("pairwise") if critic.loss == "pairwise" else critic_loss("mse", "uniform")
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(rows) // 32)
    coins = np.random.default_rng([settings.seed, critic.swapped]).random(len(data))
    flipped = coins < (0.5 if critic.swapped else 0.0)
    for step, batch in enumerate(_batches(rows, settings)):
        optimizer.param_groups[0]["lr"] = settings.lr * (1 - step / steps)
        response, at = _batch_tokens(critic, states, data, batch)
        values = torch.zeros(response.shape)
        values[response] = head(features(at))
        rewards = torch.tensor([[1.0, 0.0]]).expand(len(batch), 2)
        swap = torch.from_numpy(flipped[batch])
        values, response = (torch.where(swap[:, None, None], x.flip(1), x) for x in (values, response))
        out = loss_fn(values, response, rewards)
        (out.loss_sum / out.count).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def value(pair: int, side: int) -> np.ndarray:
        return head(features(states.rows(pair, side))).numpy()

    return value


def _batches(rows: np.ndarray, settings: FaultSettings) -> Iterator[np.ndarray]:
    for epoch in range(settings.epochs):
        order = np.random.default_rng([settings.seed, epoch]).permutation(rows)
        yield from (order[start : start + 32] for start in range(0, len(order), 32))


def _batch_tokens(critic: Critic, states: States, data: PairDataset, batch: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Which tokens the loss reads, [P, 2, S] bool, and where their states are, in the same order."""
    longest = int(states.length[batch].max())
    response = torch.zeros(len(batch), 2, longest, dtype=torch.bool)
    at = []
    for n, i in enumerate(batch):
        first = 0
        if critic.tokens == "diverging":
            correct, faulty = (d.tokens for d in data.documents[i])
            short = min(len(correct), len(faulty))
            # Two documents differ, and both end in EOS, so they differ before the shorter one ends.
            first = int(np.argmax(correct[:short] != faulty[:short]))
        for side in (0, 1):
            length = int(states.length[i, side])
            response[n, side, first:length] = True
            at.append(np.arange(first, length) + states.start[i, side])
    return response, np.concatenate(at)
