"""Sharded models in real processes (gloo): what every rank loads, computes and exports equals the unsharded model."""

import gc
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from family_parity import FAMILIES, write_case
from processes import fork_server
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from wmtp.loss import mtp_loss
from wmtp.models import checkpoint_activations, export_hf, from_checkpoint, llama_mtp, load_checkpoint, shard_model
from wmtp.pretrained import checkpoint_formats
from wmtp.weighting import uniform

# Dimensions of 5 and 7 and 1 leave some ranks of 2, 3 or 4 with less, or with nothing.
UNEVEN = {
    "vocab_size": 13,
    "num_layers": 2,
    "num_heads": 5,
    "num_kv_heads": 1,
    "embed_dim": 5,
    "intermediate_dim": 7,
    "max_seq_len": 16,
    "head_dim": 2,
}
TOKENS = torch.arange(12).view(2, 6)


def run(worker, world_size, folder, *args):
    """Run worker(folder, *args) in processes forked from a server that has imported everything once."""
    fork_server()
    mp.start_processes(
        _enter, (worker, world_size, str(folder), *args), nprocs=world_size, start_method="forkserver"
    )  # fmt: skip


def _enter(rank, worker, world_size, folder, *args):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    worker(Path(folder), *args)
    dist.destroy_process_group()


def load_sharded(folder, mesh, param_dtype=torch.float32, **changes):
    with torch.device("meta"):
        model = from_checkpoint(folder, **changes)
    shard_model(model, mesh, param_dtype=param_dtype)
    load_checkpoint(model, folder)
    return model


def load_plain(folder, **changes):
    model = from_checkpoint(folder, **changes)
    load_checkpoint(model, folder)
    return model


def same_as_unsharded(folder, mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    source = folder / "source"
    model, plain = load_sharded(source, mesh, num_future_tokens=4), load_plain(source, num_future_tokens=4)
    if mesh_shape == (3,) and dist.get_rank() == 2:
        assert model.layers[0].attn.k_proj.weight.to_local().shape == (0, 5)
    for (name, sharded), full in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(sharded.full_tensor(), full), name
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=1e-6, rtol=1e-5)
    export_hf(model, folder / "sharded", max_shard_bytes=300)
    assert (folder / "sharded").is_dir()  # on whichever rank
    if dist.get_rank() == 0:
        export_hf(plain, folder / "plain", max_shard_bytes=300)
        ours, theirs = ({f.name: f.read_bytes() for f in (folder / n).iterdir()} for n in ("sharded", "plain"))
        assert len(ours) > 5 and ours == theirs
        assert torch.equal(load_plain(folder / "sharded")(TOKENS), plain(TOKENS))
    dist.barrier()


def families_are_as_unsharded(folder):
    """Of biases, norms of three kinds, windows and fused projections: states, gradients and exports, recomputed too."""
    mesh, tokens = init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)), torch.arange(48).view(2, 24)
    documents = (torch.arange(24) >= 9).long().expand(2, 24)
    for source in sorted((folder / "families").iterdir()):
        with torch.device("meta"):
            model = checkpoint_activations(from_checkpoint(source / "hf", num_future_tokens=3), 2)
        shard_model(model, mesh, param_dtype=torch.float32)
        load_checkpoint(model, source / "hf")
        plain = load_plain(source / "hf", num_future_tokens=3)
        for each in (model, plain):
            out = each(tokens, document_ids=documents, loss_fn=mtp_loss, labels=tokens, weighting=uniform())
            out.loss_sum.backward()
        for (name, sharded), full in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(sharded.grad.full_tensor(), full.grad, atol=1e-4, rtol=1e-4, msg=name)
        export_hf(model, source / "sharded")
        if dist.get_rank() == 0:
            export_hf(plain, source / "plain")
            for name in ("model.safetensors", "mtp_heads.safetensors", "config.json"):
                assert (source / "sharded" / name).read_bytes() == (source / "plain" / name).read_bytes(), name


