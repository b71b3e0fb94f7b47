"""What every family of models is held to: small random models of `transformers`' own classes, and checks by name.

The checks are run by tests/models/test_families.py and by docs/make_models.py, which writes their table.
"""

import copy
import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from wmtp.generation import DecodingStats, Request, Sampling, generate
from wmtp.loss import weighted_mtp_cross_entropy
from wmtp.models import (
    MTPDecoder,
    add_lora,
    export_hf,
    from_checkpoint,
    init_lora,
    load_adapter,
    load_checkpoint,
    save_adapter,
)

# Four layers, so that patterns of layers show; rows of 24 tokens, three times as long as the windows.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
WINDOW = 8
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.8,
    "logits_scaling": 6.0,
}
# What people hold -> model_type, and what its config has beside SIZES.
FAMILIES = {
    "Llama 2, CodeLlama": ("llama", {}),
    "Llama 3.1, 3.2, 3.3": ("llama", {"rope_parameters": LLAMA3}),
    "SmolLM2": ("llama", {"tie_word_embeddings": True}),
    "DeepSeek-Coder": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}}),
    "Mistral, with its window": ("mistral", {"sliding_window": WINDOW}),
    "Qwen2, Qwen2.5, their -Coder": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen2, the last layers with a window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2, "rope_parameters": YARN},
    ),
    "Qwen3, dense": ("qwen3", {"head_dim": 12}),
    "Gemma 3, text": (
        "gemma3_text",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 2,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "tie_word_embeddings": True,
        },
    ),
    "OLMo 2": ("olmo2", {}),
    "Granite 3": ("granite", {**MULTIPLIERS, "tie_word_embeddings": True}),
    "Phi-3 of 4k, Phi-4": ("phi3", {"sliding_window": WINDOW}),
}
TOKENS = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(2))
CUT = 13  # where the second of two documents begins in a packed row


class Case(SimpleNamespace):
    """A model of `transformers`, its folder, and a place for the files of the checks."""

    def model(self, num_future_tokens: int = 1, folder: Path | None = None) -> MTPDecoder:
        """Ours, read from the folder; heads that it lacks get values of their own."""
        folder = self.folder if folder is None else folder
        model = from_checkpoint(folder, num_future_tokens=num_future_tokens)
        load_checkpoint(model, folder)
        return model.eval()


def write_case(root: Path, kind: str, changes: dict) -> Case:
    """Writes a random model of a family; its norms and biases are random too."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SIZES, **copy.deepcopy(changes)})
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            one = 1.0 if name.endswith("norm.weight") and kind != "gemma3_text" else 0.0
            parameter.normal_(one, 0.2)
    hf.save_pretrained(root / "hf")
    return Case(kind=kind, hf=hf, folder=root / "hf", root=root)


@torch.no_grad()
def hf_logits(folder: Path, tokens: torch.Tensor = TOKENS, adapter: Path | None = None) -> torch.Tensor:
    """Logits of `transformers`' own class, chosen by config.json, without code of the folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()(tokens).logits


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# The checks, by the name of their column


@torch.no_grad()
def logits(case: Case) -> None:
    """fp32 logits of rows, and of two documents in one packed row, within 1e-4."""
    model = case.model()
    near(model(TOKENS)[0], case.hf(TOKENS).logits)
    documents = (torch.arange(24) >= CUT).long().expand(2, 24)
    packed = model(TOKENS, document_ids=documents)[0]
    for part in (slice(0, CUT), slice(CUT, 24)):
        near(packed[:, part], case.hf(TOKENS[:, part]).logits)


def step(case: Case) -> None:
    """logits after one step of AdamW on the same loss; the fused loss's gradients moved ours."""
    model, hf = case.trained()
    with torch.no_grad():
        before, ours, theirs = case.hf(TOKENS).logits, model(TOKENS)[0], hf(TOKENS).logits
    assert (theirs - before).abs().max() > 1e-2
    near(ours, theirs)


