"""What goes wrong around a build: whatever it is, a dataset is complete or not there, and the next build says what it found."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import remount
from pictures import build, digests_of, draw, fill, put

from aplantida_dist.data.manifest import Reencoding
from aplantida_dist.errors import UserError
from aplantida_dist.files import append_line, write_whole
from aplantida_dist.lock import LockError
from aplantida_dist.shards.behind import Behind
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.claim import claimed, find_replaced
from aplantida_dist.shards.folder import read_folder
from aplantida_dist.shards.placement import PlacementError
from aplantida_dist.shards.verify import VerifyError, verify_dataset
from aplantida_dist.shards.writer import Sample, ShardLimits, WriterError, write_split

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
PAGE_BYTES = 4096


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )


def is_sound(dataset_dir: Path) -> bool:
    return verify_dataset(dataset_dir).damages == ()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_news(moment: Path, shapes: set[str]) -> bool:
    """Whether what a killed build left differs from what others left, in its folders or in any fifth file; then it is noted."""
    shape = re.sub("[0-9]{2,}", "", " ".join(names_in(moment))) + f" {len(list(moment.rglob('*.*'))) // 5}"
    is_new = shape not in shapes
    shapes.add(shape)
    return is_new


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in memory, where there is one: fifty builds sync five hundred files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five pictures of two classes: a train, a val and a test split."""
    fill(tmp_path / "source", {"birch": 3, "oak": 2})
    return tmp_path / "source"


