"""The cache: files of a dataset on this machine's own disk, whole and checked, within a bound that all its processes keep together."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from aplantida_dist.data.address import AddressError, Place, TransferError, copy, persist
from aplantida_dist.errors import UserError
from aplantida_dist.files import reason_of, sha256_of_file
from aplantida_dist.lock import in_turn, is_taken
from aplantida_dist.terminal import warn

_ENTRY = re.compile(r"(?P<sha256>[0-9a-f]{64})\.cached")
_PART = re.compile(r"(?P<sha256>[0-9a-f]{64})\.(?P<num_bytes>[0-9]+)\.part")
_ROOM_POLL_S = 0.05


class CacheError(UserError):
    """A file could not be brought into the cache; the text names where it lies, and why."""


class CacheFullError(CacheError):
    """There is room for a file only where another one is kept."""


class WrongContentError(TransferError):
    """What came is whole, and not what the manifest describes."""

    most_tries = 3


@dataclass(frozen=True)
class Item:
    """A file as a manifest knows it: where it lies, its sha256 (hex) and its length."""

    place: Place
    sha256: str
    num_bytes: int

    @property
    def seal_ns(self) -> int:
        """The time stamp that the file has in the cache: a whole second of its own, so that a file written to later shows."""
        return (1_000_000_000 + int(self.sha256[:7], 16)) * 10**9


@dataclass(frozen=True)
class Cache:
    """A folder of files named by their sha256, at most `max_bytes` together, those that are on their way included.

    An entry appears by a rename, after its length and sha256 were found right; then its modification time is its seal, and a
    file with another one is taken for changed, and brought again. Room is made of what nobody keeps (`Keeper`), what was asked
    for longest ago first, by the access times, which nothing else sets: reading leaves them. Who has it open reads on.
    Two processes that need one file bring it once. `patience_s`: how long a file is tried for before CacheError.
    """

    cache_dir: Path
    max_bytes: int
    patience_s: float

    def path_of(self, item: Item) -> Path:
        """Where an item lies while the cache has it."""
        return self.cache_dir / f"{item.sha256}.cached"

    def bring(self, item: Item) -> Path:
        """Have an item in the cache now, and return where. Waits while another process brings it; raises CacheError.

        If need be room is made of what others keep, what was asked for last first: it is read last. So no reader waits for another.
        """
        part = self._part_of(item)
        return self._bring(item, give_up=_Stall(part, self.patience_s), takes_all=True)

    def ask_for(self, item: Item) -> None:
        """Have an item in the cache by and by, and count it as asked for last. Leaves it to whoever is bringing it already.

        Raises CacheError; CacheFullError where room could be made of kept items alone.
        """
        path = self._bring(item, give_up=lambda: True, takes_all=False)
        with suppress(FileNotFoundError):
            os.utime(path, ns=(time.time_ns(), item.seal_ns))

    def open(self, item: Item) -> int:
        """A descriptor of an item in the cache, for the caller to close. Raises CacheError."""
        while True:
            path = self.bring(item)
            # Between the two another process may have made room.
            with suppress(FileNotFoundError):
                return _open_untouched(path)

    def read(self, item: Item) -> bytes:
        """All bytes of a small item, checked again. Raises CacheError."""
        while True:
            descriptor = self.open(item)
            try:
                content = os.pread(descriptor, item.num_bytes, 0)
                if hashlib.sha256(content).hexdigest() == item.sha256:
                    return content
                self.discard_if_wrong(item, descriptor)
            finally:
                os.close(descriptor)

    def discard_if_wrong(self, item: Item, descriptor: int) -> bool:
        """Remove an entry that is open here, unless its bytes are right or another has taken its place; True where they are wrong."""
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() == item.sha256:
                return False
        path = self.path_of(item)
        with in_turn(self._lock_path(item.sha256)), suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                warn(f"{path}: has changed in the cache; bringing {item.place} again")
                path.unlink()
        return True

    def _bring(self, item: Item, *, give_up: Callable[[], bool], takes_all: bool) -> Path:
        path = self.path_of(item)
        if self._is_sound(item):
            return path
        if item.num_bytes > self.max_bytes:
            raise CacheError(
                f"{item.place}: has {item.num_bytes:,} bytes, the cache {self.cache_dir} takes {self.max_bytes:,}; raise data.cache_bytes"
            )
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            persist(
                lambda: self._bring_once(item, give_up=give_up, takes_all=takes_all),
                patience_s=self.patience_s,
            )
        except BlockingIOError as error:
            if takes_all:
                raise CacheError(
                    f"{item.place}: did not come: another process tries in vain for {self.patience_s:.0f} s; look at its message"
                ) from error
        except FileNotFoundError as error:
            raise CacheError(f"{item.place}: is not there; copy or rebuild the dataset") from error
        except OSError as error:
            reason = reason_of(error, self.cache_dir, num_bytes=item.num_bytes)
            raise CacheError(
                f"{self.cache_dir}: {item.place} cannot be brought into the cache: {reason}; make room, or choose another data.cache_dir"
            ) from error
        except AddressError as error:
            text = str(error).removeprefix(f"{item.place}: ")
            raise CacheError(
                f"{item.place}: did not come: {text}; the same command goes on once it can be had"
            ) from error
        return path

    def _is_sound(self, item: Item) -> bool:
        try:
            found = self.path_of(item).stat()
        except FileNotFoundError:
            return False
        return found.st_size == item.num_bytes and found.st_mtime_ns == item.seal_ns

    def _part_of(self, item: Item) -> Path:
        return self.cache_dir / f"{item.sha256}.{item.num_bytes}.part"

    def _lock_path(self, sha256: str) -> Path:
        return self.cache_dir / f"{sha256}.lock"

    def _bring_once(self, item: Item, *, give_up: Callable[[], bool], takes_all: bool) -> None:
        """One try, by one process at a time. What another one has left unfinished is begun anew."""
        path = self.path_of(item)
        with in_turn(self._lock_path(item.sha256), give_up=give_up):
            if self._is_sound(item):
                return
            if path.exists():
                warn(f"{path}: is not what was brought (its length or time stamp differs); bringing {item.place} again")
                path.unlink(missing_ok=True)
            part = self._take_room(item, takes_all=takes_all)
            try:
                copy(item.place, part, most_bytes=item.num_bytes)
                _require_whole(part, item)
                os.utime(part, ns=(time.time_ns(), item.seal_ns))
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def _take_room(self, item: Item, *, takes_all: bool) -> Path:
        """The name to write an item under, once there is room for it; from then on the name counts as all of its bytes."""
        part = self._part_of(item)
        while True:
            with in_turn(self._room_lock):
                part.unlink(missing_ok=True)
                if self._make_room(item.num_bytes, takes_all=takes_all):
                    part.touch()
                    return part
            if not takes_all:
                raise CacheFullError(f"{self.cache_dir}: no room for {item.place} beside what is read now")
            time.sleep(_ROOM_POLL_S)

    @property
    def _room_lock(self) -> Path:
        return self.cache_dir / "room.lock"

    def _make_room(self, num_bytes: int, *, takes_all: bool) -> bool:
        """Remove entries until so many bytes fit in, or there is no other that may go. Within the room's lock."""
        kept = self._kept()
        coming_bytes = sum(
            self._parts_in_work()
        )  # before the entries: one that is renamed between counts twice, not never
        entries = list(self._entries())
        free_bytes = self.max_bytes - coming_bytes - sum(entry.num_bytes for entry in entries)
        for entry in sorted(entries, key=lambda entry: entry.turn(is_kept=entry.sha256 in kept)):
            if free_bytes >= num_bytes or (entry.sha256 in kept and not takes_all):
                break
            entry.path.unlink(missing_ok=True)
            free_bytes += entry.num_bytes
        return free_bytes >= num_bytes

    def _kept(self) -> set[str]:
        """The sha256 of all that is kept; the file of a keeper whose process has died is removed."""
        kept: set[str] = set()
        for path in list(self.cache_dir.glob("*.keep")):
            if is_taken(path):
                kept.update(path.read_text(encoding="ascii").split())
        return kept

    def _entries(self) -> Iterator[_Entry]:
        for found in os.scandir(self.cache_dir):
            if match := _ENTRY.fullmatch(found.name):
                with suppress(FileNotFoundError):
                    state = found.stat()
                    yield _Entry(Path(found.path), match["sha256"], state.st_size, state.st_atime_ns)

    def _parts_in_work(self) -> Iterator[int]:
        """The whole lengths of the files that are on their way; what a killed process has left is removed."""
        for found in list(os.scandir(self.cache_dir)):
            if match := _PART.fullmatch(found.name):
                if is_taken(self._lock_path(match["sha256"])):
                    yield int(match["num_bytes"])
                else:
                    Path(found.path).unlink(missing_ok=True)


