"""Does a weighting that finds noise also teach more? The noise AUC of each arm's weights beside the arm's gain.

    python benchmarks/study/noise_auc.py runs/study/final runs/study/ablation

For every arm of the sweeps, its weighting is called as training calls it, on the first documents of the training data
and on the signals of the base model, where training begins; low weights are read as a detector of replaced tokens. The
gain is what the arm's held-out CE of head 1 on code is below the baseline's, over the seeds that both have; an arm of
two sweeps counts once, as the first has it. One JSON line per arm, then Spearman's correlation over arms: name, value,
unit, against.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from figures import report
from validity.models import signals
from validity.statistics import auc, interval, resamples

from wmtp.config import build
from wmtp.data import Documents, pack, tokenized
from wmtp.models import from_checkpoint, load_checkpoint
from wmtp.pretrained import hf_tokenizer, resolve_checkpoint
from wmtp.report.runs import load_run
from wmtp.weighting import Signals, any_weighting
from wmtp.weighting.targets import valid_targets

SET = "code"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="+", help="output_dir of sweeps")
    parser.add_argument("--documents", type=int, default=400)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    found: dict[str, tuple[float, float]] = {}
    for sweep in args.sweeps:
        baseline = OmegaConf.load(sweep / "sweep.yaml").baseline
        seeds = {cell.name: losses(cell) for cell in sorted((sweep / "cells").iterdir())}
        for name, of_seed in seeds.items():
            both = sorted(of_seed.keys() & seeds[baseline].keys())
            folder = sweep / "cells" / name / f"seed-{both[0]}"
            cfg = OmegaConf.load(folder / "config.yaml")
            if (
                name in (baseline, *found)
                or cfg.dataset != OmegaConf.load(sweep / "cells" / baseline / f"seed-{both[0]}" / "config.yaml").dataset
            ):
                continue
            weights, noise, document = weights_of(cfg, args.documents)
            counts = resamples(document, 300, seed=0)
            low, high = interval(auc(-weights, noise, counts))
            gain = float(np.mean([seeds[baseline][seed] - of_seed[seed] for seed in both]))
            found[name] = (auc(-weights, noise), gain)
            against = f"[{low:.3f}, {high:.3f}] over documents; gain {gain:+.4f} nats over {len(both)} seeds"
            report(f"noise AUC of {name}", found[name][0], "", against)
    of_auc, gains = np.array(list(found.values())).T
    rank = stats.spearmanr(of_auc, gains)
    report(
        "Spearman's correlation of AUC and gain", float(rank.statistic), "", f"{len(found)} arms, p {rank.pvalue:.4f}"
    )


def losses(cell: Path) -> dict[str, float]:
    """Returns seed to the held-out CE of head 1 on code, mean over targets, of a cell's finished runs."""
    found = {}
    for folder in sorted(path.parent for path in cell.glob("seed-*/metrics.jsonl")):
        run = load_run(str(folder))
        if run.state != "FINISHED":
            continue
        table = run.held_out[(run.held_out["set"] == SET) & (run.held_out["head"] == 1)]
        found[folder.name.removeprefix("seed-")] = float(np.average(table["ce"], weights=table["targets"]))
    return found


def weights_of(cfg: DictConfig, documents: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns weight, noise and document of each target at the start of an arm's training: [N] each."""
    weighting = any_weighting(build(cfg.weighting, where="weighting"))
    tokenizer = hf_tokenizer(cfg.tokenizer.path)
    items = tokenized(tokenizer, source=cfg.dataset.source).items[:documents]
    data = pack(Documents("train", items), cfg.seq_len, pad_id=tokenizer.pad_id)
    ce, entropy = (np.asarray(figure) for figure in signals(loaded(cfg.checkpoint), data))
    named = {"policy_ce": torch.tensor(ce)[None], "policy_entropy": torch.tensor(entropy)[None]}
    if "reference_ce" in weighting.needs:
        named["reference_ce"] = torch.tensor(np.asarray(signals(loaded(cfg.reference_checkpoint), data)[0]))
    valid = valid_targets(data.labels.long(), 1, data.document_ids)
    weights = weighting(Signals(data.labels.long(), valid, data.document_ids, named, training=False))
    weights = torch.ones(data.labels.shape) if weights is None else weights.reshape(-1, *data.labels.shape)[0]
    number = torch.arange(len(data))[:, None] * 1000 + data.document_ids
    where = valid[0]
    return weights[where].numpy(), data.signals["noise"][where].numpy() > 0, number[where].numpy()


def loaded(checkpoint: str):
    model = from_checkpoint(checkpoint, num_future_tokens=1)
    load_checkpoint(model, resolve_checkpoint(checkpoint))
    return model.eval()


if __name__ == "__main__":
    main()
