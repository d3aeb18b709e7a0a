"""The builder: nothing is lost silently, nothing leaks, the same pictures give the same bytes."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import pytest
from pictures import build, digests_of, draw, fill, put

from aplantida_dist import pace
from aplantida_dist.data.classmap import ClassMap, load_class_map
from aplantida_dist.data.index import read_index, read_member
from aplantida_dist.data.manifest import load_manifest
from aplantida_dist.errors import UserError
from aplantida_dist.pace import with_pace
from aplantida_dist.shards.account import Account
from aplantida_dist.shards.audit import Candidate, Picture, audit_picture, sample_key_of
from aplantida_dist.shards.builder import BuildError, read_samples
from aplantida_dist.shards.folder import FolderError, read_folder
from aplantida_dist.shards.lines import LineError
from aplantida_dist.shards.placement import PlacementError
from aplantida_dist.shards.second_reading import ChangedError
from aplantida_dist.shards.writer import Sample, ShardLimits, WriterError, write_split

ROOT = Path(__file__).parents[1]


def run_build(
    *arguments: str | Path, env: dict[str, str] | None = None, file_limit_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""

    def limit_files() -> None:
        if file_limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit_bytes, file_limit_bytes))

    return subprocess.run(
        [sys.executable, ROOT / "shards" / "build.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit_files,
    )


def samples_of(dataset_dir: Path, split: str) -> dict[str, dict[str, bytes]]:
    """sample key → suffix → content, over the shards of a split in their order."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted((dataset_dir / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, suffix = member.name.split(".")
                samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return samples


