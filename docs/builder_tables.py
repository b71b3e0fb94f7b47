"""The part of docs/configuration.md on builders: every argument of what a `_component_` may name, from docstrings."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

# Title, package, and what a function of it returns that is a builder of this kind.
_KINDS = (
    ("Training data: `dataset`, `eval_dataset`", "wmtp.data", ("Documents", "Reading")),
    ("Data to be scored: `dataset` of score_reference", "wmtp.data", ("DocumentStream",)),
    ("Pairs of programs: `dataset` of critic_stage1", "wmtp.critic", ("Pairs",)),
    ("Evaluation tasks", "wmtp.eval", ("tuple[AssertionTask, ...]", "tuple[StdioTask, ...]")),
    ("Programs of tasks: `programs` of score_rollouts", "wmtp.eval", ("tuple[TaskProgram, ...]",)),
    ("Evaluation protocols", "wmtp.eval", ("Protocol",)),
    ("Tokenizers: `tokenizer`", "wmtp.pretrained", ("Tokenizer",)),
    (
        "Token weights and controls: `weighting`, `weighting.method`",
        "wmtp.weighting",
        ("Weighting", "Control", "Given", "Protected"),
    ),
    ("Models: `model`, `reference_model`", "wmtp.models", ("MTPDecoder",)),
)
_REST = "What else a config builds"
# By the recipe, not by the config.
_PASSED = {"self", "tokenizer", "tasks", "model", "optimizer", "num_training_steps", "quantize_from"}
_INTRO = """## Builders

What a `_component_` may name in this project, and its keys, from the docstrings. A key whose value is built itself is a
section with a `_component_` of its own, at any depth:

```yaml
weighting:
  _component_: wmtp.weighting.shuffled
  seed: 1
  method:
    _component_: wmtp.weighting.rho1
    percentile: 0.7
token_view:
  _component_: wmtp.report.TokenWeightPages
  every: 100
  beside:
    dft:
      _component_: wmtp.weighting.dft
```
"""


@dataclass(frozen=True)
class Builder:
    """A function or class that a config may name."""

    path: str  # wmtp.data.mbpp
    prose: tuple[str, ...]  # the docstring's paragraphs, without its sections
    keys: dict[str, tuple[str, str]]  # key to (meaning, default); "" where the docstring says nothing


def find_builders(
    functions: Callable[[str], Iterable[str]], definition: Callable, defaults: Callable, named: Iterable[str]
) -> dict[str, list[Builder]]:
    """Title to builders: those of each kind, and then whatever else of this project the configs name.

    Args:
        functions: a package's public functions, by name.
        definition: a dot path's function or class in the source, None for one of another project.
        defaults: a dot path's arguments with their defaults as text.
        named: dot paths that the configs name.
    """
    found: dict[str, list[Builder]] = {}
    for title, package, kinds in _KINDS:
        for path in (f"{package}.{name}" for name in functions(package)):
            returns = getattr(definition(path), "returns", None)
            if returns is not None and ast.unparse(returns).strip("'\"") in kinds:
                found.setdefault(title, []).append(_builder(path, definition(path), defaults(path)))
    listed = {builder.path for builders in found.values() for builder in builders}
    rest = [path for path in sorted(set(named) - listed) if definition(path) is not None]
    if rest:
        found[_REST] = [_builder(path, definition(path), defaults(path)) for path in rest]
    return found


def undocumented(builders: dict[str, list[Builder]]) -> list[str]:
    """Keys that no docstring explains, a line each."""
    every = [builder for of_kind in builders.values() for builder in of_kind]
    without = [(builder.path, key) for builder in every for key, (meaning, _) in builder.keys.items() if not meaning]
    return [f"{path}: the docstring's Args say nothing of {key}" for path, key in without]


def tables(builders: dict[str, list[Builder]], cell: Callable[[str], str], required: str) -> Iterator[str]:
    """The lines of the page."""
    if builders:
        yield _INTRO
    for title, of_kind in builders.items():
        yield f"### {title}\n"
        for builder in of_kind:
            yield f"#### `{builder.path}`\n"
            yield "\n\n".join(builder.prose) + "\n"
            if builder.keys:
                yield "| key | meaning | default |\n|---|---|---|"
                for key, (meaning, default) in builder.keys.items():
                    shown = default if default in ("", required) else f"`{cell(default)}`"
                    yield f"| `{key}` | {cell(meaning)} | {shown} |"
                yield ""


def _builder(path: str, node: ast.FunctionDef | ast.ClassDef, defaults: dict[str, str]) -> Builder:
    prose, meanings = _read_docstring(ast.get_docstring(node) or "")
    keys = {key: (meanings.get(key, ""), default) for key, default in defaults.items() if key not in _PASSED}
    return Builder(path, prose, keys)


def _read_docstring(text: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Its paragraphs, without those of sections such as Raises, and what Args (or Fields) says of each name."""
    prose, meanings, section, names = [], {}, "", ()
    for paragraph in re.split(r"\n\s*\n", text):
        if heading := re.match(r"(\w+):\n(?= )", paragraph):
            section, paragraph = heading[1], paragraph[heading.end() :]
        elif not paragraph.startswith(" "):
            section = ""
        if not section:
            prose.append(_as_markdown(paragraph))
        for line in paragraph.splitlines() if section in ("Args", "Fields") else ():
            entry = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
            names = tuple(entry[1].split(", ")) if entry else names
            for name in names:
                meanings[name] = f"{meanings.get(name, '')} {entry[2] if entry else line.strip()}".strip()
    return tuple(prose), {name: _as_markdown(meaning).removesuffix(".") for name, meaning in meanings.items()}


def _as_markdown(text: str) -> str:
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda found: f"`{found[1]}`", text)
    parts = " ".join(text.replace("``", "`").split()).split("`")  # code at odd places
    return "`".join(part if place % 2 else part.replace("<", "&lt;") for place, part in enumerate(parts))
