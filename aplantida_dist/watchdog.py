"""The watchdog: a thread of each rank that ends the run when nothing moves, or when another rank is lost, and says whose fault it is."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from aplantida_dist.beat import SILENT_AFTER_S, Beat, Doing, Sight, Stage, blame, decode_beat
from aplantida_dist.board import Board, Messenger
from aplantida_dist.errors import UserError
from aplantida_dist.processes import DEAD, STOPPED, pid_space, state_of

BEAT_EVERY_S = 1.0
LOOKS_A_BEAT = 64
"""Ranks that a moving rank looks at a second, on average: on a thousand, all of them would be too many for the board."""
ANSWER_WITHIN_S = 3.0
READ_WITHIN_S = 3 * BEAT_EVERY_S
SETTLE_S = SILENT_AFTER_S + 1.0
"""How long a rank whose collective failed looks for the rank that is to blame."""
ENDING_S = 10.0
"""How long the end of the process may take; what had to be on disk is there before."""
EXIT_CODE = 2

_REMEDY = "the same command goes on from the newest checkpoint"
_FIRST_CAUSE = "first_cause"
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid")


class LostRankError(UserError):
    """A rank, or a process of its own, is gone or stands still; the text names it, its stage and its last step."""


class Watchdog:
    """One rank's notes of where it is, and the thread that reads them. Until `watching` the notes are all there is.

    Whatever a rank does, it has `budget_s` seconds to the next note: in every stage, on every rank, and alone too.
    """

    def __init__(self, *, rank: int, budget_s: float) -> None:
        self.rank = rank
        self.budget_s = budget_s
        self._stage: Stage = "start-up"
        self._step, self._moves, self._count = 0, 0, 0
        self._doing: Doing = "working"
        self._ended = threading.Event()
        self._telling = threading.Lock()
        self._messenger: Messenger | None = None
        self._asked: Future[list[str]] | None = None
        self._answered_s = 0.0
        self._peers: dict[int, _Peer] = {}
        self._read_within_s = 0.0
        self._told = ""
        """The first cause, where another rank has told it."""
        self._tell_cause: Callable[[str], None] = lambda text: None
        self._stacks_dir: Path | None = None

    def at(self, stage: Stage, *, step: int) -> None:
        """Note that this rank begins a stage after so many completed steps."""
        self._stage, self._step = stage, step
        self.note("working")

    def note(self, doing: Doing) -> None:
        """Note what this rank begins to do within its stage; it holds until the next note."""
        self._doing = doing
        self._moves += 1

    def tell_cause_to(self, tell: Callable[[str], None]) -> None:
        """Have the first cause of a failure told here too, such as to status.json; it may be called from the thread."""
        self._tell_cause = tell

    def leave_stacks_in(self, folder: Path) -> None:
        """Where this rank ends because something stands still, have it leave its threads' stacks there, in a file of its own."""
        self._stacks_dir = folder

    def beat(self) -> Beat:
        """This rank's next sign of life."""
        self._count += 1
        return Beat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            pid_space=pid_space(),
            count=self._count,
            moves=self._moves,
            stage=self._stage,
            step=self._step,
            doing=self._doing,
        )

    @contextlib.contextmanager
    def watching(self, board: Board | None, beats: Sequence[Beat], *, keeps_board: bool = False) -> Iterator[None]:
        """Within it a rank that stands still, or is lost, ends the run on all of them; and so does an exception on any.

        `beats` holds a first one of every rank. The first cause is told once, by the rank that met it. Afterwards the process has
        `ENDING_S` seconds to end. A rank that keeps the board leaves the others time to read there why it ends.
        """
        self._messenger = None if board is None else Messenger(board)
        self._read_within_s = READ_WITHIN_S if keeps_board else 0.0
        self._peers = {beat.rank: _Peer(beat) for beat in beats if beat.rank != self.rank}
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield
        except UserError as error:
            self._keep_the_thread_from_telling()
            self._settle(error)
            raise
        except Exception as error:
            self._keep_the_thread_from_telling()
            cause = self._cause_of(error)
            if cause is error:
                error.add_note(f"on rank {self.rank}: {self.beat().text}")
                time.sleep(self._read_within_s)
                raise
            raise cause from None
        else:
            self.at("left", step=self._step)
            self._hear(ask=False)
            self._hear(ask=False)
        finally:
            self._ended.set()
            faulthandler.dump_traceback_later(ENDING_S, exit=True)

    def _keep_the_thread_from_telling(self) -> None:
        """Of a rank's two threads one tells the end; where the other one does, it also ends this process."""
        if not self._telling.acquire(blocking=False):
            time.sleep(ENDING_S)

    def _settle(self, error: UserError) -> None:
        """Claim that this error is the first cause; an error that another rank tells is left to it."""
        first = str(error)
        if not error.is_told_elsewhere:
            is_mine, first = self._claim(first)
            error.is_told_elsewhere = not is_mine
        self._tell_cause(first)

    def _cause_of(self, error: Exception) -> Exception:
        """What ended this rank: the error itself, or the one that it follows from, which may be told already."""
        text = f"{self.beat().name}: {type(error).__name__}: {error}; it was {self.beat().text}"
        if _DEAD_WORKER.match(str(error)):
            died = str(error).strip().rstrip(".")
            text = f"{self.beat().name}: {died}; it was {self.beat().text}; if memory ran out, lower data.num_workers; {_REMEDY}"
            cause: Exception = LostRankError(text)
        elif isinstance(error, RuntimeError) and (lost := self._find_lost()):
            text = f"{lost}; {_REMEDY}"
            cause = LostRankError(text)
        else:
            cause = error
        is_mine, first = self._claim(text)
        self._tell_cause(first)
        if not is_mine:
            cause = LostRankError(first)
            cause.is_told_elsewhere = True
        return cause

    def _find_lost(self) -> str:
        """Look for a rank that is lost, for as long as it takes one to fall silent; empty if there is none, or another rank has told a first cause."""
        self._look_afresh()
        deadline_s = time.monotonic() + SETTLE_S
        while self._peers and not self._told and time.monotonic() < deadline_s:
            sights = self._look()
            if any(sight.is_lost or sight.silent_s >= SILENT_AFTER_S for sight in sights):
                return blame([*sights, Sight(self.beat(), 0.0, 0.0, False)])
            time.sleep(0.2)
        return ""

    def _watch(self) -> None:
        """The thread: beat, and where this rank does not move, look at the others."""
        still_s, moves, before_s, num_lost = 0.0, -1, time.monotonic(), 0
        while not self._ended.wait(BEAT_EVERY_S):
            passed_s = time.monotonic() - before_s
            before_s = time.monotonic()
            if moves != self._moves or passed_s > 3 * BEAT_EVERY_S:
                # Of a process that was stopped, or on a machine that slept, nothing has waited meanwhile.
                still_s, moves, num_lost = 0.0, self._moves, 0
                self._look(ask=self._count % (1 + len(self._peers) // LOOKS_A_BEAT) == 0)
                self._look_afresh()
                continue
            still_s += passed_s
            sights = self._look()
            if self._told:
                self._end(self._told)
            # Twice: a rank that ends with an error of its own is given the time to tell it.
            num_lost = num_lost + 1 if any(sight.is_lost for sight in sights) else 0
            if still_s >= self.budget_s or num_lost > 1:
                told = blame([*sights, Sight(self.beat(), 0.0, still_s, False)])
                waited = f"rank {self.rank} has waited {still_s:.0f} s of the {self.budget_s:.0f} of train.timeout_s"
                stacks = (
                    "" if self._stacks_dir is None else f"; what each rank was in: {self._stacks_dir}/stacks_rank_*.txt"
                )
                self._end(f"{told}; {waited}{stacks}; {_REMEDY}")

    def _look_afresh(self) -> None:
        """Begin to look at the others: what they did while nobody looked is not held against them."""
        self._answered_s = time.monotonic()
        for peer in self._peers.values():
            peer.heard_s = peer.moved_s = self._answered_s

    def _look(self, *, ask: bool = True) -> list[Sight]:
        """Look at the other ranks, and whether one has told a first cause. `ask` for what is seen next."""
        answer = self._hear(ask=ask)
        if answer and answer[0]:
            rank, _, first = answer[0].partition(":")
            self._told = first if int(rank) != self.rank else ""
        now_s = time.monotonic()
        for peer, text in zip(self._peers.values(), answer[1:], strict=False):
            peer.hear(decode_beat(text), now_s)
        self._answered_s = now_s if answer else self._answered_s
        # A board that does not answer says nothing of the ranks, but of the main process, which keeps it.
        is_answering = now_s - self._answered_s < SILENT_AFTER_S / 2
        sights = [peer.seen(now_s) for peer in self._peers.values()]
        return [sight if is_answering or sight.beat.rank == 0 else replace(sight, silent_s=0.0) for sight in sights]

    def _hear(self, *, ask: bool) -> list[str]:
        """What the board has answered since the last call, maybe nothing: the first cause and every peer's beat. Leaves this rank's beat."""
        if self._messenger is None or (self._asked is not None and not self._asked.done()):
            return []
        answer = [] if self._asked is None or self._asked.exception() else self._asked.result()
        mine = self.beat().encode()
        keys = [_FIRST_CAUSE, *(_key(rank) for rank in self._peers)] if ask else []

        def exchange(board: Board) -> list[str]:
            board.set(_key(self.rank), mine)
            return [value.decode() for value in board.multi_get(keys)] if keys else []

        self._asked = self._messenger.ask(exchange)
        return answer

    def _claim(self, text: str) -> tuple[bool, str]:
        """Whether it is this rank that tells the first cause, and what that is: this text, unless another rank was before; without a board each tells its own."""

        def claim(board: Board) -> str:
            return board.compare_set(_FIRST_CAUSE, "", f"{self.rank}:{text}").decode()

        if self._messenger is None:
            return True, text
        try:
            rank, _, first = self._messenger.ask(claim).result(timeout=ANSWER_WITHIN_S).partition(":")
        except (RuntimeError, TimeoutError):
            return not self._told, self._told or text
        return int(rank) == self.rank, first

    def _end(self, text: str) -> None:
        """End this process, unless its main thread is about to; a rank that is stopped here, and cannot end, is killed."""
        if not self._telling.acquire(blocking=False):
            return
        is_mine, first = self._claim(text)
        if is_mine:
            print(f"error: {text}", file=sys.stderr, flush=True)
        telling = threading.Thread(target=self._leave_word, args=(first,), daemon=True)
        telling.start()
        telling.join(ENDING_S / 2)  # the folder of status.json may be what everything waits for
        for beat in (peer.beat for peer in self._peers.values()):
            # A stopped process does not hear a launcher's SIGTERM, and keeps its GPU.
            if _is_here(beat) and state_of(beat.pid) == STOPPED:
                with contextlib.suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)
        time.sleep(self._read_within_s)
        os._exit(EXIT_CODE)

    def _leave_word(self, first: str) -> None:
        if self._stacks_dir is not None:
            with contextlib.suppress(OSError), (self._stacks_dir / f"stacks_rank_{self.rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        self._tell_cause(first)


class _Peer:
    """Another rank: its last beat, and when (monotonic seconds) one came and when it moved."""

    def __init__(self, beat: Beat) -> None:
        self.beat = beat
        self.heard_s = self.moved_s = time.monotonic()

    def hear(self, beat: Beat, now_s: float) -> None:
        """Take a beat, which may be the last one again."""
        self.heard_s = now_s if beat.count != self.beat.count else self.heard_s
        self.moved_s = now_s if beat.moves != self.beat.moves else self.moved_s
        self.beat = beat

    def seen(self, now_s: float) -> Sight:
        is_gone = _is_here(self.beat) and state_of(self.beat.pid) in DEAD
        return Sight(self.beat, now_s - self.heard_s, now_s - self.moved_s, is_gone)


def first_words(board: Board, beat: Beat) -> None:
    """What must be on the board before any rank reads it."""
    board.set(_key(beat.rank), beat.encode())
    if beat.rank == 0:
        board.set(_FIRST_CAUSE, "")


def _key(rank: int) -> str:
    return f"beat_{rank}"


def _is_here(beat: Beat) -> bool:
    """Whether a rank's pid means the same process here; containers of one host name may number their own."""
    return (beat.host, beat.pid_space) == (socket.gethostname(), pid_space()) != (beat.host, "")