def keys_of(account: Account, dataset_dir: Path) -> dict[str, set[str]]:
    return {manifest.split: set(samples_of(dataset_dir, manifest.split)) for manifest in account.manifests}


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims these sides and holds nearly nothing: what a decompression bomb looks like."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def plant_every_defect(folder: Path) -> dict[str, str]:
    """A folder of splits with sound pictures and each defect at least once; returns source → reason of what must be left out."""
    first = fill(folder / "train", {"birch": 4, "oak": 3})
    fill(folder / "validation", {"birch": 2, "oak": 1}, first=first)
    fill(folder / "test", {"birch": 1, "oak": 2}, first=first + 3)
    put(folder / "LICENSE", b"CC0")
    put(folder / "train" / "notes.txt", b"in a split, in no class")
    put(folder / "train" / "oak" / "empty.jpg", b"")
    put(folder / "train" / "oak" / "error page.jpg", b"<html>404</html>")
    put(folder / "train" / "oak" / "moving.jpg", draw(900, image_format="GIF"))
    put(folder / "train" / "oak" / "cut.jpg", draw(901)[:-60])
    put(folder / "train" / "oak" / "cut.png", draw(902, image_format="PNG")[:-200])
    put(folder / "train" / "oak" / "bomb.png", png_of_size(60_000, 60_000))
    put(folder / "train" / "oak" / "large.png", png_of_size(10_001, 10_000))
    (folder / "train" / "oak" / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    os.mkfifo(folder / "train" / "oak" / "pipe.jpg")
    put(folder / "train" / "oak" / "z copy.jpg", draw(4))
    put(folder / "train" / "birch" / "also in test.jpg", draw(10))
    put(folder / "validation" / "birch" / "also in test.jpg", draw(10))
    put(folder / "train" / "birch" / "also in val.jpg", draw(7))
    put(folder / "train" / "birch" / "both.jpg", draw(903))
    put(folder / "test" / "oak" / "both.jpg", draw(903))
    return {
        "LICENSE": "outside_classes",
        "train/notes.txt": "outside_classes",
        "train/oak/empty.jpg": "not_a_picture",
        "train/oak/error page.jpg": "not_a_picture",
        "train/oak/pipe.jpg": "not_a_picture",
        "train/oak/moving.jpg": "other_format",
        "train/oak/cut.jpg": "undecodable",
        "train/oak/cut.png": "undecodable",
        "train/oak/bomb.png": "too_large",
        "train/oak/large.png": "too_large",
        "train/oak/gone.jpg": "unreadable",
        "train/oak/z copy.jpg": "duplicate",
        "train/birch/also in test.jpg": "leak",
        "validation/birch/also in test.jpg": "leak",
        "train/birch/also in val.jpg": "leak",
        "train/birch/both.jpg": "conflicting_labels",
        "test/oak/both.jpg": "conflicting_labels",
    }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_file_is_written_or_left_out_for_its_reason(tmp_path: Path, num_workers: int) -> None:
    """Files in = samples written + files left out, by reason, with every reason planted; and the report says so."""
    expected = plant_every_defect(tmp_path / "dirty")
    account = build(tmp_path / "dirty", tmp_path / "set", num_workers=num_workers)
    assert {left_out.source: left_out.reason for left_out in account.left_out} == expected
    num_files = sum(not path.is_dir() for path in (tmp_path / "dirty").rglob("*"))
    assert account.num_files == num_files == account.num_samples + len(expected)
    assert {manifest.split: manifest.num_samples for manifest in account.manifests} == {"train": 7, "val": 3, "test": 3}
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["left_out_by_reason"] == account.left_out_by_reason
    assert report["num_files"] == report["num_samples"] + report["num_left_out"]
    assert sum(report["left_out_by_reason"].values()) == len(report["left_out"]) == len(expected)
    markdown = (tmp_path / "set" / "report.md").read_text()
    assert all(f"`{source}`" in markdown for source in expected)


@pytest.mark.parametrize("with_splits", [False, True])
def test_no_photograph_stands_in_two_splits(tmp_path: Path, with_splits: bool) -> None:
    """Equal bytes under several names, in one split or in several, become one sample; of test, val, train the first keeps it."""
    source, names = tmp_path / "source", ["train", "val", "test"]
    for number in range(12):
        for copy in range(3):
            inside = source / names[copy] if with_splits else source
            put(inside / f"class {number % 2}" / f"{number}-{copy}.jpg", draw(number))
    for number in (100, 101):
        for split in names if with_splits else [""]:
            put(source / split / f"class {number % 2}" / f"{number}-{split}.jpg", draw(number + 10 * len(split)))
    account = build(source, tmp_path / "set")
    keys = keys_of(account, tmp_path / "set")
    assert sum(map(len, keys.values())) == len(set.union(*keys.values())) == account.num_samples
    assert account.left_out_by_reason["leak" if with_splits else "duplicate"] >= 24
    if with_splits:
        assert {sample_key_of(draw(number)) for number in range(12)} <= keys["test"]


def test_build_depends_on_the_pictures_alone(tmp_path: Path) -> None:
    """The same bytes come out whatever the order and age of the files, the number of workers, the locale and the place."""
    plant_every_defect(tmp_path / "a" / "leaves")
    build(tmp_path / "a" / "leaves", tmp_path / "one", num_workers=0)
    paths = [path for path in (tmp_path / "a" / "leaves").rglob("*") if not path.is_dir()]
    random.Random(1).shuffle(paths)
    for path in paths:
        copy = tmp_path / "b" / "leaves" / path.relative_to(tmp_path / "a" / "leaves")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            copy.symlink_to("nowhere")
        elif path.is_file():
            copy.write_bytes(path.read_bytes())
            os.utime(copy, (1, 1))
            copy.chmod(0o600)
        else:
            os.mkfifo(copy)
    arguments = ("--from-folder", tmp_path / "b" / "leaves", "--out", tmp_path / "two", "--workers", "2")
    done = run_build(*arguments, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "two")


def test_the_seed_decides_split_and_order(tmp_path: Path) -> None:
    """Another seed gives another split and order, of the same photographs and classes."""
    fill(tmp_path / "source", {"birch": 20, "oak": 20})
    first = build(tmp_path / "source", tmp_path / "one", seed=1)
    build(tmp_path / "source", tmp_path / "two", seed=2)
    one, two = (list(samples_of(tmp_path / name, "train")) for name in ("one", "two"))
    assert set(one) != set(two)
    common = [key for key in one if key in two]
    assert common != [key for key in two if key in one]
    assert keys_of(first, tmp_path / "one")["train"] == set(one)


def test_classes_are_mixed_in_the_shards(tmp_path: Path) -> None:
    """A reader that takes shards as they come sees every class in each full one of them."""
    fill(tmp_path / "source", {"birch": 50, "oak": 50})
    account = build(tmp_path / "source", tmp_path / "set", limits=ShardLimits(num_samples=20))
    assert all(len(shard.class_counts) == 2 for shard in account.manifests[0].shards[:-1])


def test_given_splits_are_kept(tmp_path: Path) -> None:
    """train/ and validation/ without test/ give train and val, with the classes of train, also one that val lacks."""
    first = fill(tmp_path / "source" / "train", {"Ölbaum": 3, "a": 2, "Z": 1})
    fill(tmp_path / "source" / "validation", {"a": 2}, first=first)
    account = build(tmp_path / "source", tmp_path / "set")
    assert [(manifest.split, manifest.num_samples) for manifest in account.manifests] == [("train", 6), ("val", 2)]
    assert sorted(path.name for path in (tmp_path / "set").iterdir() if path.is_dir()) == ["train", "val"]
    class_map = load_class_map(tmp_path / "set" / "classes.json")
    assert class_map.class_names == ("Z", "a", "Ölbaum")
    for split in ("train", "val"):
        manifest = load_manifest(tmp_path / "set" / split / "manifest.json")
        assert manifest.class_map_digest == class_map.digest
        assert all(sample["cls"] == b"1" for sample in samples_of(tmp_path / "set", "val").values())


def test_suffix_comes_from_the_bytes(tmp_path: Path) -> None:
    """A PNG that is called .jpg is stored as .png: what a reader decodes does not depend on a wrong name."""
    put(tmp_path / "source" / "oak" / "a.JPEG", draw(1))
    put(tmp_path / "source" / "oak" / "b.jpg", draw(2, image_format="PNG"))
    put(tmp_path / "source" / "oak" / "deeper" / "c", draw(3, image_format="WEBP"))
    account = build(tmp_path / "source", tmp_path / "set")
    suffixes = {}
    for manifest in account.manifests:
        for key, sample in samples_of(tmp_path / "set", manifest.split).items():
            suffixes[key] = set(sample) - {"cls", "json"}
    expected = {draw(1): "jpg", draw(2, image_format="PNG"): "png", draw(3, image_format="WEBP"): "webp"}
    assert suffixes == {sample_key_of(content): {suffix} for content, suffix in expected.items()}


def test_metadata_lines_become_the_json_of_their_samples(tmp_path: Path) -> None:
    """A line is kept whole but for image_path; what it does not say the folder says; strays on both sides are counted."""
    source = tmp_path / "source"
    fill(source, {"oak": 3})
    lines = [
        {"image_path": "oak/0.jpg", "latin_name": "Quercus robur", "license": "cc-by", "plant_id": 7, "region": None},
        {"image_path": "./oak/1.jpg", "common_name": "Stieleiche, große"},
        {"image_path": "oak/no such.jpg"},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    put(source / "metadata.jsonl", f"{text}\n\n".encode())
    account = build(source, tmp_path / "set")
    assert account.num_files == account.num_samples == 3
    assert account.metadata is not None
    assert account.metadata.unmatched == ((3, "oak/no such.jpg"),)
    assert account.metadata.num_files_without_line == 1
    found = {}
    for manifest in account.manifests:
        for key, sample in samples_of(tmp_path / "set", manifest.split).items():
            found[key] = json.loads(sample["json"])
    assert found == {
        sample_key_of(draw(0)): {
            "latin_name": "Quercus robur", "license": "cc-by", "plant_id": 7, "region": None, "image_source": "oak/0.jpg",
        },
        sample_key_of(draw(1)): {"common_name": "Stieleiche, große", "latin_name": "oak", "image_source": "oak/1.jpg"},
        sample_key_of(draw(2)): {"latin_name": "oak", "image_source": "oak/2.jpg"},
    }  # fmt: skip
    assert "no such.jpg" in (tmp_path / "set" / "report.md").read_text()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"image_path": "oak/0.jpg"', "line 2"),
        (b'["oak/0.jpg"]', "line 2"),
        (b'{"image_path": 3}', "line 2"),
        (b'{"image_path": "oak/1.jpg", "region": NaN}', "line 2"),
        (b'{"image_path": "oak/1.jpg", "region": "\xff"}', "line 2"),
        (b'{"image_path": "oak/1.jpg", "region": "\\ud800"}', "line 2"),
        (b'{"image_path": "oak//0.jpg"}', "lines 1 and 2"),
    ],
)
def test_malformed_metadata_is_an_error_with_its_line(tmp_path: Path, line: bytes, says: str) -> None:
    """No line of the metadata is skipped because it could not be understood."""
    fill(tmp_path / "source", {"oak": 2})
    put(tmp_path / "source" / "metadata.jsonl", b'{"image_path": "oak/0.jpg"}\n' + line + b"\n")
    with pytest.raises((FolderError, LineError), match=says):
        build(tmp_path / "source", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def lay_out(folder: Path, *files: str) -> None:
    for number, name in enumerate(files):
        put(folder / name, draw(number)) if name.endswith(".jpg") else (folder / name).mkdir(parents=True)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ((), "no class folder with a file"),
        (("a.jpg", "b.jpg"), "no class folder with a file"),
        (("oak",), "no class folder with a file"),
        (("train/oak/0.jpg", "val/oak/1.jpg", "val/Oka/2.jpg", "test/Birhc/3.jpg"), "2 classes .* unknown to train: Birhc, Oka"),
        (("train/oak/0.jpg", "oak/1.jpg"), "beside them, oak"),
        (("val/oak/0.jpg",), "no train/"),
        (("train/oak/0.jpg", "val/oak/1.jpg", "validation/oak/2.jpg"), "both val/ and validation/"),
        (("train/oak/0.jpg", "val/oak"), "not one picture of val"),
    ],
)  # fmt: skip
def test_a_layout_that_is_not_understood_is_an_error(tmp_path: Path, files: tuple[str, ...], says: str) -> None:
    """A guess about the layout would change what is trained on."""
    (tmp_path / "source").mkdir()
    lay_out(tmp_path / "source", *files)
    with pytest.raises(UserError, match=says):
        build(tmp_path / "source", tmp_path / "set")
    assert list(tmp_path.iterdir()) == [tmp_path / "source"]


