"""Are claim lines honest? Simulated studies, under the null and with a true difference of known size.

    python benchmarks/claims.py [--studies 1000] [--arms 12] [--seeds 3,5] [--documents 24,200]

A study has a baseline and other arms, each run with every seed on every document. Under the null an arm differs from
the baseline by the luck of its seed (which moves all documents), by what a document takes from it, and by chance, all
of mean zero; documents differ in length, and their differences have heavy tails. The first figure is the share of
studies that claim anything at all, beside what tests over documents alone would have claimed; the last the share of new
studies that find a true difference of the size which a study states, averaged over studies that state one. One JSON
line per figure: name, value, unit, against.
"""

import argparse
import gc

import numpy as np
from figures import report
from scipy import stats

from wmtp.numerics.paired import mean_difference
from wmtp.report.claims import compare_all

# Standard deviations of what seeds, documents and chance do to a difference: luck alone; all three; documents alone.
KINDS = {"seeds": (1.0, 0.0, 0.5), "seeds and documents": (0.5, 0.5, 0.5), "documents": (0.0, 1.0, 0.5)}
TASKS = "tasks, a sample each"  # which passes or not


def study(rng: np.random.Generator, kind: str, arms: int, seeds: int, documents: int, shift: float = 0.0):
    """Returns arm to [S, U], and the documents' lengths; ``shift`` is what the first arm truly differs by."""
    if kind == TASKS:  # many hard ones; a seed's luck moves all chances, a method's some up and some down
        chance = rng.beta(0.5, 2.0, size=(1, 1, documents)) + 0.03 * rng.normal(size=(arms, seeds, 1))
        chance = chance + 0.1 * rng.normal(size=(arms, 1, documents))
        passed = (rng.random((arms, seeds, documents)) < chance).astype(float)
        names = ["baseline", *(f"arm {arm}" for arm in range(1, arms))]
        return dict(zip(names, passed, strict=True)), None
    of_seed, of_document, of_rest = KINDS[kind]
    baseline = rng.normal(size=(seeds, documents))
    found = {"baseline": baseline}
    for arm in range(1, arms):
        noise = of_seed * rng.normal(size=(seeds, 1)) + of_rest * rng.standard_t(3, size=(seeds, documents)) / 3**0.5
        noise = noise + of_document * rng.standard_t(3, size=(1, documents)) / 3**0.5
        found[f"arm {arm}"] = baseline + noise + (shift if arm == 1 else 0.0)
    return found, rng.integers(20, 400, size=documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument(
        "--stated", type=int, default=300, help="studies whose smallest effect is held against new ones"
    )
    parser.add_argument("--arms", type=int, default=12)
    parser.add_argument("--seeds", default="3,5")
    parser.add_argument("--documents", default="24,200")
    parser.add_argument("--kinds", default=";".join((*KINDS, TASKS)))
    args = parser.parse_args()
    gc.freeze()  # statsmodels collects garbage in each adjustment: of all that was imported, 0.1 s
    for seeds in map(int, args.seeds.split(",")):
        for documents in map(int, args.documents.split(",")):
            for kind in args.kinds.split(";"):
                simulate(args, kind, seeds, documents)


def simulate(args, kind: str, seeds: int, documents: int) -> None:
    rng = np.random.default_rng(0)
    claimed = by_documents = intervals = 0
    smallest = []
    pairs = [(f"arm {k}", "baseline") for k in range(1, args.arms)]
    for _ in range(args.studies):
        arms, lengths = study(rng, kind, args.arms, seeds, documents)
        found = compare_all(arms, pairs, weights=lengths)
        claimed += any(c.found for c in found)
        intervals += np.mean([c.interval.low <= 0 <= c.interval.high for c in found])
        alone = stats.wilcoxon([(arms[a] - arms[b]).mean(axis=0) for a, b in pairs], axis=1).pvalue
        by_documents += min(alone) * len(alone) <= 0.05
        if len(smallest) < args.stated:
            smallest.append(found[0].smallest)
    where = f"{args.arms} arms, {seeds} seeds x {documents} documents, {kind}"
    report("studies under the null that claim a difference", claimed / args.studies, "", f"{where}; bar <= 0.05")
    report("the same, by Wilcoxon over documents alone", by_documents / args.studies, "", where)
    report("intervals that hold the true difference", intervals / args.studies, "", f"{where}; 0.95")
    means, needed = [], []  # of new studies: what is found is a mean beyond what the test needs
    for _ in range(args.studies):
        arms, lengths = study(rng, kind, 2, seeds, documents)
        new = mean_difference(arms["arm 1"] - arms["baseline"], lengths)
        level = 1 - 0.05 / len(pairs) / 2
        means.append(new.mean)
        needed.append(max(error * stats.t.ppf(level, freedom) for error, freedom in new.errors))
    found = [np.mean(np.abs(np.array(means) + effect) >= needed) for effect in smallest]
    median = f"median {np.median(smallest):.3f}"
    report("a true difference as stated found at the adjusted level", np.mean(found), "", f"{where}; {median}; 0.8")


if __name__ == "__main__":
    main()
