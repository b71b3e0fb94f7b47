"""The strict config reader and component builder."""

import re
import sys
from collections.abc import Sequence

import pytest
import torch
from omegaconf import OmegaConf

from wmtp.config import ConfigError, ConfigReader, build, load, parse, read_command_line
from wmtp.errors import clear_errors


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


def test_a_choice_is_one_of_its_options_whatever_is_given():
    read = ConfigReader(OmegaConf.create({"a": None, "b": ["bf16"], "c": {"bf16": 1}, "d": "fp32"}))
    dtypes = {"bf16": 16, "fp32": 32}
    assert read.choice("a", dtypes, "bf16") == 16 and read.choice("d", dtypes) == 32
    assert read.choice("a", {**dtypes, "none": None}, "bf16") is None  # export_dtype=null: no export
    assert read.choice("absent", {**dtypes, "none": None}, "bf16") == 16
    with pytest.raises(ConfigError, match="d must be one of on, null, got 'fp32'"):
        read.choice("d", {"on": 1, None: None}, None)
    for key in ("b", "c"):
        with pytest.raises(ConfigError, match=rf"^{key} must be one of bf16, fp32, got "):
            read.choice(key, dtypes)


@pytest.mark.parametrize("value", [["a.jsonl", "b.jsonl"], {"a": 1}, 5, True, "", " "])
def test_a_text_is_one_text(value):
    with pytest.raises(ConfigError, match=r"^a must be one text, got "):
        ConfigReader(OmegaConf.create({"a": value})).text("a", None)
    read = ConfigReader(OmegaConf.create({"a": "s.jsonl", "b": None}))
    assert read.text("a") == "s.jsonl" and read.text("b", None) is None


def test_a_number_of_bytes_is_one_or_a_size():
    sizes = {"20GB": 20 * 10**9, "1.5 tb": 15 * 10**11, "512K": 512_000, "7": 7, 7: 7, 2e9: 2 * 10**9, None: None}
    for given, meant in sizes.items():
        assert ConfigReader(OmegaConf.create({"a": given})).num_bytes("a", None) == meant
    for given in (0, -1, "-20GB", "0.4", "20 gallons", True, ["1GB"], 0.5, ""):
        with pytest.raises(ConfigError, match=r"^a must be a number of bytes >= 1 or a size such as 20GB, got"):
            ConfigReader(OmegaConf.create({"a": given})).num_bytes("a", None)


def test_a_choice_may_be_a_whole_number_beside_its_options():
    options = {False: None, True: 1, "selective": "selective"}
    read = lambda value: ConfigReader(OmegaConf.create({"a": value})).choice("a", options, False, or_whole=2)
    assert [read(value) for value in (None, False, True, "selective", 2, "3")] == [None, None, 1, "selective", 2, 3]
    for wrong in (1, 0, -2, 2.5, "full"):
        with pytest.raises(ConfigError, match=r"^a must be one of .*selective, a whole number >= 2, got "):
            read(wrong)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("of", "must be one of auto, off, false, got 'of'"),
        (True, "must be one of auto, off, false, got true, as YAML reads on and yes too"),
        (0, "must be one of auto, off, false, got 0"),
    ],
)
def test_a_choice_names_what_was_given_and_each_option_once_as_yaml_writes_it(value, says):
    options = {"auto": "auto", "off": "off", False: "none"}
    with pytest.raises(ConfigError, match=f"^a {says}$"):
        ConfigReader(OmegaConf.create({"a": value})).choice("a", options, "auto")
    with pytest.raises(ConfigError, match=r"^a must be one of auto, off, got "):  # YAML's off is no third option
        ConfigReader(OmegaConf.create({"a": value})).choice("a", options | {False: "off"}, "auto")


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("wmtp.weighting", r"^x\._component_ 'wmtp\.weighting' is a module, not a class or function with keys$"),
        ("torch.zeros", r"^x\._component_ 'torch\.zeros' is a builtin_function_or_method, not a class or function"),
        (5, r"^x\._component_ must be the dot path of a class or function, got 5$"),
        (["wmtp.weighting.rho1"], r"^x\._component_ must be the dot path of a class or function, got \['wmtp"),
        (None, r"^x has no _component_: name the class or function"),
    ],
)
def test_what_is_no_component_is_refused_by_name(component, message):
    with pytest.raises(ConfigError, match=message):
        build(OmegaConf.create({"_component_": component}), where="x")


