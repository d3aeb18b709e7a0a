"""Subsets: what of a dataset meets a condition, under the same keys in the same splits, and whose child it is."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aplantida_dist.data.classmap import ClassMap, ClassMapError, Parent, load_class_map
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.index import INDEX_DTYPE, ShardError, read_member, read_metadata, read_metadata_bytes
from aplantida_dist.data.manifest import SPLITS, Shard, identity_of, load_manifest, make_manifest, save_manifest
from aplantida_dist.errors import UserError
from aplantida_dist.files import sha256_of_file
from aplantida_dist.shards.account import Account
from aplantida_dist.shards.licence import parse_requirement
from aplantida_dist.shards.parentage import check_parentage
from aplantida_dist.shards.placement import PlacementError
from aplantida_dist.shards.selection import SelectionError
from aplantida_dist.shards.subset import SubsetError, SubsetOptions, build_subset
from aplantida_dist.shards.verify import verify_dataset
from aplantida_dist.shards.where import WhereError, parse_condition
from aplantida_dist.shards.writer import ShardLimits
from tests.pictures import build, digests_of, draw, put

ROOT = Path(__file__).parents[1]
LIMITS = ShardLimits(num_samples=7)
REGIONS = ("EU_SW", "EU_C", "NA_E", "NA_W")
COUNTRIES = {"EU_SW": ("ES", "PT"), "EU_C": ("DE", "AT"), "NA_E": ("US", "CA"), "NA_W": ("US", "MX")}
LICENCES = {"EU_SW": ("cc-by", "cc-by-nc"), "EU_C": ("cc0",), "NA_E": ("cc-by", "all rights reserved"), "NA_W": ("",)}
CLASSES_OF_REGION = {
    "EU_SW": {"train": "abbbc", "val": "abd", "test": "bc"},
    "EU_C": {"train": "bbddd", "val": "bd", "test": "d"},
    "NA_E": {"train": "aaccd", "val": "cde", "test": "ae"},
    "NA_W": {"train": "ee", "val": "", "test": ""},
}
"""The classes of the photographs of each region and split, each letter four photographs; d in EU_SW and e in NA_E have none in train."""


@dataclass(frozen=True)
class Found:
    """One sample as it lies in a dataset."""

    sample_key: str
    class_name: str
    image: bytes
    metadata: bytes

    @property
    def known(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.metadata)
        return content


def samples_of(dataset_dir: Path, split: str) -> list[Found]:
    """Every sample of a split in the manifest's order; none where there is no such split."""
    dataset = open_dataset(dataset_dir)
    if not dataset.has_split(split):
        return []
    opened, names = dataset.open_split(split), dataset.class_map.class_names
    found = []
    for shard_index in range(len(opened.manifest.shards)):
        index, descriptor = opened.read_index(shard_index), opened.open_shard(shard_index)
        for number, entry in enumerate(index):
            member = read_member(descriptor, entry, shard_path=opened.shard_path(shard_index))
            raw = read_metadata_bytes(descriptor, index, number)
            found.append(Found(member.sample_key, names[int(entry["label"])], member.content, raw))
        os.close(descriptor)
    return found


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of five classes in four regions, in given splits; one has no region, one is a PNG, one has a comma in a field."""
    folder = tmp_path_factory.mktemp("pictures")
    lines, number = [], 0
    for region, classes in CLASSES_OF_REGION.items():
        for split, letters in classes.items():
            for letter in letters * 4:
                suffix, image_format = ("png", "PNG") if number == 5 else ("jpg", "JPEG")
                image_path = f"{split}/{letter}/{number}.{suffix}"
                put(folder / image_path, draw(number, image_format=image_format))
                known = {"region": region, "country": COUNTRIES[region][number % 2], "plant_id": number % 3}
                known |= {"license": LICENCES[region][number % len(LICENCES[region])], "image_path": image_path}
                known |= {"attribution": "Ada, of Bilbao"} if number == 5 else {}
                lines.append(json.dumps({k: v for k, v in known.items() if (k, number) != ("region", 9)}))
                number += 1
    put(folder / "metadata.jsonl", "\n".join(lines).encode())
    dataset_dir = tmp_path_factory.mktemp("datasets") / "global"
    build(folder, dataset_dir, limits=LIMITS, near_distance=None)
    return dataset_dir


def make(
    parent_dir: Path,
    dataset_dir: Path,
    *where: str,
    licence: str = "any",
    classes_path: Path | None = None,
    replace: bool = False,
    limits: ShardLimits = LIMITS,
) -> Account:
    options = SubsetOptions(
        conditions=tuple(parse_condition(text) for text in where),
        limits=limits,
        replace=replace,
        licence=parse_requirement(licence),
        classes_path=classes_path,
    )
    return build_subset(parent_dir, dataset_dir, options=options)


def meets(sample: Found, field: str, *values: str) -> bool:
    return str(sample.known.get(field)) in values


@pytest.mark.parametrize("region", REGIONS)
def test_a_subset_holds_the_photographs_that_meet_the_condition_each_in_its_split(
    parent: Path, tmp_path: Path, region: str
) -> None:
    """The parent's samples of that region, in its order, with their keys, bytes, metadata and classes; nothing else."""
    account = make(parent, tmp_path / "set", f"region={region}")
    trained = {sample.class_name for sample in samples_of(parent, "train") if meets(sample, "region", region)}
    for split in SPLITS:
        met = [sample for sample in samples_of(parent, split) if meets(sample, "region", region)]
        expected = [sample for sample in met if sample.class_name in trained]
        assert samples_of(tmp_path / "set", split) == expected
        assert (tmp_path / "set" / split).exists() == bool(expected)
    assert account.num_samples > 0
    assert verify_dataset(tmp_path / "set").damages == ()
    assert check_parentage(tmp_path / "set", parent) == ()


