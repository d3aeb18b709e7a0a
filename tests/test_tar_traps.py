"""The traps of tars that others wrote: each is read exactly, left out by name, or refused with its place."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictures import draw

from aplantida_dist.shards.audit import sample_key_of
from aplantida_dist.shards.members import read_tar_members
from aplantida_dist.shards.tar_index import TarError
from aplantida_dist.shards.tars import read_tars
from aplantida_dist.shards.verify import verify_dataset
from tests.tars import build_tars, pack, read_dataset, sample


@pytest.mark.parametrize(
    "files",
    [
        pytest.param([*sample("a", 0), *sample("b", 1), *sample("c", 2)], id="plain"),
        pytest.param([(f"./d/{n}", c) for n, c in sample("a", 0) + sample("b", 1) + sample("c", 2)], id="./ and folders"),
        pytest.param(
            [file for group in zip(sample("a", 0), sample("b", 1), sample("c", 2), strict=True) for file in group],
            id="interleaved keys",
        ),
        pytest.param([*sample("a", 0), *sample("b", 1), *sample("a", 2)], id="a key that comes again, whole"),
        pytest.param([*sample("x" * 160, 0), *sample("y" * 300, 1), *sample("größe/☘", 2)], id="long and strange names"),
        pytest.param([*sample("a", 0, suffix="JPG"), *sample("b", 1, suffix="Jpeg"), *sample("c", 2)], id="upper case"),
        pytest.param([*sample("a.b/c", 0), *sample("a.b/d", 1), *sample("a.c/c", 2)], id="a dot in a folder"),
        pytest.param([*reversed(sample("a", 0)), *reversed(sample("b", 1)), *reversed(sample("c", 2))], id="json first"),
        pytest.param([("a.txt", b"x"), *sample("a", 0), ("b.seg.npy", b"x"), *sample("b", 1), *sample("c", 2)], id="other files"),
        pytest.param([(n.replace(".", ".v1.", 1), c) for n, c in sample("a", 0) + sample("b", 1) + sample("c", 2)], id="two dots"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_names_that_mean_samples_are_read_exactly(tmp_path: Path, files: Any, tar_format: int) -> None:
    """Whatever the names are like, each picture is one sample with the metadata of its own, and the dataset is sound."""
    files = [
        (name, content if not name.lower().endswith("json") else with_name(content, name)) for name, content in files
    ]
    urls = pack(tmp_path / "x.tar", files, tar_format=tar_format)
    account = build_tars(urls, tmp_path / "set")
    assert (account.num_samples, account.left_out) == (3, ())
    found = read_dataset(tmp_path / "set")
    assert found.keys() == {sample_key_of(draw(number)) for number in range(3)}
    assert sorted(one[2]["name"] for one in found.values()) == sorted(n for n, _ in files if n.lower().endswith("json"))
    assert verify_dataset(tmp_path / "set").damages == ()


def with_name(content: bytes, name: str) -> bytes:
    return json.dumps({**json.loads(content), "name": name}).encode()


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def test_every_trap_is_left_out_by_name_and_all_adds_up(tmp_path: Path) -> None:
    """What makes no sample is listed with its reason: tar samples in = samples indexed + left out; folders are no samples."""
    sound = [file for number in range(12) for file in sample(f"s{number}", number)]
    traps: list[tuple[str, str, str, list[Any]]] = [
        ("no_sample", "README", "", [("README", b"x")]),
        ("no_sample", "d/.hidden.jpg", "", [("d/.hidden.jpg", draw(100))]),
        ("no_sample", "dot.", "", [("dot.", draw(101))]),
        ("not_one_image", "a.1.jpg", "a.1.jpg, a.2.jpg", [("a.1.jpg", draw(102)), ("a.2.jpg", draw(103))]),
        ("not_one_image", "b.jpg", "b.jpg, b.png", [*sample("b", 104), ("b.png", draw(105))]),
        ("not_one_image", "c.json", "only c.json", sample("c", 106)[1:]),
        ("not_one_image", "link.jpg", "is a link", [special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), sample("link", 107)[1]]),
        ("not_one_image", "hard.jpg", "is a link", [special("hard.jpg", tarfile.LNKTYPE, "s0.jpg"), sample("hard", 108)[1]]),
        ("not_one_image", "fifo.jpg", "no plain file", [special("fifo.jpg", tarfile.FIFOTYPE)]),
        ("no_label", "n.jpg", "", sample("n", 109)[:1]),
        ("no_label", "e.jpg", "", [("e.jpg", draw(110)), ("e.cls", b" \n")]),
        ("bad_metadata", "j.jpg", "not JSON", [("j.jpg", draw(111)), ("j.json", b"{'a'}")]),
        ("bad_metadata", "nan.jpg", "not JSON", [("nan.jpg", draw(112)), ("nan.json", b'{"latin_name": "Acer", "x": NaN}')]),
        ("bad_metadata", "list.jpg", "holds list", [("list.jpg", draw(113)), ("list.json", b"[]")]),
        ("bad_metadata", "seven.jpg", "is 7", [("seven.jpg", draw(114)), ("seven.json", b'{"latin_name": 7}')]),
        ("bad_metadata", "half.jpg", "not JSON", [("half.jpg", draw(115)), ("half.json", b'{"latin_name": "\\ud800"}')]),
        ("bad_metadata", "cls.jpg", "no text", [("cls.jpg", draw(116)), ("cls.cls", b"\xff\xfe")]),
        ("bad_metadata", "two.jpg", "several: two.json, two.v.json", [*sample("two", 117), ("two.v.json", b"{}")]),
        ("bad_metadata", "long.jpg", "longer than", [("long.jpg", draw(118)), ("long.json", b" " * (2**20 + 1))]),
        ("bad_metadata", "lj.jpg", "lj.json is a link", [("lj.jpg", draw(119)), special("lj.json", tarfile.SYMTYPE, "s0.json")]),
        ("not_a_picture", "empty.jpg", "empty file", [("empty.jpg", b""), *sample("empty", 0)[1:]]),
        ("undecodable", "cut.jpg", "", [("cut.jpg", draw(120)[:-60]), *sample("cut", 0)[1:]]),
        ("duplicate", "copy.jpg", "same bytes as x.tar:s0.jpg", sample("copy", 0)),
        ("licence", "nc.jpg", "cc-by-nc", sample("nc", 121, license="cc-by-nc")),
    ]  # fmt: skip
    sound = [
        (n, c if n.endswith("jpg") else json.dumps({"latin_name": "Acer", "license": "cc0"}).encode()) for n, c in sound
    ]
    files = [special("d", tarfile.DIRTYPE), *sound]
    for _, _, _, planted in traps:
        files += [
            (n, json.dumps({"license": "cc0", **json.loads(c)}).encode() if n in ("copy.json", "empty.json", "cut.json") else c)
            for n, c in planted
        ]  # fmt: skip
    account = build_tars(pack(tmp_path / "x.tar", files), tmp_path / "set", licence="commercial")
    assert {one.source: one.reason for one in account.left_out} == {
        f"x.tar:{name}": reason for reason, name, _, _ in traps
    }
    details = {one.source: one.detail for one in account.left_out}
    for _, name, detail, _ in traps:
        assert detail in details[f"x.tar:{name}"], name
    assert account.num_samples == 12
    assert account.num_files == 12 + len(traps)
    assert (
        f"{account.num_files} tar samples = 12 samples written + {len(traps)} left out"
        in (tmp_path / "set/report.md").read_text()
    )


def test_no_name_in_a_tar_becomes_a_path(tmp_path: Path) -> None:
    """Names that lead out of any folder are names and nothing more: no file is made anywhere."""
    names = ("../../out", f"{tmp_path}/out", "a/../../../out")
    files = [file for number, name in enumerate(names) for file in sample(name, number)]
    account = build_tars(pack(tmp_path / "tars" / "x.tar", files), tmp_path / "deep" / "er" / "set")
    assert account.num_samples == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "tars"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["er"]


CUTS: dict[str, Callable[[bytes, list[tarfile.TarInfo]], bytes]] = {
    "in a header": lambda c, m: c[: m[4].offset + 100],
    "in a payload": lambda c, m: c[: m[4].offset_data + 100],
    "at a member": lambda c, m: c[: m[5].offset],
    "at a sample": lambda c, m: c[: m[4].offset],
    "to nothing": lambda c, m: b"",
    "a flipped header bit": lambda c, m: c[: m[4].offset + 3] + bytes([c[m[4].offset + 3] ^ 1]) + c[m[4].offset + 4 :],
    "a flipped bit in a size": lambda c, m: c[: m[4].offset + 130] + bytes([c[m[4].offset + 130] ^ 8]) + c[m[4].offset + 131 :],
    "something behind the end": lambda c, m: c + b"x",
}  # fmt: skip


@pytest.mark.parametrize("stem", ["", "ü" * 120], ids=["plain headers", "long names"])
@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_damaged_tar_is_an_error_that_names_tar_and_byte(
    tmp_path: Path, cut: str, tar_format: int, stem: str
) -> None:
    """webdataset would read half of it and say nothing."""
    files = [file for number in range(5) for file in sample(f"{stem}{number}", number)]
    path = pack(tmp_path / "x.tar", files, tar_format=tar_format)
    path.write_bytes(CUTS[cut](path.read_bytes(), list(read_tar_members(path).members)))
    with pytest.raises(TarError, match=r"x\.tar: .* byte \d+.*; fetch it again, or leave it out"):
        read_tars(str(path), class_names=None)


FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}


@pytest.mark.parametrize("tar_format", FORMATS)
def test_members_are_what_tarfile_lists(tmp_path: Path, tar_format: str) -> None:
    """The quick reading of plain headers says what the standard library says, in every format and for every kind of member."""
    dated = tarfile.TarInfo("dated.txt")
    dated.mtime = 1.5  # a pax header of its own, as ShardWriter gives every member
    files: list[Any] = [
        *sample("a", 0),
        *sample("n" * 95, 1),
        ("d" * 90 + "/" + "n" * 60, b"x"),
        (dated, b"x"),
        ("nodot", b""),
    ]
    files += [
        special("d", tarfile.DIRTYPE),
        special("l", tarfile.SYMTYPE, "a.jpg"),
        special("h", tarfile.LNKTYPE, "a.jpg"),
    ]
    if tar_format != "ustar":
        files += [*sample("ü" * 120, 2), *sample("n" * 300, 3)]
    path = pack(tmp_path / "x.tar", files, tar_format=FORMATS[tar_format])
    listed = read_tar_members(path)
    with tarfile.open(path, encoding="utf-8") as tar:
        expected = [(one.name, one.size, one.offset_data, one.type, one.linkname) for one in tar]
    assert [(one.name, one.size, one.offset_data, one.type, one.linkname) for one in listed.members] == expected
    assert (listed.fault, len(expected)) == (None, len(files))
