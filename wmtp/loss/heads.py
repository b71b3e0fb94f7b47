"""How the extra heads are trained: their weights over time, their targets, and what they may do to the trunk."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.loss.fused import head_weight_tensor
from wmtp.loss.soft_targets import SoftTargets

_TARGETS = {"hard": (1.0, 0.0), "soft": (0.0, 1.0), "both": (1.0, 1.0)}


class HeadTraining:
    """The options of heads 2 to H; the function of a config's section `heads`.

        b_k(step) = head_weights[k] * decay^(k - 1) * min(1, (step + 1) / warm_up_steps) * max(floor, agreement_k)

    for k >= 2, each factor where its option is set; b_1 is head_weights[1]. The loss is divided by sum_k b_k N_k, so
    that only the ratios of the b_k matter: FastMTP's (2509.18362) and speculators' beta^(k-1), scaled to sum 1, are
    ``decay=0.6``. agreement_k is the cosine between the gradients that head k and head 1 give to the trunk's state in a
    step, averaged over steps: a head that pulls the trunk another way than head 1 counts less. (That gradients should
    agree is from RL-MTP, 2605.28184; its formula is for reinforcement learning.) Looped heads give the trunk one
    gradient together, so that they have one agreement and one factor.

    Args:
        trunk_gradient: factor of the gradient that an extra head gives to all that head 1 uses: trunk, norm and
            unembedding; one for all, or one for each (looped heads: one for all). 1 is joint training (Meta), 0
            detached: no backward pass of the trunk for this head.
        targets: ``hard``: the data's tokens; ``soft``: a distribution of the same token, :class:`SoftTargets`;
            ``both``: the sum.
        soft_weight: of the divergence in ``soft`` and ``both``.
        top_k, temperature, teacher: of the distribution.
        decay: beta, > 0; null: none.
        warm_up_steps: optimizer steps until heads 2 to H count in full; 0: from the start.
        adaptive: weigh heads by the agreement; needs trunk_gradient > 0.
        floor, momentum: least agreement, and share of the average that a step keeps.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        trunk_gradient: float | Sequence[float] = 1.0,
        targets: str = "hard",
        soft_weight: float = 1.0,
        top_k: int = 64,
        temperature: float = 1.0,
        teacher: str = "head1",
        decay: float | None = None,
        warm_up_steps: int = 0,
        adaptive: bool = False,
        floor: float = 0.05,
        momentum: float = 0.9,
    ) -> None:
        factors = [trunk_gradient] if isinstance(trunk_gradient, int | float) else list(trunk_gradient)
        if not factors or not all(isinstance(f, int | float) and 0 <= f < math.inf for f in factors):
            raise UserError(f"trunk_gradient must be a number >= 0, or one for each extra head, got {trunk_gradient}")
        if targets not in _TARGETS:
            raise UserError(f"targets must be one of {', '.join(_TARGETS)}, got {targets!r}")
        if decay is not None and not 0 < decay < math.inf:
            raise UserError(f"decay must be a number > 0, or null, got {decay}")
        if warm_up_steps < 0:
            raise UserError(f"warm_up_steps must be a whole number >= 0, got {warm_up_steps!r}")
        if not 0 <= soft_weight < math.inf or (targets == "soft" and not soft_weight):
            raise UserError(f"soft_weight must be a number >= 0, with targets=soft > 0, got {soft_weight}")
        for name, value in (("floor", floor), ("momentum", momentum)):
            if not 0 <= value < 1:
                raise UserError(f"{name} must be in [0, 1), got {value}")
        if adaptive and not all(factors):
            raise UserError("adaptive needs trunk_gradient > 0: a detached head gives the trunk no gradient to agree")
        hard, soft = _TARGETS[targets]
        rule = SoftTargets(soft_weight, hard, top_k, temperature, teacher)  # checks them also where they do not count
        self.soft_targets = rule if soft else None
        self._factors, self._decay, self._warm_up = [float(f) for f in factors], decay, warm_up_steps
        self._adaptive, self._floor, self._momentum = adaptive, floor, momentum
        self._base: Tensor | None = None

    @property
    def teacher(self) -> str | None:
        """Returns whose distributions are soft targets: ``head1``, ``reference``, or None for none."""
        return None if self.soft_targets is None else self.soft_targets.teacher

    def require_teacher(self, reference_model: Any) -> None:
        """Refuses a frozen teacher where the config has no `reference_model`."""
        if self.teacher == "reference" and reference_model is None:
            raise UserError("heads: teacher is 'reference', and there is no reference_model; set it, or teacher=head1")

    def prepare(
        self,
        num_heads: int,
        head_weights: Sequence[float] | None,
        device: torch.device | str,
        *,
        model: Any = None,
        num_steps: int | None = None,
    ) -> None:
        """Fits the options to a model with H heads and its `head_weights`.

        Args:
            model: the :class:`~wmtp.models.MTPDecoder`, which says whether heads are looped and the trunk is trained;
                by default separate heads, and a trained trunk.
            num_steps: of the run, where its length is known.

        Raises:
            ValueError: another number of factors or weights than heads, several factors for looped heads, agreement of
                gradients that are not there, or a warm-up that the run would not reach the end of.
        """
        looped = model is not None and model.config.looped_heads
        given, extra = len(self._factors), num_heads - 1
        if given not in (1, extra) or (extra == 0 and self._changes_extra_heads):
            raise UserError(
                f"heads: trunk_gradient has {given} factors, the model {extra} extra heads; give one for each, or one"
                if extra
                else "heads: the model has one head, so that no option of extra heads can count; set num_future_tokens"
            )
        if looped and len(set(self._factors)) > 1:
            raise UserError(
                f"heads: trunk_gradient has factors {self._factors}, and looped heads give the trunk one gradient "
                "together; give one factor, or set looped_heads=false"
            )
        if num_steps and self._warm_up > num_steps:  # no step at all is an evaluation
            raise UserError(
                f"heads: warm_up_steps {self._warm_up} is longer than the run's {num_steps} steps: heads 2 and on "
                "would never reach their weight; lower it, or raise max_steps or epochs"
            )
        self._factors = self._factors * (extra if given == 1 else 1)
        base = head_weight_tensor(head_weights, num_heads, device)
        frozen = model is not None and not _trains_trunk(model)
        unweighted = head_weights is not None and not head_weights[0]
        if self._adaptive and (frozen or unweighted):
            why = "the trunk is frozen" if frozen else "head_weights is 0 for head 1"
            raise UserError(f"heads: adaptive compares gradients in the trunk's state, and {why}; set adaptive=false")
        if self._decay is not None:
            decay = self._decay ** torch.arange(num_heads, device=device, dtype=torch.float32)
            base = decay if base is None else base * decay
        self._base = base
        if self._adaptive or self._warm_up:
            self._base = torch.ones(num_heads, device=device) if base is None else base
        branches = 2 if looped else num_heads
        self._sums = torch.zeros(2, branches, device=device) if self._adaptive else None
        self._average = torch.ones(branches, dtype=torch.float64, device=device)

    @property
    def _changes_extra_heads(self) -> bool:
        return bool(self.soft_targets or self._decay or self._warm_up or self._adaptive or set(self._factors) != {1.0})

    def at(self, step: int) -> dict[str, Any]:
        """Returns the arguments of the model's forward pass, for :func:`wmtp.loss.mtp_loss`, at an optimizer step."""
        weights = self._base
        if weights is not None and self._warm_up:
            weights = torch.cat([weights[:1], weights[1:] * min(1.0, (step + 1) / self._warm_up)])
        if weights is not None and self._adaptive:
            weights = torch.cat([weights[:1], weights[1:] * self._average[1:].clamp(min=self._floor).float()])
        found: dict[str, Any] = {"head_weights": weights, "head_targets": self.soft_targets}
        if set(self._factors) - {1.0}:
            found["trunk_gradient"] = (1.0, *self._factors)
        return found | ({} if self._sums is None else {"agreement": self._sums})

    def end_step(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Takes the step's gradients into the average agreement, over all ranks; once per optimizer step."""
        if self._sums is not None:
            products, squares = all_reduce_sum(self._sums.double())
            cosines = products / (squares * squares[0]).sqrt().clamp(min=1e-30)
            self._average = self._momentum * self._average + (1 - self._momentum) * cosines
            self._sums.zero_()

    def state_dict(self) -> dict:
        """Returns what a resumed run needs, the same on every rank; {} without adaptive weights."""
        return {"agreement": self._average.tolist()} if self._adaptive else {}

    def load_state_dict(self, state: dict) -> None:
        """Restores a :meth:`state_dict`."""
        if "agreement" in state and self._adaptive:
            self._average = torch.tensor(state["agreement"], dtype=torch.float64, device=self._average.device)


def _trains_trunk(model: Any) -> bool:
    below = (model.tok_embeddings, *model.layers[:-1])  # the state that all heads read
    return any(parameter.requires_grad for module in below for parameter in module.parameters())