def named(dtype: str = "fp32", note: "str | None" = None):
    return dtype, note


def test_a_list_or_a_section_is_no_text():
    given = lambda **keys: build(OmegaConf.create({"_component_": f"{__name__}.named", **keys}), where="x")
    assert given(dtype="bf16", note=None) == ("bf16", None)
    for value in (["bf16"], {"bf16": 1}):
        with pytest.raises(ConfigError, match=r"^x\.dtype must be a text, got "):
            given(dtype=value)


def test_a_recipe_that_ends_well_raises_nothing(config_file, monkeypatch):
    """Neither is its end taken for a failure, nor does its hook for errors outlive it."""
    monkeypatch.setattr("sys.argv", ["recipe", "--config", str(config_file)])
    before, seen = sys.excepthook, []
    assert clear_errors()(parse(lambda cfg: seen.append(cfg) or 3))() is None
    assert len(seen) == 1 and sys.excepthook is before


@pytest.mark.parametrize("value", [True, "3 steps", "nan", float("nan"), float("inf"), -1, 11])
def test_a_number_is_finite_and_in_its_range(value):
    with pytest.raises(ConfigError, match="x must be a number >= 0 and <= 10, got"):
        ConfigReader(OmegaConf.create({"x": value})).number("x", minimum=0, maximum=10)


def test_a_number_in_quotes_is_that_number_wherever_one_is_meant():
    read = ConfigReader(OmegaConf.create({"a": "1e-5", "b": " 2e3", "c": 1e5, "d": ["1", 2.0], "e": ["-1.5", 0]}))
    assert (read.number("a"), read.integer("b"), read.integer("c")) == (1e-5, 2000, 100_000)
    assert (read.numbers("d", whole=True), read.numbers("e")) == ([1, 2], [-1.5, 0.0])
    adam = {"_component_": "torch.optim.AdamW", "lr": "1e-5", "betas": ["0.9", 0.99], "weight_decay": "1e-4"}
    (group,) = build(OmegaConf.create(adam), [torch.nn.Parameter(torch.zeros(1))], where="optimizer").param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-5, (0.9, 0.99), 1e-4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"lr": "fast"}, r"^optimizer\.lr must be a number, got 'fast'$"),
        ({"betas": [0.9, "0,99"]}, r"^optimizer\.betas\.1 must be a number, got '0,99'$"),
        ({"weight_decay": True}, r"^optimizer\.weight_decay must be a number, got True$"),
        ({"weight_decay": [0.1]}, r"^optimizer\.weight_decay must be a number, got \[0\.1\]$"),
        ({"weight_decay": {"a": 1}}, r"^optimizer\.weight_decay must be a number, got \{'a': 1\}$"),
        ({"weight_decay": None}, r"^optimizer\.weight_decay must be a number, got null$"),
        ({"eps": float("nan")}, r"^optimizer\.eps must be a number, got nan$"),
        ({"betas": 0.9}, r"^optimizer\.betas must be a list, got 0\.9; write \[0\.9\]$"),
        ({"betas": [0.9]}, r"^optimizer\.betas must be a list of 2, got \[0\.9\]$"),
        ({"amsgrad": "maybe"}, r"^optimizer\.amsgrad must be true or false, got 'maybe'$"),
        ({"amsgrad": 1}, r"^optimizer\.amsgrad must be true or false, got 1$"),
        ({"fused": "yes"}, r"^optimizer\.fused must be true or false or null, got 'yes'$"),
    ],
)
def test_what_is_no_number_is_named_with_its_key(value, message):
    section = OmegaConf.create({"_component_": "torch.optim.AdamW", **value})
    with pytest.raises(ConfigError, match=message):
        build(section, [torch.nn.Parameter(torch.zeros(1))], where="optimizer")


def whole_only(count: int, share: "float | None" = None, names: tuple[str, ...] = (), other=2):
    return count, share, names, other


