"""Stops for the tests: a command on forked ranks, some of which get a real signal at a chosen place in the code."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import Finished, run_module, run_ranks

HEARD_S = 0.1
"""A thread hears the signal: on a loaded machine three rounds of a tiny model can pass before it gets the interpreter."""


@dataclass(frozen=True)
class Stop:
    """A signal that some ranks send themselves in their call number `call` (from 1) of `place`, a module's function."""

    place: str
    call: int
    number: signal.Signals
    ranks: tuple[int, ...]


NEVER = Stop("aplantida_dist.trainer:run_step", 0, signal.SIGTERM, ())


@dataclass(frozen=True)
class Stopped:
    """A command that ran on a rank: how it ended, the calls of the place after the signal, seconds from the signal to the end."""

    finished: Finished
    calls_after: int
    seconds: float


def train_until(
    stop: Stop, *, world_size: int, config: Path, run_dir: Path, overrides: Sequence[str] = (), mutants: Any = ()
) -> list[Stopped]:
    """Run the training command on forked ranks with a stop in it."""
    arguments = ["--config", config, "--run-dir", run_dir, *overrides]
    return command_until(
        stop, "aplantida_dist.train", arguments, world_size=world_size, folder=config.parent, mutants=mutants
    )


def command_until(
    stop: Stop, module: str, arguments: Sequence[Any], *, world_size: int, folder: Path, mutants: Any = ()
) -> list[Stopped]:
    """Run a command on forked ranks with a stop in it. `mutants` are further places, each with what makes a mutant of the original."""
    outputs = [(folder / f"stdout_{rank}", folder / f"stderr_{rank}") for rank in range(world_size)]
    told = run_ranks(world_size, _run, stop, module, [str(argument) for argument in arguments], outputs, mutants)
    return [
        Stopped(Finished(code, out.read_text(), err.read_text()), calls_after, seconds)
        for (code, calls_after, seconds), (out, err) in zip(told, outputs, strict=True)
    ]


def _run(stop: Stop, module: str, arguments: list[str], outputs: Any, mutants: Any) -> tuple[int, int, float]:
    # A job in the background of a script ignores it, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for place, change in mutants:
        replace(place, change)
    calls: list[float] = []

    def with_signal(original: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            calls.append(time.monotonic())
            if len(calls) == stop.call and int(os.environ["RANK"]) in stop.ranks:
                os.kill(os.getpid(), stop.number)
                time.sleep(HEARD_S)
            return original(*given, **named)

        return call

    replace(stop.place, with_signal)
    code = run_module(module, arguments, outputs)
    is_hit = 0 < stop.call <= len(calls)
    return code, len(calls) - stop.call, time.monotonic() - calls[stop.call - 1] if is_hit else -1.0


def replace(place: str, change: Any) -> None:
    """Put what `change` makes of a module's function into its place, in this process."""
    module_name, name = place.split(":")
    module = importlib.import_module(module_name)
    setattr(module, name, change(getattr(module, name)))
