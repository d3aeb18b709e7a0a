"""The stream: from the plan's coordinates to micro-batches of pixels, by offset reads in DataLoader workers."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aplantida_dist.data.address import Place
from aplantida_dist.data.ahead import Ahead
from aplantida_dist.data.bad_sample import BadSample
from aplantida_dist.data.batch import Batch
from aplantida_dist.data.dataset import Split
from aplantida_dist.data.decode import DecodeError
from aplantida_dist.data.hand_over import Buffers, Parcel
from aplantida_dist.data.images import Transform
from aplantida_dist.data.index import ChangedMemberError, Member, ShardError, read_member, read_metadata
from aplantida_dist.data.manifest import identity_of
from aplantida_dist.data.plan import Coordinates, StoredPlan, TrainPlan
from aplantida_dist.data.work import Work
from aplantida_dist.data.worker import WorkerContext
from aplantida_dist.errors import UserError
from aplantida_dist.seeds import derive
from aplantida_dist.signals import held_back, outlive_requests

MOST_TRIES = 3
"""So often a sample is read from a cache whose files change under it."""
MAX_OPEN_SHARDS = 512
"""File descriptors a worker keeps open; half of the usual limit of 1,024."""
SPARE_BUFFERS = 4
"""Buffers beyond those of the micro-batches read ahead: for the one that is arriving and for those that the caller still holds."""
DEATH_IS_TOLD_WITHIN_S = 2.0
"""The system tells of a killed process within this time."""
GREY = 128
"""Every value of the picture that stands in where a micro-batch holds no good one."""


class StreamError(UserError):
    """A sample that the plan names could not be delivered; the text names its shard and key."""


@dataclass(frozen=True)
class Reading:
    """How the stream is read, which never changes what is read: worker processes, micro-batches ahead a worker, pinning."""

    num_workers: int
    prefetch_micro_batches: int
    pin_memory: bool


class MicroBatches(Dataset[Batch]):
    """Map-style: coordinates in, the whole micro-batch out, so that workers cannot change what a slot holds."""

    def __init__(
        self,
        split: Split,
        plan: TrainPlan | StoredPlan,
        transform: Transform,
        *,
        seed: int,
        with_metadata: bool = False,
        voids_bad_samples: bool = False,
    ) -> None:
        """With `voids_bad_samples` a batch says which of its samples are bad; without, the first of them is a failure."""
        self.with_metadata = with_metadata
        self.voids_bad_samples = voids_bad_samples
        self.split = split
        self.plan = plan
        self.transform = transform
        self.seed = seed
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()

    @property
    def pixels_shape(self) -> tuple[int, int, int, int]:
        """The shape of a micro-batch's pixels: [b, h, w, 3]."""
        side = self.transform.image_size
        return self.plan.micro_batch_size, side, side, 3

    def __getitem__(self, at: Coordinates) -> Batch:
        return self.read(at, pixels=torch.empty(self.pixels_shape, dtype=torch.uint8))

    def read(self, at: Coordinates, *, pixels: Tensor) -> Batch:
        """Read a micro-batch into `pixels` (uint8 [b, h, w, 3]), which become its images.

        An error that a user can mend comes as `failure`: raised here it would be a worker's traceback.
        """
        started_ns = time.perf_counter_ns()
        micro_batch = self.plan.micro_batch(at)
        places = list(zip(micro_batch.shard_indices.tolist(), micro_batch.member_indices.tolist(), strict=True))
        samples: list[_Sample] = []
        failure = None
        try:
            for i, (shard_index, member_index) in enumerate(places):
                augment_seed = derive(self.seed, "augment", at.epoch, *micro_batch.showing(i))
                samples.append(self._read(shard_index, member_index, augment_seed, into=pixels[i]))
        except UserError as error:
            failure = str(error)
        labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        weights = torch.from_numpy(micro_batch.weights)
        bad = self._bad_among(samples, weights, slot=at.slot)
        _stand_in(samples, pixels, labels, weights)
        reading_ns, read_bytes = sum(sample.reading_ns for sample in samples), sum(s.num_bytes for s in samples)
        return Batch(
            at=at,
            images=pixels.permute(0, 3, 1, 2),
            labels=labels,
            weights=weights,
            identities=torch.tensor([identity_of(sample.key) for sample in samples], dtype=torch.int64),
            sample_keys=tuple(sample.key for sample in samples),
            metadata=tuple(sample.metadata for sample in samples) if self.with_metadata else (),
            bad=bad,
            work=Work(len(samples), time.perf_counter_ns() - started_ns, reading_ns, read_bytes),
            failure=failure,
        )

    def _read(self, shard_index: int, member_index: int, augment_seed: int, *, into: Tensor) -> _Sample:
        """Read, check, decode and augment one sample into its place (uint8 [h, w, 3]). Raises ShardError."""
        started_ns, reading_ns = time.perf_counter_ns(), 0
        shard = self._shard(shard_index)
        entry = shard.index[member_index]
        offset, fault = int(entry["offset"]), ""
        try:
            member = self._member(shard_index, member_index)
            reading_ns = time.perf_counter_ns() - started_ns
            sample_key = member.sample_key
            into.numpy()[:] = self.transform(member.content, augment_seed)
        except ChangedMemberError as error:
            if not self.voids_bad_samples:
                raise
            sample_key, fault = error.sample_key, "has changed (its crc32 differs from the index)"
        except DecodeError as error:
            if not self.voids_bad_samples:
                raise ShardError(
                    f"{shard.path}: sample {sample_key} at offset {offset} {error}; rebuild the dataset without it, or set data.on_bad_sample to void"
                ) from error
            fault = str(error)
        has_metadata = self.with_metadata and not fault
        shard = self._shard(shard_index)  # it may have been brought again
        metadata = read_metadata(shard.descriptor, shard.index, member_index) if has_metadata else {}
        label, num_bytes = int(entry["label"]), int(entry["length"])
        return _Sample(sample_key, label, metadata, shard.path.name, offset, fault, reading_ns, num_bytes)

    def _member(self, shard_index: int, member_index: int) -> Member:
        """Read a sample; where a shard has changed in the cache since it came, it is brought again. Raises ShardError."""
        cache, tries_left = self.split.cache, MOST_TRIES
        while True:
            shard, tries_left = self._shard(shard_index), tries_left - 1
            try:
                return read_member(shard.descriptor, shard.index[member_index], shard_path=shard.path)
            except ShardError:
                item = self.split.tar_item(shard_index)
                if cache is None or not tries_left or not cache.discard_if_wrong(item, shard.descriptor):
                    raise
            self._open_shards.pop(shard_index).close()

    def _bad_among(self, samples: Sequence[_Sample], weights: Tensor, *, slot: int) -> tuple[BadSample, ...]:
        """The bad ones that are no padding."""
        return tuple(
            BadSample(
                split=self.split.name,
                slot=slot,
                place=place,
                shard=sample.shard,
                sample_key=sample.key,
                offset=sample.offset,
                label=sample.label,
                reason=sample.fault,
            )
            for place, sample in enumerate(samples)
            if sample.fault and weights[place] > 0
        )

    def _shard(self, shard_index: int) -> _OpenShard:
        """The open shard, from a bounded cache of the least recently used."""
        if shard_index in self._open_shards:
            self._open_shards.move_to_end(shard_index)
        else:
            if self.split.cache is not None:
                self._close_evicted()
            self._open_shards[shard_index] = _OpenShard(self.split, shard_index)
            if len(self._open_shards) > MAX_OPEN_SHARDS:
                self._open_shards.popitem(last=False)[1].close()
        return self._open_shards[shard_index]

    def _close_evicted(self) -> None:
        """Close the shards that a cache has removed since: what is open takes room on the disk."""
        for shard_index in [index for index, shard in self._open_shards.items() if shard.is_removed]:
            self._open_shards.pop(shard_index).close()


