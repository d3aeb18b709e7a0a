"""Tars that others wrote become a dataset where they lie: the same pictures as from a folder, and no trap of theirs is silent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import build, digests_of, draw, fill

from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.index import FOREIGN_INDEX_DTYPE, ShardError
from aplantida_dist.data.manifest import Manifest, Shards, load_manifest
from aplantida_dist.data.stream import StreamError
from aplantida_dist.files import sha256_of_file
from aplantida_dist.shards.audit import sample_key_of
from aplantida_dist.shards.builder import BuildError
from aplantida_dist.shards.earlier import read_splits
from aplantida_dist.shards.folder import read_folder
from aplantida_dist.shards.tar_index import TarError
from aplantida_dist.shards.tars import read_tars
from aplantida_dist.shards.verify import verify_dataset
from tests.ranks import command_on_ranks
from tests.runs import write_config
from tests.tars import build_sources, build_tars, pack, read_dataset, read_split, sample, write_shards

COUNTS = {"Acer campestre": 21, "Betula pendula": 12, "Cornus mas": 6}
CLASS_NAMES = tuple(COUNTS)
SPLITS = ("train", "val", "test")


def pictures_of(folder: Path) -> list[tuple[str, bytes]]:
    """(class name, picture) of every file of a folder of classes, the classes mixed."""
    paths = sorted(folder.rglob("*.jpg"), key=lambda path: path.name)
    return [(path.parent.name, path.read_bytes()) for path in paths]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """39 pictures as folder/ and in four tars of ShardWriter, each built: from_folder and from_tars."""
    home = tmp_path_factory.mktemp("both")
    fill(home / "folder", COUNTS)
    samples = [
        {"jpg": picture, "cls": CLASS_NAMES.index(name), "json": {"latin_name": name, "number": number}}
        for number, (name, picture) in enumerate(pictures_of(home / "folder"))
    ]
    (home / "tars").mkdir()
    write_shards(str(home / "tars" / "train-%06d.tar"), samples, num_samples=10)
    build(home / "folder", home / "from_folder")
    before = digests_of(home / "tars")
    build_tars(home / "tars" / "train-{000000..000003}.tar", home / "from_tars")
    assert digests_of(home / "tars") == before
    return home


def manifests_of(dataset_dir: Path) -> dict[str, Manifest]:
    return {split: load_manifest(dataset_dir / split / "manifest.json") for split in SPLITS}


def test_a_dataset_of_tars_is_that_of_the_same_pictures_in_a_folder(both: Path) -> None:
    """Same classes, splits, identity digests and counts; only indexes are written; verification finds nothing wrong."""
    one, two = (manifests_of(both / name) for name in ("from_folder", "from_tars"))
    for split in SPLITS:
        for field in ("num_samples", "identity_digest", "class_counts", "class_map_digest"):
            assert getattr(one[split], field) == getattr(two[split], field), (split, field)
        assert all(shard.is_foreign for shard in two[split].shards)
    assert not list((both / "from_tars").rglob("*.tar"))
    assert sum(len(manifest.shards) for manifest in two.values()) > 4, "a tar is indexed by several splits"
    assert "are indexes onto tars that others wrote" in (both / "from_tars" / "report.md").read_text()
    verdict = verify_dataset(both / "from_tars")
    assert verdict.damages == ()
    assert verdict.num_samples == 39


@pytest.mark.parametrize("split", SPLITS)
def test_a_dataset_of_tars_streams_the_same_pictures(both: Path, split: str) -> None:
    """Key, class and every pixel; the metadata is the .json that lies beside the picture in the tar."""
    one, two = (read_split(both / name, split) for name in ("from_folder", "from_tars"))
    assert {key: found[:2] for key, found in one.items()} == {key: found[:2] for key, found in two.items()}
    pictures = pictures_of(both / "folder")
    for key, (name, _, metadata) in two.items():
        assert sample_key_of(pictures[metadata["number"]][1]) == key
        assert metadata["latin_name"] == name


def test_a_dataset_of_tars_trains_and_evaluates(both: Path, tmp_path: Path) -> None:
    """One epoch proves its coverage; the checkpoint predicts the same for each picture, whether it lies in a tar of others or in ours."""
    config = write_config(tmp_path / "config.yaml", both / "from_tars", epochs=1, num_workers=1)
    (trained,) = command_on_ranks(
        1, "aplantida_dist.train", ["--config", config, "--run-dir", tmp_path / "run"], tmp_path
    )
    assert trained.code == 0, trained.stderr
    row = json.loads((tmp_path / "run" / "history.jsonl").read_text())
    assert row["train"]["identity_digest"] == manifests_of(both / "from_folder")["train"].identity_digest
    predictions = []
    for name in ("from_folder", "from_tars"):
        path = tmp_path / f"{name}.jsonl"
        arguments = ["--run", tmp_path / "run", "--data", both / name, "--split", "test", "--predictions", path]
        (done,) = command_on_ranks(1, "aplantida_dist.evaluate", arguments, tmp_path)
        assert done.code == 0, done.stderr
        predictions.append({line["key"]: line for line in map(json.loads, path.read_text().splitlines())})
    one, two = predictions
    assert one.keys() == two.keys()
    for key, line in one.items():
        assert (line["label"], line["top5"]) == (two[key]["label"], two[key]["top5"])
        assert line["loss"] == pytest.approx(two[key]["loss"], rel=1e-4)


def test_splits_are_kept_of_and_by_a_dataset_of_tars(both: Path, tmp_path: Path) -> None:
    """--keep-splits reads content keys from the indexes alone, and they hold where the pictures come from a folder."""
    expected = read_splits(both / "from_folder")
    assert read_splits(both / "from_tars") == expected
    build(both / "folder", tmp_path / "again", seed=5, keep_splits_of=both / "from_tars")
    assert read_splits(tmp_path / "again") == expected


def test_a_manifest_digest_does_not_depend_on_where_the_tars_lie(both: Path) -> None:
    """Tars that moved are the same data: a run resumes. Manifests without foreign shards are written as ever."""
    manifest = manifests_of(both / "from_tars")["train"]
    moved = Shards(shard.model_copy(update={"url": "file:///elsewhere/x.tar"}) for shard in manifest.shards)
    assert manifest.model_copy(update={"shards": moved}).digest == manifest.digest
    assert "url" not in (both / "from_folder" / "train" / "manifest.json").read_text()


@pytest.fixture
def dataset(both: Path, tmp_path: Path) -> Path:
    """A dataset of two tars, to damage both."""
    pictures = pictures_of(both / "folder")
    for tar in range(2):
        files = [file for n, (name, _) in enumerate(pictures[:20]) for file in sample(f"k{n}", 100 * tar + n, name)]
        pack(tmp_path / "tars" / f"{tar}.tar", files)
    build_tars(tmp_path / "tars" / "*.tar", tmp_path / "set")
    return tmp_path / "set"


def reseal(dataset_dir: Path, edit: Callable[[Any], object]) -> None:
    """Change the first train index, and let the manifest tell its new digest."""
    path = dataset_dir / "train" / "shard-000000.idx"
    index = np.frombuffer(path.read_bytes(), dtype=FOREIGN_INDEX_DTYPE).copy()
    edit(index)
    path.write_bytes(index.tobytes())
    edit_manifest(dataset_dir, lambda m: m["shards"][0].update(index_sha256=sha256_of_file(path)))


def edit_manifest(dataset_dir: Path, edit: Callable[[Any], object]) -> None:
    path = dataset_dir / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def change_tar(dataset_dir: Path, edit: Callable[[bytes], bytes]) -> None:
    path = dataset_dir.parent / "tars" / "0.tar"
    path.write_bytes(edit(path.read_bytes()))


def column(name: str | list[str], change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A fault: the column of the index holds what `change` makes of the index."""
    return lambda dataset_dir: reseal(dataset_dir, lambda index: index.__setitem__(name, change(index)))