def test_a_condition_that_all_meet_gives_the_parents_tars(parent: Path, tmp_path: Path) -> None:
    """Same tars, same indexes, same identities; that everything was kept is said."""
    account = make(parent, tmp_path / "all", "plant_id=0,1,2")
    tars = {name: sha256 for name, sha256 in digests_of(parent).items() if name.endswith((".tar", ".idx"))}
    assert tars.items() <= digests_of(tmp_path / "all").items()
    assert account.num_left_out == 0
    assert "asked for: plant_id=0,1,2, which every sample of the parent meets" in (
        (tmp_path / "all" / "report.md").read_text()
    )
    assert load_class_map(tmp_path / "all" / "classes.json").digest == load_class_map(parent / "classes.json").digest


def test_a_condition_and_its_opposite_part_the_dataset(parent: Path, tmp_path: Path) -> None:
    """Also the photograph that has no region is in one of the two: it is not in EU_SW."""
    make(parent, tmp_path / "in", "region=EU_SW,EU_C")
    outside = make(parent, tmp_path / "out", "region!=EU_SW,EU_C")
    keys = [{s.sample_key for s in samples_of(tmp_path / name, "train")} for name in ("in", "out")]
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == {sample.sample_key for sample in samples_of(parent, "train")}
    assert outside.selection is not None
    assert outside.selection.num_without_field == {"region": 1}
    assert "1 samples of the parent have no region" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["region=EU_SW", "country=ES"], lambda s: meets(s, "region", "EU_SW") and meets(s, "country", "ES")),
        (["country=ES,DE,US", "country!=DE"], lambda s: meets(s, "country", "ES", "US")),
        (["plant_id=2"], lambda s: s.known["plant_id"] == 2),
        (['attribution="Ada, of Bilbao"'], lambda s: meets(s, "attribution", "Ada, of Bilbao")),
        (["latin_name=b"], lambda s: s.class_name == "b"),
    ],
)
def test_all_conditions_hold_and_values_are_compared_as_text(
    parent: Path, tmp_path: Path, where: list[str], expected: Any
) -> None:
    """Several values are alternatives, several conditions are not; numbers are their JSON; a quoted value may hold a comma."""
    make(parent, tmp_path / "set", *where)
    found = samples_of(tmp_path / "set", "train")
    assert found == [sample for sample in samples_of(parent, "train") if expected(sample)]
    assert found


