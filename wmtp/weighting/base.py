"""The signals that a weighting reads, its attributes and promises, and the class that every method is composed of."""

import functools
import math
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.numerics.products import on_cuda
from wmtp.weighting.rows import SCOPES, ScopeRows, is_flat, scope_rows, weigh_rows
from wmtp.weighting.targets import Targets

NORMALIZE = ("mean", "raw")  # weights scaled to mean 1, or as they are
OF_THE_POLICY = ("policy_ce", "policy_entropy", "policy_top20_entropy")  # the signals that wmtp.loss.mtp_loss computes
# The key of the model that gives a signal.
FROM_A_MODEL = {"reference_ce": "reference_model", "reference_mass": "reference_model", "values": "value_model"}
_FIRST, _EVERY = 3, 20  # steps whose weights are checked
_MEAN_TOLERANCE, _BOUND_TOLERANCE = 1e-3, 1e-4  # far above what float32 weights and their sums are off


def way_to(signal: str) -> str:
    """Says in a message where a missing signal can come from."""
    if signal == "weight":
        return "give the data's rows, turns or characters a weight, or set the dataset's prompt_weight"
    if signal in OF_THE_POLICY:
        return "wmtp.loss.mtp_loss computes it"
    model = f"set {FROM_A_MODEL[signal]}, or " if signal in FROM_A_MODEL else ""
    return f"{model}use a dataset with a {signal} column, a number for each token"


@dataclass(frozen=True)
class Signals:
    """All that a weighting may read, indexed by target position j.

    Signals are read by name, as in ``signals.policy_ce``: those that the weighting ``needs``, and others at hand.

        policy_ce       [1 or H, B, S] float32, the policy's own CE in nats (H where ``per_head``)
        policy_entropy  [1, B, S] float32, entropy of head 1's distribution for target j, in nats
        policy_top20_entropy  [1, B, S] float32, the same of its 20 likeliest tokens alone, scaled to sum 1
        reference_ce    [B, S] float32, the reference's CE for target j
        reference_mass  [B, S] float32, p0(j) and what the reference holds less likely than it (wmtp.loss.reference)
        values          [B, S] float32, V_j: value of the prefix x_<=j, at every position of a document
        any other       [B, S] float32, the data's column of that name, 0 for padding
    """

    labels: Tensor  # [B, S], -100 where the token is no target
    valid: Tensor  # [H, B, S] bool, of wmtp.weighting.targets.valid_targets
    document_ids: Tensor | None = None  # [B, S]; None: each row is one document
    named: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = 0  # optimizer step, so that random controls draw anew each step
    training: bool = True  # False leaves the weighting's state as it is: the weights are only looked at
    targets: Targets | None = None  # the same targets, found on the host

    def __getattr__(self, name: str) -> Tensor:
        named = self.__dict__.get("named", {})
        if name in named:
            return named[name]
        there = ", ".join(named) or "none"
        raise AttributeError(f"no signal {name} here (there are: {there}); does the weighting name it in needs?")

    def rows(self, num_heads: int, scope: str) -> ScopeRows:
        """Returns where the first heads' targets are when each scope has a row (wmtp.weighting.rows.scope_rows)."""
        if self.targets is None:
            return scope_rows(self.valid[:num_heads], self.document_ids, scope)
        return self.targets.rows(num_heads, scope, self.labels.device)

    def require(self, needs: Collection[str]) -> None:
        """Raises a ValueError that names a missing signal and where it can come from."""
        for name in sorted(set(needs) - self.named.keys()):
            raise UserError(f"the weighting needs {name}, got none: {way_to(name)}")