def test_a_class_that_loses_its_train_pictures_to_test_is_an_error(tmp_path: Path) -> None:
    """The copy in test stays, so nothing is left to learn the class from: an error that names it."""
    fill(tmp_path / "source" / "train", {"birch": 2})
    for split in ("train", "test"):
        put(tmp_path / "source" / split / "oak" / "one.jpg", draw(50))
    with pytest.raises(BuildError, match=r"unknown to train, .*\(oak: 1 in test\)"):
        build(tmp_path / "source", tmp_path / "set")


def test_links_are_followed_and_loops_are_an_error(tmp_path: Path) -> None:
    """A subset made of links is a folder like any other; a link that never ends is named."""
    fill(tmp_path / "all", {"birch": 2, "oak": 3})
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "oak").symlink_to(tmp_path / "all" / "oak")
    assert len(read_folder(tmp_path / "source").records) == 3
    (tmp_path / "all" / "oak" / "up").symlink_to(tmp_path / "all" / "oak")
    with pytest.raises(FolderError, match="leads back"):
        read_folder(tmp_path / "source")


def test_names_that_are_not_utf8_are_accepted(tmp_path: Path) -> None:
    """A file name is bytes to the file system; in reports and KEY.json it is always valid text."""
    fill(tmp_path / "source", {"oak": 1})
    put(Path(os.fsdecode(os.fsencode(tmp_path / "source" / "oak") + b"/\xe4.jpg")), draw(5))
    account = build(tmp_path / "source", tmp_path / "set")
    assert account.num_samples == 2
    texts = [
        json.loads(sample["json"])["image_source"]
        for manifest in account.manifests
        for sample in samples_of(tmp_path / "set", manifest.split).values()
    ]
    assert sorted(texts) == ["oak/0.jpg", "oak/\\xe4.jpg"]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 100])
