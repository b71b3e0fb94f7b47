"""The program in a text that holds one: between fences, after prose, before more text, under a prompt that is repeated.

What EvalPlus' sanitiser does (Liu et al. 2023, arXiv 2305.01210): of the spans of lines that are Python, the longest;
of its statements, the imports and what the function asked for reaches. Unlike there, a statement that changes what the
function uses stays, such as a loop that fills a table; of several definitions of a name all stay, so that the last one
holds, as in Python; and a span that defines the function asked for is preferred to a longer one.
"""

import ast
import re
import symtable
import textwrap
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

# Tokens and marks that stand before or after an answer, the first ones with the name of who speaks, and what no program
# holds: null bytes, and halves of a character where a text was cut.
_BOUNDARY = re.compile(
    r"<\|(?:im_start|start_header_id)\|>(?:[ \t]*\w+)?|<\|[^|<>\n]{1,40}\|>|</?s>|<(?:eos|bos|file_sep|end_of_turn)>"
    r"|^[ \t]*\[/?(?:BEGIN|DONE|PYTHON|INST|ANSWER)\]|[\0\ud800-\udfff]",
    re.MULTILINE,
)
_MAY_BE_INCOMPLETE = 0x4000  # codeop's flag: Python says of a text whether it only waits for more
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[^`\n]*$", re.MULTILINE)
# A first line that Python takes for an expression: a fence of tildes, or what is left of a fence.
_LABEL = re.compile(r"\A\s*(?:~{3,}[ \t]*\w*|(?i:python3?|py))[ \t]*\n")
_HEAD = re.compile(r"^(?:async def|def|class|import|from|@)\b", re.MULTILINE)  # of code
_LEADING_TAB = re.compile(r"^ *\t", re.MULTILINE)
_DYNAMIC = {"eval", "exec", "globals", "locals", "vars", "__import__"}  # they reach names that are not written out
_STREAMS = {"stdin", "stdout", "stderr"}
_WITHOUT_EFFECT = {*_STREAMS, "exit", "_exit", "main", "testmod", "sleep", "show"}  # of modules, on later answers
_BLOCKS = ast.For | ast.AsyncFor | ast.While | ast.If | ast.With | ast.AsyncWith | ast.Try | ast.TryStar | ast.Match
_MOST_CHARACTERS = 1_000_000  # that the parser is given in the search for one span


def sanitize(text: str, entry_point: str | None = None, *, names: Collection[str] = (), prompt: str = "") -> str | None:
    """Returns the program that a text holds; None where no part of it is Python.

    Doing it twice changes nothing. What is left out of the top level of a program does not change what its function
    answers: prints, inputs, asserts, calls of the function, the main guard, what the function does not use.

    Args:
        text: a program or an answer that holds one; with a prompt, what goes on from it.
        entry_point: expression with the function asked for. Without it, and without names, whatever is Python stays:
            the top level of a program that reads stdin is the program.
        names: what else is asked of the program, such as classes that a test uses.
        prompt: the program's beginning, which the text may repeat.
    """
    entry = set(re.findall(r"[^\W\d]\w*", entry_point or "")[:1] or names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings that are not raw
        program = _cut(_plain(text), entry, _plain(prompt))
        if program is None or not entry:
            return program
        try:
            return _reduced(program, entry, entry | set(names))
        except (RecursionError, MemoryError):  # nested too deeply to look into
            return program


def open_names(code: str) -> set[str]:
    """Returns the names that a code reads and gives no value."""
    binds, uses, _ = _names(code)
    return uses - binds


def defines(program: str, name: str) -> bool:
    """Returns whether a program gives a name a value; also True where it is no Python or has a star import."""
    return not is_program(program) or name in _names(program)[0] or "import *" in program


def breaks_off(text: str) -> bool:
    """Returns whether a text's code, or that of its last fence, ends in the middle of a statement or of a line."""
    text = _plain(text)
    fences = [0, *(fence.end() for fence in _FENCE.finditer(text))]
    if len(fences) % 2 and len(fences) > 1:
        return False
    if len(fences) > 1 and _HEAD.search(text, fences[-2], fences[-1]):  # it closes a block that a prompt has opened
        return False
    start = _HEAD.search(text, fences[-1])
    code = _dedented(text[start.start() if start else fences[-1] :]).rstrip()
    last = code.rpartition("\n")[2]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, "program.py", "exec", _MAY_BE_INCOMPLETE | ast.PyCF_ONLY_AST, dont_inherit=True)
    except SyntaxError as error:
        in_last_line = error.lineno == code.count("\n") + 1
        at_its_end = (error.offset or 0) > len(last) or last[:1].isspace()  # else it may be prose after the program
        return "incomplete input" in str(error) or (in_last_line and at_its_end)
    except (ValueError, RecursionError, MemoryError):
        return False
    return False


def is_program(text: str) -> bool:
    """Returns whether a text is Python, and more than blanks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(text.strip()) and _error(text) is None


# ----------------------------------------------------------------------------------------------------------------------
# From text to program


def _plain(text: str) -> str:
    return _LABEL.sub("", text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n"))


def _cut(text: str, asked: set[str], prompt: str) -> str | None:
    """Returns the longest span of lines that is a program; one that defines a name asked for comes first."""
    if not text.strip():
        return None
    if _error(prompt + text) is None:
        return prompt + text
    head, head_lines = _longest_span(prompt)
    best, program = (False, head_lines), None
    for piece in filter(str.strip, _BOUNDARY.split(text)):
        for part in _parts(piece):
            if best[0] and part is piece:  # of its parts one is a good one
                continue
            for form in _forms(part, prompt, head):
                span, lines = _longest_span(form)
                key = lines > head_lines and (not asked or bool(asked & _names(span)[0])), lines
                if key > best:
                    best, program = key, span
        if best[0]:  # what follows a mark of the end was never an answer
            break
    return program


def _parts(piece: str) -> Iterator[str]:
    """Returns the text from the first to the last fence, if it is a program; else each fenced block; else all of it."""
    fences = list(_FENCE.finditer(piece))
    if fences:
        inside = piece[fences[0].end() + 1 : fences[-1].start()]
        if _error(_dedented(inside)) is None:  # a fence may stand in a docstring
            yield inside
        starts, ends = [0, *(f.end() + 1 for f in fences)], [*(f.start() for f in fences), len(piece)]
        yield from filter(str.strip, (piece[start:end] for start, end in zip(starts, ends, strict=True)))
    yield piece


def _forms(part: str, prompt: str, head: str) -> Iterator[str]:
    """Ways in which a part of the text can be a program, with a prompt, whose head is a program by itself."""
    bare = _dedented(part)
    if prompt:
        yield prompt + part
        yield f"{prompt}    {part.lstrip()}"  # its first blanks were stripped
        yield prompt + textwrap.indent(bare, "    ")
        bare = f"{head}\n{bare}"  # it starts anew; the prompt's imports and helpers stay
    yield bare


def _longest_span(text: str) -> tuple[str, int]:
    """Finds the most lines that are a program together, and counts those that are not blank; the first of equal ones.

    Where the parser stops at a line, no span from the same start that holds this line is a program: one or two
    attempts a start are enough.
    """
    lines = text.split("\n")
    filled = [0]
    for line in lines:
        filled.append(filled[-1] + bool(line.strip()))
    found, most, budget = "", 0, _MOST_CHARACTERS
    for start, line in enumerate(lines):
        stop = len(lines) if line.strip() else start
        while filled[stop] - filled[start] > most and budget > 0:
            span = "\n".join(lines[start:stop])
            budget -= len(span)
            error = _error(span)
            if error is None:
                found, most = span, filled[stop] - filled[start]
                break
            if isinstance(error, IndentationError) and _LEADING_TAB.search(text):  # tabs of 8 are Python 2's
                return max((_longest_span(_expanded(text, size)) for size in (8, 4)), key=lambda found: found[1])
            stop = start + min(max(1, getattr(error, "lineno", None) or 1), stop - start) - 1
    return found, most


def _dedented(text: str) -> str:
    """Removes the blanks that all lines start with. `textwrap.dedent` would also clear the blank lines of strings."""
    indented = all(line[0] in " \t" for line in text.split("\n") if line.strip())
    return textwrap.dedent(text) if indented else text


def _expanded(text: str, size: int) -> str:
    return re.sub(r"^[ \t]+", lambda blanks: blanks.group().expandtabs(size), text, flags=re.MULTILINE)


def _error(text: str) -> Exception | None:
    try:
        compile(text, "program.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: no Unicode text
        return error
    return None


# ----------------------------------------------------------------------------------------------------------------------
# From program to function


@dataclass(frozen=True, eq=False)
class _Statement:
    """A statement of the top level.

    Attributes:
        lines: first and last, from 0; those of its decorators too.
        text: its own, without what stands on the same lines.
        binds: names that it gives a value.
        uses: names of the top level that it reads, or that what it defines reads or sets when it is called.
        sets: names of the top level that what it defines sets when it is called.
    """

    node: ast.stmt
    lines: tuple[int, int]
    text: str
    binds: set[str]
    uses: set[str]
    sets: set[str]


def _reduced(program: str, entry: set[str], asked: set[str]) -> str:
    """Removes the statements of a program's top level that do not matter to the names asked for."""
    statements = list(_statements(program))
    top = _TopLevel(statements)
    if not entry & top.bound.keys():
        return program  # it is for the judge to say what is missing
    reached = top.reached_from(asked)
    if reached & _DYNAMIC - top.bound.keys():
        unasked = (s for s in statements if not top.reached_from(s.uses) & ({"input"} | entry))
        reached |= top.reached_from(name for s in unasked for name in s.binds)
    rest = [s for s in statements if not (isinstance(s.node, ast.Import | ast.ImportFrom) or _is_idle(s.node))]
    while matters := [s for s in rest if s.binds & reached or top.changed_by(s, reached, entry)]:
        rest = [s for s in rest if s not in matters]
        reached |= top.reached_from(set().union(*(s.uses for s in matters)))
    dropped = {*rest, *(s for s in statements if _is_idle(s.node))}
    return _without(program, statements, dropped) if dropped else program


def _statements(program: str) -> Iterator[_Statement]:
    nodes, lines = ast.parse(program).body, program.split("\n")
    places = [
        (
            min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1,
            (node.end_lineno or node.lineno) - 1,
        )
        for node in nodes
    ]
    ends = [-1, *(last for _, last in places)]
    starts = [*(first for first, _ in places), len(lines)]
    for place, (node, (first, last)) in enumerate(zip(nodes, places, strict=True)):
        alone = ends[place] < first and last < starts[place + 1]
        text = "\n".join(lines[first : last + 1]) if alone else ast.get_source_segment(program, node) or ""
        yield _Statement(node, (first, last), text, *_names(text))


def _names(code: str) -> tuple[set[str], set[str], set[str]]:
    """Names of the top level that code gives a value, that it or what it defines reads, that what it defines sets."""
    top = symtable.symtable(code, "program.py", "exec")
    binds = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    uses = {s.get_name() for s in top.get_symbols() if s.is_referenced()}
    sets: set[str] = set()
    tables = list(top.get_children())
    while tables:
        table = tables.pop()
        tables += table.get_children()
        shared = [s for s in table.get_symbols() if s.is_global()]
        uses.update(s.get_name() for s in shared)
        sets.update(s.get_name() for s in shared if s.is_assigned())
    return binds, uses, sets


class _TopLevel:
    """What the names of a program's top level are bound to, and what they lead to."""

    def __init__(self, statements: Iterable[_Statement]) -> None:
        self.bound: dict[str, list[_Statement]] = {}
        self._data: set[str] = set()  # that hold what the program made, not its functions and classes
        self._modules: set[str] = set()
        for statement in statements:
            for name in statement.binds:
                self.bound.setdefault(name, []).append(statement)
            self._data |= statement.sets
            if isinstance(statement.node, ast.Import | ast.ImportFrom):
                self._modules |= statement.binds
            elif not isinstance(statement.node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                self._data |= statement.binds

    def reached_from(self, names: Iterable[str]) -> set[str]:
        """Returns the names, the names that their definitions use, and so on."""
        found, waiting = set(), list(names)
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += (used for statement in self.bound.get(name, ()) for used in statement.uses)
        return found

    def changed_by(self, statement: _Statement, reached: set[str], entry: set[str]) -> bool:
        """Returns whether a statement may change the objects of the names reached, or a module's settings."""
        reads = self.reached_from(statement.uses)
        if "input" in reads - self.bound.keys():
            return False
        data = self._data & reached
        is_example = bool(reads & entry)  # it calls the function asked for
        for node in _run(statement.node):
            if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
                name, attributes = _root(node, through_calls=True)
                foreign = name in self._modules or name not in self.bound
                if (name in reached or foreign) and not _STREAMS & attributes:
                    return True
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):  # for its effect
                name, attributes = _root(node.value.func)
                if not is_example and name in self._modules and not {name, *attributes} & _WITHOUT_EFFECT:
                    return True
            elif isinstance(node, ast.Call):
                name, attributes = _root(node.func)
                if isinstance(node.func, ast.Attribute) and name in data:
                    return True
                given = {n.id for n in [*node.args, *(k.value for k in node.keywords)] if isinstance(n, ast.Name)}
                if not is_example and (given | self._effects_of(name)) & data:
                    return True
            elif isinstance(node, ast.Name) and isinstance(statement.node, _BLOCKS):  # `for row in T: row.sort()`
                if node.id in data and not is_example:
                    return True
            elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not is_example:
                callers = [_root(n)[0] for n in [*node.decorator_list, *getattr(node, "bases", ())]]
                if any(name in reached & self.bound.keys() or self._effects_of(name) & data for name in callers):
                    return True
        return False

    def _effects_of(self, name: str | None) -> set[str]:
        return self.reached_from([name]) if name in self.bound else set()


def _run(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yields the nodes that run when a statement runs: not the bodies of functions, and no prints."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Lambda) or (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"):
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += node.decorator_list
        else:
            waiting += ast.iter_child_nodes(node)


def _root(node: ast.AST, through_calls: bool = False) -> tuple[str | None, set[str]]:
    """Returns the name that `a.b[0].c` starts with, and the attributes on the way."""
    attributes = set()
    while isinstance(node, ast.Attribute | ast.Subscript) or (through_calls and isinstance(node, ast.Call)):
        attributes |= {node.attr} if isinstance(node, ast.Attribute) else set()
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "id", None), attributes


def _is_idle(node: ast.stmt) -> bool:
    """Returns whether it is an assert, or a block that runs only where the program is started as a script."""
    if isinstance(node, ast.If) and not node.orelse:
        return {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)} == {"__name__"}
    return isinstance(node, ast.Assert)


def _without(program: str, statements: list[_Statement], dropped: set[_Statement]) -> str:
    lines, left, place = program.split("\n"), [], 0
    while statements:
        last = statements[0].lines[1]
        together: list[_Statement] = []  # on the same lines
        while statements and (not together or statements[0].lines[0] <= last):
            together.append(statements[0])
            last, statements = max(last, statements[0].lines[1]), statements[1:]
        left += lines[place : together[0].lines[0]]
        stay = [s for s in together if s not in dropped]
        left += lines[together[0].lines[0] : last + 1] if len(stay) == len(together) else [s.text for s in stay]
        place = last + 1
    return "\n".join([*left, *lines[place:]]).strip("\n") + "\n"