@pytest.mark.long
def test_families_are_sharded_like_a_llama(tmp_path):
    for kind in ("gemma3_text", "qwen2", "phi3"):
        name = next(name for name, (model_type, _) in FAMILIES.items() if model_type == kind)
        write_case(tmp_path / "families" / kind, *FAMILIES[name])
    run(families_are_as_unsharded, 2, tmp_path)


@pytest.mark.parametrize("mesh_shape", [(2,), (3,), (2, 2)], ids=str)
def test_loading_and_export_equal_the_unsharded_models(tmp_path, mesh_shape):
    torch.manual_seed(0)
    export_hf(llama_mtp(**UNEVEN, num_future_tokens=3, tie_word_embeddings=len(mesh_shape) == 2), tmp_path / "source")
    world_size = torch.Size(mesh_shape).numel()
    run(same_as_unsharded, world_size, tmp_path, mesh_shape)


def after_the_rounds(model, seen, *args, **named):
    seen.append(isinstance(next(model.extra_heads.parameters()), DTensor))  # freed again
    return mtp_loss(*args, **named)


def rounds_are_as_unsharded(folder):
    """A block that runs three times in a forward pass: gathered and freed each time, or recomputed; of shards and of
    replicas. Each process has rows of its own, so that a gradient which is its own alone is another one."""
    shards, replicas = (
        init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :]) for shape in ((2,), (2, 1))
    )
    for mesh, recompute, factor in ((shards, None, 0.5), (replicas, "selective", 0.0), (replicas, 1, 0.5)):
        with torch.device("meta"):
            model = from_checkpoint(folder / "source", num_future_tokens=4, looped_heads=True)
        if recompute is not None:
            checkpoint_activations(model, recompute)
        shard_model(model, mesh, param_dtype=torch.float32)
        load_checkpoint(model, folder / "source")
        plain, seen = load_plain(folder / "source", num_future_tokens=4, looped_heads=True), []
        micro_batches = [[TOKENS, 12 - TOKENS], [TOKENS.flip(0, 1), 3 * TOKENS % 13]]  # of each process
        for each, batches in ((model, micro_batches[dist.get_rank()]), (plain, micro_batches[0] + micro_batches[1])):
            for tokens in batches:
                if each is model:
                    model.set_requires_all_reduce(tokens is batches[-1])
                options = {"labels": tokens, "weighting": uniform(), "trunk_gradient": (1.0, *[factor] * 3)}
                each(tokens, loss_fn=partial(after_the_rounds, each, seen), **options).loss_sum.backward()
        seen = seen[:2]
        for (name, sharded), full in zip(model.named_parameters(), plain.parameters(), strict=True):
            scale, mean = float(full.grad.abs().max()), sharded.grad.full_tensor()  # of two processes
            torch.testing.assert_close(2 * mean / scale, full.grad / scale, atol=1e-5, rtol=0, msg=name)
        assert seen == [True, True] and all(isinstance(p, DTensor) for p in model.extra_heads.parameters())
        torch.testing.assert_close(model(TOKENS), plain(TOKENS), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_looped_heads_are_sharded_once_and_run_in_rounds(tmp_path):
    torch.manual_seed(0)
    export_hf(llama_mtp(**UNEVEN, num_future_tokens=2, looped_heads=True), tmp_path / "source")
    run(rounds_are_as_unsharded, 2, tmp_path)


def float32_stays(folder):
    """Mixed precision: weights gathered as bfloat16, the loss's inputs as they were, the shards float32 afterwards."""
    mesh = init_device_mesh("cpu", (2,))
    model = load_sharded(folder / "source", mesh, param_dtype=torch.bfloat16, num_future_tokens=2)
    seen = {}

    def loss_fn(hidden, unembedding, *, weights, document_ids):
        seen.update(hidden=hidden.dtype, unembedding=unembedding.dtype, weights=weights, ids=document_ids)
        seen["shape"] = tuple(unembedding.shape)
        return (hidden.float() * weights[None, :, :, None]).sum()

    weights = torch.full((2, 6), 1 + 2**-20)  # not a bfloat16
    ids = torch.tensor([[0, 0, 1, 1, 1, -1]] * 2)
    with torch.no_grad():
        model(TOKENS, document_ids=ids, loss_fn=loss_fn, weights=weights)
    assert (seen["hidden"], seen["unembedding"], seen["shape"]) == (torch.bfloat16, torch.bfloat16, (13, 5))
    assert torch.equal(seen["weights"], weights) and seen["weights"].dtype == torch.float32
    assert torch.equal(seen["ids"], ids)
    plain = load_plain(folder / "source", num_future_tokens=2)  # after a forward pass without a backward
    for (name, sharded), full in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert sharded.dtype == torch.float32 and torch.equal(sharded.full_tensor(), full), name
    model(TOKENS, document_ids=ids, loss_fn=loss_fn, weights=weights).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.layers.parameters())


