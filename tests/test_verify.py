"""Verification: every fault that can be planted is found and named, and none hides another."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import build, fill

from aplantida_dist.data.classmap import ClassMap
from aplantida_dist.data.index import INDEX_DTYPE
from aplantida_dist.data.manifest import Shard, identity_of, load_manifest, make_manifest, save_manifest
from aplantida_dist.files import sha256_of_file
from aplantida_dist.shards.verify import VerifyError, verify_dataset
from aplantida_dist.shards.writer import ShardLimits

ROOT = Path(__file__).parents[1]
SHARD_0, SHARD_1, INDEX_0 = "train/shard-000000.tar", "train/shard-000001.tar", "train/shard-000000.idx"

Files = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three splits; train has five shards of five samples."""
    folder = tmp_path_factory.mktemp("sound")
    fill(folder / "source", {"birch": 15, "oak": 14, "yew": 4})
    build(folder / "source", folder / "set", limits=ShardLimits(num_samples=5))
    return folder / "set"


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(sound, tmp_path / "set"))


def damages_of(dataset_dir: Path) -> list[str]:
    return [str(damage) for damage in verify_dataset(dataset_dir).damages]


def keys_of(path: Path) -> set[str]:
    with tarfile.open(path) as tar:
        return {name.split(".")[0] for name in tar.getnames()}


def change(path: Path, edit: Callable[[bytearray], object]) -> None:
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)


def flip(position: int) -> Callable[[bytearray], object]:
    """An edit that turns one bit of the byte at this position."""

    def edit(content: bytearray) -> None:
        content[position] ^= 0x10

    return edit


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def rewrite(dataset_dir: Path, edit: Callable[[Files], object], *, name: str = "shard-000000") -> None:
    """Change the files inside a train shard, and give manifest and index honest digests of the new bytes.

    What is left to find is then inside the tar: the digests agree. The rows of the index stay, but for their offsets.
    """
    split_dir = dataset_dir / "train"
    tar_path, index_path = split_dir / f"{name}.tar", split_dir / f"{name}.idx"
    with tarfile.open(tar_path) as tar:
        files: Files = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    edit(files)
    offsets = []
    with tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for file_name, content in files:
            member = tarfile.TarInfo(file_name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with tarfile.open(tar_path) as tar:
        offsets = [member.offset_data for member in tar if member.name.endswith("jpg")]
    index = np.frombuffer(index_path.read_bytes(), dtype=INDEX_DTYPE).copy()
    if len(offsets) == len(index):
        index["offset"] = offsets
    index_path.write_bytes(index.tobytes())
    reseal(dataset_dir, tar_path.name)


def reseal(dataset_dir: Path, name: str) -> None:
    """Put the digests of a train shard as it now is into the manifest."""
    split_dir = dataset_dir / "train"

    def edit(manifest: Any) -> None:
        (shard,) = (shard for shard in manifest["shards"] if shard["name"] == name)
        path = split_dir / name
        shard["bytes"], shard["sha256"] = path.stat().st_size, sha256_of_file(path)
        shard["index_sha256"] = sha256_of_file(path.with_suffix(".idx"))

    edit_json(split_dir / "manifest.json", edit)


def test_a_dataset_as_built_is_sound(sound: Path) -> None:
    """What the builder writes has nothing wrong, and every sample is counted."""
    verdict = verify_dataset(sound)
    assert verdict.damages == ()
    assert (verdict.num_splits, verdict.num_samples) == (3, 33)
    assert verdict.num_shards == 8


def test_every_flipped_bit_is_found_and_named(dataset: Path) -> None:
    """One changed bit anywhere in a shard or its index, padding included, is found and the file is named."""
    for place, step in ((SHARD_0, 211), (INDEX_0, 7)):
        path = dataset / place
        for position in range(0, path.stat().st_size, step):
            change(path, flip(position))
            damages = damages_of(dataset)
            assert any(damage.startswith(f"{place}: its sha256") for damage in damages), position
            assert all(damage.startswith("train/shard-000000.") for damage in damages), damages
            change(path, flip(position))
    assert damages_of(dataset) == []


def test_every_cut_is_found_and_named(dataset: Path) -> None:
    """A shard cut inside a header, a payload, between members, between samples, in its end mark or to nothing."""
    path = dataset / SHARD_0
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    cuts = [
        0,
        100,
        512,
        members[0].offset_data + 10,
        members[1].offset,
        members[3].offset,
        len(whole) - 512,
        len(whole) - 1,
    ]
    end = members[-1].offset_data + 512
    for cut in (*cuts, members[4].offset + 300, end, end + 512):
        path.write_bytes(whole[:cut])
        damages = damages_of(dataset)
        assert f"{SHARD_0}: holds {cut} bytes, the manifest says {len(whole)}" in damages
        assert all(damage.startswith(SHARD_0) for damage in damages), damages
    path.write_bytes(whole)
    assert damages_of(dataset) == []


@pytest.mark.parametrize("cut", ["at a header", "at a sample", "in a header", "in a payload"])
def test_a_tar_that_ends_early_is_found_by_its_structure(dataset: Path, cut: str) -> None:
    """Even when the manifest was made from the cut file, a tar without its end is not taken for a short one."""
    path = dataset / SHARD_0
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    position = {
        "at a header": members[4].offset,
        "at a sample": members[6].offset,
        "in a header": members[6].offset + 100,
        "in a payload": members[6].offset_data + 100,
    }[cut]
    path.write_bytes(path.read_bytes()[:position])
    reseal(dataset, path.name)
    structure = ("is cut at byte", "holds no tar header at byte", "is no tar from byte")
    assert any(damage.startswith(f"{SHARD_0}: {text}") for damage in damages_of(dataset) for text in structure)


def test_a_damaged_header_does_not_end_the_shard_silently(dataset: Path) -> None:
    """Where readers of tars stop without a word, the verification says from which byte on nothing can be read."""
    with tarfile.open(dataset / SHARD_0) as tar:
        position = tar.getmembers()[6].offset
    change(dataset / SHARD_0, flip(position + 3))
    reseal(dataset, "shard-000000.tar")
    damages = damages_of(dataset)
    assert f"{SHARD_0}: holds no tar header at byte {position}; what follows cannot be read" in damages
    assert f"{SHARD_0}: 2 samples can be read, the index lists 5" in damages


def swap_shards(dataset_dir: Path) -> None:
    for suffix in (".tar", ".idx"):
        one, two = ((dataset_dir / place).with_suffix(suffix) for place in (SHARD_0, SHARD_1))
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)