class State(Protocol):
    """The memory that a weighting keeps from step to step."""

    def end_step(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


class AnyWeighting:
    """A callable from Signals to weights, with the attributes and methods that recipes use.

    Args:
        rule: it may have any of the attributes below and of the methods of :class:`State`. A plain function needs only
            labels and valid pairs, gives weights >= 0 with mean 1 over the micro-batch, and remembers nothing.

    Attributes:
        name: the name in messages: the function's, or that of the builder that made it.
        needs: names of the signals read, see :class:`Signals`.
        per_head: whether it reads the CE of all heads, for weights [H, B, S].
        bounds: least and largest weight.
        scope: the mean is 1 over the targets of one ``sequence`` (a document), or of the ``batch``.
        mean_one: whether it is: ``always``, ``unless_zero`` (every weight of a scope may be 0) or ``never``.

    Raises:
        ValueError: not a callable, or an unknown scope.
    """

    def __init__(self, rule: Callable[[Signals], Tensor | None]) -> None:
        if not callable(rule):
            raise UserError(f"a weighting must be a callable from Signals to weights, got {rule!r}")
        self._rule = rule
        while isinstance(rule, functools.partial):
            rule = rule.func
        self._state = rule
        self.name: str = getattr(rule, "name", None) or builder_of(rule)
        self.needs: frozenset[str] = frozenset(getattr(rule, "needs", ()))
        self.per_head: bool = getattr(rule, "per_head", False)
        self.bounds: tuple[float, float] = getattr(rule, "bounds", (0.0, math.inf))
        self.scope: str = getattr(rule, "scope", "batch")
        self.mean_one: str = getattr(rule, "mean_one", "always")
        check_choice("scope", self.scope, SCOPES)

    @torch.no_grad()
    def __call__(self, signals: Signals) -> Tensor | None:
        """Returns weights [B, S] or [H, B, S]; None for all ones."""
        signals.require(self.needs)
        return self._rule(signals)

    def prepare(self, tokenizer: Any, data: Any) -> None:
        """Tells the method, before training, the tokenizer and the :class:`wmtp.data.PackedDataset`, if it asks."""
        if hasattr(self._state, "prepare"):
            self._state.prepare(tokenizer, data)

    def rehearse(self) -> None:
        """Lets a method that asks to be prepared be called without: in a plan, on random signals in [0, 1)."""
        if hasattr(self._state, "rehearse"):
            self._state.rehearse()

    def end_step(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Merges what the step's calls gathered, over all ranks; call it once per optimizer step, before saving.

        Args:
            all_reduce_sum: sum of a float64 tensor over all ranks; a collective, called only if there is a state.
        """
        if hasattr(self._state, "end_step"):
            self._state.end_step(all_reduce_sum)

    def state_dict(self) -> dict:
        """Returns the state that a resumed run needs, the same on every rank; {} for a method without a memory."""
        return self._state.state_dict() if hasattr(self._state, "state_dict") else {}

    def load_state_dict(self, state: dict) -> None:
        """Restores a :meth:`state_dict`; raises a ValueError where the state is another method's."""
        if hasattr(self._state, "load_state_dict"):
            self._state.load_state_dict(state)
        elif state:
            raise UserError(
                f"this weighting keeps no state, got one with {', '.join(sorted(state))}; "
                "resume with the weighting of the checkpoint"
            )


def any_weighting(rule: Callable[[Signals], Tensor | None]) -> AnyWeighting:
    """Returns ``rule`` as an :class:`AnyWeighting`: itself if it is one already."""
    return rule if isinstance(rule, AnyWeighting) else AnyWeighting(rule)


def builder_of(rule: Any) -> str:
    """Returns the name of a function or of the function that made it; for an object, its class's name."""
    name: str = getattr(rule, "__qualname__", type(rule).__name__)
    return name.split(".<locals>")[0]


class Weighting(AnyWeighting):
    """A score for each target and a rule that turns the scores of one scope into weights.

        w = to_weights(score(signals))        w~ = (1 - strength) + strength * w

    Args:
        score: ``score(signals) -> [heads, B, S]`` or [1, B, S], with heads = H where ``per_head``, else 1. It gets the
            needed signals detached and in float32, ``policy_ce`` of these heads only. Its values where a head has no
            target are never read.
        to_weights: ``to_weights(scores [G, L], mask [G, L]) -> [G, L]`` with mean 1 over each row's real entries. A
            row is one scope and has at least one real entry.
        needs: names of the signals read, see :class:`Signals`.
        scope: ``sequence`` or ``batch``.
        strength: lambda in [0, 1]. At 0 no weight is computed and nothing is needed: plain MTP, bit for bit.
        per_head: weights [H, B, S], for scores from the CE of all heads.
        bounds: least and largest weight that ``to_weights`` gives.
        state: the method's memory from step to step; None for none.
        mean_one: as in :class:`AnyWeighting`.
        why_flat: what scores without spread in a scope mean; with it, such scopes are warned of (on CUDA in the steps
            whose weights are checked).

    Attributes:
        name: the name of the function that made it.
        needs, per_head: as given; nothing and False at strength 0.
        bounds: least and largest weight returned, strength included.

    Raises:
        ValueError: an unknown scope, or a strength outside [0, 1].
    """

    def __init__(
        self,
        score: Callable[[Signals], Tensor],
        to_weights: Callable[[Tensor, Tensor], Tensor],
        *,
        needs: Collection[str],
        scope: str = "sequence",
        strength: float = 1.0,
        per_head: bool = False,
        bounds: tuple[float, float] = (0.0, math.inf),
        state: State | None = None,
        why_flat: str | None = None,
        mean_one: str = "always",
    ) -> None:
        check_choice("scope", scope, SCOPES)
        check_range("strength", strength, 0 <= strength <= 1, "in [0, 1] (lambda)")
        weighted = strength > 0
        self.needs: frozenset[str] = frozenset(needs) if weighted else frozenset()
        self.per_head = per_head and weighted
        low, high = (1 - strength + strength * end for end in bounds) if weighted else (1.0, 1.0)
        self.bounds = low, high
        self.name = sys._getframe(1).f_code.co_qualname.split(".<locals>")[0]
        self.scope, self.mean_one = scope, mean_one
        self._score, self._to_weights, self._strength = score, to_weights, strength
        self._why_flat = why_flat
        self._state: Any = state if weighted else None

    @torch.no_grad()
    def __call__(self, signals: Signals) -> Tensor | None:
        """Returns weights [B, S], with ``per_head`` [H, B, S]; None for all ones.

        Raises:
            ValueError: a signal is missing or has another shape, or a score is not finite.
        """
        if self._strength == 0:
            return None
        heads = signals.valid.shape[0] if self.per_head else 1
        valid = signals.valid[:heads]
        scores = self._score(self._prepared(signals, heads)).expand(valid.shape)
        rows = signals.rows(heads, self.scope)
        weights = weigh_rows(scores, rows, self._to_weights)
        if self._why_flat and len(rows.row) and (is_checked(signals.step) or not on_cuda(scores)):
            self._warn_of_flat(scores, rows)
        weights = (1 - self._strength) * valid + self._strength * weights
        return weights if self.per_head else weights[0]

    def _warn_of_flat(self, scores: Tensor, rows: ScopeRows) -> None:
        flat = is_flat(rows.lay(scores[rows.place]), rows.mask) & (rows.mask.sum(1, keepdim=True) > 1)
        if bool(flat.any()):
            warnings.warn(
                f"{self.name}: scores without spread in {int(flat.sum())} of {len(flat)} scopes ({self._why_flat}): "
                "these get weight 1 everywhere",
                stacklevel=2,
            )

    def _prepared(self, signals: Signals, heads: int) -> Signals:
        """Returns the needed signals alone, checked, detached and in float32."""
        signals.require(self.needs)
        ready = {}
        for name in sorted(self.needs):
            signal = signals.named[name]
            if signal.shape[-2:] != signals.labels.shape:
                raise ValueError(
                    f"{name} must have the labels' [B, S] = {tuple(signals.labels.shape)}, got {tuple(signal.shape)}"
                )
            ready[name] = signal.detach().float()
        if "policy_ce" in ready:
            if len(ready["policy_ce"]) < heads:
                raise ValueError(f"per_head weights need policy_ce of all {heads} heads, got {len(ready['policy_ce'])}")
            ready["policy_ce"] = ready["policy_ce"][:heads]
        return replace(signals, named=ready)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is none of the allowed ones."""
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_range(name: str, value: float, ok: bool, allowed: str) -> None:
    """Refuses a number out of range; the caller makes the comparison ``ok``, which NaN always fails."""
    if not ok:
        raise UserError(f"{name} must be {allowed}, got {value}")


def check_clip(min_weight: float, max_weight: float) -> tuple[float, float]:
    """Returns the clip of a continuous method; it must contain 1, so that mean 1 can be reached."""
    check_range("min_weight", min_weight, 0 <= min_weight <= 1, "in [0, 1]")
    check_range("max_weight", max_weight, 1 <= max_weight < math.inf, ">= 1 and finite")
    return float(min_weight), float(max_weight)


def is_checked(step: int) -> bool:
    """Returns whether the step's weights are checked: in few steps, because the check waits for the device."""
    return step < _FIRST or step % _EVERY == 0


def check_weights(weights: Tensor | None, signals: Signals, weighting: AnyWeighting) -> None:
    """Refuses ``weights`` of ``weighting`` that break its promises (:mod:`wmtp.weighting`); None is always right.

    Raises:
        ValueError: another shape than [B, S] or [H, B, S], a gradient, a weight that is not finite, is out of bounds or
            lies where no target is, or a scope whose mean is not 1. The message names weighting, place and value.
    """
    if weights is None:
        return
    name, (low, high) = f"weighting {weighting.name}", weighting.bounds
    shapes = tuple(signals.labels.shape), tuple(signals.valid.shape)
    if not torch.is_tensor(weights) or tuple(weights.shape) not in shapes:
        got = f"shape {tuple(weights.shape)}" if torch.is_tensor(weights) else type(weights).__name__
        raise UserError(f"{name} must return weights [B, S] = {shapes[0]} or [H, B, S] = {shapes[1]}, got {got}")
    if weights.requires_grad:
        raise UserError(f"{name} returned weights that carry a gradient; detach them")
    w = weights.reshape(-1, *shapes[0]).double()
    valid = signals.valid[: len(w)]

    def refuse(bad: Tensor, what: str, way_out: str) -> None:
        places = bad.nonzero()
        if len(places):
            head, row, j = places[0].tolist()
            at = f"{f'head {head + 1}, ' if len(w) > 1 else ''}row {row}, token {j}"
            value = f"{w[head, row, j].item():.6g}"
            raise UserError(f"{name} gave {len(places)} weights {what}, the first at {at}: {value}; {way_out}")

    refuse(valid & ~w.isfinite(), "that are not finite", "look at the signals that it reads")
    refuse(~valid & (w != 0), "not 0 where no target is", "multiply by signals.valid (a weight belongs to its target)")
    slack = _BOUND_TOLERANCE * max(1.0, abs(low)), _BOUND_TOLERANCE * (high if high < float("inf") else 1.0)
    outside = valid & ((w < low - slack[0]) | (w > high + slack[1]))
    refuse(outside, f"outside its bounds [{low:g}, {high:g}]", "see wmtp.weighting.clipped_mean_one")
    if weighting.mean_one == "never":
        return
    rows = scope_rows(valid, signals.document_ids, weighting.scope)
    means = rows.lay(w[rows.place]).sum(1) / rows.mask.sum(1)  # [G]
    off = (means - 1).abs() > _MEAN_TOLERANCE
    if weighting.mean_one == "unless_zero":
        off &= means != 0
    off = off.nonzero()
    if len(off):
        group = int(off[0])
        head, row, j = torch.stack(rows.place, dim=1)[rows.row == group][0].tolist()
        at = f"{f'head {head + 1}, ' if len(w) > 1 else ''}row {row}, from token {j} on"
        where = "the batch" if weighting.scope == "batch" else f"the document in {at}"
        raise UserError(
            f"{name} gave weights of mean {means[group].item():.6g} over the {int(rows.mask[group].sum())} targets of "
            f"{where} ({len(off)} of {len(means)} scopes are off); it must be 1: divide by the mean, or see "
            "wmtp.weighting.clipped_mean_one"
        )
