"""A local HTTP server of a built dataset that can be slow, fail, cut and change what it sends, or be gone, and that counts."""

from __future__ import annotations

import itertools
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK_BYTES = 1 << 14


class Handler(BaseHTTPRequestHandler):
    """One request. `say` is the whole of a plain answer."""

    protocol_version = "HTTP/1.1"
    server: ShardServer

    def do_GET(self) -> None:
        with suppress(ConnectionError):
            self.server.answer(self)

    def say(self, content: bytes, *, status: int = 200, length: int | None = None) -> None:
        """Send content; with another `length` than its own the connection ends behind it."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        for first in range(0, len(content), CHUNK_BYTES):
            chunk = content[first : first + CHUNK_BYTES]
            self.server.wait_for_link(len(chunk))
            self.wfile.write(chunk)
        if length not in (None, len(content)):
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


Answer = Callable[[Handler, bytes], None]
"""How a file's content is sent."""


class ShardServer(ThreadingHTTPServer):
    """Serves a folder. The n-th request of a file whose name ends as a key of `faults` is answered by the n-th of its answers, later ones soundly.

    num_requests, num_bytes: of whole files by path, those that were answered wrongly included. bytes_per_s: of the link, which
    all share; None knows no limit.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder = folder
        self.faults: dict[str, list[Answer]] = {}
        self.num_requests: defaultdict[str, int] = defaultdict(int)
        self.num_bytes = 0
        self.bytes_per_s: float | None = None
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, handler: Handler) -> None:
        path = self.folder / handler.path.lstrip("/")
        content = path.read_bytes() if path.is_file() else None
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        if content is None:
            handler.say(b"none", status=404)
            return
        if asked:
            handler.say(content[int(asked[1]) : int(asked[2]) + 1], status=206)
            return
        with self._lock:
            self.num_requests[handler.path] += 1
            self.num_bytes += len(content)
            answers = next(
                (these for name, these in self.faults.items() if handler.path.endswith(name) and these), None
            )
            fault = answers.pop(0) if answers else sound
        fault(handler, content)

    def wait_for_link(self, num_bytes: int) -> None:
        """Return when so many bytes have gone through the link."""
        if self.bytes_per_s is None:
            return
        with self._lock:
            self._free_at_s = max(self._free_at_s, time.monotonic()) + num_bytes / self.bytes_per_s
            wait_s = self._free_at_s - time.monotonic()
        time.sleep(max(wait_s, 0.0))

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def die(self) -> None:
        """Listen no more, also where a process that was forked meanwhile has the socket."""
        self.socket.shutdown(socket.SHUT_RDWR)
        self.shutdown()
        self.server_close()

    def handle_error(self, *arguments: object) -> None:
        """A client that hangs up is no news here."""


@contextmanager
def serve(folder: Path, *, port: int = 0) -> Iterator[ShardServer]:
    """Serve a folder until the block ends."""
    server = ShardServer(folder, port)
    server.start()
    try:
        yield server
    finally:
        with suppress(OSError):
            server.die()


def sound(handler: Handler, content: bytes) -> None:
    handler.say(content)


def status(code: int) -> Answer:
    return lambda handler, content: handler.say(b"no", status=code)


def cut(handler: Handler, content: bytes) -> None:
    """Half of what was announced."""
    handler.say(content[: len(content) // 2], length=len(content))


def cut_unseen(handler: Handler, content: bytes) -> None:
    """Half of it, announced as the whole."""
    handler.say(content[: len(content) // 2])


def partial(handler: Handler, content: bytes) -> None:
    """206, which nobody asked for."""
    handler.say(content[: len(content) // 2], status=206)


def changed(handler: Handler, content: bytes) -> None:
    """Another content of the same length."""
    handler.say(content[:-1] + bytes([content[-1] ^ 1]))


def longer(handler: Handler, content: bytes) -> None:
    handler.say(content + content)


def silent(for_s: float) -> Answer:
    def answer(handler: Handler, content: bytes) -> None:
        time.sleep(for_s)
        handler.say(content)

    return answer


def die_at(server: ShardServer, number: int) -> tuple[Answer, threading.Event]:
    """Answers soundly until the request of this number (from 1), at which the server dies; and the event that it has."""
    count, is_dead = itertools.count(1), threading.Event()

    def answer(handler: Handler, content: bytes) -> None:
        if next(count) < number:
            handler.say(content)
            return
        handler.close_connection = True
        if not is_dead.is_set():
            is_dead.set()
            threading.Thread(target=server.die).start()

    return answer, is_dead
