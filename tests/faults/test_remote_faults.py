"""A dataset at an address whose server is slow, fails, cuts, changes or is gone; a cache whose disk is full, or whose files rot."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from tests.disks import remount
from tests.faults.conftest import Fired
from tests.faults.forked import start, wait_for_checkpoint
from tests.laws import train
from tests.ranks import command_on_ranks
from tests.runs import write_config
from tests.shard_server import ShardServer, changed, cut, cut_unseen, die_at, partial, serve, silent, status
from tests.test_remote import cached, same_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_config(
        tmp_path_factory.mktemp("remote") / "config.yaml", dataset_dir, epochs=2, num_workers=1, every_steps=1
    )
    path.write_text(path.read_text().replace("data:\n", "data:\n  block_samples: 16\n"))
    return path


@pytest.fixture(scope="module")
def unbroken(config: Path) -> Path:
    """The run from the folder."""
    train(1, config, config.parent / "unbroken")
    return config.parent / "unbroken"


@pytest.fixture
def server(dataset_dir: Path) -> Iterator[ShardServer]:
    with serve(dataset_dir) as server:
        yield server


def run(config: Path, run_dir: Path, *overrides: str, world_size: int = 1) -> tuple[int, str]:
    """The command: the main process's exit code and stderr."""
    arguments = ["--config", config, "--run-dir", run_dir, *overrides]
    finished = command_on_ranks(world_size, "aplantida_dist.train", arguments, config.parent)
    return finished[0].code, finished[0].stderr


@pytest.mark.fault(
    what="a server that fails now and then",
    how="each file of the dataset is answered by two of: 500, 503, 206, half a body, half a body as if it were whole, another content, 0.2 s of silence; then soundly",
    holds="the run goes on, and its history and weights are those of the run from the folder, bit for bit",
)
def test_every_file_fails_twice(
    config: Path, unbroken: Path, server: ShardServer, dataset_dir: Path, tmp_path: Path, fired: Fired
) -> None:
    """The faults take turns, so that each of them meets several files."""
    turns = cycle([status(500), cut, partial, status(503), changed, cut_unseen, silent(0.2)])
    names = [f"/{path.relative_to(dataset_dir)}" for path in sorted(dataset_dir.rglob("shard-*"))]
    server.faults = {name: [next(turns), next(turns)] for name in names}
    assert run(config, tmp_path / "run", *cached(server.url, tmp_path / "cache")) == (0, "")
    assert same_run(unbroken, tmp_path / "run")
    asked = [name for name in names if server.num_requests[name]]
    num_fired = sum(2 - len(server.faults[name]) for name in asked)
    assert len(asked) == 2 * 7
    assert num_fired > 24  # what is only silent at first is not asked for a second time
    fired(f"{num_fired} faults in {len(asked)} files")


@pytest.mark.fault(
    what="a shard that changes on the server",
    how="one byte of shard-000003.tar is another, from the beginning",
    holds="the run stops and names the shard's address, the digest found and the one expected; put right, the same command ends as the unbroken run",
)
def test_a_shard_changes_on_the_server(
    config: Path, unbroken: Path, server: ShardServer, tmp_path: Path, fired: Fired
) -> None:
    """Tried three times, whoever asks; on two ranks told once."""
    server.faults["/train/shard-000003.tar"] = [changed] * 1000
    overrides = cached(server.url, tmp_path / "cache")
    code, line = run(config, tmp_path / "run", *overrides)
    assert code == 2
    assert re.fullmatch(
        rf"error: {server.url}/train/shard-000003.tar: did not come: what has come is not what the manifest describes: "
        r"sha256 [0-9a-f]{64} found, [0-9a-f]{64} expected \(tried 3 times in .* s\); .*\n",
        line,
    ), line
    server.faults.clear()
    assert run(config, tmp_path / "run", *overrides) == (0, "")
    assert same_run(unbroken, tmp_path / "run")
    fired(f"asked for {server.num_requests['/train/shard-000003.tar']} times in all")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.fault(
    what="a server that is gone for ten seconds",
    how="it stops listening when the fourth of six shards is asked for, and comes back on its port",
    holds="training waits, goes on, and its history and weights are those of the run from the folder (1 rank: bit for bit)",
)
def test_a_server_dies_for_ten_seconds(
    world_size: int, config: Path, unbroken: Path, dataset_dir: Path, tmp_path: Path, fired: Fired
) -> None:
    """Shards of the first block may be missing then, of the last one are."""
    with serve(dataset_dir) as first:
        answer, is_dead = die_at(first, 4)
        first.faults = {f"/train/shard-{number:06d}.tar": [answer] * 100 for number in range(6)}
        arguments = ["--config", config, "--run-dir", tmp_path / "run", *cached(first.url, tmp_path / "cache")]
        forked = start(world_size, arguments, tmp_path)
        assert is_dead.wait(30), forked.said()
        time.sleep(10.0)
        assert forked.is_alive(), forked.said()
    with serve(dataset_dir, port=first.server_port) as second:
        back_s = time.monotonic()
        forked.wait_until_gone(60)
        waited_s = time.monotonic() - back_s
        assert forked.codes() == [0] * world_size, forked.said()
    missing = [name for name in second.num_requests if name.startswith("/train/shard") and name.endswith("tar")]
    assert len(missing) == 3
    if world_size == 1:
        assert same_run(unbroken, tmp_path / "run")
    fired(f"{len(missing)} of 6 shards missing; done {waited_s:.1f} s after it was back")


