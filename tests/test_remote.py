"""A dataset at an address, or behind a cache, is the dataset: the same history and weights as from its folder, to the last bit."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from aplantida_dist.config import Config
from aplantida_dist.config_file import load_config
from aplantida_dist.data.address import AddressError, place_of
from aplantida_dist.data.ahead import require_room_for_blocks
from aplantida_dist.data.cache import Cache
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.images import EvaluationTransform
from aplantida_dist.data.plan import Coordinates, PlanError, StoredPlan, TrainPlan
from aplantida_dist.data.stream import MicroBatches, Reading, stream
from aplantida_dist.errors import UserError
from aplantida_dist.recipe import dataset_of, plan_of
from aplantida_dist.resumes import RESUMES_FILE, read_resumes
from tests.laws import last_step, train
from tests.ranks import command_on_ranks
from tests.runs import cut_back, rows_of, write_config
from tests.shard_server import ShardServer, serve

BLOCK_SAMPLES = 16
"""Five blocks an epoch, each in two or three of the six shards."""


def same_run(one: Path, other: Path) -> bool:
    """The same rows but for the digest of the config, which holds the address, and the same weights."""
    rows = [
        [{**row, "digests": {**row["digests"], "config": ""}} for row in rows_of(run_dir)] for run_dir in (one, other)
    ]
    ours, theirs = (
        load_file(run_dir / "checkpoints" / f"step_{last_step(run_dir):08d}" / "model.safetensors")
        for run_dir in (one, other)
    )
    return rows[0] == rows[1] and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def cached(place: object, cache_dir: Path, *more: str) -> list[str]:
    return [f"data.dataset={place}", f"data.cache_dir={cache_dir}", *more]


@pytest.fixture(scope="module")
def config(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_config(tmp_path_factory.mktemp("remote") / "config.yaml", dataset_dir, epochs=2, num_workers=1)
    path.write_text(path.read_text().replace("data:\n", f"data:\n  block_samples: {BLOCK_SAMPLES}\n"))
    return path


@pytest.fixture(scope="module")
def local(config: Path) -> Path:
    """The run from the folder."""
    train(1, config, config.parent / "local")
    return config.parent / "local"


@pytest.fixture(scope="module")
def needed(config: Path, dataset_dir: Path) -> int:
    """The smallest cache of this config, as the error of a smaller one tells it."""
    told = loaded(config, *cached(dataset_dir, config.parent / "c", "data.cache_bytes=1"))
    split = dataset_of(told).open_split("train")
    with pytest.raises(PlanError) as error:
        require_room_for_blocks(split, plan_of(told, split), num_epochs=2)
    found = re.fullmatch(
        r"data.cache_bytes 1 is too little: a block of 16 samples and the next lie in shards of up to (\d+) bytes; "
        r"set data.cache_bytes to \1 or more, or lower data.block_samples in a new run",
        str(error.value),
    )
    assert found is not None, error.value
    return int(found[1])


def loaded(config: Path, *overrides: str) -> Config:
    return load_config(config, list(overrides))


@pytest.mark.slow
def test_a_cache_that_is_too_small_ends_the_command(
    config: Path, needed: int, dataset_dir: Path, tmp_path: Path
) -> None:
    """By one byte, before anything is brought."""
    overrides = cached(dataset_dir, tmp_path / "cache", f"data.cache_bytes={needed - 1}")
    arguments = ["--config", config, "--run-dir", tmp_path / "run", *overrides]
    (finished,) = command_on_ranks(1, "aplantida_dist.train", arguments, tmp_path)
    assert finished.code == 2
    assert f"set data.cache_bytes to {needed} or more" in finished.stderr
    assert not list(tmp_path.glob("cache/*.cached"))


@pytest.fixture
def server(dataset_dir: Path) -> Iterator[ShardServer]:
    with serve(dataset_dir) as server:
        yield server


def whole_bytes(dataset_dir: Path) -> int:
    return sum(path.stat().st_size for path in dataset_dir.glob("train/shard-*"))


def test_a_run_from_an_address_is_the_run_from_the_folder(
    config: Path, local: Path, needed: int, server: ShardServer, dataset_dir: Path, tmp_path: Path
) -> None:
    """On a cache of as many bytes as the error of a smaller one asks for, fewer than the dataset has."""
    assert needed < whole_bytes(dataset_dir)
    train(1, config, tmp_path / "run", *cached(server.url, tmp_path / "cache", f"data.cache_bytes={needed}"))
    assert same_run(local, tmp_path / "run")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".cached"]


@pytest.mark.slow
def test_two_ranks_on_the_smallest_cache_agree_with_the_folder(
    config: Path, local: Path, needed: int, server: ShardServer, tmp_path: Path
) -> None:
    """Each a little before or behind the other at the end of a block."""
    two = tmp_path / "two"
    train(2, config, two, *cached(server.url, tmp_path / "cache", f"data.cache_bytes={needed}", "data.num_workers=2"))
    for ours, theirs in zip(rows_of(local), rows_of(two), strict=True):
        assert ours["train"]["identity_digest"] == theirs["train"]["identity_digest"]
        assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_two_ranks_bring_a_shard_once(config: Path, server: ShardServer, tmp_path: Path) -> None:
    """And an epoch over what the cache holds brings nothing."""
    train(2, config, tmp_path / "run", *cached(server.url, tmp_path / "cache"))
    shards = {path: count for path, count in server.num_requests.items() if "/shard-" in path}
    assert len(shards) == 2 * 7
    assert set(shards.values()) == {1}


@pytest.mark.slow
def test_a_folder_is_cached_too_and_a_resume_may_change_the_place(
    config: Path, local: Path, dataset_dir: Path, server: ShardServer, tmp_path: Path
) -> None:
    """From the folder by way of a cache; cut back in mid-epoch, the run goes on from an address as if nothing had happened."""
    run_dir = tmp_path / "run"
    often = ("checkpoint.every_steps=1", "checkpoint.keep_last=100")
    train(1, config, run_dir, *cached(dataset_dir, tmp_path / "cache"), *often)
    assert same_run(local, run_dir)
    cut_back(run_dir, step=7)
    said = train(1, config, run_dir, *cached(server.url, tmp_path / "other"), *often)
    assert "going on from step 7" in said
    rows = rows_of(run_dir)
    assert rows[0]["train"] == rows_of(local)[0]["train"]
    assert rows[1]["train"] == rows_of(local)[1]["train"]
    assert read_resumes(run_dir / RESUMES_FILE)[0].changed.keys() == {"data.dataset", "data.cache_dir"}


@pytest.mark.slow
def test_a_run_from_a_bucket_is_the_run_from_the_folder(
    config: Path, local: Path, dataset_dir: Path, tmp_path: Path, bucket: str
) -> None:
    """S3, as moto serves it; then its evaluation."""
    train(1, config, tmp_path / "run", *cached(bucket, tmp_path / "cache"))
    assert same_run(local, tmp_path / "run")
    results = []
    for place in (bucket, dataset_dir):
        arguments = ["--run", tmp_path / "run", "--data", place, "--json", tmp_path / "test.json"]
        (finished,) = command_on_ranks(1, "aplantida_dist.evaluate", arguments, tmp_path)
        assert finished.code == 0, finished.stderr
        results.append((tmp_path / "test.json").read_text())
    assert results[0] == results[1]


@pytest.fixture
def bucket(dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The dataset in a bucket, whose server is named in the environment."""
    moto_server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="leaves")
    for path in dataset_dir.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "leaves", f"small/{path.relative_to(dataset_dir)}")
    yield "s3://leaves/small"
    server.stop()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_was_poisoned_in_the_cache_is_brought_again(
    num_workers: int, dataset_dir: Path, tmp_path: Path
) -> None:
    """Under its length and time stamp, so that only the samples tell; each is delivered, and the shard has come a second time."""
    cache = Cache(tmp_path / "cache", max_bytes=2**30, patience_s=5.0)
    split = open_dataset(dataset_dir, cache=cache).open_split("train")
    path = cache.bring(split.tar_item(2))
    sound, state = path.read_bytes(), path.stat()
    path.write_bytes(bytes(byte ^ 0x55 for byte in sound))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    transform = EvaluationTransform(32, 1.0, "bicubic")
    plan = StoredPlan(split.shard_sizes, 4)
    slots = [Coordinates(0, 0, slot) for slot in range(plan.num_slots)]
    batches = list(
        stream(MicroBatches(split, plan, transform, seed=0), slots, reading=Reading(num_workers, 2, pin_memory=False))
    )
    assert sum(float(batch.weights.sum()) for batch in batches) == 69
    assert cache.path_of(split.tar_item(2)).read_bytes() == sound