def test_shards_end_at_their_limits(tmp_path: Path, num_samples: int) -> None:
    """No shard holds more samples than asked for, and all but the last hold exactly so many."""
    samples = [Sample(f"{number:024x}", "jpg", bytes(600), number % 3, b"{}") for number in range(10)]
    manifest = write_split(
        samples, tmp_path / "train", split="train", class_map_digest="0", limits=ShardLimits(num_samples=num_samples)
    )
    sizes = [shard.num_samples for shard in manifest.shards]
    assert sum(sizes) == 10
    assert all(size == num_samples for size in sizes[:-1])
    assert 0 < sizes[-1] <= num_samples


def test_shards_end_before_they_are_too_long(tmp_path: Path) -> None:
    """The bytes of a shard's members stay within the limit, but for a sample that is longer by itself."""
    samples = [
        Sample(f"{number:024x}", "jpg", bytes(size), 0, b"{}") for number, size in enumerate([600] * 6 + [9000, 1])
    ]
    limits = ShardLimits(num_bytes=2 * 3584)
    manifest = write_split(samples, tmp_path / "train", split="train", class_map_digest="0", limits=limits)
    assert [shard.num_samples for shard in manifest.shards] == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("limits", [{"num_samples": 0}, {"num_bytes": 0}])
def test_empty_shards_are_refused(limits: dict[str, int]) -> None:
    """A limit that no sample fits is an error, not an endless row of empty shards."""
    with pytest.raises(WriterError, match="at least 1"):
        ShardLimits(**limits)


