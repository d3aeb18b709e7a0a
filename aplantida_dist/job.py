"""What a training is composed of, and the epoch that it is in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from aplantida_dist.bad_samples import Entry
from aplantida_dist.data.dataset import Split
from aplantida_dist.data.images import EvaluationTransform, TrainTransform
from aplantida_dist.data.plan import TrainPlan
from aplantida_dist.data.stream import Reading
from aplantida_dist.data.work import Work
from aplantida_dist.device_clock import DeviceClock
from aplantida_dist.ema import Ema
from aplantida_dist.freezing import Freezing
from aplantida_dist.interruption import Interruption
from aplantida_dist.lineage import Identities
from aplantida_dist.metrics import Totals
from aplantida_dist.mixing import Mixing
from aplantida_dist.nonfinite import NonFinitePolicy, Watch
from aplantida_dist.objective import Objective
from aplantida_dist.record import Record
from aplantida_dist.schedule import Schedule
from aplantida_dist.stopping import Stopping
from aplantida_dist.teachers import Teachers
from aplantida_dist.verdict import RankTimes
from aplantida_dist.world import World


@dataclass(frozen=True)
class Job:
    """What a training is composed of. Every number that the config gave is here, so that the loop reads no config."""

    world: World
    model: nn.Module
    optimizer: Any
    ema: Ema | None
    normalize: nn.Module
    plan: TrainPlan
    schedule: Schedule
    train_split: Split
    val_split: Split | None
    leaked: Identities
    train_transform: TrainTransform
    evaluation_transform: EvaluationTransform
    reading: Reading
    record: Record
    digests: dict[str, str]
    num_classes: int
    train_counts: tuple[int, ...]
    seed: int
    mixing: Mixing
    objective: Objective
    teachers: Teachers
    nonfinite: NonFinitePolicy
    stopping: Stopping | None
    interruption: Interruption
    voids_bad_samples: bool
    metrics_to_hold: tuple[str, ...]
    freezing: Freezing
    missing_soft_labels: int
    clip_norm: float | None
    clip_agc: float | None
    log_every_steps: int
    checkpoint_every_steps: int | None
    evaluate_every_epochs: int
    evaluation_micro_batch_size: int
    extra_checks: bool


@dataclass
class Running:
    """The epoch in progress on this rank: its totals and its clocks. What a checkpoint brought lies on the main process.

    done, saved_step: the completed steps of the run, and of its last checkpoint; the same on every rank.
    bad: the samples that this rank could not deliver and that the ledger has not seen yet. work: what its loaders did for the epoch,
    since the run went on if it was resumed in the middle of it; spent_before_ns and waited_before_ns are what was before, of all ranks.
    """

    totals: Totals
    train_s: float = 0.0
    spent_ns: int = 0
    waited_ns: int = 0
    spent_before_ns: int = 0
    waited_before_ns: int = 0
    watch: Watch = field(default_factory=Watch)
    done: int = 0
    saved_step: int = 0
    bad: list[Entry] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    device_clock: DeviceClock = field(init=False)

    def __post_init__(self) -> None:
        self.device_clock = DeviceClock(self.totals.vector.device)

    @property
    def times(self) -> RankTimes:
        """Where this rank's time went."""
        device_ns = self.device_clock.busy_ns if self.device_clock.counts else None
        return RankTimes(self.spent_ns, self.waited_ns, device_ns, self.work)

    def spend(self, spent_ns: int) -> None:
        """Count time as that of steps."""
        self.spent_ns += spent_ns
        self.train_s += spent_ns / 1e9

    def reset(self) -> None:
        """Begin the next epoch."""
        self.totals.reset()
        self.watch.begin_epoch()
        self.train_s, self.spent_ns, self.waited_ns = 0.0, 0, 0
        self.spent_before_ns = self.waited_before_ns = 0
        self.work = Work()
        self.device_clock.reset()
