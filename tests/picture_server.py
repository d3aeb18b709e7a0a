"""A local HTTP server whose paths answer as servers on the web do, and which counts who asked for what, when, how many at once."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pictures import draw


class Handler(BaseHTTPRequestHandler):
    """One request. `say` is the whole of a plain answer; answers that break the rules write to `wfile` themselves."""

    protocol_version = "HTTP/1.1"
    server: PictureServer

    def do_GET(self) -> None:
        self.server.answer(self)

    def say(self, content: bytes, *, status: int = 200, content_type: str = "image/jpeg", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        # Before anything is sent: the client may ask the next thing as soon as it knows enough.
        self.server.leave(self)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


Answer = Callable[[Handler], None]


class PictureServer(ThreadingHTTPServer):
    """Answers by path: the n-th request gets the n-th answer, the last one for ever. Unknown paths are 404."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[Answer, ...]] = {}
        self.times_s: defaultdict[str, list[float]] = defaultdict(list)
        self.headers: dict[str, dict[str, str]] = {}
        self.most_at_once: defaultdict[str, int] = defaultdict(int)
        """The most requests that were open at the same time, of each host as the client calls it, and of all under ''."""
        self._open: dict[Handler, str] = {}
        self._lock = threading.Lock()

    def url(self, path: str, *, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}{path}"

    def put(self, path: str, *answers: Answer) -> str:
        self.answers[path] = answers
        return self.url(path)

    def forget(self) -> None:
        """Count from zero again."""
        self.times_s.clear()

    @property
    def num_requests(self) -> dict[str, int]:
        return {path: len(times_s) for path, times_s in self.times_s.items()}

    def answer(self, handler: Handler) -> None:
        with self._lock:
            times_s = self.times_s[handler.path]
            times_s.append(time.monotonic())
            self.headers[handler.path] = dict(handler.headers.items())
            host = handler.headers["Host"].split(":")[0]
            self._open[handler] = host
            now_open = list(self._open.values())
            self.most_at_once[host] = max(self.most_at_once[host], now_open.count(host))
            self.most_at_once[""] = max(self.most_at_once[""], len(now_open))
        answers = self.answers.get(handler.path, (status(404),))
        try:
            answers[min(len(times_s), len(answers)) - 1](handler)
        except OSError:
            handler.close_connection = True
        finally:
            self.leave(handler)

    def leave(self, handler: Handler) -> None:
        with self._lock:
            self._open.pop(handler, None)

    def handle_error(self, *arguments: object) -> None:
        """A client that hangs up is no news here."""


@contextmanager
def serve_pictures() -> Iterator[PictureServer]:
    with PictureServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def picture(number: int, *, image_format: str = "JPEG", after_s: float = 0.0) -> Answer:
    def answer(handler: Handler) -> None:
        time.sleep(after_s)
        handler.say(draw(number, image_format=image_format))

    return answer


def content(content: bytes, content_type: str = "image/jpeg") -> Answer:
    return lambda handler: handler.say(content, content_type=content_type)


def status(code: int, **headers: str) -> Answer:
    return lambda handler: handler.say(b"<html>no</html>", status=code, content_type="text/html", **headers)


def redirect(location: str, *, code: int = 302) -> Answer:
    return status(code, Location=location)


def raw(text: bytes) -> Answer:
    """Exactly these bytes, and then the end of the connection."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(text)
        handler.close_connection = True

    return answer


def truncated(number: int) -> Answer:
    body = draw(number)
    return raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])


def cut_without_length(number: int) -> Answer:
    body = draw(number)
    return raw(b"HTTP/1.1 200 OK\r\n\r\n" + body[: len(body) // 2])


def endless(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + draw(0))
    while True:
        handler.wfile.write(b"\0" * 8192)


def drip(handler: Handler) -> None:
    """A byte now and then: never silent, never done."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 40000\r\n\r\n")
    while True:
        handler.wfile.write(b"\xff")
        time.sleep(0.02)


def drip_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def silence(handler: Handler) -> None:
    time.sleep(3)


def reset(handler: Handler) -> None:
    """The connection is torn down instead of answered."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True