def test_a_parameter_gets_what_its_annotation_or_default_says():
    def given(**keys):
        return build(OmegaConf.create({"_component_": f"{__name__}.whole_only", **keys}), where="it")

    assert given(count="3", share="0.5", names=["1", "2"], other="4") == (3, 0.5, ["1", "2"], 4)
    assert given(count=2.0, share=None) == (2, None, (), 2)
    with pytest.raises(ConfigError, match=r"it\.count must be a whole number, got 2\.5"):
        given(count=2.5)


def listed(names: "Sequence[str] | None" = None, ids: Sequence[int | str] = (), either: str | Sequence[str] = "a"):
    return names, ids, either


def test_a_text_is_no_list_of_its_letters():
    def given(**keys):
        return build(OmegaConf.create({"_component_": f"{__name__}.listed", **keys}), where="it")

    assert given(names=["ab"], ids=[1, "2"], either="ab") == (["ab"], [1, "2"], "ab")
    for key in ("names", "ids"):
        with pytest.raises(ConfigError, match=rf"^it\.{key} must be a list, got 'tests'; write \[tests\]$"):
            given(**{key: "tests"})


def test_the_home_folder_s_sign_is_read_in_every_path_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = OmegaConf.create(
        {
            "output_dir": "~/runs",
            "dataset": {"files": ["~/a", "b~"], "to": "${output_dir}"},
            "text": "a ~/b",
            "no": "~?x",
        }
    )
    read = ConfigReader(cfg)
    assert read.get("output_dir") == "/home/me/runs"
    assert read.section("dataset") == {"files": ["/home/me/a", "b~"], "to": "/home/me/runs"}
    assert (read.get("text"), read.get("no")) == ("a ~/b", "~?x")
    with pytest.raises(ConfigError, match="a reference that leads nowhere: Interpolation key 'sead' not found"):
        ConfigReader(OmegaConf.create({"seed": "${sead}"}))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "output_dir: a\nmax_steps: 5\ntracking: null\nweighting: {_component_: wmtp.weighting.shuffled, method: "
        "{_component_: wmtp.weighting.rho1}}\noptimizer: {_component_: torch.optim.AdamW, lr: 1e-5, "
        "betas: [0.9, 0.95]}\n"
    )
    return path


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        (["output_dir=runs/a=b"], "output_dir", "runs/a=b"),
        (["output_dir=s3://bucket/x?y=a=b"], "output_dir", "s3://bucket/x?y=a=b"),
        (["output_dir='a, b: c'"], "output_dir", "a, b: c"),
        (["optimizer.lr=1e-5"], "optimizer.lr", 1e-5),
        (["optimizer.betas.1=.99"], "optimizer.betas", [0.9, 0.99]),
        (["optimizer.betas=[0.8, 0.9]"], "optimizer.betas", [0.8, 0.9]),
        (
            ["optimizer=torch.optim.SGD", "~optimizer.betas"],
            "optimizer",
            {"_component_": "torch.optim.SGD", "lr": 1e-5},
        ),
        (["weighting.method=wmtp.weighting.dft"], "weighting.method._component_", "wmtp.weighting.dft"),
        (["optimizer=null"], "optimizer", None),
        (["tracking.experiment=e"], "tracking", {"experiment": "e"}),
        (["max_steps=None"], "max_steps", None),
        (["seed=1", "max_steps=${seed}", "seed=2"], "max_steps", 2),
    ],
)
def test_the_command_line_changes_the_file(config_file, changes, key, value):
    assert OmegaConf.select(read_command_line(["--config", str(config_file), *changes]), key) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("max_steps", "'max_steps' on the command line: write key=value, such as max_steps=20, or ~key"),
        ("--max_steps", "'--max_steps' on the command line: write key=value"),
        ("max_steps=", "'max_steps=' on the command line: the value is empty; write max_steps=null"),
        ("~max_stepz", "'~max_stepz' on the command line: the config has no such key to remove"),
        ("output_dir=[a", "the value is no YAML, quote it: \"output_dir='[a'\""),
        ("optimizer.betas.7=1", "'optimizer.betas.7=1' on the command line: list index out of range"),
    ],
)
def test_an_argument_that_changes_nothing_is_refused_in_one_line(config_file, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_command_line(["--config", str(config_file), change])


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("a: [1", "line 1"), ("- a", "holds a list")])
def test_a_file_that_is_no_config_is_refused_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_command_line(["--config", str(tmp_path / "c.yaml")])


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
            r"weighting\.method\._component_ '.*rho2' cannot be found: did you mean wmtp\.weighting\.rho1\?",
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


