"""An HTTP proxy in front of a real server that cuts, delays, corrupts, refuses or answers errors, on demand."""

import http.client
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "proxy-connection"}
_BLOCK = 1 << 16


class FaultProxy:
    """Forwards every request to `upstream`, with the fault that `mode` names. A context manager.

    What a test sets, at any time:
        mode: "pass"; "cut" (the connection drops after `cut_after` bytes of a body: the request's where it is longer,
            else the response's); "delay" (`seconds` before the answer); "corrupt" (such a body passes through `damage`,
            which flips a byte; of a HEAD's answer the SHA-256 that it tells is changed); "refuse" (the connection is
            reset); or a status: 500, 503, 403.
        faults_left: so many requests meet the fault, then all pass; None for all.
        matches: which requests can meet the fault, told by (method, path); the others pass.

    What it tells: `url`; `requests`, how many came, by method; `log`, their (method, path) in order; `faults`, how many
    met one.

    Args:
        upstream: the server's URL, `http://host:port`.
    """

    def __init__(self, upstream: str) -> None:
        parts = urllib.parse.urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self.mode: str | int = "pass"
        self.cut_after, self.seconds, self.faults_left = 1000, 1.0, None
        self.damage: Callable[[bytes], bytes] = _flipped
        self.matches: Callable[[str, str], bool] = lambda method, path: True
        self.requests: Counter[str] = Counter()
        self.log: list[tuple[str, str]] = []
        self.faults = 0
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultProxy":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def reset(self) -> None:
        """Pass everything, and count from nothing."""
        with self._lock:
            self.mode, self.faults_left, self.matches, self.faults = "pass", None, lambda method, path: True, 0
            self.damage = _flipped
            self.requests.clear()
            self.log.clear()

    def _meet(self, method: str, path: str) -> str | int:
        """Count a request and say what happens to it."""
        with self._lock:
            self.requests[method] += 1
            self.log.append((method, path))
            if self.mode == "pass" or self.faults_left == 0 or not self.matches(method, path):
                return "pass"
            if self.faults_left is not None:
                self.faults_left -= 1
            self.faults += 1
            return self.mode


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        pass  # a client that hangs up is what such tests are about


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args) -> None:
        pass

    def _forward(self) -> None:
        fault = self.proxy._meet(self.command, self.path)
        if fault == "refuse":
            return self._drop()
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut" and length > self.proxy.cut_after:
            self.rfile.read(self.proxy.cut_after)
            return self._drop()
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        if isinstance(fault, int):
            return self._answer_error(fault)
        if fault == "delay":
            time.sleep(self.proxy.seconds)
        if fault == "corrupt" and body:
            body, fault = self.proxy.damage(body), "pass"
        upstream = http.client.HTTPConnection(*self.proxy._upstream, timeout=120)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP | {"content-length"}}
            if body or self.command in ("PUT", "POST"):
                headers["Content-Length"] = str(len(body))
            upstream.request(self.command, self.path, body or None, headers)
            self._answer(upstream.getresponse(), fault)
        finally:
            upstream.close()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _forward

    def _answer(self, response: http.client.HTTPResponse, fault: str) -> None:
        length = response.getheader("Content-Length")
        body = response.read() if length is None and self.command != "HEAD" else None
        if fault == "corrupt" and self.command == "GET" and length is not None and int(length) <= _BLOCK:
            body = self.proxy.damage(response.read())  # which may make it longer or shorter
            length, fault = None, "pass"
        self.send_response_only(response.status, response.reason)
        for key, value in response.getheaders():
            if fault == "corrupt" and self.command == "HEAD" and key.lower() == "x-amz-meta-sha256":
                value = "0" * len(value)
            if key.lower() not in _HOP_BY_HOP | {"content-length"}:
                self.send_header(key, value)
        if response.status not in (204, 304):
            self.send_header("Content-Length", length if body is None else str(len(body)))
        self.end_headers()
        sent = 0
        while self.command != "HEAD":
            block, body = (response.read(_BLOCK), None) if body is None else (body, b"")
            if not block:
                break
            if fault == "corrupt" and sent == 0:
                block = self.proxy.damage(block)
            if fault == "cut" and sent + len(block) > self.proxy.cut_after:
                self.wfile.write(block[: self.proxy.cut_after - sent])
                self.wfile.flush()
                return self._drop()
            self.wfile.write(block)
            sent += len(block)

    def _answer_error(self, status: int) -> None:
        code = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}.get(status, "Fault")
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the fault proxy</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _drop(self) -> None:
        """End the connection the rude way, with a reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


def _flipped(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]
