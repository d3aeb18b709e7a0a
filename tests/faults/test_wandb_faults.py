"""W&B may be absent, silent, broken or full: the training goes on, ends in time with code 0, and every row can be had later, once."""

from __future__ import annotations

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any, cast

import pytest

from aplantida_dist.report import LIMITS
from aplantida_dist.wandb_report import Limits, flatten
from tests.ranks import command_on_ranks, free_port
from tests.runs import rows_of, write_config
from tests.wandb_process import RUN_ID
from tests.wandb_server import Fault, WandbServer, serve_wandb

KEY = 40 * "a"
SHORT_LIMITS = Limits(init_s=3.0, finish_s=3.0, grace_s=10.0)
"""For W&B's server to answer, to take what is left, and the grace beyond: the last is of a busy machine, not of W&B."""
BUSY_S = 20.0
"""What this machine may add: it runs other tests beside."""
EPOCHS = 6


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with serve_wandb() as server:
        yield server


class Training:
    """A process of tests/wandb_process.py: goes from stage to stage as it is told."""

    def __init__(
        self,
        run_dir: Path,
        *,
        url: str,
        mode: str = "online",
        last_epoch: int = EPOCHS,
        file_limit: int | None = None,
        limits: Limits = SHORT_LIMITS,
    ) -> None:
        command = [sys.executable, "-m", "tests.wandb_process", str(run_dir), mode, str(last_epoch)]
        self._is_waiting = False
        limit = (resource.RLIMIT_FSIZE, (file_limit or 0, resource.RLIM_INFINITY))
        self.process = subprocess.Popen(
            [*command, *map(str, astuple(limits))],
            env=environment(url, home=run_dir.parent),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=(lambda: resource.setrlimit(*limit)) if file_limit else None,
        )

    def reach(self, stage: str) -> float:
        """Send it on to a stage; the seconds that it tells of it, 0 where it tells none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        while True:
            if self._is_waiting:
                self.process.stdin.write("\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
            if not line:
                raise AssertionError(self.process.communicate()[1])
            self._is_waiting = True
            told = json.loads(line)
            if told["stage"] == stage:
                return float(told.get("seconds", 0.0))

    def end(self) -> str:
        """Let it exit by itself, with code 0; returns its stderr."""
        _, stderr = self.process.communicate("\n", timeout=sum(astuple(SHORT_LIMITS)) + BUSY_S)
        assert self.process.returncode == 0, stderr
        return stderr

    def kill(self) -> None:
        """SIGKILL, as the out-of-memory killer would."""
        self.process.kill()
        self.process.communicate()

    def services(self) -> list[int]:
        """W&B's own process below this one."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").parents[1].glob("*/children")
        pids = [int(pid) for path in children for pid in path.read_text().split()]
        return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == "wandb-core"]


def environment(url: str, *, home: Path) -> dict[str, str]:
    """Of a user who is logged in to a server, whose client hands rows over every second and tells nobody else of its errors."""
    told = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    quick = {"WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1", "WANDB_ERROR_REPORTING": "false"}
    return {**told, **quick, "WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "HOME": str(home)}


def sync(run_dir: Path, server: WandbServer) -> None:
    """The command that the README names, against a server that is well."""
    server.fault = "none"
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(run_dir / "wandb" / "latest-run")]
    told = environment(server.url, home=run_dir.parent)
    # In the run's own folder: the command leaves its logs where it is called.
    subprocess.run(command, env=told, cwd=run_dir, check=True, capture_output=True, timeout=60 + BUSY_S)


def history_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The record's rows as W&B shows them."""
    return [flatten(json.loads(line)) for line in (run_dir / "history.jsonl").read_text().splitlines()]


def assert_holds_every_row_once(run_dir: Path, server: WandbServer, *, num_repeated: int = 0) -> None:
    """What the server shows is the history: no row lost, none twice, in order; and how many lines it was sent again."""
    rows = history_rows(run_dir)
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    assert server.runs[RUN_ID].rows() == rows
    assert server.runs[RUN_ID].num_repeated == num_repeated


def assert_the_next_process_fills_up(run_dir: Path, server: WandbServer) -> None:
    """The same command again, offline, and one `wandb sync`: the server shows the history."""
    again = Training(run_dir, url=server.url, mode="offline")
    again.reach("done")
    again.end()
    sync(run_dir, server)
    assert_holds_every_row_once(run_dir, server)


def wait_for_rows(server: WandbServer, number: int) -> None:
    deadline_s = time.monotonic() + 2 * BUSY_S
    while len(server.runs[RUN_ID].rows()) < number:
        assert time.monotonic() < deadline_s, "the server never got the rows"
        time.sleep(0.05)


def wait_for_the_end_of(services: list[int]) -> None:
    """W&B's process goes when its parent does."""
    assert services
    deadline_s = time.monotonic() + 15.0
    while any(Path(f"/proc/{pid}").exists() for pid in services):
        assert time.monotonic() < deadline_s, "W&B's process outlives the training"
        time.sleep(0.05)


