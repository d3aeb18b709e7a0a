"""The audit: every kind of picture is decoded to what a person sees, or named; nothing half or blank is trained on."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import imagehash
import numpy as np
import pytest
from dirty import END_OF_JPEG, HEIGHT, WIDTH, chunk, claiming, encode, photograph, pixels_of, png, ycck_jpeg
from pictures import build, draw, fill, put
from PIL import Image, ImageCms, ImageDraw, ImageOps
from test_build import run_build

from aplantida_dist.data.decode import DecodeError, Flaw, decode
from aplantida_dist.data.manifest import load_manifest
from aplantida_dist.herbarium.picture import draw_leaf
from aplantida_dist.herbarium.species import make_species
from aplantida_dist.shards.audit import MIN_SIDE, Fault, Picture, audit_picture, sample_key_of
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.jsonl import read_jsonl
from aplantida_dist.shards.licence import parse_requirement
from aplantida_dist.shards.looks import LOOK_BITS, look_of, shrink
from aplantida_dist.shards.workers import ITEMS_PER_TASK, TASKS_AHEAD, WorkersError, map_in_order
from aplantida_dist.shards.writer import ShardLimits

PHOTOGRAPH = photograph()
ENCODINGS: dict[str, bytes] = {
    "JPEG": encode(PHOTOGRAPH, "JPEG"),
    "progressive": encode(PHOTOGRAPH, "JPEG", progressive=True),
    "PNG": encode(PHOTOGRAPH, "PNG"),
    "WEBP": encode(PHOTOGRAPH, "WEBP"),
    "lossless WEBP": encode(PHOTOGRAPH, "WEBP", lossless=True),
}
ORIENTATION = 0x0112


def reason_of(content: bytes, *, min_side: int = MIN_SIDE) -> str | None:
    """Why the audit leaves a picture out; None where it does not."""
    found = audit_picture(content, with_looks=True, min_side=min_side)
    return found.reason if isinstance(found, Fault) else None


def flaw_of(content: bytes) -> Flaw | None:
    """Why training would not decode a picture; None where it does."""
    try:
        decode(content)
    except DecodeError as error:
        return error.flaw
    return None


# ---- decodes fully


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_cut_picture_never_passes(encoding: str) -> None:
    """Wherever a file is cut it is left out; PNG's last four bytes are the checksum of nothing."""
    content = ENCODINGS[encoding]
    ends = {*range(1, len(content), max(1, len(content) // 200)), *range(len(content) - 60, len(content))}
    for end in sorted(ends):
        is_whole = encoding == "PNG" and len(content) - end <= 4
        assert (reason_of(content[:end]) is None) == is_whole, f"cut at {end} of {len(content)}"


@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK", "progressive"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.8])
def test_a_cut_jpeg_with_its_end_mark_put_back_is_no_picture(kind: str, share: float) -> None:
    """Pillow fills the missing rows with grey and says nothing; training and audit refuse them, and every copy of them."""
    image = photograph(width=400, height=300)
    content = encode(image if kind == "progressive" else image.convert(kind), "JPEG", progressive=kind == "progressive")
    start = content.index(b"\xff\xda") + 14
    if kind == "progressive":  # only in the first scan, which is the tenth part of the file, rows are missing
        share *= 0.1
    cut = content[: start + int((len(content) - start) * share)] + END_OF_JPEG
    assert flaw_of(cut) == reason_of(cut) == "undecodable"


@pytest.mark.parametrize("scale", [1.0, 0.77, 0.5])
@pytest.mark.parametrize("options", [{"quality": 30}, {"quality": 95, "subsampling": 0}, {"progressive": True}])
def test_half_a_picture_that_was_stored_anew_is_no_picture(scale: float, options: dict[str, object]) -> None:
    """A program that opens a cut JPEG and saves it makes a sound file whose lower part is grey."""
    content = encode(photograph(width=400, height=300), "JPEG")
    with Image.open(io.BytesIO(content[: len(content) // 2] + END_OF_JPEG)) as image:
        half = image.resize((round(400 * scale), round(300 * scale)), Image.Resampling.LANCZOS)
    for stored in (encode(half, "JPEG", **options), encode(half, "PNG")):
        assert flaw_of(stored) == reason_of(stored) == "undecodable"


def test_a_picture_with_grey_around_it_is_a_picture() -> None:
    """Mid-grey above and below, or below and not all across, is no sign of missing rows."""
    framed = Image.new("RGB", (200, 160), (128, 128, 128))
    framed.paste(photograph(), (50, 40))
    assert reason_of(encode(framed, "PNG")) is None
    standing = photograph(width=200, height=160)
    standing.paste((128, 128, 128), (0, 100, 190, 160))
    assert reason_of(encode(standing, "PNG")) is None


def test_a_png_with_a_flipped_bit_never_passes() -> None:
    """Its checksums are looked at, which decoding does not do."""
    content, generator = ENCODINGS["PNG"], random.Random(0)
    for _ in range(300):
        flipped = bytearray(content)
        flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        assert reason_of(bytes(flipped)) is not None


@pytest.mark.filterwarnings("ignore")  # Pillow warns, and training lets it
def test_bombs_are_refused_before_they_are_unpacked() -> None:
    """A small file that claims more pixels than memory holds, in every format, and texts that unpack to gigabytes."""
    values = pixels_of(PHOTOGRAPH).astype(np.uint16)
    for content in (
        png(values, bits=8, colour=2, size=(60_000, 60_000)),
        png(values, bits=8, colour=2, size=(10_001, 10_000)),
        claiming(ENCODINGS["JPEG"], width=65_000, height=65_000),
        claiming(ENCODINGS["JPEG"], width=10_001, height=10_000),
    ):
        assert len(content) < 50_000
        assert flaw_of(content) == reason_of(content) == "too_large"
    text = zlib.compress(bytes(50_000_000), 9)
    for kind in (b"zTXt", b"iCCP"):
        content = png(values, bits=8, colour=2, before=chunk(kind, b"Comment\0\0" + text))
        assert flaw_of(content) == reason_of(content) == "undecodable"


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\0" * 5000, b"%PDF-1.7\n", bytes(range(256))])
def test_what_is_no_picture_is_named_so(content: bytes) -> None:
    """An empty file, a page, zeros, a document."""
    assert flaw_of(content) == reason_of(content) == "not_a_picture"


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"])
def test_other_formats_are_named(image_format: str) -> None:
    """Neither training nor the audit decodes them, whatever the file is called; the detail says what it is."""
    content = encode(PHOTOGRAPH, image_format)
    assert flaw_of(content) == "other_format"
    found = audit_picture(content, with_looks=False)
    assert isinstance(found, Fault)
    assert found.reason == "other_format"
    assert image_format in found.detail


@pytest.mark.parametrize("image_format", ["WEBP", "PNG"])
def test_moving_pictures_are_named(image_format: str) -> None:
    """More than one frame is left out, since its label may be that of another frame than the first; one frame is a picture."""
    frames = {"append_images": [ImageOps.invert(PHOTOGRAPH)], "duration": 100}
    content = encode(PHOTOGRAPH, image_format, save_all=True, **frames)
    assert flaw_of(content) == reason_of(content) == "animated"
    assert reason_of(encode(PHOTOGRAPH, image_format, save_all=True)) is None


@pytest.mark.filterwarnings("ignore")  # Pillow warns, and training lets it
def test_of_a_multi_picture_jpeg_the_first_is_decoded() -> None:
    """MPO, as telephones write it: the photograph stands first, and what follows may even be cut."""
    content = encode(PHOTOGRAPH, "MPO", save_all=True, append_images=[ImageOps.invert(PHOTOGRAPH)])
    for whole in (content, content[:-500]):
        found = audit_picture(whole, with_looks=False)
        assert isinstance(found, Picture)
        assert found.suffix == "jpg"
        assert np.abs(pixels_of(decode(whole)) - pixels_of(PHOTOGRAPH)).mean() < 6


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_follows_a_picture_does_not_matter(encoding: str) -> None:
    """Garbage behind the end changes no pixel."""
    content = ENCODINGS[encoding]
    assert reason_of(content + b"garbage" * 99) is None
    assert np.array_equal(pixels_of(decode(content + b"garbage" * 99)), pixels_of(decode(content)))


# ---- to what a person sees


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_a_turned_picture_is_turned_back(image_format: str, orientation: int) -> None:
    """All eight EXIF orientations give the same upright pixels, in every format that has EXIF."""
    undone = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = PHOTOGRAPH.transpose(undone[orientation]) if orientation > 1 else PHOTOGRAPH
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[image_format]
    content = encode(stored, image_format, exif=exif, **options)
    assert np.abs(pixels_of(decode(content)) - pixels_of(PHOTOGRAPH)).max() <= (4 if image_format == "JPEG" else 0)
    assert reason_of(content) is None


@pytest.mark.filterwarnings("ignore")  # Pillow warns, and training lets it
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_leaves_the_picture_as_it_is(image_format: str) -> None:
    """Whatever stands where EXIF should stand, the pixels are whole and stay: every viewer shows them."""
    exif = Image.Exif()
    exif[ORIENTATION] = 1
    exif[0x010F] = "a camera"
    sound, generator = exif.tobytes(), random.Random(0)
    blocks = [b"Exif\0\0garbage", b"Exif\0\0", sound[:14], sound[:-3], b"Exif\0\0II*\0\xff\xff\xff\xff"]
    for _ in range(60):
        block = bytearray(sound)
        for _ in range(3):
            block[generator.randrange(6, len(block))] = generator.randrange(256)
        blocks.append(bytes(block))
    for block in blocks:
        content = encode(PHOTOGRAPH, image_format, exif=block)
        assert reason_of(content) is None, block
        assert sorted(decode(content).size) == [HEIGHT, WIDTH]


@pytest.mark.parametrize("kind", ["CMYK", "YCCK"])
def test_print_colours_become_the_colours_that_were_printed(kind: str) -> None:
    """Adobe's inverted CMYK and YCCK are not shown as negatives."""
    content = ycck_jpeg(PHOTOGRAPH) if kind == "YCCK" else encode(PHOTOGRAPH.convert("CMYK"), "JPEG", quality=98)
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == "CMYK"
    assert np.abs(pixels_of(decode(content)) - pixels_of(PHOTOGRAPH)).mean() < 3
    assert reason_of(content) is None


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_are_read_by_their_upper_eight(channels: int) -> None:
    """Grey or colour, with alpha or without: the picture is the same as with 8 bits, and not white all over."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rgb = pixels_of(PHOTOGRAPH if channels > 2 else PHOTOGRAPH.convert("L").convert("RGB"))
    values = np.dstack([rgb[..., :1] if channels < 3 else rgb, np.full(rgb.shape[:2], 255)])[..., :channels]
    generator = np.random.default_rng(0)
    fine = values.astype(np.uint16) * 256 + generator.integers(0, 256, values.shape, dtype=np.uint16)
    if channels in (2, 4):
        fine[..., -1] = 65535
    content = png(fine[..., 0] if channels == 1 else fine, bits=16, colour=colour)
    assert np.array_equal(pixels_of(decode(content)), rgb)
    assert reason_of(content) is None


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_few_colours_are_decoded_to_the_same(mode: str) -> None:
    """Black and white, grey and palette."""
    image = PHOTOGRAPH.convert(mode)
    content = encode(image, "PNG")
    assert np.array_equal(pixels_of(decode(content)), pixels_of(image.convert("RGB")))
    assert reason_of(content) is None


def transparent_pictures() -> dict[str, bytes]:
    """A photograph whose left half is transparent, with garbage colours under it, in every way that PNG and WebP know."""
    alpha = Image.new("L", (WIDTH, HEIGHT), 255)
    alpha.paste(0, (0, 0, WIDTH // 2, HEIGHT))
    rgba, grey = PHOTOGRAPH.copy(), PHOTOGRAPH.convert("L")
    rgba.putalpha(alpha)
    grey.putalpha(alpha)
    key, grey_key = (
        np.where(pixels_of(alpha)[..., None] > 0, pixels_of(PHOTOGRAPH), (9, 200, 30)),
        pixels_of(grey)[..., 0],
    )
    grey_key = np.where(pixels_of(alpha) > 0, grey_key.clip(8), 7).astype(np.uint16)
    palette = PHOTOGRAPH.quantize(256)
    palette.paste(255, (0, 0, WIDTH // 2, HEIGHT))
    return {
        "RGBA": encode(rgba, "PNG"),
        "LA": encode(grey, "PNG"),
        "one colour": png(key.astype(np.uint16), bits=8, colour=2, before=chunk(b"tRNS", b"\0\x09\0\xc8\0\x1e")),
        "one grey": png(grey_key, bits=8, colour=0, before=chunk(b"tRNS", b"\0\x07")),
        "one grey of 16 bits": png(grey_key * 256, bits=16, colour=0, before=chunk(b"tRNS", b"\x07\0")),
        "palette entry": encode(palette, "PNG", transparency=255),
        "palette table": encode(palette, "PNG", transparency=bytes([255] * 254 + [200, 0])),
        "WEBP with alpha": encode(rgba, "WEBP", lossless=True, exact=True),
    }


@pytest.mark.parametrize("kind", transparent_pictures())
def test_what_is_transparent_is_white(kind: str) -> None:
    """Under alpha 0 nearly every program leaves black or garbage; a person sees the page. What is opaque stays as it is."""
    content = transparent_pictures()[kind]
    pixels = pixels_of(decode(content))
    assert (pixels[:, : WIDTH // 2] == 255).all()
    opaque = pixels_of(PHOTOGRAPH)[:, WIDTH // 2 :].mean(2)
    assert np.abs(pixels[:, WIDTH // 2 :].mean(2) - opaque).mean() < 25
    assert reason_of(content) is None


def test_half_transparent_is_half_white() -> None:
    """Alpha is a share, not a switch."""
    image = Image.new("RGBA", (40, 40), (100, 0, 50, 128))
    assert decode(encode(image, "PNG")).getpixel((20, 20)) == (177, 127, 152)


def test_transparent_colours_that_pillow_misreads_are_named() -> None:
    """A colour key in 16-bit colour: the part that should vanish would stay."""
    values = pixels_of(PHOTOGRAPH).astype(np.uint16) * 257
    content = png(values, bits=16, colour=2, before=chunk(b"tRNS", bytes(6)))
    assert flaw_of(content) == reason_of(content) == "undecodable"


def test_colour_profiles_are_not_applied() -> None:
    """The stored values are what is trained on, with a profile as without."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    with_profile = encode(PHOTOGRAPH, "PNG", icc_profile=profile)
    assert len(with_profile) > len(ENCODINGS["PNG"])
    assert np.array_equal(pixels_of(decode(with_profile)), pixels_of(PHOTOGRAPH))


# ---- large enough, and something to see


def test_the_shorter_side_decides_upright() -> None:
    """A picture of min_side passes, one pixel less on either side does not; a turned one is measured as it is seen."""
    assert reason_of(draw(1, width=MIN_SIDE, height=400)) is None
    assert reason_of(draw(1, width=MIN_SIDE - 1, height=400)) == "too_small"
    assert reason_of(draw(1, width=400, height=MIN_SIDE - 1)) == "too_small"
    assert reason_of(draw(1, width=1, height=1), min_side=1) in (None, "blank")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    found = audit_picture(encode(photograph(width=20, height=50), "JPEG", exif=exif), with_looks=False)
    assert found == Fault("too_small", f"50 × 20 pixels; the shorter side must have {MIN_SIDE}")


COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "red": (200, 30, 90),
    "green": (10, 200, 30),
}


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("kind", ["flat", "noise", "gradient", "speck", "words"])
def test_placeholders_are_blank(kind: str, colour: str) -> None:
    """The first trainer's black picture and its kin: one colour with sensor noise, a faint gradient, a speck or faint words."""
    for width, height in ((150, 200), (500, 375)):
        image = Image.new("RGB", (width, height), COLOURS[colour])
        if kind == "noise":
            noise = np.random.default_rng(0).normal(0, 10, (height, width, 3))
            image = Image.fromarray((pixels_of(image) + noise).clip(0, 255).astype(np.uint8))
        elif kind == "gradient":
            shade = np.linspace(-8, 8, width)[None, :, None]
            image = Image.fromarray((pixels_of(image) + shade).clip(0, 255).astype(np.uint8))
        elif kind == "speck":
            image.putpixel((width // 2, height // 2), (255, 0, 255))
        elif kind == "words":
            faint = tuple(value + 40 if value < 128 else value - 40 for value in COLOURS[colour])
            ImageDraw.Draw(image).text((width // 2, height // 2), "No image", fill=faint)
        stored = [encode(image, "PNG")] + [encode(image, "JPEG", quality=quality) for quality in (20, 60, 95)]
        for content in stored:
            assert reason_of(content) == "blank", (kind, colour, width)
    fully_transparent = encode(Image.new("RGBA", (200, 150), (*COLOURS[colour], 0)), "PNG")
    assert reason_of(fully_transparent) == "blank"


def test_pictures_with_little_on_them_are_not_blank() -> None:
    """A leaf on white, a small thing on black, red on an equally bright green: there is something to learn."""
    for index in range(12):
        assert reason_of(encode(draw_leaf(make_species(0, index), index, width=120, height=90), "JPEG")) is None
    for ground, thing in (("white", (90, 120, 60)), ("black", (60, 60, 60))):
        product = Image.new("RGB", (500, 375), ground)
        ImageDraw.Draw(product).ellipse((250, 180, 275, 205), fill=thing)
        assert reason_of(encode(product, "JPEG")) is None
    same_green = Image.new("RGB", (200, 150), (200, 100, 0))
    same_green.paste((0, 100, 200), (0, 0, 100, 150))
    assert reason_of(encode(same_green, "JPEG")) is None


# ---- looks and workers


def test_a_look_has_every_bit_of_the_hash() -> None:
    """The integer is the hash, so that differing bits count as the library counts them."""
    smalls = [shrink(photograph(number, width=60 + 7 * number, height=90)) for number in range(12)]
    hashes, looks = [imagehash.phash(small) for small in smalls], [look_of(small) for small in smalls]
    assert max(looks) < 2**LOOK_BITS
    for i, j in itertools.combinations(range(12), 2):
        assert (looks[i] ^ looks[j]).bit_count() == hashes[i] - hashes[j]


def doubled(numbers: Sequence[int]) -> list[int]:
    return [2 * number for number in numbers]


def killed_at_100(numbers: Sequence[int]) -> list[int]:
    if 100 in numbers:
        os.kill(os.getpid(), signal.SIGKILL)
    return list(numbers)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("num_items", [0, 1, 16, 1001])
def test_results_come_in_order_and_few_items_are_taken_ahead(num_workers: int, num_items: int) -> None:
    """A million records are never queued at once: the source is read no further than the window allows."""
    taken = itertools.count(1)
    num_taken = 0

    def items() -> itertools.chain[int]:
        nonlocal num_taken
        for item in range(num_items):
            num_taken = next(taken)
            yield item

    for number, result in enumerate(map_in_order(doubled, items(), num_workers=num_workers)):
        assert result == 2 * number
        assert num_taken <= number + (num_workers or 1) * TASKS_AHEAD * ITEMS_PER_TASK
    assert num_taken == num_items


def test_a_killed_worker_is_one_error() -> None:
    """It says what to do, and results before it are not lost silently: there is no end without an error."""
    with pytest.raises(WorkersError, match="fewer --workers"):
        list(map_in_order(killed_at_100, range(1000), num_workers=2))
    with pytest.raises(WorkersError, match="--workers 0 or more"):
        list(map_in_order(doubled, range(3), num_workers=-1))


# ---- licences of one photograph


def build_records(folder: Path, records: list[dict[str, object]], *, requirement: str) -> dict[str, object]:
    """Build from these records (`picture` is the number of the drawn picture); returns report.json."""
    for record in records:
        put(folder / "pictures" / f"{record['picture']}.jpg", draw(int(str(record["picture"]))))
    lines = [{"image_path": f"{record.pop('picture')}.jpg", "latin_name": "oak", **record} for record in records]
    put(folder / "records.jsonl", "\n".join(map(json.dumps, lines)).encode())
    options = BuildOptions(
        seed=0,
        limits=ShardLimits(),
        num_workers=0,
        replace=False,
        licence=parse_requirement(requirement),
        near_distance=None,
    )
    build_dataset(read_jsonl(folder / "records.jsonl", folder / "pictures"), folder / "set", options=options)
    report: dict[str, object] = json.loads((folder / "set" / "report.json").read_text())
    assert report["num_files"] == len(records) == report["num_samples"] + report["num_left_out"]  # type: ignore[operator]
    return report


@pytest.mark.parametrize("licences", list(itertools.permutations(["cc-by", "cc-by-nc", "cc0"])))
def test_a_photograph_is_as_restricted_as_its_most_restrictive_record(
    tmp_path: Path, licences: tuple[str, ...]
) -> None:
    """In whatever order its records come: under `commercial` none of them stays, and the report leads to the one that forbids it."""
    records: list[dict[str, object]] = [{"picture": 1, "license": licence} for licence in licences]
    records += [{"picture": 2, "license": "cc-by"}, {"picture": 3, "license": "cc0"}, {"picture": 3, "license": "cc0"}]
    report = build_records(tmp_path, records, requirement="commercial")
    assert report["num_samples"] == 2
    assert {reason: count for reason, count in report["left_out_by_reason"].items() if count} == {
        "licence": 3,
        "duplicate": 1,
    }  # type: ignore[attr-defined]
    forbidding = f"records.jsonl:{licences.index('cc-by-nc') + 1}"
    details = {row["source"]: row["detail"] for row in report["left_out"]}  # type: ignore[attr-defined]
    assert details.pop(forbidding) == "cc-by-nc"
    assert sum(f"same bytes as {forbidding}: cc-by-nc" == detail for detail in details.values()) == 2


@pytest.mark.parametrize(
    ("licences", "stated"),
    [
        (["cc-by", "cc-by-nc"], "CC-BY-NC"),
        (["cc-by-nc", "cc-by"], "cc-by-nc"),
        (["cc-by 3.0", "cc-by 4.0"], "cc-by 3.0"),
        (["cc-by-nc-sa", "cc-by-nd"], "CC-BY-NC-ND"),
        (["cc0", None], "unknown"),
        ([None, None], None),
    ],
)
def test_the_copy_that_stays_states_the_strictest_licence(
    tmp_path: Path, licences: list[str | None], stated: str | None
) -> None:
    """In KEY.json, in the counts and in the manifest, whichever record comes first."""
    report = build_records(tmp_path, [{"picture": 1, "license": licence} for licence in licences], requirement="any")
    tar = next((tmp_path / "set" / "train").glob("*.tar")).read_bytes()
    assert (f'"license":{json.dumps(stated)}'.encode()) in tar
    name = {"cc-by-nc": "CC-BY-NC", "cc-by 3.0": "CC-BY"}.get(stated or "", stated)
    assert report["licence_counts"] == ({} if name is None else {name: 1})
    assert load_manifest(tmp_path / "set" / "train" / "manifest.json").licence == name


# ---- the whole


def plant_every_kind(folder: Path) -> dict[str, str]:
    """Sound pictures of every kind, and every defect that a picture can have; returns source → reason of what is left out."""
    first = fill(folder, {"birch": 4, "oak": 4})
    sound = {**ENCODINGS, **transparent_pictures(), "ycck": ycck_jpeg(photograph(5))}
    sound |= {
        "exif.jpg": encode(photograph(6), "JPEG", exif=b"Exif\0\0garbage"),
        "behind.jpg": draw(first) + b"garbage",
    }
    for name, content in sound.items():
        put(folder / "oak" / name, content)
    cut = encode(photograph(7, width=300, height=200), "JPEG")
    defects = {
        "not_a_picture": [b"", b"<html>404</html>"],
        "other_format": [encode(photograph(8), "GIF"), encode(photograph(9), "TIFF")],
        "animated": [encode(photograph(10), "WEBP", save_all=True, append_images=[photograph(11)])],
        "too_large": [png(pixels_of(PHOTOGRAPH).astype(np.uint16), bits=8, colour=2, size=(50_000, 50_000))],
        "undecodable": [cut[:-99], cut[: len(cut) // 2] + END_OF_JPEG, ENCODINGS["PNG"][:-9]],
        "too_small": [draw(70, width=31, height=80), draw(71, width=1, height=1)],
        "blank": [encode(Image.new("RGB", (64, 64), colour), "JPEG") for colour in ("black", "white")],
        "duplicate": [draw(4), ENCODINGS["WEBP"]],
        "conflicting_labels": [draw(99)],
    }
    put(folder / "birch" / "conflict.jpg", draw(99))
    expected = {"birch/conflict.jpg": "conflicting_labels"}
    for reason, contents in defects.items():
        for number, content in enumerate(contents):
            put(folder / "oak" / f"z {reason} {number}.jpg", content)
            expected[f"oak/z {reason} {number}.jpg"] = reason
    return expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_defect_is_left_out_for_its_reason_and_all_adds_up(tmp_path: Path, num_workers: int) -> None:
    """Files in = samples written + files left out, by reason; every sound kind is written, byte for byte."""
    expected = plant_every_kind(tmp_path / "dirty")
    account = build(tmp_path / "dirty", tmp_path / "set", num_workers=num_workers, near_distance=None)
    assert {left_out.source: left_out.reason for left_out in account.left_out} == expected
    num_files = sum(path.is_file() for path in (tmp_path / "dirty").rglob("*"))
    assert num_files == account.num_files == account.num_samples + len(expected)
    counts = Counter(expected.values())
    assert account.left_out_by_reason == {reason: counts[reason] for reason in account.left_out_by_reason}
    tars = b"".join(path.read_bytes() for path in sorted((tmp_path / "set").glob("*/*.tar")))
    for content in (*ENCODINGS.values(), *transparent_pictures().values()):
        assert content in tars
        assert sample_key_of(content).encode() in tars


def test_the_command_takes_the_smallest_side(tmp_path: Path) -> None:
    """--min-side decides; what is no positive number is one line and exit code 2."""
    fill(tmp_path / "source", {"oak": 3})
    put(tmp_path / "source" / "oak" / "large.jpg", draw(9, width=80, height=64))
    arguments = ("--from-folder", tmp_path / "source", "--out", tmp_path / "set", "--workers", "0")
    done = run_build(*arguments, "--min-side", "64")
    assert done.returncode == 0, done.stderr
    assert "4 files = 1 samples written + 3 left out" in done.stdout
    failed = run_build(*arguments, "--min-side", "0")
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
