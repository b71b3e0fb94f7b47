"""A step's speed, wait, memory and model FLOPs utilisation, by hand."""

import pytest
import torch

from wmtp.distributed import World
from wmtp.training.performance import ModelFlops, StepMeter, peak_flops

SPEED = ModelFlops(token=100, position=2, targets=(50, 50))


def measured(*times, models=(SPEED,), peak=None):
    meter = StepMeter(World(0, 2, torch.device("cpu"), None), torch.bfloat16, models, peak, clock=iter(times).__next__)
    meter.start()
    for _ in range((len(times) - 3) // 2):
        with meter.data_wait():
            pass
    return meter.metrics(30, 5, [8.0, 6.0])


def test_a_step_by_hand():
    found = measured(0, 100, 101, 103, 105, 106, 110, peak=1000)
    assert found.pop("train/peak_memory_gib") > 0.05  # of this very process
    flops = 30 * (100 + 5 * 2) + 50 * (8 + 6)  # 4,000 in 10 s on 2 devices
    assert found == {
        "train/tokens": 30.0,
        "train/tokens_per_second": 3.0,
        "train/data_wait": pytest.approx(0.3),
        "train/tflops": flops / 10 / 2 / 1e12,
        "train/mfu": 0.2,
    }


def test_several_models_add_up_and_what_is_not_known_is_not_logged():
    both = measured(0, 100, 110, models=(SPEED, ModelFlops(10, 0)))
    assert both["train/tflops"] == (4000 + 300) / 20 / 1e12 and "train/mfu" not in both
    assert "train/tflops" not in measured(0, 100, 110, models=(SPEED, ModelFlops(float("nan"), 0)), peak=1000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device's own name")
def test_a_device_without_a_known_peak():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
