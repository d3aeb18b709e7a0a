"""The report of a build: it adds up, names what is missing, shows what was left out, and is safe to open."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pictures import build, draw, fill, put
from PIL import Image
from test_build import plant_every_defect, png_of_size, run_build

from aplantida_dist.data.frequency import frequency_of
from aplantida_dist.shards.account import MOST_CHARACTERS
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.earlier import read_splits
from aplantida_dist.shards.gallery import PICTURES_PER_GALLERY, choose_galleries, spread
from aplantida_dist.shards.jsonl import read_jsonl
from aplantida_dist.shards.place import Place
from aplantida_dist.shards.record import MEANING_OF_REASON, Record
from aplantida_dist.shards.report import save_report
from aplantida_dist.shards.report_text import to_markdown
from aplantida_dist.shards.scarcity import ScarcityError
from aplantida_dist.shards.thumbnails import MAX_THUMBNAIL_BYTES, THUMBNAIL_SIDE, Opening, Thumbnail, preview_of
from aplantida_dist.shards.verify import verify_dataset
from aplantida_dist.shards.writer import ShardLimits

EMPTY_ELEMENTS = {"meta", "img"}


class Page(HTMLParser):
    """A page read as a browser does: `elements` in order, `texts` beside them; any tag that does not fit fails."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(self.html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY_ELEMENTS:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def pictures(self) -> list[Image.Image]:
        uris = [str(attributes["src"]) for tag, attributes in self.elements if tag == "img"]
        contents = [base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"), validate=True) for uri in uris]
        return [Image.open(io.BytesIO(content)) for content in contents]

    def exhibits(self, name: str) -> list[str]:
        """The HTML of what stands side by side in one gallery."""
        gallery = self.html.split(f'<h3 id="{name}">')[1].split("<h3")[0].split("<h2>")[0]
        return gallery.split("<article")[1:]


def photograph(number: int, *, width: int = 160, height: int = 120, quality: int = 90) -> bytes:
    """A picture of coarse patches, whose look survives another size."""
    patches = Image.open(io.BytesIO(draw(number, image_format="PNG", width=8, height=6)))
    buffer = io.BytesIO()
    patches.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.mark.parametrize("with_splits", [False, True])
@pytest.mark.parametrize("min_samples", [1, 2, 3, 5, 6])
def test_scarce_classes_are_left_out_whole(tmp_path: Path, min_samples: int, with_splits: bool) -> None:
    """A class is in the dataset if and only if it has so many usable photographs in all; the account adds up and names the others."""
    source, counts = tmp_path / "source", {"ash": 1, "birch": 2, "elm": 5, "oak": 8}
    first = fill(source / "train" if with_splits else source, {**counts, "nothing": 0})
    if with_splits:
        fill(source / "val", {"elm": 1, "oak": 2}, first=first)
        counts["elm"], counts["oak"] = 6, 10
    account = build(source, tmp_path / "set", min_samples=min_samples)
    scarce = {name: count for name, count in counts.items() if count < min_samples}
    assert account.class_names == tuple(sorted(counts.keys() - scarce.keys()))
    assert account.num_files == sum(counts.values()) == account.num_samples + len(account.left_out)
    assert account.left_out_by_reason["few_samples"] == len(account.left_out) == sum(scarce.values())
    for one in account.left_out:
        count = scarce[str(one.class_name)]
        assert one.detail == f"{count} usable photograph{'s' if count > 1 else ''}, --min-samples {min_samples}"
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["min_samples"] == min_samples
    assert report["scarce_classes"] == scarce
    assert report["classes_without_samples"] == ["nothing"]
    assert all(sum(row.values()) >= min_samples for row in report["class_counts"].values())
    page = Page(tmp_path / "set" / "report.html")
    for name, count in scarce.items():
        assert f"{name} ({count})" in (tmp_path / "set" / "report.md").read_text()
        assert f"{name} ({count})" in "".join(page.texts)


def test_usable_photographs_are_counted(tmp_path: Path) -> None:
    """Copies, broken files and leaks do not make a class large enough; near copies of one another, being samples, do."""
    fill(tmp_path / "source" / "train", {"oak": 4})
    for number in range(3):
        put(tmp_path / "source" / "train" / "elm" / f"{number}.jpg", photograph(1, width=160 - 20 * number))
        put(tmp_path / "source" / "train" / "ash" / f"copy {number}.jpg", photograph(2))
    put(tmp_path / "source" / "train" / "ash" / "cut.jpg", photograph(3)[:-200])
    put(tmp_path / "source" / "train" / "ash" / "own.jpg", photograph(4))
    put(tmp_path / "source" / "train" / "ash" / "leak.jpg", photograph(5))
    put(tmp_path / "source" / "test" / "oak" / "0.jpg", draw(50))
    put(tmp_path / "source" / "test" / "ash" / "0.jpg", photograph(5, quality=80))
    account = build(tmp_path / "source", tmp_path / "set", min_samples=4)
    assert account.scarce_classes == {"ash": 3, "elm": 3}
    account = build(tmp_path / "source", tmp_path / "set", min_samples=3, replace=True)
    assert account.class_names == ("ash", "elm", "oak")
    assert account.groups is not None
    assert account.groups.num_groups == 2
    assert account.left_out_by_reason["duplicate"] == 2
    assert account.left_out_by_reason["leak"] == account.left_out_by_reason["undecodable"] == 1


def test_scarce_classes_and_kept_splits(tmp_path: Path) -> None:
    """A class that shrinks below --min-samples goes whole, and counts as gone; nothing else moves, and no class waits in val."""
    fill(tmp_path / "source", {"birch": 12, "oak": 12})
    build(tmp_path / "source", tmp_path / "one", seed=1)
    for path in sorted((tmp_path / "source" / "birch").iterdir())[4:]:
        path.unlink()
    account = build(tmp_path / "source", tmp_path / "two", seed=2, keep_splits_of=tmp_path / "one", min_samples=5)
    assert account.kept_splits is not None
    assert (account.kept_splits.num_kept, account.kept_splits.num_gone) == (12, 12)
    assert account.scarce_classes == {"birch": 4}
    one, two = read_splits(tmp_path / "one"), read_splits(tmp_path / "two")
    assert len(two) == 12
    assert two.items() <= one.items()


def test_asking_for_more_than_any_class_has_is_an_error(tmp_path: Path) -> None:
    """The error names the largest class, and nothing is written; 0 is no number of photographs."""
    fill(tmp_path / "source", {"birch": 2, "oak": 4})
    with pytest.raises(ScarcityError, match=r"all 2 classes; the largest, oak, has 4 usable photographs"):
        build(tmp_path / "source", tmp_path / "set", min_samples=5)
    assert not (tmp_path / "set").exists()
    failed = run_build("--from-folder", tmp_path / "source", "--out", tmp_path / "set", "--min-samples", "0")
    assert failed.returncode == 2
    assert "expected a positive whole number" in failed.stderr


def test_many_medium_and_few_follow_the_train_samples(tmp_path: Path) -> None:
    """> 100, 20 to 100, < 20: by hand from the manifests, in report.json, report.md, the page and on the console."""
    assert [frequency_of(count) for count in (0, 19, 20, 100, 101)] == ["few", "few", "medium", "medium", "many"]
    first = fill(tmp_path / "source" / "train", {"a": 101, "b": 100, "c": 20, "d": 19, "e": 1})
    fill(tmp_path / "source" / "test", {"a": 2, "b": 30, "c": 4, "d": 25}, first=first)
    done = run_build("--from-folder", tmp_path / "source", "--out", tmp_path / "set", "--workers", "0")
    assert done.returncode == 0, done.stderr
    expected = {"many": (1, 101, 2), "medium": (2, 120, 34), "few": (2, 20, 25)}
    frequencies = json.loads((tmp_path / "set" / "report.json").read_text())["frequencies"]
    assert {name: tuple(row.values()) for name, row in frequencies.items()} == expected
    markdown = (tmp_path / "set" / "report.md").read_text()
    page = Page(tmp_path / "set" / "report.html").html
    for name, row in expected.items():
        assert re.search(rf"^{name} +{' +'.join(map(str, row))}  ", done.stdout, re.MULTILINE)
        assert f"| {name} | {' | '.join(map(str, row))} |" in markdown
        assert f"<td>{name}</td>{''.join(f'<td>{number}</td>' for number in row)}" in page


def test_the_page_shows_pictures_and_tells_of_what_is_none(tmp_path: Path) -> None:
    """Every defect is on the page under its reason: a picture where there is one, else words, else a frame that says so."""
    expected = plant_every_defect(tmp_path / "dirty")
    build(tmp_path / "dirty", tmp_path / "set")
    page = Page(tmp_path / "set" / "report.html")
    for source, reason in expected.items():
        if reason == "outside_classes":
            assert f"<code>{source}</code>" in page.html
            continue
        (exhibit,) = [exhibit for exhibit in page.exhibits(reason) if f"<code>{source}</code>" in exhibit]
        is_picture = reason in ("other_format", "duplicate", "leak", "conflicting_labels")
        assert ("<img" in exhibit) == is_picture
        assert ("no picture" in exhibit) == (not is_picture and source != "train/oak/error page.jpg")
        assert exhibit.count("<figure>") == (2 if reason in ("leak", "conflicting_labels") else 1)
    assert "&lt;html&gt;404&lt;/html&gt;" in page.html
    assert all(picture.format == "JPEG" and max(picture.size) <= THUMBNAIL_SIDE for picture in page.pictures)


def test_the_page_needs_nothing_and_tells_nothing_of_this_machine(tmp_path: Path) -> None:
    """No path of the machine, no address but of its own parts, no script; its tags are balanced (see Page)."""
    plant_every_defect(tmp_path / "dirty")
    build(tmp_path / "dirty", tmp_path / "set", min_samples=2)
    page = Page(tmp_path / "set" / "report.html")
    assert str(tmp_path) not in page.html
    assert "://" not in page.html
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "form")
        assert str(attributes.get("src") or "data:image/jpeg;").startswith("data:image/jpeg;")
        assert str(attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    names = {attributes.get("id") for _, attributes in page.elements}
    assert {str(attributes["href"])[1:] for tag, attributes in page.elements if tag == "a"} <= names


def test_names_and_contents_of_users_stay_text(tmp_path: Path) -> None:
    """File names, class names, licences, URLs and the words in files cannot become elements."""
    evil = "<script>alert('1')</script>\"><img src=x onerror=y>&amp;"
    pictures = tmp_path / "pictures"
    lines = []
    for number in range(6):
        put(pictures / f"{number}.jpg", draw(number))
        licence = "cc0" if number < 3 else f"{evil} {number}"
        lines.append({"latin_name": evil, "image_path": f"{number}.jpg", "license": licence})
    put(pictures / "words.jpg", evil.encode())
    put(pictures / "<b>.jpg", draw(10))
    lines += [{"latin_name": f"{evil} 2", "image_path": name} for name in ("words.jpg", "<b>.jpg", "<i>gone.jpg")]
    lines.append({"latin_name": evil, "image_url": f"x:{evil}"})
    records = put(tmp_path / "<u>.jsonl", "\n".join(map(json.dumps, lines)).encode())
    for min_samples, out in ((1, "one"), (4, "two")):
        options = BuildOptions(seed=0, limits=ShardLimits(), num_workers=0, replace=False, min_samples=min_samples)
        build_dataset(read_jsonl(records, pictures), tmp_path / out, options=options)
        page = Page(tmp_path / out / "report.html")
        assert {tag for tag, _ in page.elements}.isdisjoint({"script", "i", "u"})
        assert all(set(attributes) <= {"alt", "title", "src"} for tag, attributes in page.elements if tag == "img")
        assert evil in page.texts
        assert "<u>.jsonl" in page.texts
        assert unescape(page.html).count("<i>gone.jpg") == 1


def test_page_and_overview_stay_bounded(tmp_path: Path) -> None:
    """100,000 pictures left out, of noise and with endless names: 24 a gallery are looked at, and the page stays below 3 MB."""
    fill(tmp_path / "source", {"oak": 3})
    account = build(tmp_path / "source", tmp_path / "set")
    places = [Place(str(put(tmp_path / f"{number}", draw(number, width=200, height=190)))) for number in range(4)]
    reasons = list(MEANING_OF_REASON)
    records = [Record(place, "twin", "c" * 2000, None, b"{}", None) for place in places]
    left_out = tuple(
        replace(record, source=f"{number:06}{'/x' * 1000}").left_out(
            reasons[number % len(reasons)], "d" * 2000, twin=record if number % 2 else None
        )
        for number, record in enumerate(itertools.islice(itertools.cycle(records), 100_000))
    )
    account = replace(account, left_out=left_out, num_files=100_003)
    galleries = choose_galleries(account)
    for gallery in galleries.of_reason.values():
        assert sum(len(exhibit.views) for exhibit in gallery.exhibits) <= PICTURES_PER_GALLERY
    account = replace(account, left_out=left_out[:1000])
    (tmp_path / "out").mkdir()
    save_report(account, tmp_path / "out")
    page = Page(tmp_path / "out" / "report.html")
    assert len(page.html) < 3_000_000
    assert len(page.pictures) > 20 * len(reasons)
    assert max(map(len, page.texts)) < 10_000
    assert "c" * (MOST_CHARACTERS + 1) not in page.html
    assert len(to_markdown(account)) < 300_000


@pytest.mark.parametrize("num_items", [0, 1, 39, 40, 41, 1000, 100_003])
def test_what_is_shown_is_spread_over_all(num_items: int) -> None:
    """At most so many, in order, none twice, from the first on, with gaps that differ by one at most."""
    shown = spread(range(num_items), most=40)
    assert len(shown) == min(num_items, 40)
    assert shown[:1] == [0][:num_items]
    gaps = [after - before for before, after in zip(shown, [*shown[1:], num_items], strict=False)]
    assert all(gap > 0 for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_previews_are_safe_to_make(tmp_path: Path) -> None:
    """Small JPEGs of what decodes; nothing of bombs, pipes, folders, cuts and what is not there; no decoder but the plain ones is run."""
    os.mkfifo(tmp_path / "pipe")
    image = Image.open(io.BytesIO(photograph(0, width=90, height=300)))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned", "JPEG", exif=exif, comment=b"x" * 60_000)
    turned = preview_of(Place(str(tmp_path / "turned")))
    assert isinstance(turned, Thumbnail)
    assert len(turned.jpeg) <= MAX_THUMBNAIL_BYTES
    assert (turned.width, turned.height) == (300, 90)
    assert Image.open(io.BytesIO(turned.jpeg)).size == (128, 38)
    for number, image_format in enumerate(("JPEG", "PNG", "WEBP", "GIF", "BMP")):
        path = put(tmp_path / image_format, draw(number, image_format=image_format, width=300, height=300))
        preview = preview_of(Place(str(path)))
        assert isinstance(preview, Thumbnail)
        assert len(preview.jpeg) <= MAX_THUMBNAIL_BYTES
        assert preview == preview_of(Place(str(path)))
    member = put(tmp_path / "tar", b"before" + draw(7) + b"after")
    assert isinstance(preview_of(Place(str(member), 6, len(draw(7)))), Thumbnail)
    put(tmp_path / "bomb", png_of_size(60_000, 60_000))
    put(tmp_path / "large", png_of_size(10_001, 10_000))
    put(tmp_path / "cut", draw(8)[:-60])
    put(tmp_path / "empty", b"")
    put(tmp_path / "binary", bytes(range(256)))
    put(tmp_path / "tiff", draw(9, image_format="TIFF"))
    for name in ("tiff", "pipe", ".", "gone", "bomb", "large", "cut", "empty", "binary"):
        assert preview_of(Place(str(tmp_path / name))) is None
    words = "\ufeff  Größe:\n\t429 Too Many Requests " + "ä" * 1000
    found = preview_of(Place(str(put(tmp_path / "words", words.encode()))))
    assert found == Opening(("Größe: 429 Too Many Requests " + "ä" * 1000)[:160])
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    assert isinstance(preview_of(Place(str(put(tmp_path / "eps", eps)))), Opening)


def test_what_disagrees_stands_side_by_side(tmp_path: Path) -> None:
    """A leak beside the picture that stays, all copies of a conflict together, and groups under several classes."""
    source = tmp_path / "source"
    for number in range(8):
        put(source / "train" / "oak" / f"{number}.jpg", photograph(number))
    put(source / "train" / "elm" / "0.jpg", photograph(20))
    for number in range(5):
        put(
            source / "train" / "elm" / f"oak {number}.jpg",
            photograph(0, width=120 + 8 * number, height=90 + 6 * number),
        )
    for split, class_name in (("train", "elm"), ("train", "oak"), ("test", "elm"), ("test", "oak"), ("train", "a")):
        put(source / split / class_name / "conflict.jpg", photograph(30))
    put(source / "test" / "oak" / "small 1.jpg", photograph(1, width=80, height=60))
    put(source / "train" / "a" / "0.jpg", photograph(21))
    build(source, tmp_path / "set")
    page = Page(tmp_path / "set" / "report.html")
    (leak,) = page.exhibits("leak")
    assert re.findall("<code>(.*?)</code>", leak) == ["train/oak/1.jpg", "test/oak/small 1.jpg"]
    (conflict,) = page.exhibits("conflicting_labels")
    assert len(re.findall("<code>(.*?)</code>", conflict)) == conflict.count("<img") == 4
    assert "and 1 more" in conflict
    (group,) = page.exhibits("groups")
    assert re.findall("<b>(.*?)</b>", group) == ["elm", "oak", "elm", "elm"]
    assert "train/oak/0.jpg" in group
    assert "and 2 more" in group


def test_a_dataset_from_before_the_page_is_sound(tmp_path: Path) -> None:
    """Without report.html nothing is wrong; without report.md something is."""
    fill(tmp_path / "source", {"oak": 3})
    build(tmp_path / "source", tmp_path / "set")
    (tmp_path / "set" / "report.html").unlink()
    assert verify_dataset(tmp_path / "set").damages == ()
    (tmp_path / "set" / "report.md").unlink()
    assert [str(damage) for damage in verify_dataset(tmp_path / "set").damages] == ["report.md: missing"]
    build(tmp_path / "source", tmp_path / "set", replace=True)
    assert (tmp_path / "set" / "report.html").exists()


def test_class_without_a_usable_picture_is_reported(tmp_path: Path) -> None:
    """A class folder that holds nothing usable does not enter the class map, and the report names it."""
    fill(tmp_path / "source", {"birch": 3, "empty": 0})
    put(tmp_path / "source" / "broken" / "x.jpg", b"nothing")
    account = build(tmp_path / "source", tmp_path / "set")
    assert account.class_names == ("birch",)
    assert account.classes_without_samples == ("broken", "empty")
    assert "broken, empty" in (tmp_path / "set" / "report.md").read_text()


def test_the_command_prints_what_became_of_the_files(tmp_path: Path) -> None:
    """The summary on stdout adds up and names the report."""
    expected = plant_every_defect(tmp_path / "dirty")
    done = run_build("--from-folder", tmp_path / "dirty", "--out", tmp_path / "set", "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert f"{13 + len(expected)} files = 13 samples written + {len(expected)} left out" in done.stdout
    assert str(tmp_path / "set" / "report.md") in done.stdout
    assert str(tmp_path / "set" / "report.html") in done.stdout
