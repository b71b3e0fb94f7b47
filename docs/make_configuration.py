"""Write docs/configuration.md, the reference of every config key, from the comments in configs/ and from the code.

    python docs/make_configuration.py            (`make docs`)
    python docs/make_configuration.py --check    exit status 1 if the file is not what this would write

A config belongs to the recipe that the command in its head starts with it. A key's meaning is the comment on its line,
the same in all configs of a recipe; what holds for one config alone follows `; here: `. A config that starts from
another (`defaults`) has its keys, too. A component of this project without a comment is described by its docstring's
first sentence. Defaults are read from the source of the recipe and of the component. After the recipes come the
builders, with every key that their docstrings name (see builder_tables.py). Nothing is imported: it takes a second.
"""

import argparse
import ast
import copy
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
import builder_tables

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "configuration.md"
MODELS = ("tiny", "smollm2_135m", "meta_mtp_7b", "codellama_7b")  # from small to large; folders added later come after
HERE = "; here: "
FREE = {
    "sweep_wmtp": ("controls", "overrides", "axes", "search", "evaluations")
}  # whose keys are other recipes', or names
REQUIRED, UNKNOWN = "required", ""

_HEAD = """# Configuration

Every key of every config, written by `make docs` from the comments in `configs/` and from the code with its docstrings:
do not edit.

- Any key can be overridden on the command line: `max_steps=20 weighting.percentile=0.7 tracking=null`.
- `defaults: uniform.yaml` starts from the keys of that config, a path from the file's folder (or a list, of which later
  ones go on top). A section is taken key by key, unless it names another `_component_`; `~key:` removes a key. What a
  run reads in the end is shown by `--print-config`, and kept in its `output_dir/config.yaml`.
- A key that nobody reads is an error, and so is a value out of its range; both name the key.
- **default** is what a key is when it is left out; for *required* ones there is none. Where a meaning lists words apart
  by `|`, these are the values allowed.
- A section with a `_component_` builds what that dot path names, and its other keys are the arguments. Any function or
  class with fitting arguments will do, also one in a file of yours beside which the recipe is started. Rows that hold
  for some components alone name them. All that this project can build, with every key, is under [Builders](#builders).
- A path may be local or `s3://bucket/key`; where a checkpoint is asked for, `runs:/RUN/export` and `models:/NAME@ALIAS`
  name one in MLflow. See [data_and_models.md](data_and_models.md) and [operations.md](operations.md).
- `${key}` repeats another key's value.
"""


@dataclass(frozen=True)
class Entry:
    """One key of one config."""

    config: str  # configs/tiny/rho1.yaml
    where: str  # file and line: of the config, or of one that it starts from
    group: str  # the banner it stands under
    key: str  # with dots
    component: str | None  # of the section that holds it
    value: str | None  # as written; None for a section
    meaning: str  # the comment without what holds here alone; "" where there is none
    here: str


@dataclass(frozen=True)
class Config:
    """One file in configs/."""

    path: str
    recipe: str  # file name without .py
    title: str  # first line of its head
    entries: tuple[Entry, ...]