def export(case: Case) -> None:
    """the trained model, exported, gives `transformers` the same logits; untrained, it has the same bits and config."""
    model, hf = case.trained()
    export_hf(model, case.root / "trained")
    with torch.no_grad():
        near(hf_logits(case.root / "trained"), hf(TOKENS).logits)
    export_hf(case.model(), case.root / "same")
    first, second = (load_file(folder / "model.safetensors") for folder in (case.folder, case.root / "same"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    from transformers import AutoConfig

    first, second = (AutoConfig.from_pretrained(folder).to_dict() for folder in (case.folder, case.root / "same"))
    changed = {key for key in first if first[key] != second.get(key)}
    assert changed <= {"head_dim", "_name_or_path", "torch_dtype"}, changed  # of which some classes know nothing


@torch.no_grad()
def reload(case: Case) -> None:
    """an export read again gives the same bits, and is of the same shape."""
    model = case.model()
    export_hf(model, case.root / "again")
    again = case.model(folder=case.root / "again")
    assert again.config == model.config and torch.equal(again(TOKENS), model(TOKENS))


def lora(case: Case) -> None:
    """an adapter of all projections and norms: read by peft, merged into an export, read again bit for bit."""
    for dora in (False, True) if case.kind in ("qwen2", "phi3") else (False,):  # with biases, and of fused projections
        root = case.root / f"dora_{dora}"
        models = []
        for seed in (1, 2):
            model = add_lora(case.model(), rank=3, alpha=6.0, dora=dora, train_norms=True)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            models.append(model.eval())
        model, other = models
        save_adapter(model, root / "adapter", base_weights="0", base_name=str(case.folder))
        export_hf(model, root / "merged")
        load_adapter(other, root / "adapter", base_weights="0")
        with torch.no_grad():
            ours = model(TOKENS)[0]
            assert (ours - case.hf(TOKENS).logits).abs().max() > 0.1
            near(hf_logits(case.folder, adapter=root / "adapter"), ours)
            near(hf_logits(root / "merged"), ours)
            assert torch.equal(other(TOKENS)[0], ours)
    quantized = add_lora(case.model(4), rank=3, quantize="nf4", heads="full")
    init_lora(quantized)
    out = quantized(TOKENS, loss_fn=weighted_mtp_cross_entropy, labels=TOKENS)
    out.loss_sum.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in quantized.parameters() if p.requires_grad)


@torch.no_grad()
def heads(case: Case) -> None:
    """4 heads in Meta's layout: new ones copy the last block; trained ones leave in the export and come back. In
    `transformers`, by the folder's code, they give the same logits, draft greedy texts that plain decoding has too, and
    are saved again bit for bit."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = from_checkpoint(case.folder, num_future_tokens=4)
    load_checkpoint(model, case.folder)
    copies = model(TOKENS)
    assert copies.shape[0] == 4 and all(torch.equal(head, copies[0]) for head in copies)
    part_from_head_1(model)
    export_hf(model, case.root / "heads")
    near(hf_logits(case.root / "heads"), model(TOKENS)[0])
    again = case.model(4, case.root / "heads")
    assert torch.equal(again(TOKENS), model(TOKENS)) and not torch.equal(model(TOKENS)[1], model(TOKENS)[0])
    assert torch.equal(case.model(1, case.root / "heads")(TOKENS), model(TOKENS, num_heads=1))
    theirs, alone = (
        AutoModelForCausalLM.from_pretrained(case.root / "heads", trust_remote_code=code, dtype=torch.float32).eval()
        for code in (True, False)
    )
    near(theirs(TOKENS, num_heads=4).head_logits, model(TOKENS))
    drafts = []
    theirs.extra_heads[0].register_forward_hook(lambda *_: drafts.append(1))
    for prompt in (TOKENS[:1, :3], TOKENS[1:, :20]):  # below and above the window
        texts = [each.generate(prompt, max_new_tokens=12, do_sample=False) for each in (theirs, alone)]
        assert torch.equal(*texts) and drafts
        drafts.clear()
    theirs.save_pretrained(case.root / "saved")
    assert torch.equal(case.model(4, case.root / "saved")(TOKENS), model(TOKENS))


@torch.no_grad()
def decode(case: Case) -> None:
    """cached greedy decoding takes the best of the full forward's logits, also of rows that share a prompt; drafts
    change no token."""
    model = part_from_head_1(case.model(4))
    prompts = [TOKENS[0, :3], TOKENS[1, :12], TOKENS[1, :12], TOKENS[0, :20]]
    requests = [Request(i, tuple(prompt.tolist()), (0, i)) for i, prompt in enumerate(prompts)]
    plain = {c.id: c.tokens for c in generate(model, _Ids(), requests, Sampling(24), batch_size=3)}
    for request in requests:
        text = torch.tensor([[*request.prompt, *plain[request.id]]])
        best = model(text, num_heads=1)[0, 0].argmax(-1)
        assert best[len(request.prompt) - 1 : -1].tolist() == list(plain[request.id])
    stats = DecodingStats()
    drafted = generate(model, _Ids(), requests, Sampling(24), batch_size=3, num_drafts=3, stats=stats)
    assert {c.id: c.tokens for c in drafted} == plain and sum(stats.verified.values()) > 0


CHECKS = {
    "logits": logits,
    "step": step,
    "export": export,
    "reload": reload,
    "LoRA": lora,
    "heads": heads,
    "decode": decode,
}


class _Ids:
    """A tokenizer without an end."""

    eos_id, special_ids = -1, frozenset()

    def decode(self, ids):
        return " ".join(map(str, ids))


def part_from_head_1(model: MTPDecoder) -> MTPDecoder:
    """Moves the extra heads a little: their drafts are sometimes right."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.extra_heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


@functools.lru_cache(maxsize=1)
def case_of(name: str) -> Case:
    """The case of a family, kept until the next one is asked for."""
    kept = tempfile.TemporaryDirectory()
    case = write_case(Path(kept.name), *FAMILIES[name])
    case.kept = kept  # removes the folder with the case
    case.trained = functools.cache(lambda: _trained(case))
    return case


def _trained(case: Case) -> tuple[MTPDecoder, torch.nn.Module]:
    """Ours and theirs after one step."""
    model, hf = case.model(), copy.deepcopy(case.hf)
    F.cross_entropy(hf(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    out = model(TOKENS, loss_fn=weighted_mtp_cross_entropy, labels=TOKENS)
    (out.loss_sum / out.num_targets).backward()
    for each in (model, hf):
        torch.optim.AdamW(each.parameters(), lr=1e-2).step()
    return model, hf
