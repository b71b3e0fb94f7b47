"""Meta's checkpoints against a forward pass written from the papers (Llama, 2302.13971; heads, 2404.19737)."""

import json

import pytest
import torch

from wmtp.models import export_hf, from_checkpoint, llama_mtp, load_checkpoint

VOCAB, DIM, HEADS, FFN, EPS, HEAD_DIM = 53, 32, 4, 48, 1e-5, 8
N_LAYERS, N_FUTURE = 6, 4  # 2 shared blocks, 4 heads


def random_weights(kv_heads):
    generator = torch.Generator().manual_seed(kv_heads)

    def normal(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    weights = {
        "tok_embeddings.weight": normal(VOCAB, DIM),
        "norm.weight": 1 + normal(DIM),
        "output.weight": normal(VOCAB, DIM),
    }
    trunk = [f"layers.{i}" for i in range(N_LAYERS - N_FUTURE + 1)]
    for block in trunk + [f"extra_heads.{j}" for j in range(N_FUTURE - 1)]:
        weights |= {
            f"{block}.attention.wq.weight": normal(HEADS * HEAD_DIM, DIM),
            f"{block}.attention.wk.weight": normal(kv_heads * HEAD_DIM, DIM),
            f"{block}.attention.wv.weight": normal(kv_heads * HEAD_DIM, DIM),
            f"{block}.attention.wo.weight": normal(DIM, HEADS * HEAD_DIM),
            f"{block}.feed_forward.w1.weight": normal(FFN, DIM),
            f"{block}.feed_forward.w2.weight": normal(DIM, FFN),
            f"{block}.feed_forward.w3.weight": normal(FFN, DIM),
            f"{block}.attention_norm.weight": 1 + normal(DIM),
            f"{block}.ffn_norm.weight": 1 + normal(DIM),
        }
    return weights


def reference_logits(w, tokens, kv_heads, theta):
    """[H, B, S, V], with complex numbers for the rotation, in float64."""
    w = {key: value.double() for key, value in w.items()}
    batch, seq = tokens.shape
    frequency = theta ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    turn = torch.exp(1j * torch.arange(seq, dtype=torch.float64)[:, None] * frequency)  # [S, HEAD_DIM / 2]
    future = torch.ones(seq, seq, dtype=torch.bool).triu(1)

    def rms(x, scale):
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * scale

    def rotate(x):  # [B, S, heads, HEAD_DIM], neighbours are real and imaginary part
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn[None, :, None]
        return torch.view_as_real(z).flatten(-2)

    def run(block, x):
        n = rms(x, w[f"{block}.attention_norm.weight"])
        q = rotate((n @ w[f"{block}.attention.wq.weight"].T).view(batch, seq, HEADS, HEAD_DIM))
        k = rotate((n @ w[f"{block}.attention.wk.weight"].T).view(batch, seq, kv_heads, HEAD_DIM))
        v = (n @ w[f"{block}.attention.wv.weight"].T).view(batch, seq, kv_heads, HEAD_DIM)
        k, v = (t.repeat_interleave(HEADS // kv_heads, dim=2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_DIM**0.5
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        x = x + attended.flatten(-2) @ w[f"{block}.attention.wo.weight"].T
        n = rms(x, w[f"{block}.ffn_norm.weight"])
        gate = torch.nn.functional.silu(n @ w[f"{block}.feed_forward.w1.weight"].T)
        return x + (gate * (n @ w[f"{block}.feed_forward.w3.weight"].T)) @ w[f"{block}.feed_forward.w2.weight"].T

    x = w["tok_embeddings.weight"][tokens]
    last = N_LAYERS - N_FUTURE
    for i in range(last):
        x = run(f"layers.{i}", x)
    heads = [f"layers.{last}", *(f"extra_heads.{j}" for j in range(N_FUTURE - 1))]
    return torch.stack([rms(run(head, x), w["norm.weight"]) @ w["output.weight"].T for head in heads])


def write_meta(folder, weights, kv_heads, **params):
    folder.mkdir()
    torch.save(weights, folder / "consolidated.pth")
    base = {"dim": DIM, "n_layers": N_LAYERS, "n_heads": HEADS, "vocab_size": -1, "multiple_of": 16, "norm_eps": EPS}
    kv = {} if kv_heads == HEADS else {"n_kv_heads": kv_heads}
    (folder / "params.json").write_text(json.dumps({**base, **kv, "n_future_tokens": N_FUTURE, **params}))
    return folder


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_every_head_equals_the_papers_forward(tmp_path, kv_heads):
    weights = random_weights(kv_heads)
    theta = 10_000.0 if kv_heads == 4 else 500_000.0
    params = {} if kv_heads == 4 else {"rope_theta": theta}
    folder = write_meta(tmp_path / "meta", {**weights, "rope.freqs": torch.ones(4)}, kv_heads, **params)
    tokens = torch.randint(0, VOCAB, (2, 17))
    expected = reference_logits(weights, tokens, kv_heads, theta)
    with torch.device("meta"):
        model = from_checkpoint(folder, max_seq_len=32)
    assert (model.config.num_layers, model.num_future_tokens) == (N_LAYERS - N_FUTURE + 1, N_FUTURE)
    load_checkpoint(model, folder)
    torch.testing.assert_close(model(tokens).double(), expected, atol=2e-5, rtol=1e-5)

    # Written as HF and read back, the heads are the same, bit for bit.
    export_hf(model, tmp_path / "hf")
    again = from_checkpoint(tmp_path / "hf")
    load_checkpoint(again, tmp_path / "hf")
    assert torch.equal(again(tokens), model(tokens))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_parameters"]["rope_theta"]) == (theta, theta)
    assert (config["max_position_embeddings"], config["bos_token_id"], config["eos_token_id"]) == (4096, None, None)


def test_fewer_heads_keep_the_first_and_more_start_as_head_1(tmp_path):
    folder = write_meta(tmp_path / "meta", random_weights(4), 4)
    tokens = torch.randint(0, VOCAB, (2, 9))
    logits = {}
    for heads in (1, 3, 4, 6):
        model = from_checkpoint(folder, num_future_tokens=heads)
        load_checkpoint(model, folder)
        logits[heads] = model(tokens)
    assert torch.equal(logits[1], logits[4][:1])
    assert torch.equal(logits[3], logits[4][:3])
    assert torch.equal(logits[6][:4], logits[4])
    assert torch.equal(logits[6][4:], logits[4][:1].expand(2, -1, -1, -1))


def test_the_builder_counts_layers_on_head_1s_path(tmp_path):
    folder = write_meta(tmp_path / "meta", random_weights(2), 2)
    model = llama_mtp(
        vocab_size=VOCAB,
        num_layers=N_LAYERS - N_FUTURE + 1,
        num_heads=HEADS,
        num_kv_heads=2,
        embed_dim=DIM,
        intermediate_dim=FFN,
        max_seq_len=16,
        num_future_tokens=N_FUTURE,
    )
    load_checkpoint(model, folder)
    assert torch.equal(model.extra_heads[2].mlp.w2.weight, random_weights(2)["extra_heads.2.feed_forward.w2.weight"])