@pytest.mark.parametrize(
    ("sizes", "block_samples"),
    [((13, 13, 0, 13, 30, 0, 1), 16), ((5,) * 9, 7), ((70,), 100), ((3, 0, 0, 4), 1), ((2, 2), 4)],
)
def test_a_block_names_the_shards_of_its_samples(sizes: tuple[int, ...], block_samples: int) -> None:
    """Exactly those, for every block of three epochs; and each step the blocks that its samples are in."""
    plan = TrainPlan(np.array(sizes), seed=3, global_batch_size=6, micro_batch_size=2, block_samples=block_samples)
    read: dict[int, set[int]] = {}
    for epoch in range(3):
        for step in range(plan.steps_per_epoch):
            first, last = plan.blocks_of(Coordinates(epoch, step, 0))
            for slot in range(plan.slots_per_step):
                micro_batch = plan.micro_batch(Coordinates(epoch, step, slot))
                positions = step * 6 + (slot * 2 + np.arange(2)) % plan.samples_in_step(step)
                for position, shard in zip(positions.tolist(), micro_batch.shard_indices.tolist(), strict=True):
                    block = epoch * plan.blocks_per_epoch + position // block_samples
                    assert first <= block <= last
                    read.setdefault(block, set()).add(shard)
    assert read == {block: set(plan.shards_of_block(block).tolist()) for block in range(3 * plan.blocks_per_epoch)}


