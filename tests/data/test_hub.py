"""Data sets on a hub: the rows of the same files, fetched once, and no more than is read, also after a kill."""

import io
import json
import os
import random
import signal
import time
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubProcesses, HubServer

SHARDS = [f"data/train-0000{i}-of-00004.parquet" for i in range(4)]
ROWS = 40  # of a shard


def made_rows():
    words = random.Random(1)
    rows = []
    for i in range(len(SHARDS) * ROWS):
        completion = "é" * (i % 20) + "".join(words.choices("abc \n", k=i % 30))
        row = {"prompt": f"q{i}", "completion": completion, "topic": "t"}
        tokens = len(f"q{i}{completion}".encode()) + 1
        rows.append(row | {"noise": [i / 7] * tokens})
    return rows


def parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=16)
    return file.getvalue()


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def in_shards(rows):
    return {path: parquet(rows[i * ROWS : (i + 1) * ROWS]) for i, path in enumerate(SHARDS)}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The hub, and processes that have it as theirs: a fresh interpreter needs seconds to import the client."""
    with HubServer() as hub:
        processes = HubProcesses(hub.url, tmp_path_factory.mktemp("hf"), Path(__file__).with_name("hub_jobs.py"))
        yield hub, processes
        processes.close()


@pytest.fixture
def hub(served, request):
    """The hub with a data set of the test's own, `name`, of four shards."""
    server, _ = served
    server.down, server.refused, server.held, server.cut = False, {}, set(), {}
    server.name = f"owner/{zlib.crc32(request.node.name.encode())}"
    server.commit = server.publish(server.name, in_shards(made_rows()))
    server.reset()
    return server


@pytest.fixture
def client(served, tmp_path):
    return Client(served[1], tmp_path)


class Client:
    """Runs jobs in processes of their own, whose cache is the test's."""

    def __init__(self, processes, folder):
        self.processes, self.folder, self.count = processes, folder, 0
        self.cache = folder / "cache"

    def start(self, job="pack", **arguments):
        self.count += 1
        log = self.folder / f"log{self.count}.txt"
        if job == "pack":
            arguments = {"cache": str(self.cache), **arguments}
        environment = {"WMTP_CACHE": str(self.folder / "wmtp")}
        return self.processes.start(job, log, environment, **arguments), log

    def end(self, started, code=0):
        pid, log = started
        assert self.processes.join(pid) == code, log.read_text()
        return log.read_text()

    def run(self, job="pack", **arguments):
        return json.loads(self.end(self.start(job, **arguments)).splitlines()[-1])

    def refused(self, job="pack", **arguments):
        """Returns the lines of a job that ends with an error."""
        return self.end(self.start(job, **arguments), code=1).splitlines()

    def file(self, rows, name="rows.jsonl", **keys):
        """Packs the same rows out of a local file."""
        (self.folder / name).write_bytes(jsonl(rows) if name.endswith("jsonl") else parquet(rows))
        return self.run(source=str(self.folder / name), **keys)


def same(one, other):
    return all(one[key] == other[key] for key in ("rows_sha256", "fingerprint", "unread", "signals", "documents"))


def wait_until(happened, what):
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def test_rows_are_those_of_a_file_and_a_second_start_fetches_nothing(hub, client):
    found = client.run(source=hub.name, split="train", workers=2)
    assert same(found, client.file(made_rows())) and found["documents"] == len(made_rows())
    assert found["unread"] == ["topic"] and found["signals"] == ["noise"]
    assert f"{hub.name}[train]: row {len(made_rows())}" in found["names"]
    assert hub.commit in [json.loads(file.read_text())["source"] for file in client.cache.glob("*/key.json")]
    assert not list(client.cache.glob("*.documents"))
    hub.reset()
    assert client.run(source=hub.name, split="train") == found
    assert not hub.sent and hub.asked == {"api": 1}


def test_without_a_cache_rows_are_the_same(hub, client):
    assert same(client.run(source=hub.name, split="train", cache=None), client.file(made_rows(), cache=None))