@pytest.mark.parametrize(("region", "untrained"), [("EU_SW", "d"), ("NA_E", "e"), ("EU_C", None)])
def test_every_sample_of_the_parent_is_written_or_left_out_for_its_reason(
    parent: Path, tmp_path: Path, region: str, untrained: str | None
) -> None:
    """Samples in = written + left out by reason; those not asked for are counted, all others listed, untrained classes named."""
    account = make(parent, tmp_path / "set", f"region={region}", licence="CC-BY,CC0,CC-BY-NC")
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    everything = {split: samples_of(parent, split) for split in SPLITS}
    met = [(split, s) for split in SPLITS for s in everything[split] if meets(s, "region", region)]
    unlicensed = [(split, s) for split, s in met if s.known.get("license") == "all rights reserved"]
    unknown = [pair for pair in met if pair not in unlicensed and pair[1].class_name == untrained]
    assert report["num_files"] == sum(map(len, everything.values()))
    assert report["num_files"] == report["num_samples"] + report["num_left_out"]
    assert report["num_left_out"] == sum(report["left_out_by_reason"].values())
    assert report["left_out_by_reason"] == account.left_out_by_reason
    assert {reason: count for reason, count in account.left_out_by_reason.items() if count} == {
        reason: count
        for reason, count in {
            "licence": len(unlicensed),
            "not_selected": report["num_files"] - len(met),
            "untrained_class": len(unknown),
        }.items()
        if count
    }
    expected = [(f"{split}/{s.sample_key}", s.class_name, "licence") for split, s in unlicensed]
    expected += [(f"{split}/{s.sample_key}", s.class_name, "untrained_class") for split, s in unknown]
    assert sorted((o["source"], o["class_name"], o["reason"]) for o in report["left_out"]) == sorted(expected)
    assert report["selection"]["untrained_classes"] == ([untrained] if untrained else [])
    assert report["selection"]["criteria"] == [f"region={region}", "licence CC-BY,CC0,CC-BY-NC"]
    assert (report["counted"], report["source"], report["seed"]) == ("samples", "global", None)
    pictures = {s.sample_key: s.image for samples in everything.values() for s in samples}
    for left_out in account.left_out:
        assert left_out.place is not None
        assert left_out.place.read() == pictures[left_out.source.partition("/")[2]]


def test_the_class_map_declares_its_parents_and_keeps_its_order(parent: Path, tmp_path: Path) -> None:
    """The names that train holds, as the parent orders them, and the parent's label of each; the digest is that of the names."""
    make(parent, tmp_path / "set", "region=NA_E")
    class_map, whole = load_class_map(tmp_path / "set" / "classes.json"), load_class_map(parent / "classes.json")
    assert class_map.class_names == ("a", "c", "d")
    assert class_map.parent == Parent(whole.digest, (0, 2, 3))
    assert class_map.digest == ClassMap(("a", "c", "d")).digest
    assert whole.parent is None
    class_map.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "set" / "classes.json").read_bytes()


@pytest.mark.parametrize(
    "declared",
    [
        None,
        {},
        {"digest": "0" * 64},
        {"digest": 7, "labels": [0, 2]},
        {"digest": "0" * 64, "labels": [0]},
        {"digest": "0" * 64, "labels": [0, 0]},
        {"digest": "0" * 64, "labels": [2, 0]},
        {"digest": "0" * 64, "labels": [-1, 0]},
        {"digest": "0" * 64, "labels": [0, 1.0]},
        {"digest": "0" * 64, "labels": [False, True]},
        {"digest": "0" * 64, "labels": "01"},
    ],
    ids=str,
)
def test_a_parent_that_is_not_a_mapping_is_refused(tmp_path: Path, declared: Any) -> None:
    """One ascending label of the parent for each class, no less and nothing else."""
    path = tmp_path / "classes.json"
    ClassMap(("oak", "yew"), Parent("0" * 64, (0, 2))).save(path)
    assert load_class_map(path).parent == Parent("0" * 64, (0, 2))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parent": declared}))
    with pytest.raises(ClassMapError, match="'parent' must hold a digest and one ascending label"):
        load_class_map(path)


def test_manifests_name_their_parent_by_digest_and_others_keep_theirs(parent: Path, tmp_path: Path) -> None:
    """The parent split's digest is in the subset's manifest; a dataset made of pictures does not write the field at all."""
    make(parent, tmp_path / "set", "region=EU_C")
    for split in SPLITS:
        whole = load_manifest(parent / split / "manifest.json")
        assert load_manifest(tmp_path / "set" / split / "manifest.json").parent == whole.digest
        assert "parent" not in json.loads((parent / split / "manifest.json").read_text())
        assert "parent" not in whole.model_dump(mode="json")
    assert "parent" not in json.loads((parent / "classes.json").read_text())


