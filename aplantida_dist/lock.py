"""A lock: a file that names the one process that works on something, on this machine or on another that shares the disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from aplantida_dist.errors import UserError

BEAT_EVERY_S = 5.0
SILENT_AFTER_S = 60.0
"""A process on another machine that has not touched its lock for so long is taken for dead."""
_SIGNED_WITHIN_S = 2.0
"""So long a process may take from locking the file to naming itself in it."""
_POLL_S = 0.02
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a network disk says that has no locks: then the names in the files decide alone."""


class LockError(UserError):
    """Another process works on it now."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as the file states it. `machine` is the kernel's own number since it started, empty where it has none."""

    host: str
    machine: str
    pid: int
    since_utc: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lock(AbstractContextManager["Lock"]):
    """A lock that is held until its block ends. `left` is the dead process that it was taken over from, if any.

    Within, a thread touches the file every BEAT_EVERY_S, which is all that other machines can see of this process.
    """

    def __init__(self, path: Path, descriptor: int, left: Holder | None) -> None:
        self.path, self.left, self._descriptor = path, left, descriptor
        self._is_over = threading.Event()
        self._beats = threading.Thread(target=self._beat, name=f"lock {path.name}", daemon=True)
        self._beats.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._beats.join()
        if self._descriptor in _HELD:
            self.path.unlink(missing_ok=True)
            _close(self._descriptor)

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_EVERY_S):
            with suppress(OSError):
                os.utime(self._descriptor)


def take_lock(path: Path, *, doing: str, remedy: str) -> Lock:
    """Lock a file, or raise LockError, which names who holds it: what that process is `doing`, and what to do. OSError where none can be made.

    On one machine the system decides: it lets go of a lock when the process ends, however it ends. What the file still says
    is then that of a dead process. A process on another machine, and any on a disk without locks, holds the lock while it
    touches the file; a process of this machine that is gone does not.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        _HELD.add(descriptor)
        try:
            decides = _ask_system(descriptor)
            # Who held it may have removed the file since it was opened here: then the lock is on nothing.
            if not _is_still(path, descriptor):
                _close(descriptor)
                continue
            left = _read_holder(descriptor)
            if left is not None:
                _require_gone(left, path, descriptor, system_decides=decides, doing=doing, remedy=remedy)
            _sign(descriptor)
            return Lock(path, descriptor, left)
        except BlockingIOError:
            holder = _await_holder(descriptor)
            _close(descriptor)
            if holder is None and not path.exists():
                continue
            since = "" if holder is None else f" (since {holder.since_utc})"
            raise LockError(f"{path}: {holder or 'another process'} {doing} now{since}; {remedy}") from None
        except BaseException:
            _close(descriptor)
            raise


@contextmanager
def in_turn(path: Path, *, give_up: Callable[[], bool] | None = None) -> Iterator[None]:
    """Hold a lock among threads and processes of this machine alone; the file goes with it. OSError on a disk without locks.

    It is waited for; with `give_up`, until that says so: BlockingIOError. The system lets go of it when the process ends, however it ends.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        _HELD.add(descriptor)
        try:
            if not _wait_for(descriptor, give_up) or not _is_still(path, descriptor):
                continue
            try:
                yield
            finally:
                # In a child that was forked within the block the lock is its parent's.
                if descriptor in _HELD and _is_still(path, descriptor):
                    path.unlink()
            return
        finally:
            # A child that was forked before the descriptor was noted shares the lock: unlocking lets go for both.
            if descriptor in _HELD:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                _close(descriptor)


def _wait_for(descriptor: int, give_up: Callable[[], bool] | None) -> bool:
    """Lock a file, waiting a while where it may be given up; False where another still has it. Raises BlockingIOError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if give_up is None else fcntl.LOCK_NB))
    except BlockingIOError:
        if give_up is not None and give_up():
            raise
        time.sleep(_POLL_S)
        return False
    return True


def is_taken(path: Path) -> bool:
    """Whether somebody holds a lock that is held `in_turn`; the file of one that nobody holds is removed."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        if _is_still(path, descriptor):
            path.unlink()
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return False
    finally:
        os.close(descriptor)


def this_process() -> Holder:
    """This process as a lock names it."""
    return Holder(socket.gethostname(), _machine(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))


_HELD: set[int] = set()
"""The descriptors of this process's locks."""


def _let_go() -> None:
    """A forked child shares its parent's locks, and would hold them beyond its death."""
    while _HELD:
        os.close(_HELD.pop())


os.register_at_fork(after_in_child=_let_go)


def _close(descriptor: int) -> None:
    if descriptor in _HELD:
        _HELD.remove(descriptor)
        os.close(descriptor)


def _ask_system(descriptor: int) -> bool:
    """Lock the file by the system; False where the disk has no locks. BlockingIOError where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _require_gone(left: Holder, path: Path, descriptor: int, *, system_decides: bool, doing: str, remedy: str) -> None:
    """Raise LockError unless the process that the file names is gone."""
    is_here = left.machine == _machine() and (left.machine != "" or left.host == socket.gethostname())
    if is_here and (system_decides or not _is_running(left.pid)):
        return
    silent_s = abs(_now_on_disk(path.parent) - os.fstat(descriptor).st_mtime)
    if silent_s < SILENT_AFTER_S:
        raise LockError(
            f"{path}: {left} {doing} now (since {left.since_utc}, last sign of it {silent_s:.0f} s ago); {remedy}; if that "
            f"machine is gone, the lock is free after {SILENT_AFTER_S:.0f} s of silence"
        )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _now_on_disk(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder, which on a network disk is another machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _read_holder(descriptor: int) -> Holder | None:
    """Who the file says holds it; None where it says nothing that can be read, as when a process died while it signed."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _await_holder(descriptor: int) -> Holder | None:
    """Who holds a lock that was refused, and may be about to sign it."""
    deadline_s = time.monotonic() + _SIGNED_WITHIN_S
    while (holder := _read_holder(descriptor)) is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return holder


def _sign(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(this_process())).encode(), 0)