def read_config(path: Path) -> Config:
    """A config's keys with their comments, and those of the config that it starts from.

    Raises:
        ValueError: the file's head holds no command that starts a recipe with this very file.
    """
    text, name = path.read_text(), path.relative_to(ROOT).as_posix()
    commands = re.findall(r"^#.*\brecipes/(\w+)\.py --config (\S+)", text, flags=re.MULTILINE)
    recipes = {recipe for recipe, config in commands if config == name}
    if len(recipes) != 1:
        raise ValueError(f"{name}: its head must hold the command that starts it: recipes/NAME.py --config {name}")
    lines = text.splitlines()
    banners = [(n, line[6:].strip()) for n, line in enumerate(lines) if line.startswith("# ---- ")]
    entries = []
    free = FREE.get(next(iter(recipes)), ())
    for key, key_node, value_node, component in _keys(yaml.compose(text), "", None):
        if key.partition(".")[0] in free and "." in key:
            continue
        n = key_node.start_mark.line
        block = isinstance(value_node, yaml.MappingNode | yaml.SequenceNode) and not value_node.flow_style
        end = key_node.end_mark if block else value_node.end_mark
        comment = lines[end.line][end.column :].partition("#")[2].strip()
        meaning, _, here = comment.partition(HERE)
        value = None if block else lines[n][key_node.end_mark.column + 1 : end.column].strip()
        if not meaning and key.endswith("_component_") and (definition := _definition(value)) is not None:
            meaning = _sentence(ast.get_docstring(definition) or "").split(". ")[0].removesuffix(".")
        group = next((title for start, title in reversed(banners) if start < n), "")
        entries.append(Entry(name, f"{name}:{n + 1}", group, key, component, value, meaning, here))
    return Config(name, recipes.pop(), lines[0].lstrip("# "), _with_inherited(path, entries))


def _with_inherited(path: Path, entries: list[Entry]) -> tuple[Entry, ...]:
    """A config's entries in the places of those that they stand on top of, as :func:`wmtp.config.load` puts them."""
    base = next((entry.value for entry in entries if entry.key == "defaults"), None)
    own = {entry.key: entry for entry in entries if entry.key != "defaults"}
    if base is None:
        return tuple(own.values())
    inherited = read_config((path.parent / base).resolve()).entries
    dropped = tuple(f"{key[1:]}." for key in own if key.startswith("~"))
    components = {
        entry.key.rpartition(".")[0]: entry.value
        for entry in inherited
        if entry.key.endswith("_component_") and not entry.key.startswith(dropped)
    }
    gone = {re.sub(r"(^|\.)~", r"\1", key) for key in own if "~" in key}
    # What is no section any more, or another component's.
    gone |= {key for key, entry in own.items() if entry.value is not None}
    gone |= {
        section
        for section, _, name in (key.rpartition(".") for key in own)
        if name == "_component_" and own[f"{section}.{name}"].value != components.get(section)
    }
    own = {key: replace(entry, component=entry.component or _component(key, components)) for key, entry in own.items()}
    kept = {
        entry.key: replace(entry, config=entries[0].config)
        for entry in inherited
        if entry.key in own or not any(f"{entry.key}.".startswith(f"{key}.") for key in gone)
    }
    merged = [own.get(key, entry) for key, entry in kept.items()]
    for key, entry in own.items():
        if "~" not in key and key not in kept:  # to the others of its section and banner
            section = key.rpartition(".")[0]
            near = [n for n, other in enumerate(merged) if (other.key + ".").startswith(section + ".") or not section]
            near = [n for n in near if merged[n].group == entry.group]
            merged.insert(near[-1] + 1 if near else len(merged), entry)
    return tuple(merged)


def _component(key: str, components: dict[str, str]) -> str | None:
    """What builds the innermost section around a key."""
    section = key.rpartition(".")[0]
    return components.get(section) or _component(section, components) if section else None


def _keys(node: yaml.MappingNode, prefix: str, component: str | None) -> Iterator[tuple]:
    own = next((value.value for key, value in node.value if key.value == "_component_"), component)
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key, value, own
        if isinstance(value, yaml.MappingNode):
            yield from _keys(value, f"{name}.", own)


def read_configs() -> list[Config]:
    """All configs, small models first."""
    order = {model: place for place, model in enumerate(MODELS)}
    paths = sorted(ROOT.glob("configs/*/*.yaml"), key=lambda p: (order.get(p.parent.name, 99), p.as_posix()))
    return [read_config(path) for path in paths]


# ----------------------------------------------------------------------------------------------------------------------
# What is wrong with the configs


