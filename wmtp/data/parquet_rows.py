"""Rows of Parquet as the JSON that they were made of: in Arrow a struct has every key of all rows."""

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from wmtp.errors import UserError

ROWS = 256  # in memory at a time


def open_parquet(file: BinaryIO, name: str, **options: Any) -> pq.ParquetFile:
    """Opens a Parquet file; one with two columns of a name is refused."""
    found = pq.ParquetFile(file, **options)
    names = found.schema_arrow.names
    twice = next((column for column in names if names.count(column) > 1), None)
    if twice is not None:
        raise UserError(f"{name}: the column {twice!r} is there twice; leave one of them out")
    return found


def rows_of(batch: pa.RecordBatch | pa.Table) -> Iterator[dict]:
    """Yields rows, with columns of Arrow's JSON type read, and without keys that a nested object has only for others.

    A tool's arguments ``{"a": 1}`` in one row and ``{"b": 2}`` in the next are ``{"a": 1, "b": null}`` in Arrow's
    struct of both, and a chat template would write the null. A null in a column of JSON stays.
    """
    mends = [(field.name, mend) for field in batch.schema if (mend := _mend(field.type)) is not None]
    for row in batch.to_pylist():
        for name, mend in mends:
            row[name] = mend(row[name])
        yield row


def _mend(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Returns what makes the JSON of a value; None for a type whose values are that already."""
    if isinstance(kind, pa.JsonType):
        return lambda value: value if value is None else json.loads(value)
    if pa.types.is_struct(kind):
        inside = {field.name: _mend(field.type) or (lambda value: value) for field in kind}
        return lambda value: value and {k: inside[k](v) for k, v in value.items() if v is not None}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        each = _mend(kind.value_type)
        return each and (lambda values: values and [each(value) for value in values])
    return None
