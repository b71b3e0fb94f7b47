"""Rows of Parquet are those of the JSON lines that they were made of, whatever Arrow made of nested objects."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wmtp.data import read_rows
from wmtp.data.rows import count_rows, rows_state


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


# ----------------------------------------------------------------------------------------------------------------------
# Folders as `hf download` leaves them


def shard(folder, name, *texts):
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": list(texts)}), folder / name)


def texts_of(folder, *split):
    return [row["text"] for _, row in read_rows(folder, *split)]


def test_a_copy_of_a_hub_s_data_set_is_a_folder_with_splits(tmp_path):
    for number, text in enumerate("ab"):
        shard(tmp_path / "data", f"train-0000{number}-of-00002.parquet", text)
    shard(tmp_path / "data", "test-00000-of-00001.parquet", "c")
    shard(tmp_path / "small", "tiny-00000-of-00001.parquet", "d")
    (tmp_path / "README.md").write_text("---\n")
    assert texts_of(tmp_path, "train") == ["a", "b"] and texts_of(tmp_path, "test") == ["c"]
    assert texts_of(tmp_path, "all") == ["c", "a", "b"] and texts_of(tmp_path, "tiny", "small") == ["d"]
    assert count_rows(tmp_path, "train") == 2
    assert [row for _, row in read_rows(tmp_path, "train", max_rows=1)] == [{"text": "a"}]
    with pytest.raises(
        FileNotFoundError, match=r"has no tiny\.jsonl.* for split 'tiny'; it holds README.md, data, small"
    ):
        texts_of(tmp_path, "tiny")
    arguments = {"source": str(tmp_path), "split": "train", "subset": None}
    before = rows_state(arguments)
    shard(tmp_path / "data", "train-00001-of-00002.parquet", "other")
    assert rows_state(arguments) != before
    (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="has 1 of the 2 shards of split 'train'; copy them all"):
        texts_of(tmp_path, "train")
    shard(tmp_path, "train.parquet", "e")
    with pytest.raises(ValueError, match=r"holds train\.parquet and train-00000-of-00002\.parquet; set source to one"):
        texts_of(tmp_path, "train")