def complaints(configs: Iterable[Config]) -> list[str]:
    """Keys without a comment, and keys of one recipe with two meanings, a line each."""
    found, meanings = [], {}
    for config in configs:
        for entry in config.entries:
            if not entry.meaning:
                found.append(f"{entry.where}: {entry.key} has no comment")
            value = entry.value if entry.key.endswith("_component_") else None
            first = meanings.setdefault((config.recipe, entry.key, entry.component, value), entry)
            if first.meaning != entry.meaning:
                found.append(
                    f"{entry.where}: {entry.key} is {entry.meaning!r}, but {first.meaning!r} in {first.where}; say it "
                    f"with the same words, and what holds in one file alone after {HERE.strip()!r}"
                )
    return found


def unread(configs: Iterable[Config]) -> list[str]:
    """Keys that the recipe, or the component, does not know, and keys of a recipe that no config shows."""
    found, shown = [], {}
    for config in configs:
        known = recipe_defaults(config.recipe)
        shown.setdefault(config.recipe, set()).update(entry.key for entry in config.entries)
        for entry in config.entries:
            section, _, name = entry.key.rpartition(".")
            if not section and name not in known:
                found.append(f"{entry.where}: {entry.key} is no key of recipes/{config.recipe}.py")
            arguments = component_defaults(entry.component) if section and name != "_component_" else None
            own = entry.key in known  # a key of the recipe's in a section that a component is built of
            if arguments is not None and not own and not section.count(".") and name not in arguments:
                found.append(f"{entry.where}: {entry.key} is no argument of {entry.component}")
    for recipe, keys in shown.items():
        found += [
            f"recipes/{recipe}.py reads {key}, which no config shows" for key in recipe_defaults(recipe).keys() - keys
        ]
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Defaults, read from the source