class _HandingOver(Dataset[Parcel]):
    """What workers see of the micro-batches: each is asked for with the number of the buffer that it is to be left in."""

    def __init__(self, micro_batches: MicroBatches, buffers: Buffers) -> None:
        self.micro_batches = micro_batches
        self.buffers = buffers

    def __getitem__(self, order: tuple[Coordinates, int | None]) -> Parcel:
        at, number = order
        if number is None:
            return Parcel(self.micro_batches[at], self.buffers, None)
        pixels = torch.from_numpy(self.buffers.array(number))
        return Parcel(self.micro_batches.read(at, pixels=pixels), self.buffers, number)


@dataclass(frozen=True)
class _Sample:
    """What a sample is besides its pixels, and what it took to read; `fault` says why it has none, and is empty where it has."""

    key: str
    label: int
    metadata: dict[str, Any]
    shard: str
    offset: int
    fault: str
    reading_ns: int
    num_bytes: int


class _OpenShard:
    """A shard's descriptor and its index."""

    def __init__(self, split: Split, shard_index: int) -> None:
        self.path: Place = split.shard_place(shard_index)
        self.index: NDArray[Any] = split.read_index(shard_index)
        self.descriptor = split.open_shard(shard_index)

    @property
    def is_removed(self) -> bool:
        """Whether the file has no name any more."""
        return os.fstat(self.descriptor).st_nlink == 0

    def close(self) -> None:
        os.close(self.descriptor)