def test_a_subset_of_a_subset_is_the_subset_under_both_conditions(parent: Path, tmp_path: Path) -> None:
    """The same tars and names as in one go; its parent is the one that it was taken from."""
    make(parent, tmp_path / "eu", "region=EU_SW,EU_C")
    make(tmp_path / "eu", tmp_path / "at", "country=DE,AT")
    make(parent, tmp_path / "direct", "region=EU_SW,EU_C", "country=DE,AT")
    steps, direct = digests_of(tmp_path / "at"), digests_of(tmp_path / "direct")
    assert {n: d for n, d in steps.items() if n.endswith(("tar", "idx"))} == {
        n: d for n, d in direct.items() if n.endswith(("tar", "idx"))
    }
    assert load_class_map(tmp_path / "at" / "classes.json").class_names == ("b", "d")
    assert check_parentage(tmp_path / "at", tmp_path / "eu") == ()
    assert check_parentage(tmp_path / "direct", parent) == ()
    assert {damage.place for damage in check_parentage(tmp_path / "at", parent)} >= {"train/manifest.json"}


def test_the_licence_of_a_subset_is_the_strictest_of_its_own_samples(parent: Path, tmp_path: Path) -> None:
    """Not that of the parent; and a required licence is a condition like others."""
    stated = {"EU_SW": "CC-BY-NC", "EU_C": "CC0", "NA_E": "all rights reserved", "NA_W": None}
    for region, licence in stated.items():
        account = make(parent, tmp_path / region, f"region={region}")
        assert load_manifest(tmp_path / region / "train" / "manifest.json").licence == licence
        counts = Counter(s.known.get("license") for split in SPLITS for s in samples_of(tmp_path / region, split))
        assert list(account.licence_counts.values()) == ([n for _, n in counts.most_common()] if licence else [])
    make(parent, tmp_path / "commercial", licence="commercial")
    found = [sample for split in SPLITS for sample in samples_of(tmp_path / "commercial", split)]
    assert {sample.known["license"] for sample in found} == {"cc-by", "cc0"}
    assert verify_dataset(tmp_path / "commercial").damages == ()


def test_classes_can_be_chosen_by_a_list(parent: Path, tmp_path: Path) -> None:
    """Their order in the file means nothing; a name that the parent does not have is an error with those close to it."""
    names = tmp_path / "species.txt"
    names.write_text("d\n\na\n")
    make(parent, tmp_path / "set", "region!=EU_SW", classes_path=names)
    assert load_class_map(tmp_path / "set" / "classes.json").class_names == ("a", "d")
    for split in SPLITS:
        expected = [s for s in samples_of(parent, split) if s.class_name in "ad" and not meets(s, "region", "EU_SW")]
        assert samples_of(tmp_path / "set", split) == expected
    names.write_text("a\nDD\n")
    with pytest.raises(SubsetError, match=r"species\.txt: 'DD' is no class of the parent"):
        make(parent, tmp_path / "other", classes_path=names)
    names.write_text("\n")
    with pytest.raises(SubsetError, match="names no class"):
        make(parent, tmp_path / "other", classes_path=names)
    with pytest.raises(SubsetError, match="cannot be read as a list of classes"):
        make(parent, tmp_path / "other", classes_path=tmp_path)