@cache
def recipe_defaults(recipe: str) -> dict[str, str]:
    """The keys that a recipe reads, and what they are where they are left out."""
    defaults, tree = {}, _tree(ROOT / "recipes" / f"{recipe}.py")
    loops = [
        node for node in ast.walk(tree) if isinstance(node, ast.comprehension) and isinstance(node.iter, ast.Tuple)
    ]
    looped = {  # for key in ("gamma", "gae_lambda")
        loop.target.id: [item.value for item in loop.iter.elts if isinstance(item, ast.Constant)]
        for loop in loops
        if isinstance(loop.target, ast.Name)
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        if not isinstance(call.func.value, ast.Name) or call.func.value.id != "read" or not call.args:
            continue
        first, rest = call.args[0], call.args[1:]
        keys = looped[first.id] if isinstance(first, ast.Name) else [ast.literal_eval(first)]
        named = {word.arg: word.value for word in call.keywords}
        if call.func.attr == "section":
            default = "null" if "optional" in named else REQUIRED
        else:
            rest = rest[1:] if call.func.attr == "choice" else rest
            node = rest[0] if rest else named.get("default")
            default = REQUIRED if node is None else _as_yaml(node)
        defaults.update(dict.fromkeys(keys, default))
    return defaults


@cache
def component_defaults(path: str | None) -> dict[str, str] | None:
    """Arguments of a function or class of this project and their defaults; None for one of another project."""
    node = _definition(path)
    if node is None or isinstance(node, ast.FunctionDef):
        return None if node is None else _arguments(node)
    init = next((n for n in node.body if getattr(n, "name", None) == "__init__"), None)
    return _fields(node) if init is None else _arguments(init)


def _definition(path: str | None) -> ast.FunctionDef | ast.ClassDef | None:
    """Where a dot path of this project leads; None for one of another project."""
    if path is None or not path.startswith("wmtp."):
        return None
    *modules, name = path.split(".")
    folder = ROOT.joinpath(*modules)
    for file in sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
        for node in _tree(file).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return node
    raise ValueError(f"{path}: no such function or class in {folder.relative_to(ROOT)}")


def _functions(package: str) -> list[str]:
    """The public functions of a package by name, by file and place."""
    files = sorted(ROOT.joinpath(*package.split(".")).glob("*.py"))
    nodes = (node for file in files for node in _tree(file).body)
    return [node.name for node in nodes if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def _arguments(function: ast.FunctionDef) -> dict[str, str]:
    positional = [*function.args.posonlyargs, *function.args.args]
    padded = [None] * (len(positional) - len(function.args.defaults)) + function.args.defaults
    pairs = [
        *zip(positional, padded, strict=True),
        *zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True),
    ]
    return {argument.arg: REQUIRED if default is None else _as_yaml(default) for argument, default in pairs}


def _fields(data_class: ast.ClassDef) -> dict[str, str]:
    fields = [node for node in data_class.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: REQUIRED if node.value is None else _as_yaml(node.value) for node in fields}


def _as_yaml(default: ast.expr) -> str:
    try:
        value = ast.literal_eval(default)
    except ValueError:
        try:  # 16 * 2**20: arithmetic of numbers, and nothing else
            numbers = ast.Expression(default)
            if not all(
                isinstance(n, ast.Expression | ast.BinOp | ast.operator | ast.Constant) for n in ast.walk(numbers)
            ):
                return UNKNOWN
            value = eval(compile(numbers, "default", "eval"))
        except (TypeError, ValueError):
            return UNKNOWN
    words = {None: "null", True: "true", False: "false"}
    if isinstance(value, bool | None):
        return words[value]
    return str(list(value) if isinstance(value, tuple) else value)


@cache
def _tree(file: Path) -> ast.Module:
    """A file's syntax tree, with a function in place of each `name = streamed(builder, key=...)` of wmtp.data."""
    tree = ast.parse(file.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    tree.body = [_streamed(node, functions) or node for node in tree.body]
    return tree


def _streamed(node: ast.stmt, functions: dict[str, ast.FunctionDef]) -> ast.FunctionDef | None:
    if not isinstance(node, ast.Assign) or getattr(getattr(node.value, "func", None), "id", None) != "streamed":
        return None
    builder, fixed = functions[node.value.args[0].id], {keyword.arg for keyword in node.value.keywords}
    both = zip(builder.args.kwonlyargs, builder.args.kw_defaults, strict=True)
    kept = [(argument, default) for argument, default in both if argument.arg not in fixed]
    keys = ", ".join(argument.arg for argument, _ in kept)
    text = f"The documents of :func:`{builder.name}` without the dataset in memory; weights are kept beside the scores."
    docstring = f"{text}\n\nArgs:\n    {keys}: as in :func:`{builder.name}`."
    stream = copy.deepcopy(builder)
    stream.name, stream.returns = node.targets[0].id, ast.Name("DocumentStream")
    stream.args.kwonlyargs, stream.args.kw_defaults = map(list, zip(*kept, strict=True))
    stream.body = [ast.Expr(ast.Constant(docstring))]
    return stream


# ----------------------------------------------------------------------------------------------------------------------
# The page


def render(configs: list[Config]) -> str:
    """The whole of docs/configuration.md."""
    recipes = list(dict.fromkeys(config.recipe for config in configs))
    recipes.sort(key=lambda recipe: (-sum(config.recipe == recipe for config in configs), recipe))
    parts = [_HEAD, *(_recipe(recipe, [c for c in configs if c.recipe == recipe]) for recipe in recipes)]
    return "\n".join([*parts, *builder_tables.tables(builders(configs), _cell, REQUIRED)])


def builders(configs: Iterable[Config]) -> dict[str, list[builder_tables.Builder]]:
    """All that a config may name, by kind: of every package's kinds, and what configs name, in comments too."""
    texts = ((ROOT / config.path).read_text() for config in configs)
    named = {path for text in texts for path in re.findall(r"_component_: *(wmtp(?:\.\w+)+)", text)}
    return builder_tables.find_builders(_functions, _definition, component_defaults, named)


def _recipe(recipe: str, configs: list[Config]) -> str:
    lines = [f"## {recipe}", "", _sentence(ast.get_docstring(_tree(ROOT / "recipes" / f"{recipe}.py"))), ""]
    lines += ["| config | |", "|---|---|"]
    lines += [f"| [{c.path.removeprefix('configs/')}](../{c.path}) | {_cell(c.title)} |" for c in configs]
    entries = [entry for config in configs for entry in config.entries]
    for group in _in_order(configs):
        lines += ["", f"### {recipe}: {group}", "", "| key | meaning | default | in the configs |", "|---|---|---|---|"]
        of_group = [entry for entry in entries if entry.group == group]
        for key in _sorted_keys(of_group):
            lines += _rows(recipe, key, [entry for entry in of_group if entry.key == key], of_group)
    return "\n".join(lines) + "\n"


def _in_order(configs: list[Config]) -> list[str]:
    """Banners in the order of the longest config that has them."""
    longest = max(configs, key=lambda config: len(config.entries))
    groups = dict.fromkeys(entry.group for config in (longest, *configs) for entry in config.entries)
    return list(groups)


def _sorted_keys(entries: list[Entry]) -> list[str]:
    """Each key once; a key that only later configs have comes after the one before it there."""
    keys: list[str] = []
    for config in dict.fromkeys(entry.config for entry in entries):
        place = -1
        for key in (entry.key for entry in entries if entry.config == config):
            if key not in keys:
                section = key.rpartition(".")[0]
                inside = [i for i, other in enumerate(keys) if section and other.startswith(f"{section}.")]
                keys.insert((inside[-1] if inside else place) + 1, key)
            place = keys.index(key)
    return keys


def _rows(recipe: str, key: str, entries: list[Entry], group: list[Entry]) -> Iterator[str]:
    """A row for each meaning of the key: one where all components agree, otherwise one for each."""
    section, _, name = key.rpartition(".")
    is_component = name == "_component_"
    by_meaning: dict[tuple, list[Entry]] = {}
    for entry in entries:
        default = _default(recipe, entry)
        by_meaning.setdefault((entry.meaning, default, entry.value if is_component else None), []).append(entry)
    components = {entry.component for entry in group if entry.key.rpartition(".")[0] == section}
    for (meaning, default, _), same in by_meaning.items():
        only = dict.fromkeys(entry.component for entry in same)
        label = f"`{key}`"
        if section and not is_component and None not in only and len(only) < len(components):
            label += " of " + ", ".join(f"`{component.split('.')[-1]}`" for component in only)
        shown = REQUIRED if default == REQUIRED else f"`{default}`" if default else ""
        yield f"| {label} | {_cell(meaning)} | {shown} | {_values(same)} |"


def _default(recipe: str, entry: Entry) -> str:
    section, _, name = entry.key.rpartition(".")
    if name == "_component_":
        return UNKNOWN
    if not section or entry.key in recipe_defaults(recipe):
        return recipe_defaults(recipe).get(entry.key, UNKNOWN)
    arguments = component_defaults(entry.component)
    return UNKNOWN if arguments is None or "." in section else arguments.get(name, UNKNOWN)


def _values(entries: list[Entry], most: int = 4) -> str:
    """The different values, with what the configs say of them alone."""
    values: dict[str, list[str]] = {}
    for entry in entries:
        if entry.value is not None:
            remarks = values.setdefault(entry.value, [])
            if entry.here and entry.here not in remarks:
                remarks.append(entry.here)
    cells = [f"`{_cell(v)}`" + "".join(f" ({_cell(r)})" for r in remarks) for v, remarks in values.items()]
    return ", ".join(cells[:most]) + (f", and {len(cells) - most} more" if len(cells) > most else "")


def _sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is out of date")
    check = parser.parse_args().check
    configs = read_configs()
    wrong = complaints(configs) + unread(configs) + builder_tables.undocumented(builders(configs))
    page = render(configs)
    if check and page != (TARGET.read_text() if TARGET.exists() else ""):
        wrong.append(f"{TARGET.relative_to(ROOT)} is out of date; run make docs")
    if not check:
        TARGET.write_text(page)
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