def test_shards_are_the_bytes_of_the_standard_library(tmp_path: Path) -> None:
    """A shard is what `tarfile` writes in USTAR format, byte for byte, with every field that could vary at zero."""
    samples = [
        Sample(f"{number:024x}", "png", bytes([number]) * (number * 300), number, b'{"a":1}') for number in range(9)
    ]
    write_split(samples, tmp_path / "train", split="train", class_map_digest="0", limits=ShardLimits())
    with tarfile.open(tmp_path / "expected.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for suffix, content in (("png", sample.image), ("cls", b"%d" % sample.label), ("json", sample.metadata)):
                member = tarfile.TarInfo(f"{sample.sample_key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert (tmp_path / "train" / "shard-000000.tar").read_bytes() == (tmp_path / "expected.tar").read_bytes()


def test_the_index_leads_to_every_image(tmp_path: Path) -> None:
    """Each row of an index gives the bytes whose sha256 is the sample's key, and the label that KEY.cls says."""
    fill(tmp_path / "source", {"birch": 12, "oak": 9})
    build(tmp_path / "source", tmp_path / "set", limits=ShardLimits(num_samples=5))
    for split in ("train", "val", "test"):
        samples = samples_of(tmp_path / "set", split)
        keys = []
        for shard in load_manifest(tmp_path / "set" / split / "manifest.json").shards:
            path = tmp_path / "set" / split / shard.name
            descriptor = os.open(path, os.O_RDONLY)
            index = read_index(path.with_suffix(".idx"), num_samples=shard.num_samples, sha256=shard.index_sha256)
            for entry in index:
                member = read_member(descriptor, entry, shard_path=path)
                assert sample_key_of(member.content) == member.sample_key
                assert int(samples[member.sample_key]["cls"]) == entry["label"]
                keys.append(member.sample_key)
            os.close(descriptor)
        assert keys == list(samples)


def test_a_picture_that_changes_underneath_is_an_error(tmp_path: Path) -> None:
    """What was audited is what is written, or nothing is."""
    path = put(tmp_path / "source" / "oak" / "0.jpg", draw(0))
    (record,) = read_folder(tmp_path / "source").records
    picture = audit_picture(record.place.read(), with_looks=False)
    assert isinstance(picture, Picture)
    members = [Candidate(record, picture)]
    assert [sample.image for sample in read_samples(members, ClassMap(("oak",)))] == [draw(0)]
    path.write_bytes(draw(1))
    with pytest.raises(ChangedError, match="changed while"):
        list(read_samples(members, ClassMap(("oak",))))
    path.unlink()
    with pytest.raises(ChangedError, match="cannot be read any more"):
        list(read_samples(members, ClassMap(("oak",))))


def test_a_dataset_is_replaced_only_when_asked(tmp_path: Path) -> None:
    """--out must be free; --replace swaps a dataset, and never deletes a folder that holds anything else."""
    fill(tmp_path / "source", {"oak": 3})
    build(tmp_path / "source", tmp_path / "set")
    before = digests_of(tmp_path / "set")
    fill(tmp_path / "source", {"birch": 3}, first=10)
    with pytest.raises(PlacementError, match="--replace"):
        build(tmp_path / "source", tmp_path / "set")
    assert digests_of(tmp_path / "set") == before
    put(tmp_path / "set" / "thesis.tex", b"ten years of work")
    with pytest.raises(PlacementError, match=r"thesis\.tex"):
        build(tmp_path / "source", tmp_path / "set", replace=True)
    (tmp_path / "set" / "thesis.tex").unlink()
    build(tmp_path / "source", tmp_path / "set", replace=True)
    assert digests_of(tmp_path / "set") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "source"]


@pytest.mark.parametrize("out", ["source/set", ".", "source"])
def test_pictures_and_dataset_lie_apart(tmp_path: Path, out: str) -> None:
    """A dataset among the pictures would be read by the next build, and a replacement around them would delete them."""
    fill(tmp_path / "source", {"oak": 3})
    with pytest.raises(PlacementError, match="apart"):
        build(tmp_path / "source", tmp_path / out, replace=True)


def test_a_failed_build_leaves_the_old_dataset_alone(tmp_path: Path) -> None:
    """A disk that fills up in the middle is one line and exit code 2; what stood there still stands, and nothing beside it."""
    fill(tmp_path / "source", {"oak": 30})
    build(tmp_path / "source", tmp_path / "set")
    before = digests_of(tmp_path / "set")
    arguments = ("--from-folder", tmp_path / "source", "--out", tmp_path / "set", "--replace", "--workers", "0")
    failed = run_build(*arguments, file_limit_bytes=20_000)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "make room" in failed.stderr
    assert digests_of(tmp_path / "set") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "source"]