def test_mixed_precision_rounds_neither_loss_inputs_nor_weights(tmp_path):
    torch.manual_seed(0)
    export_hf(llama_mtp(**UNEVEN), tmp_path / "source")
    run(float32_stays, 2, tmp_path)


def whole_where_needed(folder):
    """Embedding and unembedding are gathered for the forward pass; the blocks' backward pass runs without them."""
    mesh = init_device_mesh("cpu", (2,))
    model, plain = (
        load(folder / "source", num_future_tokens=3) for load in (partial(load_sharded, mesh=mesh), load_plain)
    )
    seen = []

    def looked_at(*_):
        seen.append([isinstance(module.weight, DTensor) for module in (model.tok_embeddings, model.output)])

    for block in model.layers[:-1]:
        block.register_full_backward_hook(looked_at)
    losses = []
    for one in (model, plain):
        out = one(TOKENS, loss_fn=mtp_loss, labels=TOKENS, weighting=uniform())
        out.loss_sum.backward()
        losses.append(out.loss_sum.detach())
    assert torch.equal(*losses) and seen == [[True, True]] * len(model.layers[:-1])
    for (name, sharded), full in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(sharded.grad.full_tensor(), full.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_embedding_and_unembedding_are_whole_only_where_they_are_needed(tmp_path):
    torch.manual_seed(0)
    export_hf(llama_mtp(**UNEVEN | {"num_layers": 4}), tmp_path / "source")
    run(whole_where_needed, 2, tmp_path)


def live_bytes():
    gc.collect()
    tensors = {
        t.data_ptr(): t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and not t.is_meta
    }
    return sum(t.untyped_storage().nbytes() for t in tensors.values())


def only_its_shard(folder):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    gc.freeze()  # what the imports made, out of the count
    before, peak, full, largest = live_bytes(), 0, 0, 0
    read, alive = checkpoint_formats.Checkpoint.read, []

    def counted(self, name):
        """Each full tensor as it is read: how many earlier ones are still there, and how much is held in all."""
        nonlocal peak, full, largest
        tensor = read(self, name)
        alive[:] = [ref for ref in alive if ref() is not None]
        assert not alive, f"{len(alive)} full tensors still held when {name} is read"
        alive.append(weakref.ref(tensor))
        peak, full = max(peak, live_bytes()), full + tensor.nbytes
        largest = max(largest, tensor.nbytes)
        return tensor

    checkpoint_formats.Checkpoint.read = counted
    model = load_sharded(folder / "source", mesh)
    checkpoint_formats.Checkpoint.read = read
    rope = model.rope.cache.nbytes + model.rope.theta.nbytes
    shard = 1.04 * full / dist.get_world_size()  # 22 rows of 64, where a third is 21.3
    assert 0.9 * shard < live_bytes() - before <= shard + rope
    assert peak - before <= shard + rope + largest < full / 2


def test_no_rank_ever_holds_more_than_its_shard_and_one_tensor(tmp_path):
    sizes = {"vocab_size": 256, "num_layers": 12, "num_heads": 4, "num_kv_heads": 4, "embed_dim": 64}
    model = llama_mtp(**sizes, intermediate_dim=128, max_seq_len=16)
    export_hf(model, tmp_path / "source")
    run(only_its_shard, 3, tmp_path)
