"""Records as a source: each becomes a sample or is left out for its reason, under a licence that was asked for."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from pictures import build, digests_of, draw, fill, put

from aplantida_dist.data.manifest import Manifest, load_manifest, make_manifest
from aplantida_dist.errors import UserError
from aplantida_dist.shards.account import Account
from aplantida_dist.shards.audit import sample_key_of
from aplantida_dist.shards.builder import BuildError, BuildOptions, build_dataset
from aplantida_dist.shards.jsonl import RecordsError, read_jsonl
from aplantida_dist.shards.licence import parse_requirement
from aplantida_dist.shards.lines import LineError
from aplantida_dist.shards.stated_splits import StatedSplitsError
from aplantida_dist.shards.verify import verify_dataset
from aplantida_dist.shards.writer import ShardLimits

ROOT = Path(__file__).parents[1]
SPECIES = ("Acer campestre", "Betula pendula", "Quercus ilex")


def url_of(number: int) -> str:
    return f"https://pictures.example/{number}/größe.jpeg?size=large"


def place(image_dir: Path, number: int, *, suffix: str = ".jpg", content: bytes | None = None) -> Path:
    """Put the picture of a URL where the records' downloader left it."""
    name = hashlib.md5(url_of(number).encode()).hexdigest() + suffix
    return put(image_dir / name, draw(number) if content is None else content)


def record(number: int, **fields: Any) -> dict[str, Any]:
    return {"latin_name": SPECIES[number % 3], "image_url": url_of(number), "plant_id": number, **fields}


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    return put(path, b"".join(json.dumps(one).encode() + b"\n" for one in records))


def build_records(folder: Path, out: Path, *, licence: str = "any", num_workers: int = 0, seed: int = 0) -> Account:
    """Build in this process from records.jsonl and pictures/ in a folder."""
    options = BuildOptions(
        seed=seed,
        limits=ShardLimits(num_samples=7),
        num_workers=num_workers,
        replace=False,
        licence=parse_requirement(licence),
    )
    return build_dataset(read_jsonl(folder / "records.jsonl", folder / "pictures"), out, options=options)