INDEX_0 = "train/shard-000000.idx"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tar gone": (lambda d: (d.parent / "tars/0.tar").unlink(), f"{INDEX_0}: the tar that it leads into is missing: "),
    "tar cut": (lambda d: change_tar(d, lambda c: c[:-20_000]), "bytes, the manifest says"),
    "tar grown": (lambda d: change_tar(d, lambda c: c + b"x"), "holds no tar header at byte"),
    "tar of another name": (lambda d: shutil.copy(d.parent / "tars/1.tar", d.parent / "tars/0.tar"), "0.tar its sha256 is not the manifest's"),
    "picture changed": (lambda d: change_tar(d, lambda c: c[:900] + b"?" + c[901:]), "0.tar its sha256 is not the manifest's"),
    "index gone": (lambda d: (d / INDEX_0).unlink(), f"{INDEX_0}: missing"),
    "index short": (lambda d: (d / INDEX_0).write_bytes(b"x"), f"{INDEX_0}: holds 1 bytes, expected"),
    "tar put beside": (lambda d: shutil.copy(d.parent / "tars/0.tar", d / "train/shard-000000.tar"), "train/shard-000000.tar: does not belong"),
    "url elsewhere": (lambda d: edit_manifest(d, lambda m: m["shards"][0].update(url="https://x/0.tar")), "train/manifest.json: shards.0.url: "),
    "offset": (column("offset", lambda i: i["offset"] + 1), f"{INDEX_0}: no member of the tar lies where the index says"),
    "length": (column("length", lambda i: i["length"] - 1), f"{INDEX_0}: no member of the tar lies where the index says"),
    "crc32": (column("crc32", lambda i: i["crc32"] ^ 1), f"{INDEX_0}: the crc32 of the image is not the index's"),
    "label": (column("label", lambda i: i["label"] + 9), f"{INDEX_0}: a label is none of the 2 classes"),
    "other label": (column("label", lambda i: 0), f"{INDEX_0}: its samples of each class are not as many as the manifest says"),
    "key": (column("key", lambda i: i["key"][::-1].copy()), f"{INDEX_0}: the key is not that of the image"),
    "metadata": (column("metadata_offset", lambda i: i["metadata_offset"] + 1), f"{INDEX_0}: no metadata lies where the index says"),
    "metadata is a picture": (
        column(["metadata_offset", "metadata_length"], lambda i: i[["offset", "length"]]), f"{INDEX_0}: no JSON lies where the index says",
    ),
    "order": (column(list(FOREIGN_INDEX_DTYPE.names or ()), lambda i: i[::-1].copy()), f"{INDEX_0}: its rows are not in the tar's order"),
    "row twice": (lambda d: reseal(d, lambda i: i.__setitem__(1, i[0])), f"{INDEX_0}: 1 sample keys stand in {INDEX_0} already"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_verification_finds_every_fault(dataset: Path, fault: str) -> None:
    """A tar that changed or vanished, and every column of its index, also where all digests agree."""
    assert verify_dataset(dataset).damages == ()
    plant, expected = FAULTS[fault]
    plant(dataset)
    damages = [str(damage) for damage in verify_dataset(dataset).damages]
    assert any(expected in damage for damage in damages), damages


def test_training_does_not_start_on_a_tar_that_vanished_or_changed(dataset: Path) -> None:
    """The split does not open, and names the tar; a tar changed at the same size stops the stream at its picture."""
    path = dataset.parent / "tars" / "0.tar"
    whole = path.read_bytes()
    row = np.frombuffer((dataset / INDEX_0).read_bytes(), dtype=FOREIGN_INDEX_DTYPE)[0]
    position = int(row["offset"]) + 300
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    with pytest.raises(StreamError, match=rf"0\.tar: sample {row['key'].tobytes().hex()} at offset \d+ has changed"):
        read_split(dataset, "train")
    path.write_bytes(whole + bytes(10240))
    with pytest.raises(ShardError, match=r"0\.tar: the shard has \d+ bytes, the manifest says"):
        open_dataset(dataset).open_split("train")
    path.unlink()
    with pytest.raises(ShardError, match=r"0\.tar: the shard is not there"):
        open_dataset(dataset).open_split("train")


@pytest.mark.parametrize("change", ["bytes", "gone"])
def test_a_tar_that_changes_while_it_is_built_from_is_an_error(tmp_path: Path, change: str) -> None:
    """The dataset is not there: its index would lead into another tar."""
    path = pack(tmp_path / "x.tar", [file for n in range(9) for file in sample(f"{n}", n)])
    source = read_tars(str(path), class_names=None)
    where = TarError if change == "bytes" else BuildError
    if change == "bytes":
        with path.open("ab") as file:
            file.write(bytes(10240))
    else:
        path.unlink()
    with pytest.raises(where, match="changed while the dataset was built" if change == "bytes" else "unreadable 9"):
        build_sources([source], tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_own_and_foreign_shards_stand_in_one_manifest(tmp_path: Path) -> None:
    """What comes from a folder is written, what lies in tars is indexed; the numbers of the shards go on."""
    fill(tmp_path / "folder", {"Acer": 20}, first=50)
    tar = pack(tmp_path / "x.tar", [file for n in range(20) for file in sample(f"{n}", n)])
    account = build_sources([read_folder(tmp_path / "folder"), read_tars(str(tar), class_names=None)], tmp_path / "set")
    assert (account.num_samples, account.num_files, account.counted) == (40, 40, "files and tar samples")
    shards = load_manifest(tmp_path / "set" / "train" / "manifest.json").shards
    assert [shard.is_foreign for shard in shards] == [False] * (len(shards) - 1) + [True]
    assert [shard.name for shard in shards] == [f"shard-{number:06d}.tar" for number in range(len(shards))]
    assert read_dataset(tmp_path / "set").keys() == {sample_key_of(draw(n)) for n in [*range(20), *range(50, 70)]}
    assert verify_dataset(tmp_path / "set").damages == ()