@pytest.mark.fault(
    what="a server that is gone for good",
    how="it stops listening when the fourth of six shards is asked for; train.timeout_s is 12, of which a file has a third",
    holds="the run stops and names the shard's address; with a server again the same command ends as the unbroken run",
)
def test_a_server_dies_for_good(config: Path, unbroken: Path, dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """Before the watchdog, which could only say that a batch does not come."""
    with serve(dataset_dir) as first:
        answer, is_dead = die_at(first, 4)
        first.faults = {f"/train/shard-{number:06d}.tar": [answer] * 100 for number in range(6)}
        overrides = cached(first.url, tmp_path / "cache", "train.timeout_s=12")
        forked = start(2, ["--config", config, "--run-dir", tmp_path / "run", *overrides], tmp_path)
        assert is_dead.wait(30), forked.said()
        took_s = forked.wait_until_gone(30)
        said = forked.said()
    assert re.search(
        rf"error: .*{first.url}/train/shard-00000\d\.(tar|idx): did not come: .*\(tried \d+ times in", said
    ), said
    assert set(forked.codes()) == {2}, said
    with serve(dataset_dir, port=first.server_port):
        code, line = run(config, tmp_path / "run", *overrides, world_size=1)
        assert code == 0, line
    fired(f"{took_s:.1f} s")


@pytest.mark.fault(
    what="disk full in the cache",
    how="a file system in memory that is too small for the second shard",
    holds="one line with the cache's path, the bytes needed and free, and the shard; with room the same command ends as the unbroken run",
)
def test_the_disk_of_the_cache_is_full(
    config: Path, unbroken: Path, dataset_dir: Path, disk: Path, tmp_path: Path, fired: Fired
) -> None:
    """What fitted is kept; no part of the other is left."""
    shard_bytes = (dataset_dir / "train" / "shard-000000.tar").stat().st_size
    remount(disk, f"size={shard_bytes * 3 // 2 // 4096 * 4096}")
    overrides = cached(dataset_dir, disk / "cache", "data.num_workers=0")
    code, line = run(config, tmp_path / "run", *overrides)
    assert code == 2
    told = re.fullmatch(
        rf"error: {disk}/cache: {dataset_dir}/train/shard-\d+.tar cannot be brought into the cache: No space left on device "
        r"\((?P<needed>[\d,]+) bytes more needed, (?P<free>[\d,]+) bytes free\); make room, or choose another data.cache_dir\n",
        line,
    )
    assert told is not None, line
    assert not list((disk / "cache").glob("*.part"))
    remount(disk, "size=64M")
    assert run(config, tmp_path / "run", *overrides) == (0, "")
    assert same_run(unbroken, tmp_path / "run")
    fired(f"{told['needed']} bytes needed, {told['free']} free")


@pytest.mark.fault(
    what="files of the cache that rot, are cut or vanish while they are read",
    how="after the checkpoint of step 1 every file of the cache is overwritten, cut or deleted, once and again",
    holds="each that is read is told, brought again, and the history and weights are those of the run from the folder, bit for bit",
)
def test_the_cache_rots(config: Path, unbroken: Path, dataset_dir: Path, tmp_path: Path, fired: Fired) -> None:
    """Thirds of the files by turns, for as long as the run lives."""
    cache_dir, is_over = tmp_path / "cache", threading.Event()
    num_damaged = 0

    def damage() -> None:
        nonlocal num_damaged
        for turn in cycle(range(3)):
            for number, path in enumerate(sorted(cache_dir.glob("*.cached"))):
                try:
                    match (number + turn) % 3:
                        case 0:
                            path.unlink()
                        case 1:
                            shutil.copyfile("/dev/null", path)
                        case _:
                            path.write_bytes(bytes(path.stat().st_size))
                    num_damaged += 1
                except FileNotFoundError:
                    pass
            if is_over.wait(0.3):
                return

    forked = start(1, ["--config", config, "--run-dir", tmp_path / "run", *cached(dataset_dir, cache_dir)], tmp_path)
    wait_for_checkpoint(forked, tmp_path / "run", step=1)
    thread = threading.Thread(target=damage)
    thread.start()
    forked.wait_until_gone(60)
    is_over.set()
    thread.join()
    assert forked.codes() == [0], forked.said()
    num_told = forked.said().count("in the cache; bringing") + forked.said().count("is not what was brought")
    assert num_told > 0
    assert same_run(unbroken, tmp_path / "run")
    fired(f"{num_damaged} damaged, {num_told} found")