@pytest.mark.parametrize("rows", [2 * ROWS, *(pytest.param(n, marks=pytest.mark.long) for n in (1, ROWS + 1, 10_000))])
def test_of_max_rows_no_shard_is_fetched_that_has_none_of_them(rows, hub, client):
    found = client.run(source=hub.name, split="train", max_rows=rows)
    assert set(hub.sent) == set(SHARDS[: -(-min(rows, 4 * ROWS) // ROWS)])
    sizes = {path: len(content) for path, content in in_shards(made_rows()).items()}
    assert all(sent <= 1.5 * sizes[path] for path, sent in hub.sent.items())
    assert same(found, client.file(made_rows()[:rows])) and same(found, client.file(made_rows(), max_rows=rows))


def test_in_a_large_file_it_goes_on_at_the_row_group(hub, client):
    noise = random.Random(2)
    rows = [{"prompt": f"q{i}", "completion": "a", "topic": noise.randbytes(1 << 18).hex()} for i in range(64)]
    content = parquet(rows)  # four groups of 8 MB
    hub.publish(hub.name, {"train.parquet": content})
    hub.refused["train.parquet"] = int(0.97 * len(content))
    *_, line = client.refused(source=hub.name, split="train", seconds_a_part=0)
    assert "48 documents are kept" in line
    hub.refused.clear()
    hub.reset()
    found = client.run(source=hub.name, split="train")
    assert hub.sent["train.parquet"] < 0.3 * len(content) and same(found, client.file(rows))


def test_of_another_format_it_goes_on_at_the_file(hub, client):
    names, rows = [f"train-{i}.jsonl" for i in range(4)], made_rows()
    hub.publish(hub.name, {name: jsonl(rows[i * ROWS : (i + 1) * ROWS]) for i, name in enumerate(names)})
    hub.refused[names[3]] = 0
    *_, line = client.refused(source=hub.name, split="train", seconds_a_part=0)
    assert f"{3 * ROWS} documents are kept" in line
    hub.refused.clear()
    hub.reset()
    assert same(client.run(source=hub.name, split="train"), client.file(rows))
    assert set(hub.sent) == {names[0], *names[2:]}  # the first tells the columns; in the third it stopped


@pytest.mark.long
def test_the_first_rows_of_a_large_file_are_its_beginning(hub, client):
    rows = [{"prompt": "q", "completion": f"{i:07}" * 1000} for i in range(6000)]
    hub.publish(hub.name, {"train.jsonl": jsonl(rows)})
    client.run(source=hub.name, split="train", max_rows=10)
    assert 0 < hub.sent["train.jsonl"] < 0.8 * len(jsonl(rows))


def test_after_a_kill_only_what_was_not_kept_is_fetched(hub, client):
    hub.held.add(SHARDS[3])
    started = client.start(source=hub.name, split="train", seconds_a_part=0, workers=2)
    wait_until(lambda: SHARDS[3] in hub.waiting, "the last shard is not asked for")
    os.kill(started[0], signal.SIGKILL)
    client.end(started, code=-signal.SIGKILL)
    (kept,) = client.cache.glob("*.documents")
    assert not list(client.cache.glob("*/key.json"))
    with (kept / "tokens").open("ab") as file:  # as if it had died while it wrote
        file.write(b"torn")
    hub.release()
    log = client.end(client.start(source=hub.name, split="train"))
    assert f"dataset: {3 * ROWS} documents are there from an earlier start; it goes on there" in log
    assert set(hub.sent) == set(SHARDS[2:])  # in the third it stopped
    assert same(json.loads(log.splitlines()[-1]), client.file(made_rows()))
    assert not list(client.cache.glob("*.documents"))


@pytest.mark.parametrize("name", ["labels", pytest.param("state.json", marks=pytest.mark.long)])
def test_what_was_kept_and_has_changed_since_is_told_and_made_again(name, hub, client):
    hub.refused[SHARDS[1]] = 0
    client.refused(source=hub.name, split="train", seconds_a_part=0)
    (kept,) = client.cache.glob("*.documents")
    content = bytearray((kept / name).read_bytes())
    content[-10] ^= 1
    (kept / name).write_bytes(content)
    hub.refused.clear()
    log = client.end(client.start(source=hub.name, split="train"))
    assert f"dataset: {kept} is not whole: the content of {name} has changed; it is made again" in log
    assert same(json.loads(log.splitlines()[-1]), client.file(made_rows()))


def test_a_fetch_that_fails_is_one_line_and_says_what_is_kept(hub, client):
    hub.refused[SHARDS[1]] = 0
    *_, line = client.refused(source=hub.name, split="train", seconds_a_part=0)
    (kept,) = client.cache.glob("*.documents")
    assert line.startswith(f"error: {hub.name}[train]: what follows row {ROWS} cannot be fetched (")
    assert f"); start again: {ROWS} documents are kept in {kept}, and it goes on there" in line and "403" in line


@pytest.mark.long
def test_a_network_that_is_gone_is_one_line_after_the_client_has_tried_for_a_while(hub, client):
    hub.held.add(SHARDS[1])
    started = client.start(source=hub.name, split="train", seconds_a_part=0, tries=1)
    wait_until(lambda: SHARDS[1] in hub.waiting, "the second shard is not asked for")
    hub.down = True
    hub.cut[SHARDS[1]] = 100
    hub.release()
    *_, line = client.end(started, code=1).splitlines()
    assert f"what follows row {ROWS} cannot be fetched (" in line and f"; start again: {ROWS} documents" in line
    hub.down = False
    assert same(client.run(source=hub.name, split="train"), client.file(made_rows()))


def test_a_connection_that_drops_is_taken_up(hub, client):
    hub.cut[SHARDS[1]] = 100
    assert same(client.run(source=hub.name, split="train"), client.file(made_rows())) and not hub.cut


def test_two_runs_at_once_fetch_once(hub, client):
    alone = client.run(source=hub.name, split="train", cache=str(client.folder / "other"))
    once = dict(hub.sent)
    hub.reset()
    hub.held.add(SHARDS[0])
    first, second = (client.start(source=hub.name, split="train") for _ in range(2))
    wait_until(lambda: SHARDS[0] in hub.waiting, "nobody asks for the first shard")
    time.sleep(0.3)
    hub.release()
    found = [json.loads(client.end(started).splitlines()[-1]) for started in (first, second)]
    assert found == [alone, alone] and dict(hub.sent) == once


def test_all_ranks_may_ask_for_the_commit_at_once(hub, client):
    started = [client.start("commit", source=hub.name) for _ in range(12)]
    assert {json.loads(client.end(one).splitlines()[-1]) for one in started} == {hub.commit}


def test_a_new_commit_makes_new_rows_and_the_old_one_can_be_named(hub, client):
    old = client.run(source=hub.name, split="train")
    hub.publish(hub.name, in_shards(made_rows()[::-1]))
    new = client.run(source=hub.name, split="train")
    assert same(new, client.file(made_rows()[::-1])) and not same(new, old)
    named = f"{hub.name}@{hub.commit}"
    assert same(client.run(source=named, split="train"), old)
    hub.down = True
    assert same(client.run(source=named, split="train"), old)


def test_a_hub_that_does_not_answer_is_one_line_and_what_was_packed_is_found(hub, client):
    found = client.run(source=hub.name, split="train")
    hub.down = True
    log = client.end(client.start(source=hub.name, split="train")).splitlines()
    assert json.loads(log[-1]) == found
    assert log[-2].startswith(f"{hub.name}: the hub does not answer (")
    assert log[-2].endswith(f"its commit is taken to be {hub.commit} still")


def test_what_is_in_the_cache_of_datasets_is_read_where_the_hub_does_not_answer(hub, client):
    assert client.run("load", name=hub.name) == len(made_rows())
    hub.down = True
    assert same(client.run(source=hub.name, split="train"), client.file(made_rows()))


def made_chats():
    """Conversations with tools of different arguments, which Parquet keeps as one struct, and weights."""
    for i in range(2 * ROWS):
        call = {"function": {"name": "f", "arguments": {f"a{i % 3}": i}}}
        tools = [{"type": "function", "function": {"name": "f", "parameters": {f"a{i % 3}": {"type": "integer"}}}}]
        turn = {"role": "assistant", "content": f"It is {i}.", "weights": [{"start": 6, "end": 7, "weight": 3}]}
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        yield {"messages": [*said, {"role": "tool", "content": str(i)}, turn], "tools": tools, "weight": 1 + i % 2}


def test_the_other_builders_and_a_mixture_of_them_read_the_hub_as_they_do_files(hub, client):
    """Killed in the first part's second file, it goes on there."""
    rows = {
        "chat": list(made_chats()),
        "instruct": [{"instruction": f"Say {i}.", "output": str(i), "weight": 2} for i in range(ROWS)],
        "text": [{"text": f"{i}: " + "text " * (i % 9)} for i in range(ROWS)],
    }
    keys = {"chat": {"prompt_weight": 0.5}, "instruct": {}, "text": {"piece_len": 64, "joined": True}}
    shards = [f"train-{i}.parquet" for i in range(2)]

    def mixture(source_of):
        parts = {n: {"_component_": f"wmtp.data.{n}", **k, **source_of(n)} for n, k in keys.items()}
        return {"builder": "mixture", "parts": parts, "shares": {"chat": 2, "instruct": 1, "text": 1}}

    def local(name):
        (client.folder / f"{name}.jsonl").write_bytes(jsonl(rows[name]))
        return {"source": str(client.folder / f"{name}.jsonl")}

    for name, made in rows.items():
        files = dict(zip(shards, (parquet(made[: len(made) // 2]), parquet(made[len(made) // 2 :])), strict=True))
        hub.publish(f"{hub.name}-{name}", files if name != "instruct" else {"train.jsonl": jsonl(made)})
    of_hub = mixture(lambda name: {"source": f"{hub.name}-{name}", "split": "train"})
    hub.held.add(shards[1])
    started = client.start(**of_hub, seconds_a_part=0)
    wait_until(lambda: shards[1] in hub.waiting, "the chats' second shard is not asked for")
    os.kill(started[0], signal.SIGKILL)
    client.end(started, code=-signal.SIGKILL)
    hub.release()
    log = client.end(client.start(**of_hub))
    assert f"{ROWS} documents are there from an earlier start; it goes on there" in log
    found = json.loads(log.splitlines()[-1])
    assert found["signals"] == ["weight"] and same(found, client.run(**mixture(local)))


def test_what_the_hub_does_not_have_is_one_line(hub, client):
    for source, split, said in (
        ("owner/absent", "train", "dataset 'owner/absent' cannot be loaded ("),
        (f"{hub.name}@absent", "train", f"dataset '{hub.name}@absent' cannot be loaded ("),
        (hub.name, "absent", "cannot be loaded (Bad split: absent. Available splits: ['train'])"),
        (hub.name, None, f"{hub.name} is read from the hub; set split (such as train)"),
    ):
        *_, line = client.refused(source=source, split=split)
        assert said in line and line.startswith("error: ")
    *_, line = client.refused(source=hub.name, split="train", max_rows=0)
    assert line.startswith("error: dataset.max_rows must be >= 1, or null for all rows, got 0")


@pytest.mark.long
def test_slices_of_a_split_are_read_as_before(hub, client):
    assert same(client.run(source=hub.name, split="train[:10]"), client.file(made_rows()[:10]))


def test_a_stream_for_scoring_has_the_same_documents(hub, client):
    (client.folder / "rows.jsonl").write_bytes(jsonl(made_rows()))
    for rows in (None, 50):
        found = client.run("stream", source=hub.name, split="train", max_rows=rows)
        local = client.run("stream", source=str(client.folder / "rows.jsonl"), max_rows=rows)
        assert found["tokens"] == local["tokens"] and len(found["tokens"]) == (rows or len(made_rows()))
        assert local["count"] == len(found["tokens"])
    assert set(hub.sent) == set(SHARDS)
