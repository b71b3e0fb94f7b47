"""Optimizers of torch.optim on FSDP2's parameters, on one and two processes: stepped, saved, loaded, or refused."""

import pytest
import torch
from omegaconf import OmegaConf
from processes import start
from torch import nn
from torch.distributed.fsdp import fully_shard

from wmtp.distributed import start_world
from wmtp.errors import UserError
from wmtp.training.checkpoint import Checkpointer, load_sharded
from wmtp.training.optimizers import build_optimizer

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


def test_a_value_that_torch_refuses_is_one_line_and_the_user_s_own_fault_keeps_its_traceback():
    world = start_world("cpu")
    with pytest.raises(UserError, match=r"^optimizer \(torch\.optim\.AdamW\): Invalid weight_decay value: -1"):
        build_optimizer(section("torch.optim.AdamW", weight_decay=-1.0), groups(model(world)))
    with pytest.raises(ZeroDivisionError):
        build_optimizer(section(f"{__name__}.Faulty"), groups(model(world)))


class Faulty(torch.optim.SGD):
    def step(self, closure=None):
        return 1 / 0