def metadata_of(dataset_dir: Path) -> dict[str, dict[str, Any]]:
    """sample key → KEY.json, over all splits, as any reader of tars sees them."""
    found = {}
    for path in sorted(dataset_dir.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    found[member.name.split(".")[0]] = json.loads(content.read())
    return found


def plant_every_defect(folder: Path) -> dict[str, str]:
    """Records with sound pictures in given splits, and each defect that records can have; returns source → reason."""
    pictures = folder / "pictures"
    records = [
        record(number, split=("train", "train", "validation", "test")[number // 6], license="cc-by")
        for number in range(24)
    ]
    for number in range(24):
        place(pictures, number)
    expected: dict[str, str] = {}

    def plant(reason: str, content: bytes | None, **fields: Any) -> None:
        number = 100 + len(records)
        records.append({**record(number, split="train", license="cc-by"), **fields})
        expected[f"records.jsonl:{len(records)}"] = reason
        if content is not None:
            place(pictures, number, content=content)

    plant("missing", None)
    plant("missing", None, image_path="gone/away.jpg")
    plant("licence", draw(500), license="cc-by-nc")
    plant("licence", draw(501), license=None)
    plant("not_a_picture", b"<html>404</html>")
    plant("not_a_picture", b"")
    plant("undecodable", draw(502)[:-60])
    plant("other_format", draw(503, image_format="GIF"))
    plant("duplicate", draw(0), latin_name=SPECIES[0])
    plant("leak", draw(13), latin_name=SPECIES[1])
    plant("conflicting_labels", draw(504), latin_name=SPECIES[0])
    plant("conflicting_labels", draw(504), latin_name=SPECIES[1])
    plant("not_a_picture", None, image_path="pipe.jpg")
    os.mkfifo(pictures / "pipe.jpg")
    write_records(folder / "records.jsonl", records)
    return expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_record_is_written_or_left_out_for_its_reason(tmp_path: Path, num_workers: int) -> None:
    """Records in = samples written + left out, by reason, with every reason that records can have; and the report says so."""
    expected = plant_every_defect(tmp_path)
    account = build_records(tmp_path, tmp_path / "set", licence="commercial", num_workers=num_workers)
    assert {left_out.source: left_out.reason for left_out in account.left_out} == expected
    num_records = len((tmp_path / "records.jsonl").read_bytes().splitlines())
    assert account.num_files == num_records == account.num_samples + len(expected)
    assert {manifest.split: manifest.num_samples for manifest in account.manifests} == {
        "train": 12,
        "val": 6,
        "test": 6,
    }
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert (report["counted"], report["num_files"]) == ("records", report["num_samples"] + report["num_left_out"])
    assert report["left_out_by_reason"] == account.left_out_by_reason
    details = {one["source"]: one["detail"] for one in report["left_out"]}
    assert details["records.jsonl:25"].endswith(f" of {url_of(124)}")
    assert details["records.jsonl:26"] == "no gone/away.jpg"
    assert (details["records.jsonl:27"], details["records.jsonl:28"]) == ("cc-by-nc", "no licence is stated")
    markdown = (tmp_path / "set" / "report.md").read_text()
    assert all(f"`{source}`" in markdown for source in expected)
    assert f"{num_records} records = 24 samples written + {len(expected)} left out" in markdown
    assert verify_dataset(tmp_path / "set").damages == ()


def test_the_dataset_depends_on_records_and_pictures_alone(tmp_path: Path) -> None:
    """The same bytes whatever the workers and the place, and the order of the keys in a line."""
    plant_every_defect(tmp_path / "a")
    plant_every_defect(tmp_path / "b")
    lines = [json.loads(line) for line in (tmp_path / "b" / "records.jsonl").read_bytes().splitlines()]
    write_records(tmp_path / "b" / "records.jsonl", [dict(reversed(line.items())) for line in lines])
    build_records(tmp_path / "a", tmp_path / "one")
    build_records(tmp_path / "b", tmp_path / "two", num_workers=2)
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "two")


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".webp"])
def test_the_picture_of_a_url_lies_under_its_md5(tmp_path: Path, suffix: str) -> None:
    """md5 of the URL's UTF-8 bytes in hex, with any of four suffixes, .jpg first; what it holds decides what it is."""
    place(tmp_path / "pictures", 0, suffix=suffix)
    write_records(tmp_path / "records.jsonl", [record(0)])
    source = read_jsonl(tmp_path / "records.jsonl", tmp_path / "pictures")
    assert [Path(one.place.path).suffix for one in source.records] == [suffix]
    place(tmp_path / "pictures", 0)
    assert [
        Path(one.place.path).suffix for one in read_jsonl(tmp_path / "records.jsonl", tmp_path / "pictures").records
    ] == [".jpg"]


def test_a_record_is_kept_whole(tmp_path: Path) -> None:
    """KEY.json is the record, but for its split and where the picture lay here; the class is the latin name."""
    full = record(
        0, common_name="Feld-Ahorn", image_source="inaturalist", license="CC BY-NC 4.0", attribution="(c) Ada", region="EU_SW",
        country="ES", observed=["2020", None],
    )  # fmt: skip
    by_path = {"latin_name": "  Acer \t campestre\n", "image_path": "deep/er/x.jpg"}
    place(tmp_path / "pictures", 0)
    put(tmp_path / "pictures" / "deep" / "er" / "x.jpg", draw(1))
    write_records(tmp_path / "records.jsonl", [{**full, "split": "train"}, {**by_path, "split": "val"}])
    account = build_records(tmp_path, tmp_path / "set")
    assert account.class_names == ("Acer campestre",)
    expected = {sample_key_of(draw(0)): full, sample_key_of(draw(1)): {"latin_name": by_path["latin_name"]}}
    assert metadata_of(tmp_path / "set") == expected


