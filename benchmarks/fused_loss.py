"""The fused loss beside its alternatives, in one run: time and peak memory of forward + backward.

    make bench    or    python benchmarks/fused_loss.py [--tokens 4096] [--vocab 49152] [--dim 576] [--repeats 3]

Times: the contenders take turns, round after round; a ratio is the median over rounds of that round's ratio, so a
machine that slows down slows both. Memory: each contender alone in a fresh process, its peak resident size minus what
the process held before the call (inputs included in the latter). One JSON line per figure: name, value, unit, against.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time

import psutil
import torch
import torch.nn.functional as F
from figures import report

from wmtp.loss import weighted_mtp_cross_entropy


def inputs(tokens: int, vocab: int, dim: int, dtype: torch.dtype):
    torch.manual_seed(0)
    hidden = torch.randn(1, 1, tokens + 1, dim, dtype=dtype).requires_grad_()  # one more: the last predicts nothing
    unembedding = torch.empty(vocab, dim, dtype=dtype).normal_(std=0.04).requires_grad_()  # in place: no early peak
    return hidden, unembedding, torch.randint(0, vocab, (1, tokens + 1))


def fused(hidden, unembedding, labels):
    weighted_mtp_cross_entropy(hidden, unembedding, labels).loss_sum.backward()


def plain(hidden, unembedding, labels):
    F.cross_entropy(hidden[0, 0, :-1] @ unembedding.T, labels[0, 1:], reduction="sum").backward()


def torch_chunked(hidden, unembedding, labels):
    F.linear_cross_entropy(
        hidden[0, 0, :-1], unembedding, labels[0, 1:], reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
    ).backward()


@torch.no_grad()
def gemms(hidden, unembedding, labels, rows: int = 512):
    """The three products alone, on outputs allocated once: what no implementation can be faster than."""
    h = hidden[0, 0, :-1]
    logits, d_hidden = h.new_empty(rows, len(unembedding)), torch.empty_like(h)
    d_unembedding = torch.zeros_like(unembedding)
    for start in range(0, len(h), rows):
        part = h[start : start + rows]
        z = torch.mm(part, unembedding.T, out=logits[: len(part)])
        torch.mm(z, unembedding, out=d_hidden[start : start + rows])
        d_unembedding.addmm_(z.T, part)


def measure_memory(name: str, args, queue) -> None:
    torch.set_num_threads(args.threads)
    case = inputs(args.tokens, args.vocab, args.dim, getattr(torch, args.dtype))
    small = inputs(64, 512, args.dim, getattr(torch, args.dtype))
    globals()[name](*small)  # libraries loaded, thread pools started
    before = psutil.Process().memory_info().rss
    globals()[name](*case)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    # Memory first: a child's peak counts what its parent held when it started, so the parent must still be small.
    context = multiprocessing.get_context("spawn")
    megabytes = {}
    for name in ("fused", "plain", "torch_chunked"):
        queue = context.Queue()
        process = context.Process(target=measure_memory, args=(name, args, queue))
        process.start()
        megabytes[name] = queue.get(timeout=300)
        process.join()

    shape = f"{args.tokens} tokens, V {args.vocab}, D {args.dim}, H 1, {args.dtype}, {args.threads} threads"
    contenders = {f.__name__: f for f in (gemms, fused, plain, torch_chunked)}
    case = inputs(args.tokens, args.vocab, args.dim, getattr(torch, args.dtype))
    seconds = {name: [] for name in contenders}
    for _ in range(args.repeats):
        for name, contender in contenders.items():
            case[0].grad = case[1].grad = None
            started = time.perf_counter()
            contender(*case)
            seconds[name].append(time.perf_counter() - started)

    for name in contenders:
        report(f"time of {name}", statistics.median(seconds[name]), "s", shape)
    bars = {"gemms": (1.25, "its three GEMMs"), "plain": (0.75, "F.cross_entropy on full logits")}
    bars["torch_chunked"] = (0.55, "F.linear_cross_entropy, chunked")
    for name, (bar, words) in bars.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["fused"], seconds[name], strict=True))
        report("fused loss, time", ratio, "x", f"{words}; bar <= {bar}")
    for name, value in megabytes.items():
        report(f"extra peak memory of {name}", value, "MB", shape)
    report("fused loss, extra peak memory", megabytes["fused"] / megabytes["plain"], "x", "plain; bar <= 1/12 = 0.083")


if __name__ == "__main__":
    main()
