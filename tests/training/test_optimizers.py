"""Optimizers of torch.optim on FSDP2's parameters, on one and two processes: stepped, saved, loaded, or refused."""

import pytest
import torch
from omegaconf import OmegaConf
from processes import start
from random_models import random_decoder
from torch import nn
from torch.distributed.fsdp import fully_shard

from wmtp.distributed import start_world
from wmtp.errors import UserError
from wmtp.models import ValueModel, add_lora
from wmtp.training.checkpoint import Checkpointer, load_sharded, load_trainer
from wmtp.training.optimizers import build_optimizer, parameter_groups

WORKING = {
    "Adam": {"amsgrad": True}, "AdamW": {"fused": True}, "SGD": {"momentum": 0.9}, "RMSprop": {"centered": True},
    "Adagrad": {}, "Adadelta": {}, "Adamax": {}, "NAdam": {}, "RAdam": {}, "ASGD": {}, "SGD plain": {},
}  # fmt: skip
REFUSED = {
    "Adafactor": "cannot update this model's sharded parameters",
    "Rprop": "cannot update this model's sharded parameters",
    "SparseAdam": "cannot update this model's sharded parameters .*does not support dense gradients",
    "LBFGS": "doesn't support per-parameter options|closure",
    "Muon": "Muon only supports 2D parameters",
}


