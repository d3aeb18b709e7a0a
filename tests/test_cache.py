"""The cache: whole files alone, within its bound, one transfer for all that ask, and nothing kept that has changed."""

from __future__ import annotations

import hashlib
import os
import random
import time
from pathlib import Path

import pytest

from aplantida_dist.data.address import Place, place_of
from aplantida_dist.data.cache import Cache, CacheError, CacheFullError, Item, Keeper
from aplantida_dist.lock import in_turn
from tests.ranks import FORK, run_ranks
from tests.shard_server import changed, cut, cut_unseen, longer, partial, serve, silent, status

KIB = 1024


def make_items(folder: Path, sizes: list[int], *, place: Place | None = None) -> list[Item]:
    """Files of these sizes, in KiB, as a manifest would name them."""
    folder.mkdir(exist_ok=True)
    items = []
    for number, size in enumerate(sizes):
        content = random.Random(number).randbytes(size * KIB)
        (folder / f"{number}.bin").write_bytes(content)
        items.append(Item((place or folder) / f"{number}.bin", hashlib.sha256(content).hexdigest(), len(content)))
    return items


def cache_of(tmp_path: Path, *, kib: int, patience_s: float = 20.0) -> Cache:
    return Cache(tmp_path / "cache", max_bytes=kib * KIB, patience_s=patience_s)


def held(cache: Cache, items: list[Item]) -> list[int]:
    """The numbers of the items that are there."""
    return [number for number, item in enumerate(items) if cache.path_of(item).exists()]


def files_in(cache: Cache) -> set[str]:
    return {path.suffix for path in cache.cache_dir.iterdir()}


def test_room_is_made_of_what_was_asked_for_longest_ago(tmp_path: Path) -> None:
    """Within the bound to the byte; asking again counts, reading does not."""
    items, cache = make_items(tmp_path / "files", [4, 4, 4, 4, 8]), cache_of(tmp_path, kib=12)
    for item in items[:3]:
        cache.ask_for(item)
    cache.ask_for(items[0])
    assert cache.bring(items[1]).read_bytes() == (tmp_path / "files" / "1.bin").read_bytes()
    cache.ask_for(items[3])
    assert held(cache, items) == [0, 2, 3]
    cache.ask_for(items[4])
    assert held(cache, items) == [3, 4]
    assert files_in(cache) == {".cached"}


def test_what_is_kept_gives_way_to_no_file_that_is_asked_for_ahead(tmp_path: Path) -> None:
    """But to one that is read now: then what was asked for last goes, which is read last. Closed, nothing is kept."""
    items, cache = make_items(tmp_path / "files", [4, 4, 4, 4]), cache_of(tmp_path, kib=12)
    keeper = Keeper(cache)
    keeper.keep(items[:2])
    for item in items[:3]:
        cache.ask_for(item)
    cache.ask_for(items[3])
    assert held(cache, items) == [0, 1, 3]
    keeper.keep([items[0], items[1], items[3]])
    with pytest.raises(CacheFullError, match=r"no room for .*2\.bin beside what is read now"):
        cache.ask_for(items[2])
    cache.bring(items[2])
    assert held(cache, items) == [0, 1, 2]
    keeper.close()
    cache.ask_for(items[3])
    assert held(cache, items) == [1, 2, 3]
    assert files_in(cache) == {".cached"}


def test_a_process_that_was_killed_keeps_nothing(tmp_path: Path) -> None:
    """Neither what it kept nor the room of what it was bringing; its files go."""
    with serve(tmp_path / "files") as server:
        items = make_items(tmp_path / "files", [8, 8], place=place_of(server.url))
        cache = cache_of(tmp_path, kib=8)

        def keep_and_bring() -> None:
            keeper = Keeper(cache)
            keeper.keep(items)
            cache.bring(items[0])

        server.faults["0.bin"] = [silent(20)]
        process = FORK.Process(target=keep_and_bring)
        process.start()
        while not list(cache.cache_dir.glob("*.part")):
            time.sleep(0.01)
        process.kill()
        process.join()
        assert ".keep" in files_in(cache)
        cache.ask_for(items[1])
    assert held(cache, items) == [1]
    assert files_in(cache) - {".lock"} == {".cached"}