def test_stored_blocks_name_the_shards_of_their_samples() -> None:
    """Of the slots of evaluation, the empty ones aside."""
    plan = StoredPlan(np.array([3, 0, 5, 1, 1, 2, 2, 2, 2, 4, 1, 9, 0, 1, 1, 1, 1, 1, 7]), 4)
    for slot in range(plan.num_slots):
        first, last = plan.blocks_of(Coordinates(0, 0, slot))
        live = {shard for block in range(first, last + 1) for shard in plan.shards_of_block(block).tolist()}
        micro_batch = plan.micro_batch(Coordinates(0, 0, slot))
        assert set(micro_batch.shard_indices[micro_batch.weights > 0].tolist()) <= live
    assert plan.blocks_of(Coordinates(0, 0, plan.num_slots + 1)) == plan.blocks_of(
        Coordinates(0, 0, plan.num_slots - 1)
    )


@pytest.mark.parametrize(
    ("dataset", "told"),
    [
        ("pipe:cat /etc/passwd", "a path, or an address of s3, gs, http, https"),
        ("ftp://host/leaves", "a path, or an address of s3, gs, http, https"),
        ("s3://KEYID:HIDDENSECRET@bucket/leaves", "a user, a password or a query"),
        ("https://host/leaves?X-Amz-Signature=HIDDENSECRET", "a user, a password or a query"),
    ],
)
def test_an_address_that_is_not_read_is_refused(dataset: str, told: str, config: Path) -> None:
    """With the config's other faults; nothing that lets its bearer in is shown."""
    for refused in (
        lambda: load_config(config, [f"data.dataset={dataset}", "data.cache_dir=x"]),
        lambda: place_of(dataset),
    ):
        with pytest.raises(UserError) as error:
            refused()
        assert "HIDDENSECRET" not in str(error.value)
    with pytest.raises(UserError, match=told):
        load_config(config, [f"data.dataset={dataset}", "data.cache_dir=x"])


def test_an_address_needs_a_cache(config: Path) -> None:
    """Told before anything is asked of the server."""
    with pytest.raises(
        UserError,
        match=r"data.cache_dir: found null, expected a folder on this machine's own disk where data.dataset is an address",
    ):
        load_config(config, ["data.dataset=s3://leaves/small"])


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what installs it."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(AddressError, match=r"gs:// cannot be read here \(.*\); run `pip install '\.\[remote\]'`"):
        (place_of("gs://leaves/small") / "classes.json").read_bytes()


def test_a_place_without_a_dataset_is_told(server: ShardServer, tmp_path: Path) -> None:
    """As for a folder."""
    with pytest.raises(UserError, match=r"http://.*/none: no dataset here \(no classes.json\)"):
        open_dataset(place_of(f"{server.url}/none"), cache=Cache(tmp_path, 1, 1.0))


def test_identities_beside_the_manifest_spare_reading_every_shard(
    dataset_dir: Path, server: ShardServer, tmp_path: Path
) -> None:
    """They are those of the tar headers, whole and limited, from an address and in a folder; others than the manifest's are refused."""
    cache = Cache(tmp_path / "cache", 2**30, 1.0)
    shutil.copytree(dataset_dir, tmp_path / "earlier", ignore=shutil.ignore_patterns("identities.bin"))
    shutil.copytree(dataset_dir, tmp_path / "hollow")
    for tar in (tmp_path / "hollow").glob("*/shard-*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    for max_samples in (None, 20):
        from_headers, hollow, remote = (
            open_dataset(place, cache=its_cache).open_split("train", max_samples=max_samples)
            for place, its_cache in (
                (tmp_path / "earlier", None),
                (tmp_path / "hollow", None),
                (place_of(server.url), cache),
            )
        )
        assert np.array_equal(from_headers.identities, remote.identities)
        assert np.array_equal(from_headers.identities, hollow.identities)
        assert from_headers.identity_digest == hollow.identity_digest == remote.identity_digest
    with pytest.raises(UserError, match="no tar header"):
        hollow.sample_keys(0)
    assert not [path for path in server.num_requests if "/shard-" in path]
    damaged = tmp_path / "damaged"
    (damaged / "train").mkdir(parents=True)
    for name in ("classes.json", "train/manifest.json"):
        (damaged / name).write_bytes((dataset_dir / name).read_bytes())
    with serve(damaged) as other:
        split = open_dataset(place_of(other.url), cache=cache).open_split("train")
        with pytest.raises(UserError, match=r"train/identities.bin: is not there; without it every shard"):
            _ = split.identities
        content = (dataset_dir / "train" / "identities.bin").read_bytes()
        (damaged / "train" / "identities.bin").write_bytes(content[:-1] + b"\0")
        with pytest.raises(
            UserError, match=r"train/identities.bin: does not hold the identities that the manifest sums up"
        ):
            _ = split.identities
