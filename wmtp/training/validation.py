"""Cross-entropy over whole data sets and each of their documents, each rank its share of the rows."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn

from wmtp.config import ConfigError
from wmtp.data import PackedDataset, validation_batches
from wmtp.distributed import World, all_reduce_sum
from wmtp.files import publish, unfinished
from wmtp.loss import score_heads, token_cross_entropy, weighted_mtp_cross_entropy
from wmtp.models import MTPDecoder


@dataclass(frozen=True)
class HeldOut:
    """The cross-entropies of one evaluation, the same on every rank.

    Attributes:
        metrics: the mean of each head over all target tokens of a set, by its name: ``eval/ce_head1``, and
            ``eval/code/ce_head1`` of a set that has a name.
        documents: the columns of :meth:`write`, one row for each document and head that has targets in it.
        sha256: of each set's packed rows (:attr:`~wmtp.data.PackedDataset.rows_sha256`).
    """

    metrics: dict[str, float]
    documents: dict[str, list]
    sha256: dict[str, str]

    def write(self, path: Path) -> None:
        """Writes the documents as a Parquet file, atomically; equal figures are equal bytes.

        Columns: ``set`` ("" for the only one), ``document`` (its id), ``number`` (its place in its set), ``head`` (from
        1), ``targets`` (tokens) and ``ce`` (their mean, in nats), sorted by set, number and head. The file's metadata
        hold :attr:`sha256` as JSON.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        types = {"set": pa.string(), "document": pa.string(), "number": pa.int32(), "head": pa.int8()}
        types |= {"targets": pa.int32(), "ce": pa.float64()}
        schema = pa.schema(types.items(), metadata={"sha256": json.dumps(self.sha256)})
        written = unfinished(path)
        pq.write_table(pa.table(self.documents, schema=schema), written)
        publish(written, path)


def held_out_sets(
    section: DictConfig | None, pack: Callable[[DictConfig, str], PackedDataset]
) -> dict[str, PackedDataset]:
    """Returns a config's held-out sets by name: none, one without a name (""), or each of a mapping of sections.

    Args:
        section: ``eval_dataset``: a section that builds a data set, or sections by name.
        pack: builds and packs the data set of a section, which has this name in messages.

    Raises:
        ConfigError: a name with other signs than letters, digits, _ and -, or that names no section.
    """
    if section is None:
        return {}
    if "_component_" in section or not section:
        return {"": _plain(pack(section, "eval_dataset"))}
    named = {str(name): of_set for name, of_set in section.items()}
    for name, of_set in named.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"eval_dataset has a set named {name!r}; use letters, digits, _ and -")
        if not OmegaConf.is_dict(of_set):
            raise ConfigError(
                f"eval_dataset.{name} must be the section of a set of that name, got {of_set!r}; for one set without a "
                "name give eval_dataset a _component_"
            )
    return {name: _plain(pack(of_set, f"eval_dataset.{name}")) for name, of_set in named.items()}


def _plain(data: PackedDataset) -> PackedDataset:
    data.require_read((), "held-out CE")
    return data


@torch.no_grad()
def validate(
    model: MTPDecoder,
    sets: Mapping[str, PackedDataset],
    inputs: Callable[[dict], dict],
    batch_size: int,
    world: World,
    choices: bool = False,
) -> HeldOut:
    """Computes the CE of each head, in nats per target token, over all of each data set and over each document.

    Args:
        model: an :class:`~wmtp.models.MTPDecoder`, which is left in evaluation mode.
        sets: by name; "" for one that needs none.
        inputs: what the model reads of a batch, on its device.
        batch_size: rows of one rank's batch.
        choices: also ``accuracy_head{k}``, the share of targets that are the head's likeliest token, and
            ``agreement_head{k}``, k > 1, of those at which its likeliest token is head 1's: the share of drafts that
            would be accepted if each text were the data's own, and each draft verified.
    """
    model.eval()
    loss_fn = score_heads if choices else weighted_mtp_cross_entropy
    found = HeldOut({}, {name: [] for name in ("set", "document", "number", "head", "targets", "ce")}, {})
    for name, data in sorted(sets.items()):
        heads = torch.zeros(4 if choices else 2, model.num_future_tokens, dtype=torch.float64, device=world.device)
        numbers = torch.from_numpy(data.members)
        firsts = torch.from_numpy(data.starts[:-1, None])  # of each row
        documents = torch.zeros(2, len(heads[0]), len(numbers), dtype=torch.float64)
        for batch in validation_batches(data, batch_size, world.rank, world.size):
            labels = batch["labels"].to(world.device)
            out = model(**inputs(batch), labels=labels, loss_fn=loss_fn)
            parts = (out.ce, out.valid, *((out.correct, out.agreed) if choices else ()))
            heads += torch.stack([part.double().sum(dim=(1, 2)) for part in parts])
            rows = batch["rows"]
            of_token = firsts[rows] + batch["document_ids"][: len(rows)].clamp(min=0)  # padding has CE and count 0
            for total, part in zip(documents, (out.ce, out.valid), strict=True):
                total.index_add_(1, of_token.flatten(), part[:, : len(rows)].cpu().double().flatten(1))
        ce, count, *shares = all_reduce_sum(heads)
        prefix = f"eval/{name}/" if name else "eval/"
        for figure, total in {"ce": ce, **dict(zip(("accuracy", "agreement"), shares, strict=False))}.items():
            means = {f"{prefix}{figure}_head{k}": mean for k, mean in enumerate((total / count).tolist(), start=1)}
            found.metrics.update(means)
        found.metrics.pop(f"{prefix}agreement_head1", None)  # with itself
        # Every document was scored by one rank, and is 0 on the others.
        ce, count = all_reduce_sum(documents.to(world.device)).cpu()
        ids = data.ids.to_pylist()
        for i in numbers.argsort().tolist():
            for head in count[:, i].nonzero().flatten().tolist():
                targets = int(count[head, i])
                values = (name, ids[i], int(numbers[i]), head + 1, targets, float(ce[head, i]) / targets)
                for column, value in zip(found.documents.values(), values, strict=True):
                    column.append(value)
        found.sha256[name] = data.rows_sha256
    return found


@torch.no_grad()
def epoch_cross_entropy(
    kept: dict | None,
    epoch: int,
    model: nn.Module,
    data: PackedDataset,
    inputs: Callable[[dict], dict],
    *,
    heads: int,
    batch_size: int,
    world: World,
) -> dict:
    """Computes the CE of the first heads for every target of a data set, as an epoch begins, on every rank.

    Args:
        kept: of an earlier call, returned again where it is of this epoch and of so many heads.
        model: left in training mode.
        data: whose targets.
        inputs: what the model reads of a batch, on its device.
        batch_size: rows of one rank's batch.

    Returns:
        ``epoch``, and ``ce`` [heads, R, S] float32 on the CPU: small state of a checkpoint.
    """
    if kept is not None and (kept["epoch"], len(kept["ce"])) == (epoch, heads):
        return kept
    model.eval()
    table = torch.zeros(heads, *data.tokens.shape)
    for batch in validation_batches(data, batch_size, world.rank, world.size):
        labels = batch["labels"].to(world.device)
        ce = model(**inputs(batch), labels=labels, num_heads=heads, loss_fn=token_cross_entropy).cpu()
        table[:, batch["rows"]] = ce[:, : len(batch["rows"])]
    dist.all_reduce(table)  # every row was scored by one rank, and is 0 on the others
    model.train()
    return {"epoch": epoch, "ce": table}
