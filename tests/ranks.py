"""Real ranks for the tests: processes forked from this warm one, which meet over gloo as a launcher's would."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState

FORK = multiprocessing.get_context("fork")
TIME_LIMIT_S = 200.0


@dataclass(frozen=True)
class Finished:
    """A command that ran on one rank."""

    code: int
    stdout: str
    stderr: str


def run_ranks(world_size: int, act: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `act(*arguments)` on every rank of a world; returns what each returned. An exception on a rank fails the test."""
    port = free_port()
    processes, results = [], []
    with uncollected():
        for rank in range(world_size):
            receiver, sender = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_on_rank, args=(sender, rank, world_size, port, act, arguments))
            process.start()
            sender.close()
            processes.append(process)
            results.append(receiver)
    values = [_receive(receiver) for receiver in results]
    for process in processes:
        process.join(TIME_LIMIT_S)
    faults = [value for value in values if isinstance(value, _Fault)]
    assert not faults, "\n".join(fault.text for fault in faults)
    assert [process.exitcode for process in processes] == [0] * world_size
    return values


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Processes forked within it leave this one's objects out of their garbage collections, which would touch, and so copy, every page."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def command_on_ranks(world_size: int, module: str, arguments: Sequence[str | Path], folder: Path) -> list[Finished]:
    """Run `python -m module arguments` on every rank; what each printed and its exit code."""
    outputs = [(folder / f"stdout_{rank}", folder / f"stderr_{rank}") for rank in range(world_size)]
    codes = run_ranks(world_size, run_module, module, [str(argument) for argument in arguments], outputs)
    return [Finished(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, outputs, strict=True)]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher tells a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


def become_rank(rank: int, world_size: int, port: int) -> None:
    """Make of this process, which was forked from a test, what a launcher starts."""
    os.environ.update(environment_of(rank, world_size, port))
    # A test in this process may have opened a world of its own, which accelerate keeps in class attributes.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@dataclass(frozen=True)
class _Fault:
    text: str


def _receive(receiver: Connection) -> Any:
    if not receiver.poll(TIME_LIMIT_S):
        return _Fault(f"a rank said nothing for {TIME_LIMIT_S} s")
    try:
        return receiver.recv()
    except EOFError:
        return _Fault("a rank died without a word")


def _on_rank(
    sender: Connection, rank: int, world_size: int, port: int, act: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    become_rank(rank, world_size, port)
    try:
        sender.send(act(*arguments))
    except BaseException:
        sender.send(_Fault(f"rank {rank}:\n{traceback.format_exc()}"))
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)  # past pytest's own exit handlers


def run_module(module: str, arguments: list[str], outputs: list[tuple[Path, Path]]) -> int:
    """Run a module as `__main__` with its output in files; returns its exit code."""
    for path, stream in zip(outputs[int(os.environ["RANK"])], (sys.__stdout__, sys.__stderr__), strict=True):
        assert stream is not None
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream.fileno())
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        print(end="", flush=True)
        print(end="", file=sys.stderr, flush=True)
    return 0
