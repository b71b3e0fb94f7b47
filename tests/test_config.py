"""The strict config reader and component builder."""

import pytest
from omegaconf import OmegaConf

from wmtp.config import ConfigError, ConfigReader, build


def test_a_key_that_nobody_reads_is_an_error_and_reading_it_allows_it():
    read = ConfigReader(OmegaConf.create({"lr": 1, "mine": 2}))
    read.get("lr")
    with pytest.raises(ConfigError, match="unknown key 'mine'"):
        read.done()
    read.get("mine")
    read.done()


def test_null_is_the_default_and_a_required_key_must_be_there():
    read = ConfigReader(OmegaConf.create({"a": None}))
    assert read.integer("a", 3) == 3
    with pytest.raises(ConfigError, match="'a' is missing"):
        read.integer("a")


def test_a_section_set_to_null_on_the_command_line_is_null():
    cfg = OmegaConf.create({"tracking": {"_component_": None, "experiment": "e"}})
    assert ConfigReader(cfg).section("tracking", optional=True) is None


@pytest.mark.parametrize("value", [True, "3", float("nan"), float("inf"), -1, 11])
def test_a_number_is_finite_and_in_its_range(value):
    with pytest.raises(ConfigError, match="x must be a number >= 0 and <= 10, got"):
        ConfigReader(OmegaConf.create({"x": value})).number("x", minimum=0, maximum=10)


def test_build_checks_keys_by_name_and_passes_the_recipe_s_own():
    section = OmegaConf.create({"_component_": "collections.Counter", "a": 2})
    assert build(section, where="counts")["a"] == 2
    lr = {"_component_": "torch.optim.AdamW", "lr": 0.1, "weigth_decay": 0.0}
    with pytest.raises(ConfigError, match="unknown key 'weigth_decay' in optimizer; did you mean 'weight_decay'"):
        build(OmegaConf.create(lr), [], where="optimizer")
    with pytest.raises(ConfigError, match="lacks the key"):
        build(OmegaConf.create({"_component_": "wmtp.tracking.MLflowLogger"}), where="tracking")
