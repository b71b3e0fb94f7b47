"""Pages that show micro-batches of a training run with the weights that the loss used."""

from collections.abc import Callable, Mapping, Set
from typing import Any

from torch import Tensor

from wmtp.data import PackedDataset
from wmtp.errors import UserError
from wmtp.loss import MTPLoss
from wmtp.report.token_views import token_views
from wmtp.report.token_weights import token_weights_html
from wmtp.weighting import Signals, any_weighting
from wmtp.weighting.base import OF_THE_POLICY

_TITLES = {"reference_ce": "reference CE", "values": "value", "weight": "given weight"}


class TokenWeightPages:
    """Pages of a run's token weights on its code, every so many steps.

    Args:
        every: optimizer steps between pages, >= 1.
        documents: at most so many documents on a page, >= 1.
        beside: other weightings by name, shown beside the run's own for the same tokens. They may read the policy's CE,
            and whatever else the run's own weighting reads.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, every: int, documents: int = 4, beside: Mapping[str, Callable[[Signals], Tensor | None]] | None = None
    ) -> None:
        for name, value in {"every": every, "documents": documents}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number >= 1, got {value!r}")
        self.every, self._documents = every, documents
        self._beside = {name: any_weighting(method) for name, method in (beside or {}).items()}

    def check(self, needs: Set[str]) -> None:
        """Refuses a weighting that needs a signal which the run does not have.

        Args:
            needs: signals that the run's own weighting reads.
        """
        at_hand = {"policy_ce"} | (needs - set(OF_THE_POLICY))
        for name, method in self._beside.items():
            lacking = sorted(method.needs - at_hand)
            if lacking:
                raise UserError(
                    f"token_view.beside.{name} reads {', '.join(lacking)}, which this run's weighting does not; "
                    "leave it out"
                )

    def page(
        self, tokenizer, data: PackedDataset, batch: Mapping[str, Any], out: MTPLoss, step: int, settings: Mapping
    ) -> tuple[str, str]:
        """Returns the name and HTML of a page of a micro-batch's documents, shaded by the weights that the loss used.

        Args:
            data: whose rows the batch has.
            batch: tokens, labels and document_ids [B, S], the run's signals, and `rows`.
            out: the result of :func:`wmtp.loss.mtp_loss` for the batch.
            step: the step's number, from 1; random controls draw the numbers of that step.
            settings: listed above the documents, such as the run's weighting.
        """
        named = batch["signals"] | {"policy_ce": out.ce}
        signals = Signals(batch["labels"], out.valid, batch["document_ids"], named, step=step - 1, training=False)
        weights = {"this run": out.weights, **{name: method(signals) for name, method in self._beside.items()}}
        shown = {"CE": out.ce[0]}
        shown |= {_TITLES.get(name, name): signal for name, signal in batch["signals"].items() if name != "policy_ce"}
        ids = [data.row_ids(row) for row in batch["rows"]]
        views = token_views(tokenizer, batch, weights, shown, ids=ids, limit=self._documents)
        page = token_weights_html(views, title=f"Token weights of step {step}", settings=dict(settings))
        return f"token_weights/step_{step:08d}.html", page
