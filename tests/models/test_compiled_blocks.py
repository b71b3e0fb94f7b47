"""torch.compile of blocks: one graph each, with recomputation and FSDP2, and the planner's count of what it fuses."""

import pytest
import torch
import torch.distributed as dist
from processes import start
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh

from wmtp.loss import mtp_loss
from wmtp.models import checkpoint_activations, llama_mtp, masks, shard_model
from wmtp.training.planning.compiled import fused_traffic
from wmtp.weighting import uniform

SIZES = {
    "vocab_size": 300, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "intermediate_dim": 128,
    "max_seq_len": 64, "num_future_tokens": 3,
}  # fmt: skip


def compiled_steps(recompute):
    """Train two steps on packed rows, compiled in the recipes' order; nothing may break a graph."""
    masks._WORTH_A_CALL = -1  # these would have a dense mask
    dist.init_process_group("gloo")
    mesh, graphs = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",)), []
    model = llama_mtp(**SIZES)
    if recompute is not None:
        checkpoint_activations(model, recompute)

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    for block in (*model.layers, *model.extra_heads):
        block.compile(backend=backend)
    shard_model(model, mesh, param_dtype=torch.bfloat16)
    tokens = torch.arange(128).reshape(2, 64) % 300
    seen = []
    for edge in (30, 40):
        documents = (torch.arange(64) >= edge).long().expand(2, 64)
        out = model(tokens, document_ids=documents, loss_fn=mtp_loss, labels=tokens, weighting=uniform())
        out.loss_sum.backward()
        seen.append(len(graphs))
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert 1 <= seen[0] == seen[1] <= 5, seen  # blocks of a kind share their graph, whatever the documents' lengths


@pytest.mark.parametrize("recompute", [None, 1, 2, "selective"])
def test_a_block_is_one_graph(recompute, tmp_path):
    start(compiled_steps, recompute, size=2, log=tmp_path / "log.txt").join()


def test_what_a_compiled_block_moves_is_counted_by_inductor():
    with torch.device("meta"):
        block = llama_mtp(**SIZES).layers[0]
    rows, seq, width, inner = 2, 64, 64, 128
    forward, backward = fused_traffic(block, rows, seq, width, torch.bfloat16)
    hidden, wide = 2 * rows * seq * width, 2 * rows * seq * inner
    # Two norms, two residual sums, the rotations, and the gate, each read and written about once.
    assert 2 * hidden + 2 * wide < forward.moved < 25 * hidden + 5 * wide
    assert forward.moved < backward.moved < 4 * forward.moved and 4 <= forward.calls <= 12
    assert fused_traffic(block.requires_grad_(False), rows, seq, width, torch.bfloat16)[1] == (0, 0)
