"""Rows of Parquet are those of the JSON lines that they were made of, whatever Arrow made of nested objects."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wmtp.data import read_rows


def tool(**properties):
    return {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}


def call(**arguments):
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


ROWS = [
    {
        "messages": [{"role": "user", "content": "a"}, call(a=1)],
        "tools": [tool(a={"type": "integer"})],
        "scores": [1.5],
    },
    {"messages": [call(b="x"), {"role": "tool", "content": ""}], "tools": [tool(b={"type": "string"})], "scores": []},
    {"messages": [], "tools": None, "scores": None},
]


def rows_of(path, table):
    pq.write_table(table, path)
    return [row for _, row in read_rows(path)]


def test_an_object_has_no_key_of_another_row_s(tmp_path):
    assert rows_of(tmp_path / "struct.parquet", pa.Table.from_pylist(ROWS)) == ROWS


def test_a_column_of_json_is_read_as_datasets_writes_it(tmp_path):
    """`datasets` keeps objects of different keys so; a null that is written stays."""
    rows = [ROWS[0], {**ROWS[1], "messages": [{"role": "tool", "content": None}]}, ROWS[2]]
    texts = pa.array([[json.dumps(message) for message in row["messages"]] for row in rows])
    columns = {name: [row[name] for row in rows] for name in ("tools", "scores")}
    table = pa.table({"messages": texts.cast(pa.list_(pa.json_())), **columns})
    assert rows_of(tmp_path / "json.parquet", table) == rows


@pytest.mark.parametrize("list_of", [pa.large_list, lambda kind: pa.list_(kind, 1)])
def test_lists_of_every_kind_are_searched(list_of, tmp_path):
    kind = list_of(pa.struct({"a": pa.int64(), "b": pa.struct({"c": pa.int64()})}))
    values = [[{"a": 1}], [{"b": {}}]]
    assert [row["x"] for row in rows_of(tmp_path / "x.parquet", pa.table({"x": pa.array(values, kind)}))] == values