def figure(*, start_s: float, show_s: float, end_s: float) -> str:
    return f"start {start_s:.1f} s, slowest row {1000 * show_s:.1f} ms, end {end_s:.1f} s (limits {SHORT_LIMITS.init_s:.0f}, –, {SHORT_LIMITS.finish_s:.0f} s)"


def finish(training: Training, *, start_s: float) -> tuple[str, str]:
    """From where a training stands to its exit, within its budgets; its figure and its stderr."""
    show_s, end_s = training.reach("shown"), training.reach("done")
    stderr = training.end()
    init_s, finish_s, grace_s = astuple(SHORT_LIMITS)
    assert start_s < init_s + grace_s + BUSY_S
    assert end_s < finish_s + grace_s + BUSY_S
    assert show_s < 0.5
    return figure(start_s=start_s, show_s=show_s, end_s=end_s), stderr


@pytest.mark.fault(
    what="W&B's server absent, its name dead, answering 500, silent, closing connections, or refusing the key, from the start",
    how="a stand-in of the server on the loopback, or none; `online` is asked for",
    holds="said once, code 0, every row in an offline folder; `wandb sync` hands each over once",
)
@pytest.mark.parametrize(
    "fault",
    [
        "absent",
        pytest.param("401", id="wrong-key", marks=pytest.mark.slow),
        pytest.param("hang", marks=pytest.mark.slow),
        pytest.param("dns", marks=pytest.mark.slow),
        pytest.param("500", marks=pytest.mark.slow),
        pytest.param("reset", marks=pytest.mark.slow),
    ],
)
def test_online_goes_on_offline_where_the_server_is_not_to_be_had(
    fault: str, server: WandbServer, tmp_path: Path, fired: Any
) -> None:
    urls = {"absent": f"http://127.0.0.1:{free_port()}", "dns": "http://nonexistent.invalid"}
    if fault not in urls:
        server.fault = cast(Fault, fault)
    run_dir = tmp_path / "run"
    training = Training(run_dir, url=urls.get(fault, server.url))
    told, stderr = finish(training, start_s=training.reach("open"))
    assert fault in urls or server.failed[fault] > 0
    (warning,) = [line for line in stderr.splitlines() if line.startswith("warning:")]
    assert "going on offline" in warning
    assert "wandb sync --include-online" in warning
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 1
    sync(run_dir, server)
    assert_holds_every_row_once(run_dir, server)
    fired(told)


