"""The columns of a dataset's rows: which there are, which are read, and which name may be misspelt."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, get_args, get_origin

from wmtp.data.rows import fields_of
from wmtp.errors import UserError

_LIKENESS = 0.8  # two names at least as alike may be one name and its misspelling


class ReadColumns:
    """Rows of :func:`wmtp.data.read_rows` with a check of their columns while they are read.

    A column that is not read is refused if it has the type of one that the row lacks, and nearly its name: it is
    misspelt.

    Args:
        optional: columns that are read and that a row may lack, with the type of their values, such as
            ``list[float]``.
        read: the other columns that are read, without those that are None; needed for :attr:`unread`.
        way_out: the advice in the message about a refused column.

    Attributes:
        there: the columns of the rows so far.
    """

    def __init__(
        self,
        rows: Iterable[tuple[str, dict]],
        optional: Mapping[str, Any],
        read: Collection[str | None] = (),
        *,
        way_out: str = "Rename or remove it",
    ) -> None:
        self._rows, self._read, self._optional = rows, frozenset((*optional, *read)), optional
        self._way_out = way_out
        self._harmless: set[str] = set()
        self.there: dict[str, None] = {}

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        for where, row in self._rows:
            for column in row.keys() - self._read - self._harmless:
                if row[column] is None:  # a later row shows its type
                    continue
                lacking = [n for n, kind in self._optional.items() if n not in row and _is_a(row[column], kind)]
                near = difflib.get_close_matches(str(column), lacking, n=1, cutoff=_LIKENESS)
                if near:
                    raise UserError(
                        f"{where}: nobody reads the column {column!r}; did you mean {near[0]!r}? {self._way_out}"
                    )
                self._harmless.add(column)
            self.there.update(dict.fromkeys(row))
            yield where, row

    def state(self) -> dict | None:
        """Returns that of the rows (:class:`wmtp.data.documents.Resumable`) with the columns so far."""
        state = getattr(self._rows, "state", lambda: None)()
        return state and {"rows": state, "columns": list(self.there)}

    def resume(self, state: dict) -> None:
        self._rows.resume(state["rows"])  # type: ignore[attr-defined]
        self.there = dict.fromkeys(state["columns"])

    @property
    def unread(self) -> tuple[str, ...]:
        """Returns the columns of the rows so far that are not read."""
        return tuple(str(column) for column in self.there if column not in self._read)

    def require(self, key: str, column: str, source: object) -> None:
        """Refuses a config's key that names a column which no row has."""
        if column not in self.there:
            raise UserError(
                f"{key} is {column!r}, which no row of {source} has; its columns are {fields_of(self.there)}"
            )


def _is_a(value: object, kind: Any) -> bool:
    """Returns whether a value, or a list's first element, has a type; an int is a float too, a bool is no number."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(element, get_args(kind)[0]) for element in value[:1])
    return isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