def test_what_the_sandbox_refuses_is_one_line_though_it_knows_no_error_of_ours():
    with pytest.raises(ConfigError, match=r"^limits \(wmtp.sandbox.Limits\): memory_bytes must be > 0, got -1"):
        build(OmegaConf.create({"_component_": "wmtp.sandbox.Limits", "memory_bytes": -1}), where="limits")


@pytest.fixture
def written(tmp_path):
    """Writes config files by name; the folder."""

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path

    return write


def test_a_config_stands_on_top_of_those_that_it_starts_from(written):
    base = "steps: 3\nlr: 0.1\nmodel: {_component_: a.B, width: 4, depth: 2}\nlist: [1, 2]\nname: ${model.width}\n"
    folder = written(
        base=base,
        middle="defaults: base.yaml\nlr: 0.2\nmodel: {width: 8}\nlist: [3]\nnew: null\n",
        top="defaults: middle.yaml\nmodel: {_component_: a.C}\n~steps:\nlr: null\n",
        both="defaults: [base.yaml, more/other.yaml]\nsteps: 5\n",
    )
    (folder / "more").mkdir()
    (folder / "more" / "other.yaml").write_text("steps: 4\nlr: 7\nmodel:\n  ~depth:\n")
    middle = OmegaConf.to_container(load(folder / "middle.yaml"), resolve=True)
    assert middle == {
        **{"steps": 3, "lr": 0.2, "list": [3], "name": 8, "new": None},
        "model": {"_component_": "a.B", "width": 8, "depth": 2},
    }
    assert list(middle) == ["steps", "lr", "model", "list", "name", "new"]
    # Another component's keys are not the first one's; a key that is removed or null is not the base's.
    top = OmegaConf.to_container(load(folder / "top.yaml"))
    assert (top["model"], top["lr"], "steps" in top) == ({"_component_": "a.C"}, None, False)
    both = OmegaConf.to_container(load(folder / "both.yaml"))
    assert (both["steps"], both["lr"], both["model"]) == (5, 7, {"_component_": "a.B", "width": 4})
    assert OmegaConf.to_container(load(folder / "base.yaml")) == OmegaConf.to_container(OmegaConf.create(base))


@pytest.mark.parametrize(
    ("top", "reason"),
    [
        (
            "defaults: gone.yaml\n",
            r"gone.yaml, which .*top.yaml starts from \(defaults\), cannot be read: .*No such file",
        ),
        ("defaults: top.yaml\n", r"top.yaml starts from itself \(defaults\): .*top.yaml -> .*top.yaml"),
        ("defaults: around.yaml\n", r"top.yaml starts from itself .*top.yaml -> .*around.yaml -> .*top.yaml"),
        ("defaults: list.yaml\n", r"list.yaml, which .*top.yaml starts from \(defaults\), holds a list"),
        (
            "defaults: {a: b}\n",
            r"defaults of .*top.yaml must be the path of a config, or a list of paths, got {'a': 'b'}",
        ),
        ("defaults: base.yaml\n~lr:\n", r"top.yaml: ~lr removes a key that is not there"),
        ("defaults: base.yaml\nmodel: {~with: null}\n", r"top.yaml: model: ~with removes a key that is not there"),
    ],
)
def test_what_a_config_cannot_start_from_is_named(written, top, reason):
    folder = written(top=top, around="defaults: top.yaml\n", list="- 1\n", base="model: {width: 1}\n")
    with pytest.raises(ConfigError, match=reason) as caught:
        read_command_line(["--config", str(folder / "top.yaml")])
    assert "\n" not in str(caught.value)


def test_the_whole_config_can_be_printed_before_a_run(written, capsys):
    folder = written(base="lr: 0.1\nsteps: 3\n", top="defaults: base.yaml\nsteps: 4\n")
    with pytest.raises(SystemExit) as ended:
        read_command_line(["--config", str(folder / "top.yaml"), "lr=0.5", "--print-config"])
    assert not ended.value.code
    assert capsys.readouterr().out == "lr: 0.5\nsteps: 4\n"
