"""The strict config reader and component builder."""

import sys

import pytest
import torch
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
        build(OmegaConf.create({"_component_": "wmtp.weighting.shuffled"}), where="weighting")


def control(**method):
    method = {"_component_": "wmtp.weighting.rho1", **method}
    return OmegaConf.create({"_component_": "wmtp.weighting.shuffled", "seed": 3, "method": method})


def test_a_section_inside_a_section_is_built_first():
    weighting = build(
        control(mode="soft", max_weight=3.0, strength="${.min_weight}", min_weight=0.5), where="weighting"
    )
    assert weighting.bounds == (0.75, 2.0)  # (1 - 0.5) + 0.5 * (0.5, 3)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"percentle": 0.5}, r"unknown key 'percentle' in weighting\.method; did you mean 'percentile'"),
        ({"percentile": 2}, r"^weighting\.method\.percentile must be in \(0, 1\], got 2"),
        (
            {"_component_": "wmtp.weighting.rho2"},
            r"weighting\.method\._component_ '.*rho2' cannot be found",
        ),
        ({"_component_": None}, r"weighting\.method has no _component_"),
    ],
)
def test_what_is_wrong_inside_is_named_with_its_full_key(method, message):
    with pytest.raises(ConfigError, match=message):
        build(control(**method), where="weighting")


def test_a_component_beside_where_the_recipe_is_started(tmp_path, monkeypatch):
    (tmp_path / "my_weights.py").write_text("def half(strength):\n    return strength / 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    assert build(OmegaConf.create({"_component_": "my_weights.half", "strength": 1}), where="weighting") == 0.5


OWN = """
from wmtp.errors import UserError

def broken(strength):
    return len(strength)

def refuses(strength):
    raise {error}

class Table(dict):
    def __init__(self, strength):
        self["strength"] + strength
"""


@pytest.mark.parametrize(
    ("name", "error", "kind", "says"),
    [
        ("broken", "0", TypeError, "object of type 'int' has no len"),
        ("refuses", "ValueError('strength is odd')", ValueError, "strength is odd"),
        ("refuses", "OSError('strength')", OSError, "strength"),
        ("Table", "0", KeyError, "strength"),
        ("refuses", "UserError('strength must be even')", ConfigError, "weighting.strength must be even"),
        ("broken.no", "0", ConfigError, "cannot be found"),
    ],
)
def test_what_a_component_of_one_s_own_raises_stays_its_own(tmp_path, monkeypatch, name, error, kind, says):
    module = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(OWN.format(error=error))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(kind) as raised:
        build(OmegaConf.create({"_component_": f"{module}.{name}", "strength": 1}), where="weighting")
    assert type(raised.value) is kind
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("source", "kind"),
    [("import no_such_package", ModuleNotFoundError), ("x = (", SyntaxError), ("{}['x']", KeyError)],
)
def test_an_error_of_a_component_s_module_is_no_misspelt_name(tmp_path, monkeypatch, source, kind):
    module = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(kind) as raised:
        build(OmegaConf.create({"_component_": f"{module}.weights"}), where="weighting")
    assert type(raised.value) is kind


def test_a_value_that_a_library_refuses_is_one_line_with_the_section_s_name():
    with pytest.raises(ConfigError, match=r"^optimizer \(torch.optim.SGD\): Invalid learning rate: -1"):
        build(OmegaConf.create({"_component_": "torch.optim.SGD", "lr": -1}), [torch.zeros(1)], where="optimizer")
