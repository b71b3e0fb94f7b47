"""The fused loss beside its alternatives, in one run: time and peak memory of forward + backward.

    make bench    or    python benchmarks/fused_loss.py [--tokens 4096] [--vocab 49152] [--dim 576] [--repeats 3]
    on a GPU      python benchmarks/fused_loss.py --device cuda --dtype bfloat16 --tokens 8192 --vocab 128256 --dim 4096

Times: the contenders take turns, round after round; a ratio is the median over rounds of that round's ratio, so a
machine that slows down slows both. Memory on a CPU: each contender alone in a fresh process, its peak resident size
minus what the process held before the call (inputs included in the latter); on CUDA the same of what the allocator
counts. Liger's fused loss and Apple's CCE take part on CUDA where they are installed (pip install liger-kernel
cut-cross-entropy; neither gives a weight to each token with its exact gradient in one pass). One JSON line per figure:
name, value, unit, against.
"""

import argparse
import importlib.util
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


def inputs(tokens: int, vocab: int, dim: int, dtype: torch.dtype, device: str):
    torch.manual_seed(0)
    with torch.device(device):
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


def liger(hidden, unembedding, labels):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    LigerFusedLinearCrossEntropyLoss(reduction="sum")(unembedding, hidden[0, 0, :-1], labels[0, 1:]).backward()


def cce(hidden, unembedding, labels):
    from cut_cross_entropy import linear_cross_entropy

    linear_cross_entropy(hidden[0, 0, :-1], unembedding, labels[0, 1:], reduction="sum").backward()


def contenders(device: str) -> list:
    """Returns who takes part: ours first, then those whose library is here."""
    found = [fused, plain] + ([torch_chunked] if hasattr(F, "linear_cross_entropy") else [])
    if device == "cuda":
        found += [liger] if importlib.util.find_spec("liger_kernel") else []
        found += [cce] if importlib.util.find_spec("cut_cross_entropy") else []
    return found


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


def megabytes_beside_its_inputs(name: str, args) -> float:
    """Runs the contender once and returns its peak."""
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    case = inputs(args.tokens, args.vocab, args.dim, dtype, args.device)
    globals()[name](*inputs(64, 512, args.dim, dtype, args.device))  # libraries loaded, thread pools started
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        globals()[name](*case)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = psutil.Process().memory_info().rss
    globals()[name](*case)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before) / 2**20


def measure(name: str, args, queue) -> None:
    queue.put(megabytes_beside_its_inputs(name, args))


def seconds_of(contender, case, device: str) -> float:
    case[0].grad = case[1].grad = None
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    contender(*case)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--dim", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    # Memory first: a child's peak counts what its parent held when it started, so the parent must still be small.
    others = contenders(args.device)
    megabytes = {}
    for name in (f.__name__ for f in others):
        if args.device == "cuda":
            megabytes[name] = megabytes_beside_its_inputs(name, args)
            continue
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=measure, args=(name, args, queue))
        process.start()
        megabytes[name] = queue.get(timeout=300)
        process.join()

    shape = f"{args.tokens} tokens, V {args.vocab}, D {args.dim}, H 1, {args.dtype}, "
    shape += torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    case = inputs(args.tokens, args.vocab, args.dim, getattr(torch, args.dtype), args.device)
    seconds = {f.__name__: [] for f in (gemms, *others)}
    for turn in range(args.repeats + (args.device == "cuda")):
        for contender in (gemms, *others):
            took = seconds_of(contender, case, args.device)
            if turn or args.device == "cpu":  # a GPU's first turn compiles kernels
                seconds[contender.__name__].append(took)

    for name, values in seconds.items():
        report(f"time of {name}", statistics.median(values), "s", shape)
    bars = {"gemms": "its three GEMMs; bar <= 1.25", "plain": "F.cross_entropy on full logits; bar <= 0.75"}
    bars |= {"torch_chunked": "F.linear_cross_entropy, chunked; bar <= 0.55"}
    bars |= {"liger": "Liger's fused loss", "cce": "Apple's cut cross-entropy"}
    for name in (name for name in bars if name in seconds):
        ratio = statistics.median(a / b for a, b in zip(seconds["fused"], seconds[name], strict=True))
        report("fused loss, time", ratio, "x", bars[name])
    for name, value in megabytes.items():
        report(f"extra peak memory of {name}", value, "MB", shape)
    report("fused loss, extra peak memory", megabytes["fused"] / megabytes["plain"], "x", "plain; bar <= 1/12 = 0.083")


if __name__ == "__main__":
    main()
