"""The real servers that tests talk to, as processes on free ports."""

import atexit
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

AWS_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def moto_server() -> Iterator[str]:
    """An S3 server, empty; gives its URL, for AWS_ENDPOINT_URL. It takes any credentials."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, f"http://127.0.0.1:{port}", "/moto-api/"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def running(command: list[str], url: str, path: str, environment: dict[str, str] | None = None) -> Iterator[None]:
    """Run a server until the end of the block, which begins when it answers at url + path."""
    environment = {**os.environ, **(environment or {})}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_it_answers(process, url + path)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def postgres_server() -> Iterator[str]:
    """An empty PostgreSQL, of a user of its own as it refuses root; gives the URL of a database without a password."""
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
    if programs is None or (os.geteuid() == 0 and shutil.which("runuser") is None):
        raise FileNotFoundError("no PostgreSQL in /usr/lib/postgresql, or no runuser to start it with")
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        make = [*user, programs / "initdb", "-D", f"{folder}/data", "-U", "wmtp", "--auth=trust", "-N"]
        subprocess.run(make, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        serve = [*user, programs / "postgres", "-D", f"{folder}/data", "-p", port, "-k", folder, "-F"]
        process = subprocess.Popen(serve, cwd=folder, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 60
            ready = [programs / "pg_isready", "-q", "-h", "localhost", "-p", port]
            while subprocess.run(ready, check=False).returncode:
                assert process.poll() is None and time.monotonic() < end, "PostgreSQL did not start"
                time.sleep(0.1)
            yield f"postgresql://wmtp@localhost:{port}/postgres"
        finally:
            ctl = [*user, programs / "pg_ctl", "-D", f"{folder}/data", "-m", "fast", "stop"]
            subprocess.run(ctl, check=True, cwd=folder, stdout=subprocess.DEVNULL)
            process.wait(timeout=30)


_taken: list[socket.socket] = []  # names that say which ports are this process's, to its end


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to outgoing connections: it stays free.

    Nor will another process of tests be given it, before a server listens or between two lives of one.
    """
    for port in random.sample(range(20_000, 30_000), 100):
        name = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe, contextlib.suppress(OSError):
            if sys.platform == "linux":
                name.bind(f"\0wmtp-tests-port-{port}")
            probe.bind(("127.0.0.1", port))
            _taken.append(name)
            return port
        name.close()
    raise RuntimeError("no free port between 20000 and 30000")


def _wait_until_it_answers(process: subprocess.Popen, url: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{' '.join(process.args)} ended with status {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it answers, which is all that is asked
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{url} did not answer in {seconds} s")


class MlflowServer:
    """A real `mlflow server` on one port and one SQLite file, whatever happens to its processes.

    Args:
        folder: for its database, and its artifacts where they go to no other place.
        artifacts: where the server puts artifacts: `s3://bucket/prefix`, or None for `folder`.
        environment: of the server, beside this process's own.
    """

    def __init__(
        self, folder: Path, *, artifacts: str | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        self._command += ["--backend-store-uri", new_store(folder), "--workers", "1"]
        self._command += ["--artifacts-destination", artifacts or str(folder / "artifacts")]
        # Without its job runner, seven more processes that nothing here needs, it starts in half the time.
        own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.environment = {**os.environ, **own, **(environment or {})}
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Return when it answers; at once where it does already."""
        if self._process is not None:
            return
        # A session of its own: the server's workers are stopped with it.
        self._process = subprocess.Popen(
            self._command, env=self.environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        _wait_until_it_answers(self._process, f"{self.url}/health")

    def pause(self) -> None:
        """It takes connections and answers nothing."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def mlflow_server(
    folder: Path, *, artifacts: str | None = None, environment: dict[str, str] | None = None
) -> Iterator[MlflowServer]:
    """A running :class:`MlflowServer`; its address is its `url`."""
    server = MlflowServer(folder, artifacts=artifacts, environment=environment)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@cache
def _empty_store() -> Path:
    from mlflow.tracking import MlflowClient

    folder = Path(tempfile.mkdtemp(prefix="mlflow-store-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


def new_store(folder: Path) -> str:
    """The URI of an empty SQLite store in a folder: a copy, since mlflow takes seconds to lay out a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_empty_store(), folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"
