"""Decoding of random weights with and without shared prompts: time and tokens of a step, and the peak of memory.

    python benchmarks/decoding.py [--model meta_mtp_7b] [--device cuda] [--rows 64] [--new-tokens 64]

Times do not depend on what the weights are, and no answer ends early. One JSON line per figure: name, value, unit,
against.
"""

import argparse

import torch
from figures import report

from wmtp import models
from wmtp.generation import DecodingStats, Request, Sampling, generate


class NoText:
    """A tokenizer whose texts are empty and do not end."""

    eos_id, special_ids = -1, frozenset()

    def decode(self, ids) -> str:
        return ""


def measure(model, case: str, prompts: int, length: int, args, **options) -> None:
    """Decodes so many rows, which go on from so many different prompts of a length, once."""
    sampling = Sampling(args.new_tokens, options.pop("temperature", 0.8), options.pop("top_p", 1.0))
    requests = []
    for row in range(args.rows):
        prompt = tuple((31 * (row * prompts // args.rows) + i) % model.vocab_size for i in range(length))
        requests.append(Request(row, prompt, (0, row)))
    stats = DecodingStats()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    list(generate(model, NoText(), requests, sampling, batch_size=args.rows, stats=stats, **options))
    report("time of a decode step", 1e3 * stats.decode_seconds / stats.forwards, "ms", case)
    report("decoding", (stats.new_tokens - stats.first_tokens) / stats.decode_seconds, "tokens/s", case)
    report("prefill of a prompt", 1e3 * stats.prefill_seconds / stats.prefills, "ms", case)
    if args.device == "cuda":
        report("peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB", case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta_mtp_7b", help="a builder of wmtp.models")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=700, help="tokens of a prompt; the longest is six times as long")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = getattr(models, args.model)(max_seq_len=6 * args.prompt + args.new_tokens)
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False).eval()
    name = f"{args.model} bf16, {args.rows} rows"
    for run in ("first", "second"):  # the first one allocates and warms up
        measure(model, f"{name}, one prompt of {args.prompt}, {run} time", 1, args.prompt, args)
    measure(model, f"{name}, prompts of {args.prompt} of their own", args.rows, args.prompt, args)
    measure(model, f"{name}, one prompt of {6 * args.prompt}", 1, 6 * args.prompt, args)
    measure(model, f"{name}, one prompt of {args.prompt}, top_p", 1, args.prompt, args, top_p=0.95)
    measure(model, f"{name}, one prompt of {args.prompt}, greedy", 1, args.prompt, args, temperature=0.0)
    if model.num_future_tokens > 1:
        measure(model, f"{name}, one prompt of {args.prompt}, 1 draft", 1, args.prompt, args, num_drafts=1)


if __name__ == "__main__":
    main()
