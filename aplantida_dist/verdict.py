"""The verdict: what bounds the speed of a run, and what to change, from what its clocks counted in an epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aplantida_dist.data.work import Work

WAITING = 0.10
"""Share of step time lost to waiting for data from which on the input bounds a run: below, less than a ninth of its speed is to be won."""
IDLE = 0.20
"""Share of step time that a GPU has nothing to do, though it has its data, from which on the host bounds a run."""
READING = 0.50
"""Share of the loaders' time that is reading from which on the disk, and not decoding, bounds the input."""

Bound = Literal["decoding", "disk", "bursts", "host", "model"]


@dataclass(frozen=True)
class RankTimes:
    """What a rank's clocks counted: nanoseconds in steps, of them waiting for data, and that the device was busy; what its loaders did.

    device_ns is None where there is no device beside the host.
    """

    spent_ns: int
    waited_ns: int
    device_ns: int | None
    work: Work

    @property
    def wait_fraction(self) -> float:
        return self.waited_ns / self.spent_ns

    @property
    def device_fraction(self) -> float | None:
        return None if self.device_ns is None else min(1.0, self.device_ns / self.spent_ns)

    @property
    def lost_fraction(self) -> float:
        """Share of the time that waiting costs: on a GPU a wait is no loss while the device still has something to do."""
        device = self.device_fraction
        return self.wait_fraction if device is None else min(self.wait_fraction, 1.0 - device)


@dataclass(frozen=True)
class Machine:
    """The cores that this process may use, the ranks that share them, and the threads that each computes in."""

    num_cores: int
    num_ranks: int
    threads_a_rank: int

    @property
    def most_workers(self) -> int:
        """Loader workers of each rank that find a core of their own."""
        return max(0, self.num_cores // self.num_ranks - self.threads_a_rank)


@dataclass(frozen=True)
class Verdict:
    """What bounds a run, by the rank that waits most: all others wait for it in every step. Speeds are that rank's, images a second.

    bound_by: `decoding` and `disk` are the input; `bursts` is an input that is fast enough and late all the same; `host` is a GPU
    that gets its work too slowly; `model` is what should be.
    """

    bound_by: Bound
    rank: int
    num_ranks: int
    times: RankTimes
    num_workers: int
    machine: Machine
    model_per_s: float

    @property
    def loader_per_s(self) -> float:
        """What the rank's loaders deliver when they never pause; without workers the rank's own process, when it does nothing else."""
        return _images_per_s(self.times.work) * max(1, self.num_workers)

    @property
    def line(self) -> str:
        """One line for the screen: the bound, the numbers behind it, and what to change."""
        name = {"decoding": "input", "bursts": "input"}.get(self.bound_by, self.bound_by)
        return f"{name}-bound: {self._shares}; {self._speeds}: {self._advice}"

    @property
    def _shares(self) -> str:
        where = f" on rank {self.rank} of {self.num_ranks}" if self.num_ranks > 1 else ""
        device = self.times.device_fraction
        worked = "" if device is None else f", the GPU at work {_percent(device)}"
        return f"{_percent(self.times.wait_fraction)} of step time waiting{where}{worked}"

    @property
    def _speeds(self) -> str:
        who = _count(self.num_workers, "worker") if self.num_workers else "the rank's own process"
        does = ("decode" if self.bound_by == "decoding" else "deliver") + ("" if self.num_workers > 1 else "s")
        if self.bound_by == "disk":
            work = self.times.work
            mb_per_s = 1e3 * work.read_bytes / work.reading_ns * max(1, self.num_workers)
            who = f"{who}, reading {_percent(read_fraction(work))} of the time at {mb_per_s:,.1f} MB/s,"
        elif self.bound_by != "decoding":
            does = "could deliver"
        return f"{who} {does} {self.loader_per_s:,.0f} images/s, the model takes {self.model_per_s:,.0f}/s"

    @property
    def _advice(self) -> str:
        match self.bound_by:
            case "decoding":
                return self._more_workers_or_less_work
            case "disk":
                ahead = "" if self.num_workers else "raise data.num_workers to read ahead, "
                return f"{ahead}put the shards on a faster disk, or set data.cache_dir to a folder on one"
            case "bursts":
                return (
                    "they are fast enough but late, as when they start; raise data.prefetch_micro_batches if it lasts"
                )
            case "host":
                return "raise train.micro_batch_size, or set model.compile"
            case "model":
                return "nothing to change"

    @property
    def _more_workers_or_less_work(self) -> str:
        needed = math.ceil(self.model_per_s / _images_per_s(self.times.work))
        most = self.machine.most_workers
        if needed <= most:
            return f"raise data.num_workers to {needed}"
        smaller = "smaller pictures take less time (`shards/build.py --max-side`)"
        cores = _count(self.machine.num_cores, "core")
        if self.num_workers < most:
            return (
                f"raise data.num_workers to {most} of the {needed} it takes, for which {cores} have no room; {smaller}"
            )
        return f"no room for the {_count(needed, 'worker')} it takes on {cores}; {smaller}"


def judge(ranks: Sequence[RankTimes], *, images_per_s: float, num_workers: int, machine: Machine) -> Verdict | None:
    """What bounds a run whose ranks together read so many images a second in its steps; None where a rank has made none.

    The disk is to blame from READING of the loaders' time on, and bursts where workers could deliver more than the model takes.
    """
    if any(times.spent_ns == 0 or times.work.working_ns == 0 for times in ranks):
        return None
    rank = max(range(len(ranks)), key=lambda i: ranks[i].lost_fraction)
    times = ranks[rank]
    model_per_s = images_per_s / len(ranks) / max(1e-3, 1.0 - times.lost_fraction)
    return Verdict(
        bound_by=_bound_of(times, num_workers=num_workers, model_per_s=model_per_s),
        rank=rank,
        num_ranks=len(ranks),
        times=times,
        num_workers=num_workers,
        machine=machine,
        model_per_s=model_per_s,
    )


def times_in_row(ranks: Sequence[RankTimes], verdict: Verdict) -> dict[str, Any]:
    """What the history's row says of the ranks' times beside wait_fraction, over all ranks, and by what they are bound."""
    work = sum((times.work for times in ranks), Work())
    spent_ns, waited_ns = sum(times.spent_ns for times in ranks), sum(times.waited_ns for times in ranks)
    device = [times.device_ns for times in ranks if times.device_ns is not None]
    device_fraction = min(1.0, sum(device) / spent_ns)
    return {
        "host_fraction": max(0.0, 1.0 - waited_ns / spent_ns - device_fraction),
        **({"device_fraction": device_fraction} if device else {}),
        "read_fraction": read_fraction(work),
        "loader_images_per_s": _images_per_s(work) * len(ranks) * max(1, verdict.num_workers),
        "bound_by": verdict.bound_by,
    }


def read_fraction(work: Work) -> float:
    """The share of the loaders' time that is reading."""
    return work.reading_ns / work.working_ns


def _bound_of(times: RankTimes, *, num_workers: int, model_per_s: float) -> Bound:
    if times.lost_fraction < WAITING:
        device = times.device_fraction
        is_starved = device is not None and 1.0 - device - times.lost_fraction >= IDLE
        return "host" if is_starved else "model"
    if num_workers * _images_per_s(times.work) >= model_per_s:
        return "bursts"
    return "disk" if read_fraction(times.work) >= READING else "decoding"


def _images_per_s(work: Work) -> float:
    """What one process makes in a second of work."""
    return 1e9 * work.num_images / work.working_ns


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"
