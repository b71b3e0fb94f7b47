"""A hub of data sets on this machine, for its real client, and processes that have it as their hub.

The server answers what `huggingface_hub` and `datasets` ask: a data set's commit, its files, and their bytes by range.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parent.parent
_BLOCK = 1 << 16


class HubServer:
    """A context manager. What a test sets, at any time:

        down: every connection is closed without an answer.
        refused: path of a file to one of its bytes; who asks for that is answered by 403.
        cut: path to the bytes after which a connection that gives its content is closed, once.
        held: paths of files whose content waits until they are taken out of the set.

    What it tells: `url`; `sent`, bytes of content by path; `asked`, requests by method and kind (api, HEAD, GET); and
    `waiting`, the paths of requests that were held.
    """

    def __init__(self) -> None:
        self.down = False
        self.refused: dict[str, int] = {}
        self.cut: dict[str, int] = {}
        self.held: set[str] = set()
        self.waiting: set[str] = set()
        self.sent: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # name to commit to path to content; the last is main
        self.lock = threading.Condition()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def publish(self, name: str, files: dict[str, bytes]) -> str:
        """Makes a commit of a data set `owner/name`, its newest, and returns its hash."""
        commits = self.commits.setdefault(name, {})
        commit = hashlib.sha1(repr((name, len(commits))).encode()).hexdigest()
        commits[commit] = files
        return commit

    def release(self) -> None:
        """Lets those go on that were held."""
        self.reset()
        with self.lock:
            self.held.clear()
            self.lock.notify_all()

    def reset(self) -> None:
        """Forgets what was sent and asked."""
        with self.lock:
            self.sent.clear()
            self.asked.clear()
            self.waiting.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self):
        if self.hub.down:
            self.close_connection = True
            return
        url = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        with self.hub.lock:
            self.hub.asked["api" if parts[0] == "api" else self.command] += 1
        api = parts[0] == "api"
        if parts[api : api + 1] != ["datasets"]:
            return self._error(404, "EntryNotFound")
        owner, name, what, revision, *rest = *parts[1 + api :], *[""] * 4
        commits, path = self.hub.commits.get(f"{owner}/{name}"), "/".join(part for part in rest if part)
        if commits is None:
            return self._error(404 if api else 401, "RepoNotFound")
        commit = [*commits][-1] if revision in ("", "main") else revision
        if commit not in commits:
            return self._error(404, "RevisionNotFound")
        if what in ("", "revision"):
            siblings = [{"rfilename": file} for file in commits[commit]]
            return self._json({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings, "tags": []})
        if what == "tree":
            return self._json(_tree(commits[commit], path, "recursive=true" in url.query.lower()))
        if what == "paths-info":
            form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            return self._json([e for e in _tree(commits[commit], "", True) if e["path"] in form["paths"]])
        if path not in commits[commit]:
            return self._error(404, "EntryNotFound")
        return self._content(path, commits[commit][path], commit)

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass

    def _content(self, path: str, content: bytes, commit: str):
        asked = self.headers.get("Range")
        first, last = 0, len(content) - 1
        if asked:
            first, last = (int(x) if x else len(content) - 1 for x in asked.removeprefix("bytes=").split("-"))
        if first <= self.hub.refused.get(path, -1) <= last:
            return self._error(403, "")
        body = content[first : last + 1]
        if self.command == "GET":
            with self.hub.lock:
                if path in self.hub.held:
                    self.hub.waiting.add(path)
                    self.hub.lock.notify_all()
                    self.hub.lock.wait_for(lambda: path not in self.hub.held)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            cut = self.hub.cut.pop(path, None)
            for start in range(0, len(body if cut is None else body[:cut]), _BLOCK):
                block = body[:cut][start : start + _BLOCK]
                self.wfile.write(block)
                with self.hub.lock:
                    self.hub.sent[path] += len(block)
            self.close_connection = cut is not None

    def _json(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, code: str):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _tree(files: dict[str, bytes], below: str, recursive: bool) -> list[dict]:
    entries = {}
    for path, content in files.items():
        inside = path.removeprefix(f"{below}/") if below else path
        if below and inside == path:
            continue
        parents = inside.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            folder = "/".join(filter(None, (below, *parents[:depth])))
            if depth == 1 or recursive:
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
        if recursive or not parents:
            oid = hashlib.sha1(content).hexdigest()
            entries[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
    return list(entries.values())


class HubProcesses:
    """Starts processes whose hub is a server, forked from one that has imported its client: that reads HF_ENDPOINT.

    Args:
        url: the server's.
        home: folder for what the client keeps.
        jobs: file with the functions that the processes run; each takes what JSON can say.
    """

    def __init__(self, url: str, home: Path, jobs: Path) -> None:
        path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", jobs.parent)))
        off = {f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS")}
        hub = {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **off, **hub}
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
            environment.pop(name, None)
        command = [sys.executable, __file__, jobs.stem]
        self._zygote = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def start(self, job: str, log: Path, environment: dict[str, str], **arguments) -> int:
        """Starts a function in a process and returns its pid; its result, as JSON, is the last line of the log."""
        return self._ask("start", job, str(log), environment, arguments)

    def join(self, pid: int) -> int:
        """Returns a process's exit status, once it has ended."""
        return self._ask("join", pid)

    def close(self) -> None:
        self._zygote.stdin.close()
        self._zygote.wait()

    def _ask(self, *words) -> int:
        self._zygote.stdin.write(json.dumps(words) + "\n")
        self._zygote.stdin.flush()
        return int(self._zygote.stdout.readline())


def _run(module, job: str, log: str, environment: dict[str, str], arguments: dict) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    status = 1
    try:
        print(json.dumps(getattr(module, job)(**arguments)), flush=True)
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve(jobs: str) -> None:
    module = __import__(jobs)
    for line in sys.stdin:
        word, *rest = json.loads(line)
        if word == "join":
            print(os.waitstatus_to_exitcode(os.waitpid(rest[0], 0)[1]), flush=True)
        else:
            pid = os.fork()
            if pid == 0:
                _run(module, *rest)
            print(pid, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
