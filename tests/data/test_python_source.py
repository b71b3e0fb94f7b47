"""Functions of a Python source tree: cut where Python agrees, split by module, the same every time."""

import ast
import sysconfig
import textwrap
import warnings
from pathlib import Path

import pytest

from wmtp.data import pack, python_functions
from wmtp.data.python_source import SPLITS, functions_of, module_paths, read_source
from wmtp.pretrained import byte_tokenizer

TOKENIZER = byte_tokenizer()


def without_strings(tree: ast.AST) -> str:
    """The syntax tree as text, with every string emptied: moving a function left moves the text inside them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            node.value = ""
    return ast.dump(tree)


@pytest.mark.slow
def test_functions_of_the_standard_library_are_valid_python_and_unchanged():
    root = Path(sysconfig.get_paths()["stdlib"])
    count = 0
    for path in module_paths(root)[::4]:
        source = read_source(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            originals = {
                n.lineno: n
                for n in ast.walk(ast.parse(source))
                if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            }
            for function in functions_of(source, path.name):
                [node] = ast.parse(function.prompt + function.body).body
                [head] = ast.parse(function.prompt).body
                assert len(head.body) == 1 and ast.get_docstring(head) is not None  # the whole docstring, and no code
                assert len(node.body) > 1
                assert function.prompt.endswith("\n") and function.body.endswith("\n")
                assert not function.prompt[0].isspace()
                original = originals[int(function.id.split(":")[1])]
                assert without_strings(node) == without_strings(original), function.id
                count += 1
    assert count > 1000


MODULE = '''
import x

class A(B):
    @property
    @deco(
        1)
    def f(self):
        """Doc.

        More."""  # note

        # first
        text = """
  left of the function
        """
        def inner():
            """Not a document of its own."""
            return 1
        return text

    def empty(self):
        """Only a docstring."""

    def one_line(self): """Doc."""; return 1

if x:
\tasync def g():
\t\t'doc'
\t\treturn 2

def h():
    return "no docstring"
'''


def test_the_cut_is_after_the_docstring_and_the_text_is_exact():
    f, g = functions_of(MODULE, "pkg/m.py")
    assert f.id == "pkg/m.py:8:A.f"
    assert f.prompt == '@property\n@deco(\n    1)\ndef f(self):\n    """Doc.\n\n    More."""  # note\n'
    assert f.body == (
        '\n    # first\n    text = """\n  left of the function\n    """\n    def inner():\n'
        '        """Not a document of its own."""\n        return 1\n    return text\n'
    )
    assert (g.id, g.prompt, g.body) == ("pkg/m.py:28:g", "async def g():\n\t'doc'\n", "\treturn 2\n")


def write_modules(root: Path, count: int) -> None:
    for i in range(count):
        folder = root / ("a" if i % 2 else "b")
        folder.mkdir(exist_ok=True)
        body = "\n".join(f"    x{j} = {i}" for j in range(1 + i % 5))
        text = f'def f{i}():\n    """Doc {i}."""\n{body}\n\n\ndef same():\n    """In every module."""\n    return 0\n'
        (folder / f"m{i}.py").write_text(text)


def test_a_document_is_prompt_body_and_eos_with_the_prompt_no_target(tmp_path):
    write_modules(tmp_path, 1)
    document = python_functions(TOKENIZER, root=str(tmp_path), split="all")[0]
    prompt, body = 'def f0():\n    """Doc 0."""\n', "    x0 = 0\n"
    assert document.id == "b/m0.py:1:f0"
    assert document.tokens.tolist() == [*prompt.encode(), *body.encode(), TOKENIZER.eos_id]
    assert document.labels.tolist() == [-100] * len(prompt) + [*body.encode(), TOKENIZER.eos_id]


def test_splits_are_disjoint_by_module_and_together_everything(tmp_path):
    write_modules(tmp_path, 200)
    splits = {s: python_functions(TOKENIZER, root=str(tmp_path), split=s) for s in (*SPLITS, "all")}
    modules = {s: {d.id.split(":")[0] for d in documents} for s, documents in splits.items()}
    texts = {s: {bytes(d.tokens[:-1].tolist()) for d in documents} for s, documents in splits.items()}
    for kind in (modules, texts):
        assert sum(len(kind[s]) for s in SPLITS) == len(kind["all"])
        assert set.union(*(kind[s] for s in SPLITS)) == kind["all"]
    assert len(splits["all"]) == 201 and splits["all"].skipped["repeated functions"] == 199
    for split, share in zip(SPLITS, (0.7, 0.2, 0.1), strict=True):
        assert abs(len(modules[split]) / 200 - share) < 0.08


def test_the_split_of_a_module_depends_on_its_path_alone(tmp_path):
    for name, count in (("few", 40), ("many", 80)):
        (tmp_path / name).mkdir()
        write_modules(tmp_path / name, count)
    few, many = ({d.id for d in python_functions(TOKENIZER, root=str(tmp_path / n))} for n in ("few", "many"))
    assert few and few <= many
    thirty = {d.id for d in python_functions(TOKENIZER, root=str(tmp_path / "many"), fractions=(0.3, 0.0, 0.0))}
    assert 0 < len(thirty) < len(many) and thirty <= many


def test_samples_and_bounds_are_deterministic(tmp_path):
    write_modules(tmp_path, 60)
    everything = python_functions(TOKENIZER, root=str(tmp_path), split="all")
    sample = python_functions(TOKENIZER, root=str(tmp_path), split="all", max_functions=10)
    again = python_functions(TOKENIZER, root=str(tmp_path), split="all", max_functions=10)
    assert len(sample) == 10 and sample.fingerprint == again.fingerprint != everything.fingerprint
    order = [d.id for d in everything]
    assert [d.id for d in sample] == sorted((d.id for d in sample), key=order.index)
    bounded = python_functions(TOKENIZER, root=str(tmp_path), split="all", min_body_lines=2, max_body_lines=3)
    lines = {bytes(d.tokens[d.labels >= 0][:-1].tolist()).decode().count("\n") for d in bounded}
    assert lines == {2, 3} and bounded.skipped["bodies too short or too long"] == len(everything) - len(bounded)


def test_modules_that_do_not_parse_are_counted_and_excluded_folders_not_entered(tmp_path):
    write_modules(tmp_path, 4)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_m.py").write_text('def t():\n    """Doc."""\n    return 1\n')
    documents = python_functions(TOKENIZER, root=str(tmp_path), split="all")
    assert documents.skipped["modules that Python cannot parse (the first is broken.py)"] == 2
    assert not any(d.id.startswith("test/") for d in documents)
    assert any(
        d.id.startswith("test/") for d in python_functions(TOKENIZER, root=str(tmp_path), split="all", exclude=[])
    )


@pytest.mark.slow
def test_the_standard_library_splits_are_large_enough_and_pack_well():
    documents = {split: python_functions(TOKENIZER, split=split) for split in SPLITS}
    assert min(len(d) for d in documents.values()) > 200
    assert len({d.fingerprint for d in documents.values()}) == 3
    packed = pack(documents["train"], 1024, pad_id=TOKENIZER.pad_id)
    assert (packed.document_ids >= 0).double().mean() > 0.98


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split must be one of train, reference, heldout, all, got 'test'"),
        ({"fractions": (0.9, 0.2, 0.1)}, r"fractions must be three numbers >= 0 that sum to at most 1, got \[0.9"),
        ({"max_functions": 0}, "max_functions must be >= 1, got 0"),
        ({"exclude": "tests"}, r"exclude must be a list of folder names, got 'tests'; write \[tests\]"),
        ({"min_body_lines": 1000}, r"the dataset is empty \(left out: 2 bodies too short or too long\)"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, message, tmp_path):
    write_modules(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        python_functions(TOKENIZER, **{"root": str(tmp_path), "split": "all", **arguments})


def test_a_root_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match="root /nowhere is no folder"):
        python_functions(TOKENIZER, root="/nowhere")


def test_dedent_agrees_with_textwrap_on_a_plain_method():
    source = 'class A:\n    def f(self):\n        """Doc."""\n        return 1\n'
    [function] = functions_of(source, "m.py")
    assert function.prompt + function.body == textwrap.dedent(source.split("\n", 1)[1])