class Keeper:
    """What one reader of a cache goes on reading, or will read next: no room is made of it for what is asked for ahead.

    A file in the cache that names the items, for as long as this process lives and has not closed it.
    """

    def __init__(self, cache: Cache) -> None:
        """Raises CacheError where the cache's folder cannot be written."""
        self._cache = cache
        self._path = cache.cache_dir / f"{os.getpid()}-{next(_NUMBERS)}.keep"
        self._held = ExitStack()
        try:
            cache.cache_dir.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(in_turn(self._path))
        except OSError as error:
            raise self._error(error) from error

    def keep(self, items: Iterable[Item]) -> None:
        """Keep these, whether they are there already or not, and nothing else. Raises CacheError."""
        content = "\n".join(sorted({item.sha256 for item in items}))
        try:
            with in_turn(self._cache._room_lock):
                self._path.write_text(content, encoding="ascii")
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        self._held.close()

    def _error(self, error: OSError) -> CacheError:
        reason = reason_of(error, self._cache.cache_dir, num_bytes=0)
        return CacheError(
            f"{self._path}: cannot be written: {reason}; make room, or choose another data.cache_dir, on a disk that has locks"
        )


_NUMBERS = itertools.count()


@dataclass(frozen=True)
class _Entry:
    path: Path
    sha256: str
    num_bytes: int
    asked_ns: int

    def turn(self, *, is_kept: bool) -> tuple[bool, int]:
        """Sorted by it, room is made: of what is not kept, what was asked for longest ago first; of what is kept the other way round."""
        return is_kept, -self.asked_ns if is_kept else self.asked_ns


class _Stall:
    """Whether a file that another process brings has not grown for too long."""

    def __init__(self, part: Path, patience_s: float) -> None:
        self._part, self._patience_s = part, patience_s
        self._most_bytes, self._since_s = 0, time.monotonic()

    def __call__(self) -> bool:
        now_s = time.monotonic()
        with suppress(FileNotFoundError):
            found_bytes = self._part.stat().st_size
            if found_bytes > self._most_bytes:
                self._most_bytes, self._since_s = found_bytes, now_s
        return now_s - self._since_s > self._patience_s


def _require_whole(part: Path, item: Item) -> None:
    found_bytes = part.stat().st_size
    if found_bytes < item.num_bytes:
        raise TransferError(f"{found_bytes:,} bytes have come, the manifest says {item.num_bytes:,}")
    found = sha256_of_file(part)
    if found != item.sha256:
        raise WrongContentError(
            f"what has come is not what the manifest describes: sha256 {found} found, {item.sha256} expected"
        )


def _open_untouched(path: Path) -> int:
    """Open for reading, so that reading does not count as asking; OSError."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_NOATIME", 0))