@pytest.mark.parametrize("damage", ["cut", "written to", "emptied"])
def test_what_has_changed_in_the_cache_is_brought_again(
    damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Told once, and then sound."""
    (item,), cache = make_items(tmp_path / "files", [4]), cache_of(tmp_path, kib=12)
    path = cache.bring(item)
    with path.open("r+b") as file:
        match damage:
            case "cut":
                file.truncate(1000)
            case "emptied":
                file.truncate(0)
            case _:
                file.write(b"other")
    assert cache.bring(item).read_bytes() == (tmp_path / "files" / "0.bin").read_bytes()
    assert cache.bring(item) == path
    assert capfd.readouterr().err.count("is not what was brought") == 1


def test_what_was_poisoned_under_its_time_stamp_is_found_by_who_reads_it(tmp_path: Path) -> None:
    """A small file by its digest; a shard by the crc32 of its samples, which tests/test_remote.py has."""
    (item,), cache = make_items(tmp_path / "files", [4]), cache_of(tmp_path, kib=12)
    path = cache.bring(item)
    state = path.stat()
    path.write_bytes(b"x" * item.num_bytes)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert cache.read(item) == (tmp_path / "files" / "0.bin").read_bytes()


def test_two_processes_that_ask_for_one_file_bring_it_once(tmp_path: Path) -> None:
    """While it comes slowly, and the second waits."""
    with serve(tmp_path / "files") as server:
        (item,) = make_items(tmp_path / "files", [64], place=place_of(server.url))
        server.bytes_per_s = 256 * KIB
        cache = cache_of(tmp_path, kib=64)
        found = run_ranks(3, lambda: hashlib.sha256(cache.bring(item).read_bytes()).hexdigest())
        assert found == [item.sha256] * 3
        assert dict(server.num_requests) == {"/0.bin": 1}


def test_many_processes_keep_the_bound_together(tmp_path: Path) -> None:
    """Four of them read at random what does not fit together: every byte is right, and there are never more than the bound."""
    items = make_items(tmp_path / "files", [1, 2, 3, 4, 5, 6])
    cache = cache_of(tmp_path, kib=12)

    def read_at_random() -> int:
        choose, most = random.Random(os.getpid()), 0
        for _ in range(60):
            item = choose.choice(items)
            descriptor = cache.open(item)
            content = os.pread(descriptor, item.num_bytes, 0)
            os.close(descriptor)
            assert hashlib.sha256(content).hexdigest() == item.sha256
            with in_turn(cache.cache_dir / "room.lock"):  # nothing goes meanwhile
                most = max(most, sum(path.stat().st_size for path in cache.cache_dir.glob("*.cached")))
        return most

    assert 8 * KIB < max(run_ranks(4, read_at_random)) <= 12 * KIB
    assert files_in(cache) == {".cached"}


@pytest.mark.parametrize(
    "fault", [status(500), status(503), status(429), cut, cut_unseen, partial, longer, changed, silent(0.3)]
)
def test_a_fault_of_the_server_is_outlived(fault: object, tmp_path: Path) -> None:
    """Once, twice: then the file is there, and right."""
    with serve(tmp_path / "files") as server:
        (item,) = make_items(tmp_path / "files", [64], place=place_of(server.url))
        server.faults["0.bin"] = [fault, fault]  # type: ignore[list-item]
        assert cache_of(tmp_path, kib=64).bring(item).read_bytes() == (tmp_path / "files" / "0.bin").read_bytes()
        is_slow_alone = len(server.faults["0.bin"]) == 1
        assert server.num_requests["/0.bin"] == (1 if is_slow_alone else 3)


@pytest.mark.parametrize(
    ("fault", "told", "within_s"),
    [
        (status(500), r"0.bin: did not come: .*500.* \(tried \d+ times in .* s\); the same command goes on", 4.0),
        (cut_unseen, r"0.bin: did not come: 32,768 bytes have come, the manifest says 65,536 \(tried", 4.0),
        (changed, r"0.bin: did not come: .*: sha256 [0-9a-f]{64} found, [0-9a-f]{64} expected \(tried 3 times", 1.0),
        (longer, r"0.bin: did not come: more than the 65536 bytes that the manifest says have come", 4.0),
        (status(403), r"0.bin: did not come: the server refuses it: .*403", 1.0),
        (status(404), r"0.bin: is not there; copy or rebuild the dataset", 1.0),
    ],
)
def test_a_fault_that_stays_is_told_within_the_budget(
    fault: object, told: str, within_s: float, tmp_path: Path
) -> None:
    """With the file's address, what came and what should have; nothing of it is left."""
    with serve(tmp_path / "files") as server:
        (item,) = make_items(tmp_path / "files", [64], place=place_of(server.url))
        server.faults["0.bin"] = [fault] * 1000  # type: ignore[list-item]
        cache, begun_s = cache_of(tmp_path, kib=64, patience_s=1.5), time.monotonic()
        with pytest.raises(CacheError, match=told):
            cache.bring(item)
        assert time.monotonic() - begun_s < within_s
        assert files_in(cache) == set()


def test_a_reader_does_not_wait_for_ever_for_one_who_tries_in_vain(tmp_path: Path) -> None:
    """Both tell within twice the budget, however long each try takes."""
    with serve(tmp_path / "files") as server:
        (item,) = make_items(tmp_path / "files", [4], place=place_of(server.url))
        server.faults["0.bin"] = [_slow_500] * 100
        cache = cache_of(tmp_path, kib=64, patience_s=1.0)

        def bring() -> float:
            begun_s = time.monotonic()
            with pytest.raises(CacheError, match=r"0\.bin: did not come"):
                cache.bring(item)
            return time.monotonic() - begun_s

        assert max(run_ranks(4, bring)) < 4.0


def _slow_500(handler: object, content: bytes) -> None:
    time.sleep(1.2)
    status(500)(handler, content)  # type: ignore[arg-type]


def test_a_file_larger_than_the_cache_is_refused(tmp_path: Path) -> None:
    """With both numbers, before a byte comes."""
    (item,), cache = make_items(tmp_path / "files", [16]), cache_of(tmp_path, kib=8)
    with pytest.raises(CacheError, match=r"0.bin: has 16,384 bytes, the cache .* takes 8,192; raise data.cache_bytes"):
        cache.bring(item)