def test_two_records_of_one_photograph_are_one_sample_of_the_first(tmp_path: Path) -> None:
    """Same URL, or same bytes under another: the metadata of the lowest line stays, also of line 9 beside line 10."""
    records = [record(number, latin_name="Acer", license="cc0") for number in range(8)]
    records += [
        record(100, latin_name="Acer", image_url=url_of(8)),
        record(101, latin_name="Acer", image_url=url_of(8)),
    ]
    records += [
        record(102, latin_name="Acer", image_url=url_of(200)),
        record(103, latin_name="Acer", image_url=url_of(0)),
    ]
    for number in range(9):
        place(tmp_path / "pictures", number)
    place(tmp_path / "pictures", 200, content=draw(8))
    write_records(tmp_path / "records.jsonl", records)
    account = build_records(tmp_path, tmp_path / "set")
    assert account.num_samples == 9
    assert [(one.source, one.reason, one.detail) for one in account.left_out] == [
        ("records.jsonl:10", "duplicate", "same bytes as records.jsonl:9"),
        ("records.jsonl:11", "duplicate", "same bytes as records.jsonl:9"),
        ("records.jsonl:12", "duplicate", "same bytes as records.jsonl:1"),
    ]
    kept = metadata_of(tmp_path / "set")
    assert (kept[sample_key_of(draw(8))]["plant_id"], kept[sample_key_of(draw(0))]["plant_id"]) == (100, 0)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"latin_name": "Acer", "image_path": "1.jpg"', "is not JSON"),
        (b'["1.jpg"]', "expected a JSON object"),
        (b'{"image_path": "1.jpg"}', "no 'latin_name'"),
        (b'{"latin_name": " ", "image_path": "1.jpg"}', "no 'latin_name'"),
        (b'{"latin_name": 7, "image_path": "1.jpg"}', "'latin_name' is 7, expected text"),
        (b'{"latin_name": "Acer"}', "neither 'image_url' nor 'image_path'"),
        (b'{"latin_name": "Acer", "image_url": null, "image_path": ""}', "neither 'image_url' nor 'image_path'"),
        (b'{"latin_name": "Acer", "image_url": 3}', "'image_url' is 3"),
        (b'{"latin_name": "Acer", "image_path": "1.jpg", "license": ["cc-by"]}', "'license' is"),
        (b'{"latin_name": "Acer", "image_path": "1.jpg", "region": NaN}', "is not JSON"),
        (b'{"latin_name": "Acer", "image_path": "1.jpg", "region": "\xff"}', "is not JSON"),
        (b'{"latin_name": "Acer", "image_path": "1.jpg", "region": "\\ud800"}', "is not JSON"),
        (b'{"latin_name": "Acer", "image_path": "../1.jpg"}', "does not name a file inside the image folder"),
        (b'{"latin_name": "Acer", "image_path": "a/../1.jpg"}', "does not name a file inside the image folder"),
        (b'{"latin_name": "Acer", "image_path": "/etc/passwd"}', "does not name a file inside the image folder"),
        (b'{"latin_name": "Acer", "image_path": "."}', "does not name a file inside the image folder"),
        (b'{"latin_name": "Acer", "image_path": "a\\u0000b"}', "does not name a file inside the image folder"),
        (b'{"latin_name": "Acer", "image_path": "1.jpg", "split": "dev"}', "split 'dev', expected one of train, val"),
        (b'{"latin_name": "Acer", "image_path": "1.jpg", "split": ["val"]}', "expected one of train, val"),
        (b'{"latin_name": "%s"}' % (b"x" * 2**20), "longer than 1048576 bytes"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_one_error_with_its_number(tmp_path: Path, line: bytes, says: str) -> None:
    """No record is skipped because it could not be understood, and none reaches a file outside the image folder."""
    put(tmp_path / "pictures" / "0.jpg", draw(0))
    put(tmp_path / "pictures" / "1.jpg", draw(1))
    put(tmp_path / "records.jsonl", b'{"latin_name": "Acer", "image_path": "0.jpg"}\n\n' + line + b"\n")
    with pytest.raises((LineError, StatedSplitsError)) as raised:
        build_records(tmp_path, tmp_path / "set")
    assert f"{tmp_path / 'records.jsonl'}: line 3: " in str(raised.value)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "set").exists()