@pytest.mark.slow
@pytest.mark.fault(
    what="W&B's server breaks in mid-run: silent, 500, closed connections",
    how="the stand-in begins to fail when it has half of the rows",
    holds="code 0; the same command again sends exactly what is left; `wandb sync` sends all again under the same W&B steps",
)
@pytest.mark.parametrize(
    ("fault", "later"), [("hang", "again"), ("hang", "sync"), ("500", "again"), ("reset", "again")]
)
def test_a_server_that_breaks_in_mid_run_gets_the_rows_later(
    fault: Fault, later: str, server: WandbServer, tmp_path: Path, fired: Any
) -> None:
    run_dir = tmp_path / "run"
    training = Training(run_dir, url=server.url)
    start_s = training.reach("open")
    training.reach("half")
    wait_for_rows(server, EPOCHS // 2)
    server.fault = fault
    told, stderr = finish(training, start_s=start_s)
    assert server.failed[fault] > 0
    assert stderr.count("warning: W&B: ") == 1
    assert len(server.runs[RUN_ID].rows()) == EPOCHS // 2
    server.fault = "none"
    if later == "sync":
        sync(run_dir, server)
        assert_holds_every_row_once(run_dir, server, num_repeated=EPOCHS // 2)
    else:
        again = Training(run_dir, url=server.url)
        again.reach("done")
        again.end()
        assert_holds_every_row_once(run_dir, server)
    fired(told)


@pytest.mark.slow
@pytest.mark.fault(
    what="`finish` never returns",
    how="W&B's own process is stopped (SIGSTOP) before the end",
    holds="given up within the budget, said once, code 0; the folder has the rows",
)
def test_a_finish_that_never_returns_is_given_up(server: WandbServer, tmp_path: Path, fired: Any) -> None:
    run_dir = tmp_path / "run"
    training = Training(run_dir, url=server.url, mode="offline")
    start_s = training.reach("open")
    training.reach("half")
    time.sleep(3.0)  # two flushes of W&B's folder
    (service,) = training.services()
    os.kill(service, signal.SIGSTOP)
    told, stderr = finish(training, start_s=start_s)
    assert "W&B: not done after" in stderr
    assert not Path(f"/proc/{service}").exists()
    assert_the_next_process_fills_up(run_dir, server)
    fired(told)


@pytest.mark.slow
@pytest.mark.fault(
    what="a run that is asked to stop while W&B's server is silent",
    how="the stand-in falls silent in mid-run; the limits are those of a training",
    holds="W&B is closed within the 30 s that a launcher and Kubernetes give, so that the exit code comes through",
)
def test_a_silent_server_leaves_room_in_the_grace_period(server: WandbServer, tmp_path: Path, fired: Any) -> None:
    """The check of the key before the artifact once took 19 s of its own, and `finish` 20 more."""
    training = Training(tmp_path / "run", url=server.url, limits=LIMITS)
    training.reach("open")
    training.reach("half")
    wait_for_rows(server, EPOCHS // 2)
    server.fault = "hang"
    training.reach("shown")
    end_s = training.reach("done")
    training.end()
    assert server.failed["hang"] > 0
    assert end_s < 30.0
    fired(f"end {end_s:.1f} s")


@pytest.mark.fault(
    what="SIGKILL with W&B on",
    how="twice, right after a row was shown; the third process trains to the end",
    holds="the rows that W&B had not got are back-filled from the history; the server has each once",
)
@pytest.mark.parametrize("mode", ["offline", pytest.param("online", marks=pytest.mark.slow)])
def test_what_a_kill_took_is_filled_up_from_the_history(
    mode: str, server: WandbServer, tmp_path: Path, fired: Any
) -> None:
    run_dir = tmp_path / "run"
    for last_epoch in (EPOCHS, 2 * EPOCHS):
        training = Training(run_dir, url=server.url, mode=mode, last_epoch=last_epoch)
        training.reach("shown")
        services = training.services()
        training.kill()
        wait_for_the_end_of(services)
    held = 0 if mode == "offline" else len(server.runs[RUN_ID].rows())
    training = Training(run_dir, url=server.url, mode=mode, last_epoch=3 * EPOCHS)
    told, stderr = finish(training, start_s=training.reach("open"))
    assert "warning" not in stderr
    if mode == "offline":
        sync(run_dir, server)
    assert len(history_rows(run_dir)) == 3 * EPOCHS
    assert_holds_every_row_once(run_dir, server)
    fired(f"killed with {held} of {2 * EPOCHS} rows at the server; {told}")


@pytest.mark.fault(
    what="the disk is full in W&B's folder",
    how="a limit on the size of its files, or a file in the folder's place",
    holds="code 0, the history whole; once there is room the same command fills the folder up",
)
@pytest.mark.parametrize("how", ["limit", pytest.param("file", marks=pytest.mark.slow)])
def test_a_full_disk_in_the_folder_does_not_end_the_training(
    how: str, server: WandbServer, tmp_path: Path, fired: Any
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if how == "file":
        (run_dir / "wandb").write_text("in the way")
    limit = 8_000 if how == "limit" else None
    training = Training(run_dir, url=server.url, mode="offline", file_limit=limit)
    told, stderr = finish(training, start_s=training.reach("open"))
    assert len(history_rows(run_dir)) == EPOCHS
    assert stderr.count("warning: W&B: ") == 1
    if how == "file":
        (run_dir / "wandb").unlink()
    else:
        assert [path.stat().st_size for path in (run_dir / "wandb").glob("offline-run-*/*.wandb")] == [limit]
    assert_the_next_process_fills_up(run_dir, server)
    fired(told)


@pytest.mark.fault(
    what="`online` asked without a key that could be one",
    how="no key, a key of another shape",
    holds="an error before anything is made",
)
@pytest.mark.parametrize("key", ["", "abc"])
def test_online_without_a_sound_key_is_an_error_at_once(
    key: str, dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fired: Any
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    arguments = ["--config", config, "--run-dir", tmp_path / "run", "report.wandb=online"]
    started_s = time.monotonic()
    (finished,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
    seconds = time.monotonic() - started_s
    assert finished.code == 2
    assert "report.wandb is online" in finished.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    fired(f"{seconds:.2f} s, imports of the command's own modules included")


@pytest.mark.slow
@pytest.mark.fault(
    what="training speed beside a silent W&B server",
    how="a training with `online` and a stand-in that accepts and never answers, and one without W&B",
    holds="the same rows; the cost of W&B in the step loop is a row handed to a thread, once an epoch",
)
def test_a_silent_server_costs_no_speed(
    server: WandbServer, dataset_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fired: Any
) -> None:
    server.fault = "hang"
    for name, value in environment(server.url, home=tmp_path).items():
        monkeypatch.setenv(name, value)
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=12)
    speeds: dict[str, list[float]] = {"online": [], "disabled": []}
    histories = []
    for mode, found in speeds.items():
        run_dir = tmp_path / mode
        arguments = ["--config", config, "--run-dir", run_dir, f"report.wandb={mode}"]
        (finished,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
        assert finished.code == 0, finished.stderr
        assert ("going on offline" in finished.stderr) == (mode == "online")
        rows = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
        found += [row["train"]["images_per_s"] for row in rows[1:]]
        histories.append(rows_of(run_dir))
        for row in histories[-1]:
            del row["digests"]["config"]  # the mode is in it
    assert server.failed["hang"] > 0
    assert histories[0] == histories[1]
    online, disabled = (statistics.median(found) for found in speeds.values())
    # On a machine that does other things beside this tells little: `make bench` has the CPU time.
    fired(f"median of 11 epochs of 5 tiny steps: {online:.0f} images/s with, {disabled:.0f} without")