def edit_manifest(edit: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda dataset_dir: edit_json(dataset_dir / "train" / "manifest.json", edit)


def other_classes(dataset_dir: Path) -> None:
    (dataset_dir / "classes.json").unlink()
    ClassMap(("birch", "yew", "oak")).save(dataset_dir / "classes.json")


def fewer_classes(dataset_dir: Path) -> None:
    (dataset_dir / "classes.json").unlink()
    ClassMap(("birch", "oak")).save(dataset_dir / "classes.json")


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda d: (d / SHARD_1).unlink(), f"{SHARD_1}: missing"),
    "missing index": (lambda d: (d / INDEX_0).unlink(), f"{INDEX_0}: missing"),
    "short index": (lambda d: change(d / INDEX_0, lambda c: c.pop()), f"{INDEX_0}: holds 99 bytes, expected 100"),
    "grown shard": (lambda d: change(d / SHARD_0, lambda c: c.extend(b"x")), f"{SHARD_0}: holds no tar header"),
    "swapped shards": (swap_shards, f"{SHARD_0}: holds what belongs in shard-000001.tar"),
    "missing manifest": (lambda d: (d / "val/manifest.json").unlink(), "val/manifest.json: no manifest here"),
    "broken manifest": (lambda d: (d / "val/manifest.json").write_text("{"), "val/manifest.json: not readable as a manifest"),
    "manifest of another split": (
        lambda d: shutil.copy(d / "val/manifest.json", d / "train/manifest.json"),
        "train/manifest.json: is that of split 'val'",
    ),
    "missing class map": (lambda d: (d / "classes.json").unlink(), "classes.json: missing"),
    "edited class map": (
        lambda d: edit_json(d / "classes.json", lambda c: c["classes"].reverse()),
        "classes.json: the names do not match their digest",
    ),
    "other class map": (other_classes, "test/manifest.json: was written for other classes"),
    "fewer classes": (fewer_classes, "val/shard-000000.tar: a label is none of the 2 classes"),
    "missing report": (lambda d: (d / "report.json").unlink(), "report.json: missing"),
    "missing train": (lambda d: shutil.rmtree(d / "train"), "train: missing"),
    "extra file": (lambda d: (d / "train/notes.txt").write_text("x"), "train/notes.txt: does not belong to the dataset"),
    "extra folder": (lambda d: (d / "dev").mkdir(), "dev: does not belong to the dataset"),
    "total of samples": (
        edit_manifest(lambda m: m.update(num_samples=26)),
        "train/manifest.json: states 26 samples, its shards add up to ",
    ),
    "total of classes": (
        edit_manifest(lambda m: m["class_counts"].update({"0": 1})),
        "train/manifest.json: the class counts are not the sums over the shards",
    ),
    "class counts of a shard": (
        edit_manifest(lambda m: m["shards"][0].update(class_counts={"0": 5})),
        f"{SHARD_0}: its samples of each class are not as many as the manifest says",
    ),
    "samples of a shard": (
        edit_manifest(lambda m: m["shards"][0].update(num_samples=4)),
        f"{SHARD_0}: holds 5 samples, the manifest says 4",
    ),
    "identity digest": (
        edit_manifest(lambda m: m.update(identity_digest="0" * 16)),
        "train/manifest.json: the identity digest is not that of the samples",
    ),
    "shard named twice": (
        edit_manifest(lambda m: m["shards"].append(m["shards"][0])),
        "train/manifest.json: a shard name stands more than once",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_faults_of_files_are_found(dataset: Path, fault: str) -> None:
    """What is absent, added, swapped or edited is named with its place."""
    plant, expected = FILE_FAULTS[fault]
    plant(dataset)
    damages = damages_of(dataset)
    assert any(damage.startswith(expected) for damage in damages), damages


def rename(number: int, suffix: str) -> Callable[[Files], object]:
    def edit(files: Files) -> None:
        files[number] = (f"{files[number][0].split('.')[0]}.{suffix}", files[number][1])

    return edit


def put_content(number: int, content: bytes) -> Callable[[Files], object]:
    def edit(files: Files) -> None:
        files[number] = (files[number][0], content)

    return edit


@pytest.mark.parametrize("region", ["header", "payload", "index"])
def test_a_flipped_bit_is_named_for_what_it_hit(dataset: Path, region: str) -> None:
    """Where digests agree with the damage, the structure still tells: a header that is none, a picture or a row that differs."""
    with tarfile.open(dataset / SHARD_0) as tar:
        second = tar.getmembers()[3]
    place, position, says = {
        "header": (SHARD_0, second.offset + 150, f"holds no tar header at byte {second.offset};"),
        "payload": (SHARD_0, second.offset_data + 40, "the crc32 of the image is not the index's (1 samples"),
        "index": (INDEX_0, 21, "the image does not lie where the index says (1 samples"),
    }[region]
    change(dataset / place, flip(position))
    assert any(damage.startswith(f"{place}: its sha256") for damage in damages_of(dataset))
    reseal(dataset, "shard-000000.tar")
    damages = damages_of(dataset)
    assert any(damage.startswith(f"{SHARD_0}: {says}") for damage in damages), damages


def state_licences(*texts: str | None) -> Callable[[Files], object]:
    """An edit that gives the samples of a shard these licences in turn."""

    def edit(files: Files) -> None:
        for number, position in enumerate(range(2, len(files), 3)):
            text = texts[number % len(texts)]
            content = {} if text is None else {"license": text}
            files[position] = (files[position][0], json.dumps(content).encode())

    return edit


@pytest.mark.parametrize(
    ("texts", "stated", "expected"),
    [
        (("cc-by", "cc-by-nc"), "CC-BY", "CC-BY-NC"),
        (("cc-by-nc-sa", "cc-by-nd"), "CC-BY", "CC-BY-NC-ND"),
        (("cc-by", None), "CC-BY", "unknown"),
        (("whatever",), "CC-BY", "unknown"),
        (("cc0",), None, "CC0"),
        ((None,), "CC0", "none"),
    ],
)
def test_a_licence_that_is_not_the_strictest_inside_is_found(
    dataset: Path, texts: tuple[str | None, ...], stated: str | None, expected: str
) -> None:
    """A manifest that promises more than its samples allow, or states what none of them does, is named with both licences."""

    def edit(manifest: Any) -> None:
        manifest.pop("licence", None)
        manifest.update({} if stated is None else {"licence": stated})

    for path in sorted((dataset / "train").glob("*.tar")):
        rewrite(dataset, state_licences(*texts), name=path.stem)
    edit_json(dataset / "train/manifest.json", edit)
    (damage,) = damages_of(dataset)
    assert damage == (
        f"train/manifest.json: states the licence {stated or 'none'}, the most restrictive of its samples is {expected}"
    )
    edit_json(dataset / "train/manifest.json", lambda m: m.update(licence=None if expected == "none" else expected))
    assert damages_of(dataset) == []


SAMPLE_FAULTS: dict[str, tuple[Callable[[Files], object], str]] = {
    "extra member": (lambda f: f.insert(3, (f[0][0].replace("jpg", "txt"), b"x")), "an extra member .txt (1 samples"),
    "two images": (lambda f: f.insert(3, (f[0][0].replace("jpg", "png"), b"x")), "2 image members, expected one"),
    "no image": (lambda f: f.pop(0), "0 image members, expected one"),
    "no class": (lambda f: f.pop(1), "no class index in KEY.cls"),
    "class is no number": (put_content(1, b"oak"), "no class index in KEY.cls"),
    "class is negative": (put_content(1, b"-1"), "no class index in KEY.cls"),
    "class beyond the map": (put_content(1, b"3"), "a label is none of the 3 classes"),
    "other class": (put_content(1, b"9"), "the label in KEY.cls is not the index's"),
    "no metadata": (lambda f: f.pop(2), "no JSON object in KEY.json"),
    "metadata is no JSON": (put_content(2, b"{'a'}"), "no JSON object in KEY.json"),
    "metadata is no object": (put_content(2, b"[]"), "no JSON object in KEY.json"),
    "unknown image suffix": (rename(0, "bmp"), "0 image members, expected one"),
    "other image": (lambda f: f.__setitem__(0, (f[0][0], f[0][1][:-1] + b"\0")), "the crc32 of the image is not the index's"),
    "longer image": (lambda f: f.__setitem__(0, (f[0][0], f[0][1] + b"\0")), "the image does not lie where the index says"),
    "sample gone": (lambda f: f.__delitem__(slice(3)), "holds 4 samples, the manifest says 5"),
    "sample twice": (lambda f: f.extend(f[:3]), f"1 sample keys stand in {SHARD_0} already"),
    "files out of order": (lambda f: f.append(f.pop(1)), "no class index in KEY.cls"),
}  # fmt: skip


@pytest.mark.parametrize("fault", SAMPLE_FAULTS)
def test_faults_of_samples_are_found_where_digests_agree(dataset: Path, fault: str) -> None:
    """A tar whose sha256 is the manifest's is still read: each sample has one image, one label, one JSON object, as indexed."""
    edit, expected = SAMPLE_FAULTS[fault]
    rewrite(dataset, edit)
    damages = damages_of(dataset)
    assert any(damage.startswith(f"{SHARD_0}: ") and expected in damage for damage in damages), damages


def test_a_photograph_in_two_splits_is_found(dataset: Path) -> None:
    """A val shard copied into train, with every digest and total made right, is found by its keys."""
    train, val = (load_manifest(dataset / split / "manifest.json") for split in ("train", "val"))
    (stray,) = val.shards
    shutil.copy(dataset / "val" / stray.name, dataset / "train" / "shard-000009.tar")
    shutil.copy(dataset / "val" / stray.index_name, dataset / "train" / "shard-000009.idx")
    shards: tuple[Shard, ...] = (*train.shards, stray.model_copy(update={"name": "shard-000009.tar"}))
    paths = [dataset / "train" / shard.name for shard in shards]
    keys = {key for path in paths for key in keys_of(path)}
    identity_sum = sum(map(identity_of, keys))
    manifest = make_manifest(
        split="train", class_map_digest=train.class_map_digest, shards=shards, identity_sum=identity_sum
    )
    save_manifest(manifest, dataset / "train")
    with (dataset / "train" / "identities.bin").open("ab") as identities:
        identities.write((dataset / "val" / "identities.bin").read_bytes())
    (damage,) = damages_of(dataset)
    assert damage.startswith(
        f"val/{stray.name}: {stray.num_samples} sample keys stand in train/shard-000009.tar already"
    )


def test_one_fault_does_not_hide_the_next(dataset: Path) -> None:
    """Faults in several places are all listed in one run."""
    change(dataset / SHARD_0, flip(600))
    (dataset / SHARD_1).unlink()
    change(dataset / "train/shard-000002.idx", flip(5))
    (dataset / "val/manifest.json").write_text("[]")
    (dataset / "classes.json").write_text("{}")
    (dataset / "test/extra").write_text("")
    places = {damage.split(":")[0] for damage in damages_of(dataset)}
    assert places == {
        SHARD_0, SHARD_1, "train/shard-000002.idx", "train/shard-000002.tar", "val/manifest.json", "classes.json", "test/extra",
    }  # fmt: skip


def test_a_thousand_equal_faults_make_one_line(dataset: Path) -> None:
    """Faults of one kind in one shard are counted, so that the list stays readable."""

    def shift(content: bytearray) -> None:
        index = np.frombuffer(bytes(content), dtype=INDEX_DTYPE).copy()
        index["label"] = (index["label"] + 1) % 3
        content[:] = index.tobytes()

    change(dataset / INDEX_0, shift)
    lines = [damage for damage in damages_of(dataset) if "not the index's" in damage]
    assert len(lines) == 1
    assert "(5 samples, first " in lines[0]


def run_verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "shards" / "verify.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_answers_with_its_exit_code(dataset: Path, tmp_path: Path) -> None:
    """Sound: 0 and one line. Damaged: 2 and one line for each thing on stderr. Nothing there: 2 and one line."""
    done = run_verify(dataset)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sound: 3 splits, 8 shards, 33 samples" in done.stdout
    (dataset / SHARD_1).unlink()
    (dataset / "val/extra").write_text("")
    failed = run_verify(dataset)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[:2] == [f"{SHARD_1}: missing", "val/extra: does not belong to the dataset"]
    assert "2 things are wrong" in failed.stderr.splitlines()[2]
    nothing = run_verify(tmp_path / "nothing")
    assert nothing.returncode == 2
    assert nothing.stderr.count("\n") == 1
    assert "python shards/verify.py shards/mine" in run_verify("--help").stdout


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    """A folder that does not exist is no sound dataset."""
    with pytest.raises(VerifyError, match="no dataset here"):
        verify_dataset(tmp_path / "nothing")


def test_identities_that_are_not_those_of_the_shards_are_found(dataset: Path) -> None:
    """In another order, too; a dataset of an earlier version, which has none, is sound."""
    path = dataset / "train" / "identities.bin"
    content = path.read_bytes()
    path.write_bytes(content[8:] + content[:8])
    (damage,) = damages_of(dataset)
    assert damage == "train/identities.bin: does not hold the identities of the samples in the shards"
    path.unlink()
    assert list(damages_of(dataset)) == []
