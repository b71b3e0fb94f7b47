"""docs/configuration.md says what the configs say, and the configs say it of every key, once."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def configs(reference):
    return reference.read_configs()


@pytest.fixture
def scratch(reference, tmp_path, monkeypatch):
    """A project of one config, to be written by the test, and one recipe that reads two keys."""
    (tmp_path / "configs" / "tiny").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "some.py").write_text('"""A recipe."""\nread.integer("seed", 3)\nread.get("folder")\n')
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    for cached in (reference.recipe_defaults, reference.component_defaults, reference._tree):
        cached.cache_clear()

    def write(body: str, name: str = "one") -> None:
        head = f"# A config.\n#\n#   tune run recipes/some.py --config configs/tiny/{name}.yaml\n\n# ---- Run\n"
        (tmp_path / "configs" / "tiny" / f"{name}.yaml").write_text(head + body)

    yield write
    for cached in (reference.recipe_defaults, reference.component_defaults, reference._tree):
        cached.cache_clear()


def test_the_committed_page_is_what_make_docs_writes(reference, configs):
    assert reference.TARGET.read_text() == reference.render(configs), "run make docs"


def test_every_key_has_a_comment_the_same_in_all_configs_of_its_recipe(reference, configs):
    assert sum(len(config.entries) for config in configs) > 2000
    assert reference.complaints(configs) == []


def test_configs_and_recipes_know_the_same_keys(reference, configs):
    assert reference.unread(configs) == []


def test_every_shipped_config_and_its_recipe_are_found(configs):
    assert {config.path for config in configs} == {str(p.relative_to(ROOT)) for p in ROOT.glob("configs/*/*.yaml")}
    assert all((ROOT / "recipes" / f"{config.recipe}.py").is_file() for config in configs)


def test_defaults_and_values_stand_beside_the_comment(reference, scratch):
    scratch("folder: here  # where | there\nseed: 5   # of all; here: a lucky one\n")
    page = reference.render(reference.read_configs())
    assert "| `folder` | where \\| there | required | `here` |" in page
    assert "| `seed` | of all | `3` | `5` (a lucky one) |" in page


def test_what_is_wrong_with_a_config_is_said_with_file_and_line(reference, scratch):
    scratch("folder: a  # where\nseed: 5\n")
    scratch("folder: a  # whither\nseed: 5  # of all\nsede: 5  # of none\n", "two")
    (bare, whither, _) = reference.complaints(reference.read_configs())
    assert bare == "configs/tiny/one.yaml:7: seed has no comment"
    assert whither.startswith("configs/tiny/two.yaml:6: folder is 'whither', but 'where' in configs/tiny/one.yaml:6")
    (unknown,) = reference.unread(reference.read_configs())
    assert unknown == "configs/tiny/two.yaml:8: sede is no key of recipes/some.py"
    scratch("folder: a  # where\n")
    (tmp := reference.ROOT / "configs" / "tiny" / "two.yaml").unlink()
    assert not tmp.exists()
    assert reference.unread(reference.read_configs()) == ["recipes/some.py reads seed, which no config shows"]


def test_every_key_of_every_builder_is_explained(reference, configs):
    builders = reference.builders(configs)
    assert reference.builder_tables.undocumented(builders) == []
    listed = {builder.path for of_kind in builders.values() for builder in of_kind}
    named = {entry.value for config in configs for entry in config.entries if entry.key.endswith("_component_")}
    assert {name for name in named if name.startswith("wmtp.")} <= listed
    assert {
        f"wmtp.weighting.{name}" for name in ("rho1", "critic", "dft", "entropy", "shuffled", "random_matched")
    } <= listed
    assert {"wmtp.data.prompt_completion", "wmtp.data.tokenized", "wmtp.critic.jsonl_pairs"} <= listed  # in no config


def test_a_builders_table_is_read_from_its_docstring(reference, scratch):
    scratch("folder: here  # where\nseed: 5   # of all\n")
    (reference.ROOT / "wmtp").mkdir()
    source = '''def mine(tokenizer, *, source: str, low: float = 0.5, high: float = 1.0, odd: int = 3) -> "Documents":
    """Documents of <mine>.

    Kept whole.

    Args:
        source: a file,
            or ``a|b``.
        low, high: in :func:`~wmtp.other`'s range.

    Raises:
        ValueError: never.

    Said last.
    """
'''
    (reference.ROOT / "wmtp" / "data").mkdir()
    (reference.ROOT / "wmtp" / "data" / "own.py").write_text(source)
    configs = reference.read_configs()
    page = reference.render(configs)
    assert "#### `wmtp.data.mine`\n\nDocuments of &lt;mine>.\n\nKept whole.\n\nSaid last.\n" in page
    assert "| `source` | a file, or `a\\|b` | required |\n" in page
    assert "| `high` | in `wmtp.other`'s range | `1.0` |\n" in page
    assert "tokenizer" not in page and "never" not in page
    said = reference.builder_tables.undocumented(reference.builders(configs))
    assert said == ["wmtp.data.mine: the docstring's Args say nothing of odd"]


def test_a_config_without_its_command_is_refused(reference, scratch):
    scratch("seed: 5  # of all\n")
    file = reference.ROOT / "configs" / "tiny" / "one.yaml"
    file.write_text(file.read_text().replace("tiny/one", "tiny/other"))
    with pytest.raises(ValueError, match=r"configs/tiny/one.yaml: its head must hold the command"):
        reference.read_configs()