@pytest.mark.parametrize("num_samples", [1, 5, 1000])
def test_the_same_subset_twice_is_the_same_byte_for_byte(parent: Path, tmp_path: Path, num_samples: int) -> None:
    """Report included; the limit of a shard changes where the tars end and not what they hold."""
    limits = ShardLimits(num_samples=num_samples)
    for name in ("one", "two"):
        make(parent, tmp_path / name, "region=EU_SW", limits=limits)
    assert digests_of(tmp_path / "one") == digests_of(tmp_path / "two")
    manifest = load_manifest(tmp_path / "one" / "train" / "manifest.json")
    assert max(shard.num_samples for shard in manifest.shards) == min(num_samples, manifest.num_samples)
    assert int(manifest.identity_digest, 16) == (
        sum(identity_of(s.sample_key) for s in samples_of(parent, "train") if meets(s, "region", "EU_SW")) % 2**64
    )


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("region", r"--where 'region': expected FIELD=VALUE"),
        ("=EU_SW", "expected FIELD=VALUE"),
        ("region=", "a value is empty"),
        ("region=EU_SW,", "a value is empty"),
        ('region="EU_SW', "the values cannot be read"),
        ("regoin=EU_SW", r"no sample has a field 'regoin'; there are .*region \(EU_.*\); correct its name"),
        ("regoin!=EU_SW", "no sample has a field 'regoin'"),
        ("region=EU_SW,EU_CC", "no sample has region 'EU_CC'; close to it: EU_C, "),
        ("region!=eu_sw", "no sample has region 'eu_sw'; close to it: EU_SW"),
        ("region= EU_SW", "no sample has region ' EU_SW'; close to it: EU_SW"),
        ("country=Atlantis", "no sample has country 'Atlantis'; there are .*ES"),
    ],
)
def test_a_condition_on_what_is_not_there_is_an_error_that_shows_what_is(
    parent: Path, tmp_path: Path, where: str, told: str
) -> None:
    """A typing error neither keeps everything nor nothing: it is told in one line, and nothing is written."""
    with pytest.raises(WhereError, match=told) as error:
        make(parent, tmp_path / "set", where)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_train_on_is_an_error(parent: Path, tmp_path: Path) -> None:
    """Conditions that exclude each other, or that only val and test meet, leave no subset; asking for nothing is none either."""
    with pytest.raises(
        SelectionError, match="not one sample of train meets region=EU_SW and country=DE, so there is no class"
    ):
        make(parent, tmp_path / "set", "region=EU_SW", "country=DE")
    with pytest.raises(SelectionError, match="not one sample of train meets region=NA_E and latin_name=e"):
        make(parent, tmp_path / "set", "region=NA_E", "latin_name=e")
    with pytest.raises(SubsetError, match="a subset asks for something; give --where, --classes or --require-license"):
        make(parent, tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_a_split_of_which_nothing_stays_is_absent_and_that_is_said(parent: Path, tmp_path: Path) -> None:
    """As where pictures are built without one: there is no such folder, and the report has a line for it."""
    account = make(parent, tmp_path / "set", "region=NA_W")
    assert sorted(path.name for path in (tmp_path / "set").iterdir() if path.is_dir()) == ["train"]
    assert account.selection is not None
    assert account.selection.absent_splits == ("val", "test")
    assert "nothing of val stays, so there is no val" in (tmp_path / "set" / "report.md").read_text()
    assert verify_dataset(tmp_path / "set").damages == ()


@pytest.mark.parametrize("position", range(600, 7 * 3000, 1999))
def test_damage_of_the_parent_is_never_passed_on(parent: Path, tmp_path: Path, position: int) -> None:
    """One changed bit in a header, a picture, a label or the metadata of the last shard: an error, and no dataset is there."""
    damaged = Path(shutil.copytree(parent, tmp_path / "global"))
    path = sorted((damaged / "train").glob("*.tar"))[-1]
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(UserError):
        make(damaged, tmp_path / "set", "region!=EU_C")
    assert [entry.name for entry in tmp_path.iterdir()] == ["global"]


def test_a_parent_that_is_not_whole_is_an_error(parent: Path, tmp_path: Path) -> None:
    """A lost manifest or shard does not make a smaller subset."""
    damaged = Path(shutil.copytree(parent, tmp_path / "global"))
    (damaged / "val" / "manifest.json").unlink()
    with pytest.raises(UserError, match="has no split 'val'"):
        make(damaged, tmp_path / "set", "region=EU_C")
    (damaged / "train" / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match="the shard is not there"):
        make(damaged, tmp_path / "set", "region=EU_C")
    with pytest.raises(UserError, match="no dataset here"):
        make(tmp_path, tmp_path.parent / "set", "region=EU_C")


def test_a_subset_stands_apart_from_its_parent(parent: Path, tmp_path: Path) -> None:
    """Neither inside it, nor around it, nor in its place; another dataset is replaced only when asked."""
    copy = Path(shutil.copytree(parent, tmp_path / "global"))
    for place in (copy, copy / "eu", tmp_path):
        with pytest.raises(PlacementError, match="apart from it"):
            make(copy, place, "region=EU_C", replace=True)
    make(copy, tmp_path / "set", "region=EU_C")
    with pytest.raises(PlacementError, match="exists already"):
        make(copy, tmp_path / "set", "region=EU_SW")
    make(copy, tmp_path / "set", "region=EU_SW", replace=True)
    assert load_class_map(tmp_path / "set" / "classes.json").class_names == ("a", "b", "c")
    assert digests_of(copy) == digests_of(parent)


def write_foreign(split_dir: Path, samples: list[tuple[str, bytes, int, bytes | None]], class_map: ClassMap) -> None:
    """A shard as another program writes it: KEY.json before the picture or not at all, no KEY.cls, and a file more."""
    split_dir.mkdir(parents=True)
    path, rows = split_dir / "foreign.tar", []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, label, metadata in samples:
            contents = {"json": metadata, "jpg": image, "txt": b"a caption"}
            for suffix, content in contents.items():
                if content is not None:
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            rows.append((image, label))
    with tarfile.open(path) as tar:
        offsets = [member.offset_data for member in tar if member.name.endswith("jpg")]
    entries = [(offset, len(i), zlib.crc32(i), label) for offset, (i, label) in zip(offsets, rows, strict=True)]
    index_path = path.with_suffix(".idx")
    index_path.write_bytes(np.array(entries, dtype=INDEX_DTYPE).tobytes())
    counts = Counter(str(label) for _, label in rows)
    shard = Shard(
        name=path.name,
        num_samples=len(rows),
        bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        index_sha256=sha256_of_file(index_path),
        class_counts=dict(sorted(counts.items())),
    )
    identities = sum(identity_of(key) for key, *_ in samples)
    save_manifest(
        make_manifest(
            split=split_dir.name, class_map_digest=class_map.digest, shards=(shard,), identity_sum=identities
        ),
        split_dir,
    )


def test_tars_of_others_become_our_own(tmp_path: Path) -> None:
    """Metadata before the picture or absent, keys with folders: the subset is sound, with the bytes and the keys as they were."""
    class_map = ClassMap(("oak", "yew"))
    stated = [b'{"region" : "EU_SW"}', b'{"region":"EU_C"}', None, b'["EU_SW"]', b'{"region": "EU_SW", "n": 1.50}']
    samples = [(f"0001/{number}", draw(number), number % 2, raw) for number, raw in enumerate(stated)]
    samples[1] = ("0001/1", draw(1, image_format="PNG"), 1, stated[1])
    write_foreign(tmp_path / "foreign" / "train", samples, class_map)
    class_map.save(tmp_path / "foreign" / "classes.json")
    make(tmp_path / "foreign", tmp_path / "in", "region=EU_SW")
    assert [(s.sample_key, s.class_name, s.image, s.metadata) for s in samples_of(tmp_path / "in", "train")] == [
        ("0001/0", "oak", draw(0), stated[0]),
        ("0001/4", "oak", draw(4), stated[4]),
    ]
    make(tmp_path / "foreign", tmp_path / "out", "region!=EU_SW")
    found = [(s.sample_key, s.metadata) for s in samples_of(tmp_path / "out", "train")]
    assert found == [("0001/1", stated[1]), ("0001/2", b"{}"), ("0001/3", b'{"content":["EU_SW"]}')]
    with tarfile.open(tmp_path / "out" / "train" / "shard-000000.tar") as tar:
        assert tar.getnames()[:3] == ["0001/1.png", "0001/1.cls", "0001/1.json"], "the suffix follows the bytes"
    for name in ("in", "out"):
        assert verify_dataset(tmp_path / name).damages == ()


def test_a_picture_of_another_format_is_an_error(tmp_path: Path) -> None:
    """A dataset that was not built by us may hold what a shard of ours may not."""
    class_map = ClassMap(("oak",))
    write_foreign(tmp_path / "global" / "train", [("a", draw(0, image_format="GIF"), 0, b'{"region":"EU"}')], class_map)
    class_map.save(tmp_path / "global" / "classes.json")
    with pytest.raises(ShardError, match="sample a is neither JPEG, PNG nor WebP"):
        make(tmp_path / "global", tmp_path / "set", "region=EU")
    assert not (tmp_path / "set").exists()


def test_metadata_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    """One line that names the sample."""
    class_map = ClassMap(("oak",))
    write_foreign(tmp_path / "train", [("a", draw(0), 0, b"{region")], class_map)
    class_map.save(tmp_path / "classes.json")
    split = open_dataset(tmp_path).open_split("train")
    descriptor = split.open_shard(0)
    with pytest.raises(ShardError, match=r"sample a: its KEY\.json is no JSON"):
        read_metadata(descriptor, split.read_index(0), 0)
    os.close(descriptor)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_verify_finds_what_is_not_as_the_parent_has_it(parent: Path, tmp_path: Path) -> None:
    """Another parent, other labels, a photograph of another split or under another class: each is found by name."""
    subset = tmp_path / "set"
    make(parent, subset, "region=EU_SW")
    (none,) = check_parentage(parent, parent)
    assert "names no parent" in str(none)
    elsewhere = Path(shutil.copytree(subset, tmp_path / "elsewhere"))
    digest = load_manifest(subset / "val" / "manifest.json").digest
    edit_json(elsewhere / "train" / "manifest.json", parent=digest)
    (other,) = check_parentage(elsewhere, parent)
    assert other.place == "train/manifest.json"
    assert "names another parent" in other.what
    shutil.copytree(parent, tmp_path / "moved")
    (tmp_path / "moved" / "val").rename(tmp_path / "moved" / "held")
    (tmp_path / "moved" / "test").rename(tmp_path / "moved" / "val")
    (tmp_path / "moved" / "held").rename(tmp_path / "moved" / "test")
    told = [str(damage) for damage in check_parentage(subset, tmp_path / "moved")]
    num_val = len(samples_of(subset, "val"))
    assert any(
        f"val/manifest.json: {num_val} photographs are not in val of the parent, first " in line for line in told
    )
    declared = json.loads((subset / "classes.json").read_text())["parent"]
    edit_json(subset / "classes.json", parent={**declared, "labels": [0, 1, 4]})
    told = [str(damage) for damage in check_parentage(subset, parent)]
    assert "classes.json: 'c' should be class 4 of the parent, which is 'e'" in told
    assert any("photographs stand under another class in the parent" in line for line in told)


def test_verify_finds_a_parent_named_by_halves(parent: Path, tmp_path: Path) -> None:
    """Class map and manifests name a parent together or not at all."""
    make(parent, tmp_path / "set", "region=EU_SW")
    content = json.loads((tmp_path / "set" / "classes.json").read_text())
    del content["parent"]
    (tmp_path / "set" / "classes.json").write_text(json.dumps(content))
    told = [str(damage) for damage in verify_dataset(tmp_path / "set").damages]
    assert "train/manifest.json: it names a parent and classes.json does not" in told


def run_command(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "shards" / script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_commands_make_a_subset_and_verify_it_beside_its_parent(parent: Path, tmp_path: Path) -> None:
    """As the help shows it: one table, one sum; sound beside its own parent, and exit code 2 beside another."""
    done = run_command("build.py", "--from-dataset", parent, "--where", "region=EU_SW", "--out", tmp_path / "eu_sw")
    assert (done.returncode, done.stderr) == (0, "")
    assert "asked for: region=EU_SW\n3 of the 5 classes of the parent stay, in its order" in done.stdout
    assert "1 classes keep photographs in val or test but none in train, so these are left out: d" in done.stdout
    assert run_command("verify.py", tmp_path / "eu_sw", "--parent", parent).returncode == 0
    wrong = run_command("verify.py", parent, "--parent", tmp_path / "eu_sw")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("classes.json: names no parent, so this is no subset\n")


@pytest.mark.parametrize(
    "option",
    [["--seed", "0"], ["--near-duplicates=2"], ["--keep-splits", "x"], ["--image-dir", "x"], ["--workers", "1"]],
    ids=str,
)
def test_options_that_say_nothing_of_a_subset_are_refused(parent: Path, tmp_path: Path, option: list[str]) -> None:
    """Given explicitly they are an error, their default value included; and what selects belongs to a dataset."""
    arguments = ["--from-dataset", parent, "--where", "region=EU_SW", "--out", tmp_path / "set"]
    refused = run_command("build.py", *arguments, *option)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {option[0].split('=')[0]} does not go with --from-dataset")
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_a_condition_without_a_dataset_is_refused(tmp_path: Path) -> None:
    """`--where` on a folder of pictures would be ignored otherwise."""
    refused = run_command("build.py", "--from-folder", tmp_path, "--where", "region=EU_SW", "--out", tmp_path / "set")
    assert refused.returncode == 2
    assert "--where and --classes belong to --from-dataset" in refused.stderr