def test_killed_at_any_call_a_build_leaves_no_half_dataset(
    tmp_path: Path, home: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL before each file, folder or rename of a build: complete or absent; the next build says so and succeeds."""
    build(source, tmp_path / "fresh")
    done = run(ROOT / "tests/hooked_build.py", "kill", source, home, tmp_path / "none")
    assert done.returncode == 0, done.stderr
    moments = sorted(home.iterdir())
    assert len(moments) > 30
    shapes: set[str] = set()
    num_complete = 0
    for moment in moments:
        before = names_in(moment)
        if "set" in before:
            assert is_sound(moment / "set"), moment
            with pytest.raises(PlacementError, match="exists already"):
                build(source, moment / "set")
            num_complete += 1
            continue
        lock = moment / ".set.lock"
        was_signed = lock.exists() and lock.read_bytes() != b""
        if not is_news(moment, shapes):
            continue
        capsys.readouterr()
        build(source, moment / "set")
        said = capsys.readouterr().err
        assert ("starting clean" in said) == was_signed, (moment, said)
        assert ("removed" in said) == any(".partial-" in name for name in before), (moment, said)
        assert names_in(moment) == ["set"]
        assert digests_of(moment / "set") == digests_of(tmp_path / "fresh")
    assert 1 <= num_complete < len(moments) / 2


def test_killed_at_any_call_a_replacement_keeps_the_old_or_the_new(
    tmp_path: Path, home: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also between its two renames: one of the two is whole, under its name or where the verification says; the next build restores it."""
    fill(tmp_path / "other", {"elm": 2, "yew": 1}, first=50)
    build(tmp_path / "other", tmp_path / "old")
    build(source, tmp_path / "new")
    old, new = digests_of(tmp_path / "old"), digests_of(tmp_path / "new")
    done = run(ROOT / "tests/hooked_build.py", "kill", source, home, tmp_path / "old")
    assert done.returncode == 0, done.stderr
    num_old, num_new, num_between = 0, 0, 0
    shapes: set[str] = set()
    for moment in sorted(home.iterdir()):
        dataset_dir = moment / "set"
        if dataset_dir.exists():
            found = digests_of(dataset_dir)
            assert found in (old, new), moment
            num_old, num_new = num_old + (found == old), num_new + (found == new)
        else:
            num_between += 1
            replaced = find_replaced(dataset_dir)
            assert replaced is not None
            assert digests_of(replaced) == old
            with pytest.raises(VerifyError, match=re.escape(str(replaced))):
                verify_dataset(dataset_dir)
            capsys.readouterr()
            with pytest.raises(PlacementError, match="exists already"):
                build(source, dataset_dir)
            assert "has its name again" in capsys.readouterr().err
            assert digests_of(dataset_dir) == old
        if not is_news(moment, shapes):
            continue
        build(source, dataset_dir, replace=True)
        assert digests_of(dataset_dir) == new
        assert names_in(moment) == ["set"]
    assert num_between == 1
    assert num_old > 30
    assert num_new >= 2


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_a_random_time_the_command_leaves_no_half_dataset(tmp_path: Path, seed: int) -> None:
    """The command with two workers, killed somewhere between its claim and its end."""
    fill(tmp_path / "source", {"oak": 60, "yew": 60})
    home = tmp_path / "home"
    arguments = [
        ROOT / "shards/build.py", "--from-folder", tmp_path / "source", "--out", home / "set", "--workers", "2", "--shard-samples", "3",
    ]  # fmt: skip
    process = subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 60
    while not (home / ".set.lock").exists():
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    time.sleep(random.Random(seed).uniform(0.02, 1.5))
    process.kill()
    is_killed = process.wait() == -signal.SIGKILL
    if (home / "set").exists():
        assert is_sound(home / "set")
        return
    assert is_killed
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "starting clean" in done.stderr
    assert is_sound(home / "set")
    assert names_in(home) == ["set"]


def test_two_builds_of_one_dataset_do_not_meet(tmp_path: Path, source: Path) -> None:
    """The second is refused with the number of the process that builds, and disturbs nothing; other names are free."""
    arguments = (ROOT / "shards/build.py", "--from-folder", source, "--workers", "0", "--out")
    with claimed(tmp_path / "set"):
        unfinished = put(tmp_path / f".set.partial-{os.getpid()}" / "classes.json", b"")
        refused = run(*arguments, tmp_path / "set")
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
        assert f"process {os.getpid()} on {socket.gethostname()} builds this dataset now" in refused.stderr
        assert unfinished.exists()
        assert run(*arguments, tmp_path / "set.2").returncode == 0
    assert run(*arguments, tmp_path / "set").returncode == 0
    assert names_in(tmp_path) == ["set", "set.2", "source"]


def test_a_name_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    """Six threads that claim a name again and again never hold it together, though each removes the lock file it leaves."""
    inside: list[int] = []
    overlaps: list[int] = []

    def claim_often() -> None:
        for _ in range(100):
            try:
                with claimed(tmp_path / "set"):
                    inside.append(1)
                    time.sleep(0.001)
                    overlaps.extend(inside[1:])
                    inside.pop()
            except LockError:
                pass

    threads = [threading.Thread(target=claim_often) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == []
    assert names_in(tmp_path) == []


def test_only_what_builds_left_is_removed(tmp_path: Path, source: Path) -> None:
    """Names that merely look alike belong to others."""
    others = [".set.partial-x", ".set.partial-7.bak", ".set2.partial-7", "set.partial-7", ".xset.partial-7"]
    for name in others:
        put(tmp_path / name / "thesis.tex", b"ten years of work")
    put(tmp_path / ".set.partial-7" / "train" / "shard-000000.tar", b"")
    build(source, tmp_path / "set")
    assert names_in(tmp_path) == sorted([*others, "set", "source"])


@pytest.mark.parametrize("kind", ["changes", "vanishes", "becomes a folder"])
def test_a_source_that_changes_between_the_passes_is_one_line(tmp_path: Path, source: Path, kind: str) -> None:
    """The picture is named, and no dataset is left."""
    done = run(ROOT / "tests/hooked_build.py", "change", source, tmp_path / "home/set", kind)
    says = "changed while the dataset was built" if kind == "changes" else "cannot be read any more"
    last = done.stderr.splitlines()[-1]
    assert f"ChangedError: {source}" in last, done.stderr
    assert f"{says}" in last
    assert "leave the pictures alone and build again" in last
    assert names_in(tmp_path / "home") == []


def build_without_asking_for_room(source: Path, dataset_dir: Path) -> None:
    """A re-encoded build, whose size nobody knows before; no picture is so long that it changes."""
    options = BuildOptions(
        seed=0,
        limits=ShardLimits(),
        num_workers=0,
        replace=False,
        near_distance=2,
        reencoding=Reencoding(max_side=1000, quality=90),
    )
    build_dataset(read_folder(source), dataset_dir, options=options)


def test_a_disk_that_fills_up_at_any_page_is_told_with_its_bytes(tmp_path: Path, disk: Path) -> None:
    """From one page to enough: the file that did not fit, the bytes that it lacks, and the disk as empty as before."""
    fill(tmp_path / "source", {"oak": 6, "yew": 4})
    told = re.compile(
        rf"{disk}/[^ ]*?([^/ ]+): could not be written: No space left on device "
        r"\(([1-9][\d,]*) bytes more needed, ([\d,]+) bytes free\); make room or choose another"
    )
    refusals = {}
    for num_pages in range(1, 60):
        remount(disk, f"size={num_pages * PAGE_BYTES}")
        try:
            build_without_asking_for_room(tmp_path / "source", disk / "set")
        except UserError as error:
            refusals[num_pages] = str(error)
            assert names_in(disk) == []
        else:
            break
    assert is_sound(disk / "set")
    named = set()
    for num_pages, text in refusals.items():
        match = told.match(text)
        assert match is not None, text
        assert int(match[3].replace(",", "")) < num_pages * PAGE_BYTES
        named.add(match[1])
    assert named >= {
        "classes.json",
        "shard-000000.tar",
        "shard-000000.idx",
        "manifest.json",
        "report.json",
        "report.md",
    }


def test_room_is_required_before_anything_is_written(tmp_path: Path, disk: Path) -> None:
    """The audit knows what the shards will take: bytes needed, bytes free, and nothing on the disk."""
    fill(tmp_path / "source", {"oak": 30})
    remount(disk, f"size={4 * PAGE_BYTES}")
    with pytest.raises(PlacementError, match=r"set: ([\d,]+) bytes needed, 12,288 bytes free; make room") as raised:
        build(tmp_path / "source", disk / "set")
    remount(disk, "size=64M")
    build(tmp_path / "source", disk / "set")
    needed = int(str(raised.value).split("set: ")[1].split(" ")[0].replace(",", ""))
    written = sum(path.stat().st_size for path in (disk / "set").rglob("*.tar"))
    assert written - 3 * 10240 <= needed <= written
    assert names_in(disk) == ["set"]


def test_a_read_only_disk_is_one_line(tmp_path: Path, source: Path, disk: Path) -> None:
    """It is told before a picture is decoded, whoever builds."""
    remount(disk, "ro")
    for out in (disk / "set", disk / "deep" / "set"):
        done = run(ROOT / "shards/build.py", "--from-folder", source, "--out", out, "--workers", "0")
        assert done.returncode == 2
        assert done.stderr == (
            f"error: {out}: nothing can be written beside it: Read-only file system; choose another --out\n"
        )


def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path: Path, source: Path) -> None:
    """--out below a file cannot be made, and the file stays."""
    put(tmp_path / "file", b"mine")
    done = run(ROOT / "shards/build.py", "--from-folder", source, "--out", tmp_path / "file/set", "--workers", "0")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_what_fails_behind_the_writing_fails_in_front(tmp_path: Path, disk: Path) -> None:
    """An endless stream of samples ends at a full disk: no thread waits for ever, none is left, and the file is closed."""
    remount(disk, f"size={256 * PAGE_BYTES}")
    samples = (Sample(f"{number:024x}", "jpg", draw(1) * 40, 0, b"{}") for number in iter(int, 1))
    threads = threading.active_count()
    with pytest.raises(WriterError, match=r"shard-\d+\.(tar|idx): could not be written: No space left on device"):
        write_split(samples, disk / "train", split="train", class_map_digest="", limits=ShardLimits(num_bytes=100_000))
    assert threading.active_count() == threads


def test_acts_behind_keep_their_order_and_their_errors() -> None:
    """Done one after another, at most so many ahead; the first error comes out of a later call or the result."""
    done: list[int] = []
    with Behind(ahead=2) as behind:
        futures = [behind.do(lambda number=number: done.append(number) or number) for number in range(50)]  # type: ignore[misc]
    assert done == [future.result() for future in futures] == list(range(50))
    gate = threading.Event()
    with Behind(ahead=1) as behind:
        behind.do(gate.wait)
        waiter = threading.Thread(target=behind.do, args=(lambda: None,))
        waiter.start()
        waiter.join(0.05)
        assert waiter.is_alive(), "a second act was taken while the first had not ended"
        gate.set()
        waiter.join()

    def fill_up_and_fail(behind: Behind) -> None:
        for _ in range(3):
            behind.do(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError), Behind(ahead=2) as behind:
        fill_up_and_fail(behind)


def test_a_file_that_is_written_whole_says_what_it_lacks(disk: Path) -> None:
    """The report, the manifest and the class map are told like a shard, and the file that stood there still stands."""
    write_whole(disk / "report.json", b"old")
    remount(disk, f"size={4 * PAGE_BYTES}")
    with pytest.raises(
        UserError, match=r"report\.json: could not be written: .*\(50,000 bytes more needed, 12,288 bytes"
    ):
        write_whole(disk / "report.json", bytes(50_000))
    assert (disk / "report.json").read_bytes() == b"old"
    assert names_in(disk) == ["report.json"]
    with pytest.raises(
        UserError, match=r"report\.json: no line could be added: .*\(50,001 bytes more needed, [0-9,]+ bytes"
    ):
        append_line(disk / "report.json", bytes(50_000))
