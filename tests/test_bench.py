"""The bench compares equals: what stands side by side in its table does the same work."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count

import pytest
import torch
from timm.data import Mixup
from torch import Tensor, nn

from aplantida_dist.metrics import Totals, compute
from aplantida_dist.mixing import MixupCutmix
from aplantida_dist.world import open_world
from bench.feed import bench_feed
from bench.finding import Finding, Goal, compare, interleave
from bench.index import index, read, read_with_sha256
from bench.loader import NUM_EPOCHS, Loader, image_folder, measure, ours, webdataset_pipeline
from bench.loop import Load, make_loops
from bench.pictures import NUM_SPECIES, Pictures, prepare_pictures
from bench.report import bench_report
from bench.stop import bench_stop
from bench.table import to_text
from bench.totals import make_peer, make_slot, update_ours

NUM_PICTURES = 36


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    cache_dir = tmp_path_factory.mktemp("bench")
    return prepare_pictures(cache_dir, num_pictures=NUM_PICTURES, width=48, height=36, workers=1)


@pytest.mark.parametrize("loader", [ours, webdataset_pipeline, image_folder])
def test_every_loader_delivers_every_picture_once_and_normalised(loader: Loader, pictures: Pictures) -> None:
    """Float batches of one shape and one scale: over all epochs the means of the channels are those of the pictures."""
    deliveries = list(loader(pictures, 0))
    assert sum(delivery.num_pictures for delivery in deliveries) == NUM_EPOCHS * NUM_PICTURES
    images = torch.cat([delivery.images[: delivery.num_pictures] for delivery in deliveries])
    assert images.dtype == torch.float32
    assert images.shape[1:] == (3, 224, 224)
    reference = torch.cat([delivery.images[: delivery.num_pictures] for delivery in image_folder(pictures, 1)])
    assert images.mean((0, 2, 3)).tolist() == pytest.approx(reference.mean((0, 2, 3)).tolist(), abs=0.15)
    assert images.std().item() == pytest.approx(reference.std().item(), rel=0.1)


def test_a_pass_counts_the_time_of_the_workers(pictures: Pictures) -> None:
    """The CPU time is more than this process spends, because two workers decode for it and have ended."""
    started_s = time.process_time()
    measured = measure(0, loader=image_folder, pictures=pictures)
    own_s = time.process_time() - started_s
    assert measured.num_pictures == NUM_EPOCHS * NUM_PICTURES
    assert measured.cpu_s > own_s + 0.01


class OurShares(Mixup):
    """timm's mixup, which mixes a picture with its mirror in the batch, by the shares that our slots draw."""

    def __init__(self, mixing: MixupCutmix, *, num_classes: int) -> None:
        super().__init__(mixing.mixup_alpha, label_smoothing=0.0, num_classes=num_classes)
        self.mixing, self.steps = mixing, count()

    def _params_per_batch(self) -> tuple[float, bool]:
        mix = self.mixing.draw(2, height=32, width=32, step=next(self.steps), slot=0)
        assert mix is not None
        return mix.share, False


