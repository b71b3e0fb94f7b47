"""Token weights say how much each target token counts in the loss.

A weight belongs to a target token j and is the same for every head that predicts it. A weighting is a callable that
reads the :class:`Signals` of a micro-batch and returns weights [B, S] (with ``per_head`` [H, B, S]), or None for all
ones. Weights have mean 1 over the valid targets of their scope, lie in [min_weight, max_weight], are 0 where there is
no target, finite, and carry no gradient. The scope ``sequence`` is one document (so packing changes nothing),
``batch`` all documents of one micro-batch on one rank. Training checks all of this in its first three steps and in
every 20th (:func:`check_weights`); a breach ends it with one line that names the method, the place and the value.

To add a method, write one builder: a function that returns a :class:`Weighting` made of a score (a number for each
target, from the signals) and a rule that turns the scores of one scope into weights. Name it in a config:

    def hard_tokens(temperature: float = 1.0) -> Weighting:
        return Weighting(
            lambda signals: signals.policy_ce / temperature,
            lambda scores, mask: clipped_mean_one(scores, mask, 0.1, 5.0),
            needs={"policy_ce"},
            bounds=(0.1, 5.0),
        )

    weighting:
      _component_: my_module.hard_tokens

A method that needs ``prior_ce`` reads the data's column of that name as ``signals.prior_ce``: no other file knows it.

A plain function of ``signals`` works too, named by ``_component_`` or returned by a builder. It may have the attributes
of :class:`AnyWeighting`. Without ``needs`` no signal is computed for it; without ``scope`` its mean is taken over the
micro-batch:

    def no_names(signals, least=0.2):
        weights = torch.where(signals.labels == 42, least, 1.0) * signals.valid[0]
        return weights * signals.valid[0].sum() / weights.sum().clamp(min=1e-9)
"""

from wmtp import on_demand
from wmtp.weighting.base import AnyWeighting, Signals, Weighting, any_weighting, check_weights
from wmtp.weighting.rows import clipped_mean, clipped_mean_one, spread, top_share, weigh_rows, z_score

__getattr__ = on_demand(
    __name__,
    from_data="given",
    controls="random_matched shuffled",
    methods="dft entropy rho1 uniform",
    over_data="token_cleaning",
    protected="protect",
    published="eaft infosft prift profit sstoken talr",
    statistics="target_table weight_statistics",
    values="critic gae value_deltas",
)
