"""The cache: files of a dataset on this machine's own disk, whole and checked, within a bound that all its processes keep together."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aplantida_dist.data.address import AddressError, Place, TransferError, copy, persist
from aplantida_dist.errors import UserError
from aplantida_dist.files import reason_of, sha256_of_file, write_whole
from aplantida_dist.lock import in_turn, is_taken

_ENTRY = re.compile(r"[0-9a-f]{64}\.cached")
_PART = re.compile(r"(?P<sha256>[0-9a-f]{64})\.(?P<num_bytes>[0-9]+)\.part")
_ROOM_POLL_S = 0.05
_YEAR_S = 365 * 24 * 3600


class CacheError(UserError):
    """A file could not be brought into the cache; the text names where it lies, and why."""


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
    file with another one is taken for changed, and brought again. What was asked for longest ago, or has been let go, is removed
    first, by the order of access times, which nothing else sets: reading leaves them. Who has it open reads on.
    Two processes that need one file bring it once. `patience_s`: how long a file is tried for before CacheError.
    """

    cache_dir: Path
    max_bytes: int
    patience_s: float

    def path_of(self, item: Item) -> Path:
        """Where an item lies while the cache keeps it."""
        return self.cache_dir / f"{item.sha256}.cached"

    def bring(self, item: Item) -> Path:
        """Have an item in the cache, and return where. Waits while another process brings it; raises CacheError."""
        path = self.path_of(item)
        if self._is_sound(item):
            return path
        if item.num_bytes > self.max_bytes:
            raise CacheError(
                f"{item.place}: has {item.num_bytes:,} bytes, the cache {self.cache_dir} takes {self.max_bytes:,}; raise data.cache_bytes"
            )
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            persist(lambda: self._bring_once(item), patience_s=self.patience_s)
        except FileNotFoundError as error:
            raise CacheError(f"{item.place}: is not there; copy or rebuild the dataset") from error
        except OSError as error:
            reason = reason_of(error, self.cache_dir, num_bytes=item.num_bytes)
            raise CacheError(
                f"{item.place}: cannot be brought into the cache {self.cache_dir}: {reason}; make room, or choose another data.cache_dir"
            ) from error
        except AddressError as error:
            text = str(error).removeprefix(f"{item.place}: ")
            raise CacheError(f"{item.place}: did not come: {text}") from error
        return path

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
                self.discard(item, descriptor)
            finally:
                os.close(descriptor)

    def ask_for(self, item: Item) -> None:
        """Bring an item, and count it as asked for last."""
        path = self.bring(item)
        with suppress(FileNotFoundError):
            os.utime(path, ns=(time.time_ns(), item.seal_ns))

    def let_go(self, item: Item) -> None:
        """Count an item as one that will not be read soon: room is made of such first, in the order in which they were asked for."""
        path = self.path_of(item)
        with suppress(FileNotFoundError):
            os.utime(path, ns=(path.stat().st_atime_ns - _YEAR_S * 10**9, item.seal_ns))

    def discard(self, item: Item, descriptor: int) -> None:
        """Remove an entry whose bytes were found wrong, unless another has taken its place since it was opened."""
        path = self.path_of(item)
        with in_turn(self._lock_path(item.sha256)), suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                _tell(f"{path}: has changed in the cache; bringing {item.place} again")
                path.unlink()

    def recall(self, name: str) -> bytes | None:
        """What was put down under this name, for the caller to check; None where nothing was."""
        try:
            return (self.cache_dir / name).read_bytes()
        except FileNotFoundError:
            return None

    def put_down(self, name: str, content: bytes) -> None:
        """Keep what took long to find, outside of the bound."""
        write_whole(self.cache_dir / name, content)

    def _is_sound(self, item: Item) -> bool:
        try:
            found = self.path_of(item).stat()
        except FileNotFoundError:
            return False
        return found.st_size == item.num_bytes and found.st_mtime_ns == item.seal_ns

    def _lock_path(self, sha256: str) -> Path:
        return self.cache_dir / f"{sha256}.lock"

    def _bring_once(self, item: Item) -> None:
        """One try, by one process at a time. What another one has left unfinished is begun anew."""
        path = self.path_of(item)
        with in_turn(self._lock_path(item.sha256)):
            if self._is_sound(item):
                return
            if path.exists():
                _tell(f"{path}: is not what was brought (its length or time stamp differs); bringing {item.place} again")
                path.unlink(missing_ok=True)
            part = self._take_room(item)
            try:
                copy(item.place, part, most_bytes=item.num_bytes)
                _require_whole(part, item)
                os.utime(part, ns=(time.time_ns(), item.seal_ns))
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def _take_room(self, item: Item) -> Path:
        """The name to write an item under, once there is room for it; from then on the name counts as all of its bytes."""
        part = self.cache_dir / f"{item.sha256}.{item.num_bytes}.part"
        while True:
            with in_turn(self.cache_dir / "room.lock"):
                part.unlink(missing_ok=True)
                if self._make_room(item.num_bytes):
                    part.touch()
                    return part
            time.sleep(_ROOM_POLL_S)

    def _make_room(self, num_bytes: int) -> bool:
        """Remove entries until so many bytes fit in; False where all that is left is on its way."""
        coming = sum(self._parts_in_work())
        entries = sorted(self._entries())
        kept = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if coming + kept + num_bytes <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            kept -= size
        return coming + kept + num_bytes <= self.max_bytes

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """When each entry was asked for, its length, and its path."""
        for found in os.scandir(self.cache_dir):
            if _ENTRY.fullmatch(found.name):
                with suppress(FileNotFoundError):
                    state = found.stat()
                    yield state.st_atime_ns, state.st_size, Path(found.path)

    def _parts_in_work(self) -> Iterator[int]:
        """The whole lengths of the files that are on their way; what a killed process has left is removed."""
        for found in list(os.scandir(self.cache_dir)):
            if match := _PART.fullmatch(found.name):
                if is_taken(self._lock_path(match["sha256"])):
                    yield int(match["num_bytes"])
                else:
                    Path(found.path).unlink(missing_ok=True)


def _require_whole(part: Path, item: Item) -> None:
    found_bytes = part.stat().st_size
    if found_bytes != item.num_bytes:
        raise TransferError(f"{found_bytes:,} bytes have come, the manifest says {item.num_bytes:,}")
    found = sha256_of_file(part)
    if found != item.sha256:
        raise TransferError(
            f"what has come is not what the manifest describes (sha256 {found[:12]}…, not {item.sha256[:12]}…)"
        )


def _open_untouched(path: Path) -> int:
    """Open for reading, so that reading does not count as asking; OSError."""
    return os.open(path, os.O_RDONLY | getattr(os, "O_NOATIME", 0))


def _tell(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