def test_both_loops_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve steps of each, across one computing of the totals, end at models, and averages of them, that say the same.

    Of two pictures the mirror is the shift. Weights may differ where the gradient is rounding alone, as of a key's bias.
    """
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    world = open_world(precision="fp32", timeout_s=60)
    our_loop, bare_loop = make_loops(Load("test_vit", image_size=32, num_classes=10, batch_size=2), world=world)
    job = our_loop.job
    assert isinstance(job.mixing, MixupCutmix)
    assert job.ema is not None
    bare_loop = replace(bare_loop, mixup=OurShares(job.mixing, num_classes=10))
    pictures = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = logits_of(bare_loop.model, pictures)
    for _ in range(12):
        our_loop.step()
        bare_loop.step()
    trained, averaged = logits_of(bare_loop.model, pictures), logits_of(bare_loop.ema.module, pictures)
    assert (trained - before).abs().max() > 0.1
    assert (trained - averaged).abs().max() > 0.01
    torch.testing.assert_close(logits_of(job.model, pictures), trained, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_of(job.ema.model, pictures), averaged, atol=1e-4, rtol=0)
    assert compute(our_loop.running.totals.vector).num_samples == 24


@pytest.mark.filterwarnings("ignore")  # webdataset's and torch's own, in timm's reader
def test_a_fed_training_is_beside_a_resident_one_and_timms(pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loop takes its steps, over the ends of epochs."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    world = open_world(precision="fp32", timeout_s=60)
    load = Load("test_vit", image_size=32, num_classes=NUM_SPECIES, batch_size=4)
    resident, timms = bench_feed(pictures.split, load, world=world, num_workers=1, repeats=1)
    assert (resident.peer_name, timms.peer_name) == ("resident batches", "timm's reader and parts")
    assert resident.ours == timms.ours > 0.0
    assert resident.peer is not None
    assert timms.peer is not None
    assert timms.peer > 0.0
    assert "fp32, cpu, 1 workers" in resident.what


def logits_of(model: nn.Module, pictures: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(pictures)
    return logits


def test_totals_and_torchmetrics_say_the_same() -> None:
    """With no class absent and no ties, loss, top-1, top-5 and macro top-1 agree."""
    slot, totals, peer = make_slot(128, 32), Totals(32, torch.device("cpu")), make_peer(32)
    for _ in range(2):
        update_ours(totals, slot)
        peer.update(slot)
    metrics = compute(totals.vector)
    assert 0.1 < metrics.top1 < metrics.top5 < 1.0
    assert peer.compute() == pytest.approx([metrics.loss, metrics.top1, metrics.top5, metrics.macro_top1], abs=1e-6)


def test_the_index_and_its_peers_read_the_same_tars(pictures: Pictures) -> None:
    """Every sample is indexed, every byte is read, every tar has its digest."""
    paths = [pictures.split.shard_path(shard_index) for shard_index in range(len(pictures.split.shard_sizes))]
    assert index(paths) == NUM_PICTURES
    assert read(paths) == sum(shard.bytes for shard in pictures.split.manifest.shards)
    assert read_with_sha256(paths) == len(paths)


def test_measures_take_turns() -> None:
    """Each is measured once a repeat, and another one goes first each time."""
    order: list[str] = []
    results = interleave(
        [lambda repeat: order.append("a") or repeat, lambda repeat: order.append("b") or -repeat], repeats=3
    )
    assert order == list("abbaab")
    assert results == [[0, 1, 2], [0, -1, -2]]


def test_the_ratio_is_the_median_of_the_pairs() -> None:
    """One disturbed repeat moves neither the ratio nor the verdict; a missed goal is said aloud."""
    faster = compare("x", "ms", [1.0, 9.0, 1.0], [2.0, 9.0, 2.0], peer_name="peer", goal=Goal("at most", 0.5))
    slower = compare("x", "1/s", [1.0, 1.0], [2.0, 2.0], peer_name="peer", goal=Goal("at least", 1.0))
    assert faster.ratio == 0.5
    assert faster.is_reached
    assert not slower.is_reached
    alone = Finding("y", "MB", 51.0, "", None, None, Goal("at most", 50.0))
    lines = to_text([faster, slower, alone]).splitlines()
    assert [line.split()[-1] for line in lines] == ["reached", "yes", "NO", "NO"]


TINY = Load("test_vit", image_size=32, num_classes=10, batch_size=2)


def test_the_poll_is_measured_beside_the_step() -> None:
    """On one process and on two ranks, CPU and wall time; and two ranks have something to ask each other."""
    findings = bench_stop(TINY, repeats=1)
    assert [finding.unit for finding in findings] == ["CPU ms", "wall ms"] * 2
    assert findings[0].ours < findings[2].ours < findings[2].peer  # type: ignore[operator]


@pytest.mark.slow
def test_wandb_is_measured_beside_the_steps(capfd: pytest.CaptureFixture[str]) -> None:
    """Its threads and its process both spend something on rows; the stand-in is fresh for each way it answers."""
    findings = bench_report(TINY, repeats=1)
    assert [finding.unit for finding in findings] == ["CPU ms", "CPU ms", "wall ms"] * 2
    assert all(finding.ours > 0.1 for finding in findings)
    assert "going on offline" not in capfd.readouterr().err
