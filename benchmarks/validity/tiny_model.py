"""A small language model for the tiny tasks: its shape, its tokenizer, and a training step without what a run needs."""

import torch
from torch import nn

from wmtp.data import BatchStream
from wmtp.data.mbpp_rows import mbpp_prompt
from wmtp.loss import mtp_loss
from wmtp.models import llama_mtp
from wmtp.pretrained import Tokenizer
from wmtp.weighting import uniform

from .models import schedule
from .tiny_tasks import TinyTask

LAYERS = (1, 2, 3)  # the last is the state that the language model's head reads


def new_model(tokenizer: Tokenizer) -> nn.Module:
    """Returns a model whose matrices start at 1 / sqrt(width): at 0.02, as wide ones have, attention stays flat."""
    torch.manual_seed(0)
    model = llama_mtp(
        vocab_size=tokenizer.vocab_size, num_layers=len(LAYERS), num_heads=4, num_kv_heads=4, embed_dim=64,
        intermediate_dim=192, max_seq_len=256, num_future_tokens=1, tie_word_embeddings=True,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def train(model, data, *, steps: int, lr: float, seed: int, weighting=None, tell: int | None = None) -> None:
    """The recipe's training step, on one process and without anything that a measurement does not need."""
    stream = BatchStream(data, batch_size=8, rank=0, world_size=1, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    weighting = uniform() if weighting is None else weighting
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps, warmup=steps // 20)
        batch = stream.next_batch()
        out = model(
            batch["tokens"], document_ids=batch["document_ids"], loss_fn=mtp_loss, labels=batch["labels"],
            weighting=weighting, signals=batch["signals"], step=step,
        )  # fmt: skip
        loss = out.loss_sum / out.num_targets
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if tell and (step + 1) % tell == 0:
            print(f"# step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()


def tiny_tokenizer(tasks: list[TinyTask]) -> Tokenizer:
    """Byte-level BPE of 512 ids, learned on the training tasks."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # a constant is one token, with its space
    backend.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((mbpp_prompt(task.row()) + task.code for task in tasks[:2000]), trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **names), name="tiny_tasks")