def test_a_killed_build_leaves_no_dataset(tmp_path: Path) -> None:
    """kill -9 while shards are written: no dataset under the name, and the next build starts clean and says so."""
    fill(tmp_path / "source", {"oak": 120})
    arguments = [
        "--from-folder", tmp_path / "source", "--out", tmp_path / "set", "--workers", "0", "--shard-samples", "1",
    ]  # fmt: skip
    command = [sys.executable, ROOT / "shards" / "build.py", *arguments]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline_s = time.monotonic() + 60
    while not list(tmp_path.glob(".set.partial-*/train/shard-000002.tar")):
        assert process.poll() is None, "the build ended before it could be killed"
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "set").exists()
    done = run_build(*arguments)
    assert done.returncode == 0, done.stderr
    assert "starting clean" in done.stderr
    assert json.loads((tmp_path / "set" / "report.json").read_text())["num_samples"] == 120


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the children of a process from /proc")
def test_workers_end_with_a_killed_build(tmp_path: Path) -> None:
    """kill -9 of the build while its workers decode leaves no process behind."""
    fill(tmp_path / "source", {"oak": 40})
    large = draw(0, width=2000, height=1500)
    for number in range(40):
        put(tmp_path / "source" / "oak" / f"large {number}.jpg", large + bytes([number]))
    command = [
        sys.executable,
        ROOT / "shards" / "build.py",
        "--from-folder",
        tmp_path / "source",
        "--out",
        tmp_path / "set",
    ]
    process = subprocess.Popen([*command, "--workers", "2"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    children: list[str] = []
    while len(children) < 3:  # the resource tracker of multiprocessing and two workers
        assert process.poll() is None, "the build ended before it could be killed"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline_s = time.monotonic() + 20
    while any(Path(f"/proc/{child}/cmdline").exists() and is_running(child) for child in children):
        assert time.monotonic() < deadline_s, "a worker outlived the build"
        time.sleep(0.05)


def is_running(process_id: str) -> bool:
    """Whether a process exists and is not a zombie that only waits to be reaped."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_long_work_tells_its_pace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines on stderr with the count, the rate and the time left; the items pass unchanged, and short work is silent."""
    assert list(with_pace(iter("abc"), total=3, doing="reading")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(pace, "LINE_EVERY_S", 0.01)
    for _ in with_pace(range(3), total=3, doing="reading"):
        time.sleep(0.02)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["reading: 1 of 3", "reading: 2 of 3", "reading: 3 of 3"]
    assert lines[-1].endswith(" 0 s left")


def test_help_shows_an_example() -> None:
    """--help is enough to build a first dataset."""
    done = run_build("--help")
    assert done.returncode == 0
    assert "python shards/build.py --from-folder my_pictures --out shards/mine" in done.stdout


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """A folder that is not there, and an --out below a file, are told in one line without a traceback."""
    fill(tmp_path / "source", {"oak": 3})
    put(tmp_path / "file", b"")
    for source, out, workers in (("no such", "set", "0"), ("source", "file/set", "0"), ("source", "set", "-1")):
        failed = run_build("--from-folder", tmp_path / source, "--out", tmp_path / out, "--workers", workers)
        assert failed.returncode == 2
        assert failed.stderr.startswith("error: ")
        assert failed.stderr.count("\n") == 1
