"""Decoding of random weights with and without shared prompts, and compiled: time and tokens of a step, peak of memory.

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


def measure(model, case: str, args, *, rows: int, prompts: int, length: int, **options) -> None:
    """Decodes so many rows, which go on from so many different prompts of a length, once."""
    sampling = Sampling(args.new_tokens, options.pop("temperature", 0.8), options.pop("top_p", 1.0))
    requests = []
    for row in range(rows):
        prompt = tuple((31 * (row * prompts // rows) + i) % model.vocab_size for i in range(length))
        requests.append(Request(row, prompt, (0, row)))
    stats = DecodingStats()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    list(generate(model, NoText(), requests, sampling, batch_size=rows, stats=stats, **options))
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
    one = {"rows": args.rows, "prompts": 1, "length": args.prompt}
    text = f"one prompt of {args.prompt}"
    cases = {
        f"{text}, first time": one,  # allocates and warms up, and compiles
        text: one,
        f"prompts of {args.prompt} of their own": {**one, "prompts": args.rows},
        f"one prompt of {6 * args.prompt}": {**one, "length": 6 * args.prompt},
        f"{text}, top_p": {**one, "top_p": 0.95},
        f"{text}, greedy": {**one, "temperature": 0.0},
        f"{text}, alone": {**one, "rows": 1},  # a step is bound by its launches
    }
    if model.num_future_tokens > 1:
        cases[f"{text}, 1 draft, first time"] = cases[f"{text}, 1 draft"] = {**one, "num_drafts": 1}
    for case, options in cases.items():
        for compile in (False, True):  # in turn
            name = f"{args.model} bf16, {options['rows']} rows, {case}{', compiled' * compile}"
            measure(model, name, args, compile=compile, **options)


if __name__ == "__main__":
    main()