class CountsInItsGroup(torch.optim.SGD):
    """Keeps its number of steps in a parameter group, as schedule-free optimizers do."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr, momentum=0.9)
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["k"] += 1


def section(name, **keys):
    return OmegaConf.create({"_component_": name, "lr": 0.1, **keys})


def model(world):
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False))
    fully_shard(made, mesh=world.mesh)
    return made


def groups(trained):
    return [{"params": list(trained.parameters())}]


def steps(trained, optimizer, *numbers):
    for number in numbers:
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        trained(inputs).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs)


def every_optimizer(folder):
    world = start_world("cpu")
    for number, (name, keys) in enumerate(WORKING.items()):
        cfg = section(f"torch.optim.{name.split()[0]}", **keys)
        trained = model(world)
        optimizer = build_optimizer(cfg, groups(trained))
        assert not any(state.get("step") for state in optimizer.state.values()), name  # it was tried on stand-ins
        steps(trained, optimizer, 1, 2)
        saver = Checkpointer(folder / str(number))
        saver.save(2, trained, optimizer, {})
        saver.close()
        steps(trained, optimizer, 3, 4)
        resumed = model(world)
        again = build_optimizer(cfg, groups(resumed))
        load_sharded(folder / str(number) / "checkpoints" / "step_00000002", resumed, again)
        steps(resumed, again, 3, 4)
        assert same(resumed, trained), name
        assert not same(resumed, model(world)), name
    for name, message in REFUSED.items():
        with pytest.raises(UserError, match=rf"^optimizer \(torch\.optim\.{name}\).*({message})"):
            build_optimizer(section(f"torch.optim.{name}"), groups(model(world)))


@pytest.mark.parametrize("size", [1, 2])
def test_each_optimizer_of_torch_trains_and_goes_on_bit_for_bit_or_is_refused_by_name(tmp_path, size):
    start(every_optimizer, tmp_path, size=size, log=tmp_path / "log.txt").join()


def test_what_an_optimizer_counts_in_its_group_is_kept_and_what_the_config_gives_is_the_config_s(tmp_path):
    world = start_world("cpu")
    trained = model(world)
    name = f"{__name__}.CountsInItsGroup"
    optimizer = build_optimizer(section(name), groups(trained))
    steps(trained, optimizer, 1, 2, 3)
    saver = Checkpointer(tmp_path)
    saver.save(3, trained, optimizer, {})
    saver.close()
    resumed = model(world)
    again = build_optimizer(OmegaConf.create({"_component_": name, "lr": 0.5}), groups(resumed))
    load_sharded(tmp_path / "checkpoints" / "step_00000003", resumed, again)
    (group,) = again.param_groups
    assert (group["k"], group["lr"]) == (3, 0.5)


def test_a_parameter_that_never_had_a_gradient_starts_without_moments_as_it_would_have(tmp_path):
    world = start_world("cpu")
    trained = model(world)
    optimizer = build_optimizer(section("torch.optim.AdamW"), groups(trained))
    trained[2].weight.requires_grad_(False)
    steps(trained, optimizer, 1)
    saver = Checkpointer(tmp_path)
    saver.save(1, trained, optimizer, {})
    saver.close()
    resumed = model(world)
    again = build_optimizer(section("torch.optim.AdamW"), groups(resumed))
    load_sharded(tmp_path / "checkpoints" / "step_00000001", resumed, again)
    assert again.state[resumed[0].weight]["step"] == 1
    assert resumed[2].weight not in again.state


SIZES = {"vocab_size": 20, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 8, "intermediate_dim": 12}
SIZES |= {"max_seq_len": 16, "tie_word_embeddings": True}


def undecayed(trained, part, lr=None):
    """The names of what has no weight decay; all that is trained is in one group each."""
    groups = parameter_groups(trained, part, lr, False)
    names = {p: name for name, p in trained.named_parameters() if p.requires_grad}
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())
    assert all(group.get("weight_decay") in (None, 0.0) for group in groups)
    return {names[p] for group in groups if "weight_decay" in group for p in group["params"]}


def test_norms_biases_and_embeddings_have_no_weight_decay_and_matrices_do():
    decoder = random_decoder(**SIZES, num_future_tokens=2)
    norms = {name for name, _ in decoder.named_parameters() if name.endswith("norm.scale")}
    assert len(norms) == 7
    assert undecayed(decoder, decoder.extra_heads) == norms | {"tok_embeddings.weight"}
    assert undecayed(decoder, decoder.extra_heads, 0.5) == norms | {"tok_embeddings.weight"}
    rates = [
        (group.get("lr"), "weight_decay" in group) for group in parameter_groups(decoder, decoder.layers, 0.5, False)
    ]
    assert rates == [(None, False), (None, True), (0.5, False), (0.5, True)]
    (everything,) = parameter_groups(decoder, decoder.extra_heads, None, True)
    assert everything.keys() == {"params"} and len(everything["params"]) == len(list(decoder.parameters()))

    untied = random_decoder(**SIZES | {"tie_word_embeddings": False}, num_future_tokens=1)
    assert "output.weight" not in undecayed(untied, untied.extra_heads)
    dora = add_lora(random_decoder(**SIZES, num_future_tokens=1), rank=2, targets=["q_proj"], dora=True)
    assert undecayed(dora, dora.extra_heads) == {f"layers.{i}.attn.q_proj.magnitude" for i in (0, 1)}
    value_model = ValueModel(untied, "mlp")
    value_model.backbone.requires_grad_(False)
    assert undecayed(value_model, value_model.value_head) == {"value_head.hidden.bias", "value_head.out.bias"}


def test_a_step_without_gradients_shrinks_matrices_alone():
    world = start_world("cpu")
    trained = model(world)
    before = [p.full_tensor().clone() for p in trained.parameters()]
    cfg = section("torch.optim.AdamW", weight_decay=0.5)
    optimizer = build_optimizer(cfg, parameter_groups(trained, trained[2], None, False))
    for p in trained.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, was in zip(trained.parameters(), before, strict=True):
        torch.testing.assert_close(p.full_tensor(), was * (0.95 if p.dim() == 2 else 1.0))


def test_moments_of_a_run_with_one_group_go_on_bit_for_bit_in_several(tmp_path):
    world = start_world("cpu")
    cfg = section("torch.optim.AdamW", weight_decay=0.0)
    trained = model(world)
    optimizer = build_optimizer(cfg, groups(trained))
    steps(trained, optimizer, 1, 2)
    saver = Checkpointer(tmp_path)
    saver.save(2, trained, optimizer, {})
    saver.close()
    steps(trained, optimizer, 3, 4)
    resumed = model(world)
    again = build_optimizer(cfg, parameter_groups(resumed, resumed[2], None, False))
    load_sharded(tmp_path / "checkpoints" / "step_00000002", resumed, again)
    assert len(again.param_groups) == 2
    steps(resumed, again, 3, 4)
    assert same(resumed, trained)


def test_an_optimizer_without_weight_decay_gets_no_such_entry():
    trained = model(start_world("cpu"))
    optimizer = build_optimizer(section(f"{__name__}.Signs"), parameter_groups(trained, trained[2], None, False))
    assert [group.keys() for group in optimizer.param_groups] == [{"params", "lr"}] * 2


class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * p.grad.sign()


def test_a_run_goes_on_by_its_config_and_is_refused_where_its_optimizer_counts_in_other_groups(tmp_path):
    world = start_world("cpu")
    trained = model(world)
    optimizer = build_optimizer(section(f"{__name__}.CountsInItsGroup"), groups(trained))
    steps(trained, optimizer, 1)
    saver = Checkpointer(tmp_path)
    before = {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.1}}
    saver.save(1, trained, optimizer, {"config": before})
    saver.close()
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    assert load_trainer(checkpoint, OmegaConf.create(before))[1] == ""
    state, changes = load_trainer(checkpoint, OmegaConf.create(before | {"decay_norms_and_embeddings": True}))
    assert (state["step"], changes) == (1, " with decay_norms_and_embeddings null -> True")

    again = build_optimizer(section(f"{__name__}.CountsInItsGroup"), parameter_groups(trained, trained[2], None, False))
    message = r"keeps the state k, momentum_buffer in 2 parameter group\(s\), the checkpoint holds .* in 1 parameter gr"
    with pytest.raises(UserError, match=message):
        load_sharded(checkpoint, trained, again)


def test_a_value_that_torch_refuses_is_one_line_and_the_user_s_own_fault_keeps_its_traceback():
    world = start_world("cpu")
    with pytest.raises(UserError, match=r"^optimizer \(torch\.optim\.AdamW\): Invalid weight_decay value: -1"):
        build_optimizer(section("torch.optim.AdamW", weight_decay=-1.0), groups(model(world)))
    with pytest.raises(ZeroDivisionError):
        build_optimizer(section(f"{__name__}.Faulty"), groups(model(world)))


class Faulty(torch.optim.SGD):
    def step(self, closure=None):
        return 1 / 0
