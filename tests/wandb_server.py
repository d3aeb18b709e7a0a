"""A stand-in of the W&B server on the loopback: as much of it as the real client needs to upload a run, and its ways to fail."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["none", "500", "401", "hang", "reset"]
HANG_S = 600.0
ENTITY = "herbarium"


@dataclass
class UploadedRun:
    """What the server holds of a run: every line that it was sent, in its place, whoever sent it.

    W&B's steps only ever rise, so a line whose step the run has already is no new row; `num_repeated` counts such lines.
    """

    project: str
    display_name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[int, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    is_complete: bool = False
    num_uploads: int = 0

    def rows(self) -> list[dict[str, Any]]:
        """The rows by their W&B step, without W&B's own underscored fields."""
        items = [json.loads(self.lines[place]) for place in sorted(self.lines)]
        by_step = {item["_step"]: item for item in reversed(items)}
        return [
            {name: value for name, value in by_step[step].items() if not name.startswith("_")}
            for step in sorted(by_step)
        ]

    @property
    def num_repeated(self) -> int:
        return len(self.lines) - len(self.rows())


class WandbServer(ThreadingHTTPServer):
    """Runs by id, artifacts by name. `fault` says how each request fails; `fault_after_rows` when that begins."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, UploadedRun] = {}
        self.artifacts: list[str] = []
        self.requests: list[str] = []
        self.failed: dict[str, int] = defaultdict(int)
        self.fault: Fault = "none"
        self.fault_after_rows = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault_now(self) -> Fault:
        """How the next request fails."""
        num_rows = max((len(run.lines) for run in self.runs.values()), default=0)
        return self.fault if num_rows >= self.fault_after_rows else "none"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed or gave up is what these tests are about."""


@contextmanager
def serve_wandb() -> Iterator[WandbServer]:
    """A server that listens until the block ends."""
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silence."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        query = json.loads(body) if self.path == "/graphql" else {}
        name = (
            query.get("operationName")
            or (query.get("query") or self.path).replace("(", " ").split()[-1 if not query else 1]
        )
        self.server.requests.append(name)
        fault = self.server.fault_now()
        if fault != "none":
            self.server.failed[fault] += 1
            return self._fail(fault)
        if self.path == "/graphql":
            return self._send({"data": self._graphql(name, query.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            self._take_lines(self.path.split("/")[-2], json.loads(body))
        return self._send({})

    do_GET = do_POST = do_PUT = _answer  # noqa: N815 - the names are http.server's

    def _fail(self, fault: Fault) -> None:
        if fault == "hang":
            time.sleep(HANG_S)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        else:
            self._send({"errors": [{"message": f"told to fail with {fault}"}]}, code=int(fault))

    def _send(self, content: dict[str, Any], *, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _graphql(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to one query; an empty one to those that the client can do without."""
        match name:
            case "Viewer":
                return {
                    "viewer": {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}
                }
            case "UpsertBucket":
                return {"upsertBucket": self._upsert(variables)}
            case "RunResumeStatus":
                return {
                    "model": {"id": "p", "name": variables["project"], "bucket": self._resume_status(variables["name"])}
                }
            case "CreateRunFiles":
                files = [{"name": file, "uploadUrl": f"{self.server.url}/upload/{file}"} for file in variables["files"]]
                return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
            case "CreateArtifact":
                self.server.artifacts.append(variables["input"]["artifactCollectionName"])
                sequence = {"id": "s", "latestArtifact": None}
                # Committed already: the client then has nothing to upload, and the files' names and digests are what it asked with.
                return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
        return {}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables["name"]
        is_new = run_id not in self.server.runs
        run = self.server.runs.setdefault(run_id, UploadedRun(variables.get("project") or ""))
        run.num_uploads += 1
        run.display_name = variables.get("displayName") or run.display_name
        run.config |= json.loads(variables.get("config") or "{}")
        return {"bucket": self._bucket(run_id, run), "inserted": is_new}

    def _bucket(self, run_id: str, run: UploadedRun) -> dict[str, Any]:
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}}
        counted = {"historyLineCount": len(run.lines), "logLineCount": 0, "eventsLineCount": 0}
        return {
            "id": run_id,
            "name": run_id,
            "displayName": run.display_name,
            "config": "{}",
            "project": project,
            **counted,
        }

    def _resume_status(self, run_id: str) -> dict[str, Any] | None:
        run = self.server.runs.get(run_id)
        if run is None:
            return None
        tail = [run.lines[max(run.lines)]] if run.lines else []
        told = {"historyTail": json.dumps(tail), "summaryMetrics": json.dumps(run.summary), "eventsTail": "[]"}
        return {
            **self._bucket(run_id, run),
            **told,
            "config": json.dumps(run.config),
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }

    def _take_lines(self, run_id: str, stream: dict[str, Any]) -> None:
        run = self.server.runs[run_id]
        files = stream.get("files") or {}
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for place, line in enumerate(history["content"], start=history["offset"]):
            run.lines[place] = line
        for line in files.get("wandb-summary.json", {}).get("content", []):
            run.summary = json.loads(line)
        run.is_complete = run.is_complete or bool(stream.get("complete"))