def _stand_in(samples: Sequence[_Sample], pixels: Tensor, labels: Tensor, weights: Tensor) -> None:
    """Put the first good sample of a micro-batch, at weight 0, in the place of each bad one, or grey where none is good.

    pixels: uint8 [b, h, w, 3]; labels: int64 [b]; weights: float32 [b].
    """
    good = next((place for place, sample in enumerate(samples) if not sample.fault), None)
    for place, sample in enumerate(samples):
        if sample.fault:
            weights[place] = 0.0
            pixels[place] = GREY if good is None else pixels[good]
            labels[place] = labels[place if good is None else good]


def stream(
    micro_batches: MicroBatches,
    coordinates: Iterable[Coordinates],
    *,
    reading: Reading,
    num_epochs: int = 1,
    slots: range | None = None,
) -> Iterator[Batch]:
    """Yield the micro-batches of the coordinates, in that order, read ahead by worker processes (with 0: by this one).

    What is yielded does not depend on `reading`. Of a cached split the next block is brought meanwhile, as far as the plan has
    `num_epochs`: what the lanes of `slots` read, those that the coordinates have. Raises StreamError for the first sample that cannot be delivered.
    """
    split, received = micro_batches.split, iter(coordinates)
    if split.cache is not None:
        coordinates, received = tee(coordinates)
    loader = _loader(micro_batches, coordinates, reading=reading)
    with held_back():
        batches = _received(iter(loader))
    if split.cache is not None:
        ahead = Ahead(split, micro_batches.plan, cache=split.cache, num_epochs=num_epochs, slots=slots)
        batches = _with_the_next_block(batches, received, ahead)
    for batch in batches:
        if batch.failure is not None:
            raise StreamError(batch.failure)
        yield batch


def _loader(
    micro_batches: MicroBatches, coordinates: Iterable[Coordinates], *, reading: Reading
) -> DataLoader[Batch] | DataLoader[Parcel]:
    """Torch's loader, as the worker processes' foreman. What it yields are batches: a parcel is one when it has arrived."""
    dataset: Dataset[Any] = micro_batches
    orders: Iterable[Any] = coordinates
    if reading.num_workers:
        num_ahead = reading.num_workers * reading.prefetch_micro_batches
        buffers = Buffers(num_ahead + SPARE_BUFFERS, micro_batches.pixels_shape)
        dataset, orders = _HandingOver(micro_batches, buffers), ((at, buffers.lend()) for at in coordinates)
    return DataLoader(
        dataset,
        sampler=orders,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=reading.num_workers,
        prefetch_factor=reading.prefetch_micro_batches if reading.num_workers else None,
        pin_memory=reading.pin_memory,
        worker_init_fn=_leave_requests_to_the_main_process,
        # The buffers are those that a worker is born with.
        multiprocessing_context=WorkerContext() if reading.num_workers else None,
        generator=torch.Generator(),  # the loader draws a worker seed from it; the global generator stays untouched
    )


def _received(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches. Of a worker that was killed while it handed one over, torch's handler of SIGCHLD tells: a moment later."""
    try:
        yield from batches
    except (ConnectionError, EOFError, FileNotFoundError):
        time.sleep(DEATH_IS_TOLD_WITHIN_S)
        raise


def _with_the_next_block(batches: Iterator[Batch], coordinates: Iterator[Coordinates], ahead: Ahead) -> Iterator[Batch]:
    """The same batches, while what they and the next block need is brought and kept."""
    try:
        for at in coordinates:
            ahead.look(at)
            yield next(batches)
    finally:
        ahead.close()


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_requests_to_the_main_process(worker: int) -> None:
    """Signals to stop reach workers with everyone else, and a run that stops at a step boundary needs them up to it."""
    outlive_requests()