def test_splits_are_given_by_all_records_or_by_none(tmp_path: Path) -> None:
    """A record without a split among records with one would have to be guessed: an error that counts both."""
    for number in range(9):
        place(tmp_path / "pictures", number)
    words = ["train"] * 3 + ["val"] * 3 + ["test"] * 3
    records = [record(number, split=word) for number, word in enumerate(words)]
    write_records(tmp_path / "records.jsonl", records)
    account = build_records(tmp_path, tmp_path / "given")
    assert {manifest.split: manifest.num_samples for manifest in account.manifests} == {"train": 3, "val": 3, "test": 3}
    write_records(tmp_path / "records.jsonl", [*records, record(3), record(4, split=None)])
    with pytest.raises(StatedSplitsError, match="9 records carry a split and 2 do not"):
        build_records(tmp_path, tmp_path / "mixed")
    write_records(tmp_path / "records.jsonl", [record(number, split="val") for number in range(9)])
    with pytest.raises(BuildError, match="not one picture of train"):
        build_records(tmp_path, tmp_path / "no train")


def test_records_and_folder_split_alike(tmp_path: Path) -> None:
    """The split follows the photographs: the same pictures and classes give the same splits from either source."""
    fill(tmp_path / "folder", {"Acer": 11, "Betula": 6, "Carex": 2})
    paths = sorted(path.relative_to(tmp_path / "folder") for path in (tmp_path / "folder").rglob("*.jpg"))
    records = [{"latin_name": path.parent.name, "image_path": str(path)} for path in reversed(paths)]
    (tmp_path / "pictures").symlink_to(tmp_path / "folder")
    write_records(tmp_path / "records.jsonl", records)
    one, two = build(tmp_path / "folder", tmp_path / "one"), build_records(tmp_path, tmp_path / "two")
    found = [[(m.split, m.num_samples, m.identity_digest, m.class_counts) for m in a.manifests] for a in (one, two)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("required", "kept", "licence"),
    [("any", "abcdef", "unknown"), ("commercial", "abc", "CC-BY-SA"), ("CC-BY,CC BY-NC", "bd", "CC-BY-NC"), ("cc0", "a", "CC0")],
)  # fmt: skip
def test_a_licence_is_required_and_stated(tmp_path: Path, required: str, kept: str, licence: str) -> None:
    """Only samples under an accepted licence are written; account and manifest state what is inside."""
    texts = {"a": "CC0", "b": "cc-by", "c": "CC BY-SA 4.0", "d": "cc-by-nc", "e": "© Ada", "f": "as you like"}
    names = {"a": "CC0", "b": "CC-BY", "c": "CC-BY-SA", "d": "CC-BY-NC", "e": "all rights reserved", "f": "unknown"}
    records = [
        record(number, license=text, split="train", latin_name=letter)
        for number, (letter, text) in enumerate(texts.items())
    ]
    for number in range(len(texts)):
        place(tmp_path / "pictures", number)
    write_records(tmp_path / "records.jsonl", records)
    account = build_records(tmp_path, tmp_path / "set", licence=required)
    assert "".join(account.class_names) == kept
    assert account.licence_counts == {names[letter]: 1 for letter in kept}
    assert {one.detail for one in account.left_out} == {text for letter, text in texts.items() if letter not in kept}
    assert load_manifest(tmp_path / "set" / "train" / "manifest.json").licence == licence
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["licence_counts"] == account.licence_counts
    assert report["splits"]["train"]["licence"] == licence
    assert f"The most restrictive inside: train {licence}." in (tmp_path / "set" / "report.md").read_text()


