"""Two at once: the second is refused at once and told who the first is; what a dead one holds is free."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aplantida_dist import lock
from aplantida_dist.errors import UserError
from aplantida_dist.lock import SILENT_AFTER_S, Lock, LockError, take_lock, this_process
from aplantida_dist.shards.verify import verify_dataset
from tests.faults.conftest import Fired
from tests.pictures import build, digests_of, fill
from tests.ranks import FORK, command_on_ranks
from tests.runs import write_config

CONSTANT = ("schedule.kind=constant", "checkpoint.keep_last=2")


def wait_until(is_so: object, *, within_s: float = 100.0) -> None:
    deadline_s = time.monotonic() + within_s
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.fault(
    what="a second run in a run folder, and a resume while the first still runs",
    how="the command on two ranks while another process trains there; then SIGKILL of the first, and the command again",
    holds="refused with host and pid of the first, which goes on; after the kill the lock is taken over and the run goes on",
)
def test_a_second_run_in_a_run_folder_is_refused_and_a_dead_ones_lock_taken_over(
    dataset_dir: Path, tmp_path: Path, fired: Fired
) -> None:
    """The folder's files are not touched by the one that is refused."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1000, every_steps=1)
    run_dir = tmp_path / "run"
    arguments = ["--config", str(config), "--run-dir", str(run_dir), *CONSTANT]
    with (tmp_path / "first").open("wb") as output:
        first = subprocess.Popen(
            [sys.executable, "-m", "aplantida_dist.train", *arguments], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: any(run_dir.glob("checkpoints/step_*")) or first.poll() is not None)
        assert first.poll() is None, (tmp_path / "first").read_text()
        assert json.loads((run_dir / "run.lock").read_text())["pid"] == first.pid
        started_s = time.monotonic()
        refused = command_on_ranks(2, "aplantida_dist.train", [*arguments, "train.epochs=7"], tmp_path)
        took_s = time.monotonic() - started_s
        assert [rank.code for rank in refused] == [2, 2]
        said = "".join(rank.stderr for rank in refused)
        assert said.count("\n") == 1, "told once"
        assert f"process {first.pid} on {socket.gethostname()} trains in this run folder now" in said
        assert "epochs: 1000" in (run_dir / "config.yaml").read_text(), "the config of the first stands"
        assert not (run_dir / "resumes.jsonl").exists()
        step = json.loads((run_dir / "checkpoints" / "last.json").read_text())["step"]
        wait_until(lambda: json.loads((run_dir / "checkpoints" / "last.json").read_text())["step"] > step)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (run_dir / "run.lock").exists(), "a killed run leaves its lock file"
    step = json.loads((run_dir / "checkpoints" / "last.json").read_text())["step"]
    (again,) = command_on_ranks(1, "aplantida_dist.train", [*arguments, f"train.epochs={step // 5 + 1}"], tmp_path)
    assert again.code == 0, again.stderr
    assert f"process {first.pid} on {socket.gethostname()} ended without a word while it trained here" in again.stdout
    assert "going on from step" in again.stdout
    assert not (run_dir / "run.lock").exists()
    fired(f"refused in {took_s:.1f} s, start of two ranks included")


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path) -> None:
    """The folder is made for the lock, and goes with it where nothing else was written."""
    config = write_config(tmp_path / "config.yaml", tmp_path / "nowhere")
    arguments = ["--config", config, "--run-dir", tmp_path / "run"]
    (refused,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
    assert refused.code == 2
    assert not (tmp_path / "run").exists()


def build_at_once(pictures: Path, dataset_dir: Path, outcomes: Path) -> None:
    """Build in a process of its own and leave word of how it ended."""
    try:
        build(pictures, dataset_dir)
        said = "built"
    except UserError as error:
        said = str(error)
    (outcomes / f"{os.getpid()}").write_text(said)
    os._exit(0)


@pytest.mark.fault(
    what="several builders of one dataset",
    how="five processes that build it at the same moment, six times",
    holds="one builds; each other is refused with host and pid, or finds it built; the dataset is that of one builder",
)
def test_builders_of_one_dataset_do_not_meet(tmp_path: Path, fired: Fired) -> None:
    """Whoever comes second; nothing is left beside."""
    fill(tmp_path / "pictures", {"oak": 6, "yew": 6})
    build(tmp_path / "pictures", tmp_path / "alone")
    num_refused = 0
    for turn in range(6):
        home, outcomes = tmp_path / f"home{turn}", tmp_path / f"outcomes{turn}"
        outcomes.mkdir()
        processes = [
            FORK.Process(target=build_at_once, args=(tmp_path / "pictures", home / "set", outcomes)) for _ in range(5)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        said = {path.name: path.read_text() for path in outcomes.iterdir()}
        assert len(said) == 5
        assert sum(text == "built" for text in said.values()) == 1, said
        for text in said.values():
            named = [pid for pid in said if f"process {pid} on {socket.gethostname()} builds this dataset now" in text]
            num_refused += len(named)
            assert text == "built" or named or "exists already" in text, text
        assert verify_dataset(home / "set").damages == ()
        assert digests_of(home / "set") == digests_of(tmp_path / "alone")
        assert [path.name for path in home.iterdir()] == ["set"]
    assert num_refused
    fired(f"{num_refused} of 24 refused by the lock, the others found it built")


@pytest.mark.fault(
    what="a second command that writes the same soft labels",
    how="the command while its lock is held",
    holds="refused with host and pid; the parts of the first are not touched",
)
def test_a_second_writer_of_soft_labels_is_refused(dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """Both would write the same parts and delete them under each other."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    (trained,) = command_on_ranks(
        1, "aplantida_dist.train", ["--config", config, "--run-dir", tmp_path / "run"], tmp_path
    )
    assert trained.code == 0, trained.stderr
    out = tmp_path / "out" / "teacher.soft"
    arguments = ["--run", tmp_path / "run", "--data", dataset_dir, "--out", out, "--top", "3"]
    out.parent.mkdir()
    with take(out.with_name(".teacher.soft.lock")):
        (refused,) = command_on_ranks(1, "aplantida_dist.soft_labels", arguments, tmp_path)
    assert refused.code == 2
    assert f"process {os.getpid()} on {socket.gethostname()} writes these soft labels now" in refused.stderr
    assert list(out.parent.iterdir()) == []
    (written,) = command_on_ranks(1, "aplantida_dist.soft_labels", arguments, tmp_path)
    assert written.code == 0, written.stderr
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    fired("1 of 1 refused")


def take(path: Path) -> Lock:
    return take_lock(path, doing="works", remedy="wait")


def leave(path: Path, *, silent_s: float, **said: object) -> None:
    """A lock file as another process left it, last touched so long ago."""
    path.write_text(json.dumps({**dataclasses.asdict(this_process()), **said}))
    os.utime(path, (time.time() - silent_s,) * 2)


@pytest.mark.fault(
    what="the first runs on another machine that shares the disk",
    how="a lock file that names another host and kernel, touched 3 s ago, 120 s ago, and by a clock an hour ahead",
    holds="refused while it gives signs of life, with how long ago the last was and what to do; else taken over",
)
def test_a_process_on_another_machine_holds_its_lock_while_it_touches_it(tmp_path: Path, fired: Fired) -> None:
    """The system's own locks may not reach across machines."""
    path = tmp_path / "run.lock"
    leave(path, silent_s=3.0, host="node17", machine="another", pid=4321)
    before = path.read_bytes()
    with pytest.raises(
        LockError, match=r"process 4321 on node17 works now \(since .*, last sign of it [34] s ago\)"
    ) as told:
        take(path)
    assert f"the lock is free after {SILENT_AFTER_S:.0f} s of silence" in str(told.value)
    assert path.read_bytes() == before
    for silent_s in (120.0, -3600.0):
        leave(path, silent_s=silent_s, host="node17", machine="another", pid=4321)
        with take(path) as held:
            assert str(held.left) == "process 4321 on node17"
        assert not path.exists()
    fired("1 of 1 refused, 2 of 2 taken over")


@pytest.mark.fault(
    what="a disk without locks",
    how="flock fails with ENOLCK; the lock file names a dead process, and one that lives",
    holds="the dead one's is taken over, the living one's is refused",
)
def test_without_the_systems_locks_the_names_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fired: Fired
) -> None:
    """As on some network disks."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "run.lock"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leave(path, silent_s=0.0, pid=ended.pid)
    with take(path) as held:
        assert held.left is not None
        assert held.left.pid == ended.pid
        with pytest.raises(LockError, match=f"process {os.getpid()} on "):
            take(path)
    with take(path) as held:
        assert held.left is None
    fired("1 of 1 taken over, 1 of 1 refused")


def hold_and_fork(path: Path, told: Path) -> None:
    """Take the lock, leave a child that outlives this process, and wait to be killed."""
    held = take(path)
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    told.write_text(str(child))
    assert held
    time.sleep(20)


@pytest.mark.fault(
    what="a run is killed and its loader workers live on for a moment",
    how="SIGKILL of a process that holds a lock and has forked a child",
    holds="the lock is free at once, though the child has inherited its parent's files",
)
def test_a_forked_child_does_not_hold_its_parents_lock(tmp_path: Path, fired: Fired) -> None:
    """Loader workers notice only seconds later that they are orphans."""
    path, told = tmp_path / "run.lock", tmp_path / "child"
    parent = FORK.Process(target=hold_and_fork, args=(path, told))
    parent.start()
    wait_until(lambda: told.exists() and told.read_text() != "")
    child = int(told.read_text())
    try:
        with pytest.raises(LockError, match=f"process {parent.pid} on "):
            take(path)
        parent.kill()
        parent.join()
        os.kill(child, 0)
        with take(path) as held:
            assert held.left is not None
            assert held.left.pid == parent.pid
    finally:
        os.kill(child, signal.SIGKILL)
    fired("free at once")


def test_a_held_lock_is_touched_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sign of life that other machines go by."""
    monkeypatch.setattr(lock, "BEAT_EVERY_S", 0.02)
    path = tmp_path / "run.lock"
    with take(path):
        os.utime(path, (0, 0))
        wait_until(lambda: path.stat().st_mtime > 0, within_s=5)