def test_silence_beside_a_licence_is_unknown_and_silence_alone_is_none(tmp_path: Path) -> None:
    """One sample that states nothing makes the split's licence unknown; where none states any, nothing is claimed."""
    for number in range(2):
        place(tmp_path / "pictures", number)
    for licence, expected in ((None, None), ("cc-by", "unknown")):
        records = [record(0, license=licence, split="train"), record(1, split="train")]
        write_records(tmp_path / "records.jsonl", records)
        account = build_records(tmp_path, tmp_path / f"set {licence}")
        assert account.manifests[0].licence == expected
        assert ("licence" in (tmp_path / f"set {licence}" / "train" / "manifest.json").read_text()) == bool(expected)


def test_manifests_without_a_licence_keep_their_digest() -> None:
    """What checkpoints and histories remember a split by is what it was before manifests stated licences."""
    manifest = make_manifest(split="train", class_map_digest="0", shards=(), identity_sum=5)
    assert manifest.digest == "2499db9a1da0d3d5e36b2b70691304decde63a7040e20f0a54b9d316e5203818"
    assert "licence" not in manifest.model_dump(mode="json")
    stated = manifest.model_copy(update={"licence": "CC-BY"})
    assert stated.digest != manifest.digest
    assert Manifest.model_validate(stated.model_dump(mode="json")) == stated


def test_records_that_meet_no_picture_or_no_licence_are_an_error(tmp_path: Path) -> None:
    """The wrong folder, or a licence that nothing has, says what became of the records."""
    (tmp_path / "pictures").mkdir()
    write_records(tmp_path / "records.jsonl", [record(0, license="cc-by-nc"), record(1)])
    with pytest.raises(
        BuildError, match=r"the picture of none of 2 records in records\.jsonl, first records\.jsonl:1: no "
    ):
        build_records(tmp_path, tmp_path / "set")
    place(tmp_path / "pictures", 0)
    with pytest.raises(BuildError, match=r"not one picture of train can be used \(left out: licence 1, missing 1\)"):
        build_records(tmp_path, tmp_path / "set", licence="commercial")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_jsonl(tmp_path / "none.jsonl", tmp_path / "pictures")
    with pytest.raises(RecordsError, match="no such folder"):
        read_jsonl(tmp_path / "records.jsonl", tmp_path / "nowhere")


def test_memory_of_a_record_is_bounded(tmp_path: Path) -> None:
    """Records are held as bytes, not as dictionaries: below 1 kB each, so a million fit in 1 GB."""
    put(tmp_path / "pictures" / "0.jpg", draw(0))
    fields = {"attribution": "(c) somebody, some rights reserved (CC BY-NC)", "license": "cc-by-nc", "country": "ES"}
    records = [record(number, image_path="0.jpg", region="EU_SW", **fields) for number in range(5_000)]
    write_records(tmp_path / "records.jsonl", records)
    del records
    tracemalloc.start()
    source = read_jsonl(tmp_path / "records.jsonl", tmp_path / "pictures")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source.records) == 5_000
    assert peak_bytes / 5_000 < 1_000


def test_the_command_builds_from_records(tmp_path: Path) -> None:
    """As a user types it: what was left out is told; options that do not go together are one line and exit code 2."""
    plant_every_defect(tmp_path)
    command = [sys.executable, ROOT / "shards" / "build.py", "--workers", "0", "--out", tmp_path / "set"]
    records, pictures = tmp_path / "records.jsonl", tmp_path / "pictures"

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)

    for arguments, says in (
        (["--from-jsonl", records], "needs --image-dir"),
        (["--from-folder", pictures, "--image-dir", pictures], "--image-dir belongs to --from-jsonl"),
        ([], "nothing to build from"),
        (["--from-jsonl", records, "--image-dir", pictures, "--require-license", "permissive"], "names no licence"),
    ):
        failed = run(*arguments)
        assert (failed.returncode, failed.stderr.count("\n")) == (2, 1), failed.stderr
        assert says in failed.stderr
    done = run("--from-jsonl", records, "--image-dir", pictures, "--require-license", "commercial")
    assert done.returncode == 0, done.stderr
    assert "37 records = 24 samples written + 13 left out" in done.stdout
    assert "CC-BY" in done.stdout
