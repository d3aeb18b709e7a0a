"""Doors that must stay shut: files that would run code, names that would become paths, sizes that would eat the memory, secrets that would show."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from aplantida_dist.ancestor import InitError, open_ancestor
from aplantida_dist.config import ConfigError
from aplantida_dist.config_file import load_config
from aplantida_dist.credentials import has_credentials, without_credentials
from aplantida_dist.data.dataset import open_dataset
from aplantida_dist.data.index import INDEX_DTYPE, ShardError
from aplantida_dist.data.manifest import ManifestError
from aplantida_dist.files import sha256_of_file
from aplantida_dist.shards.builder import BuildOptions, build_dataset
from aplantida_dist.shards.jsonl import read_jsonl
from aplantida_dist.shards.lines import LineError
from aplantida_dist.shards.tar_index import PICKLE_SUFFIXES, TarError
from aplantida_dist.shards.tar_urls import TarUrlError, expand_tar_urls
from aplantida_dist.shards.tars import read_tars
from aplantida_dist.shards.writer import ShardLimits
from aplantida_dist.strict_yaml import load_yaml
from tests.pictures import draw, put
from tests.ranks import command_on_ranks
from tests.runs import write_config
from tests.tars import pack, sample

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("aplantida_dist", "shards", "bench") for path in (ROOT / folder).rglob("*.py"))
SECRET = "hunter2"
URL = f"https://me:{SECRET}@example.org/x.tar"
SIGNED_URL = f"https://example.org/x.tar?X-Amz-Expires=60&X-Amz-Signature={SECRET}"
EVIL = "<script>alert(1)</script>"


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


# what would run code


def faults_of_calls(source: str) -> list[str]:
    """The calls and imports in a source that can run what a file or a text says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                name for name in names if name.split(".")[0] in ("marshal", "shelve", "dill", "cloudpickle", "joblib")
            ]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen") or given.get("shell") == "True":
            found.append(name)
        if name.startswith(("pickle.", "yaml.load", "yaml.unsafe", "yaml.full")):
            found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(name)
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append(name)
        if name in ("yaml.parse", "yaml.scan") and given.get("Loader") != "yaml.SafeLoader":
            found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_a_file_says(path: Path) -> None:
    """No unpickling, no eval, no shell, in the package, its commands and its benchmarks."""
    assert faults_of_calls(path.read_text(encoding="utf-8")) == []


def test_the_search_of_the_sources_finds_them() -> None:
    """Each door, open."""
    for line in (
        "import marshal", "from dill import loads", "eval(x)", "exec(x)", "pickle.load(f)", "pickle.loads(b)", "os.system(x)",
        "subprocess.run(x, shell=True)", "yaml.load(t)", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)",
        "yaml.parse(t, Loader=yaml.Loader)",
    ):  # fmt: skip
        assert len(faults_of_calls(line)) == 1, line


def test_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    """As a .pt of the first trainer, whole or inside one of torch's."""
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=2))
    torch.save(
        {"model_state_dict": {"w": torch.zeros(1)}, "class_names": Trap(tmp_path / "sprung")}, tmp_path / "torch.pt"
    )
    for name in ("raw.pt", "torch.pt"):
        with pytest.raises(InitError, match="which is not unpickled because that can run code"):
            open_ancestor(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [ls]", "!!python/name:os.system", "!x 1"])
def test_yaml_makes_plain_values_only(tag: str) -> None:
    with pytest.raises(Exception, match="found the tag"):
        load_yaml(f"a: {tag}", source="x")


@pytest.mark.parametrize("suffix", [*PICKLE_SUFFIXES, "PYD"])
def test_pickles_in_tars_are_refused(tmp_path: Path, suffix: str) -> None:
    """Nothing here would read them, but the tar stays in place, where other readers do."""
    pack(tmp_path / "x.tar", [*sample("a", 0), (f"a.{suffix}", pickle.dumps(Trap(tmp_path / "sprung")))])
    with pytest.raises(TarError, match=rf"x\.tar: holds a\.{suffix}: a \.{suffix.lower()} is read by unpickling"):
        read_tars(str(tmp_path / "x.tar"), class_names=None)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("url", ["pipe:touch {}", "{{pipe,x}}:touch {}", "pipe:touch {}; cat x.tar", "pipe:touch {} |"])
def test_no_url_runs_a_command(tmp_path: Path, url: str) -> None:
    """There is no switch for it: the tar that the command would write is given as a file."""
    with pytest.raises(TarUrlError, match=r"would run a command|a brace without"):
        expand_tar_urls(url.format(tmp_path / "sprung"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "urls", ["train-{0..100000000}.tar", "{0..9999}/{-500..500}.tar", "{" + ",".join("a" * 1100) + "}{0..999}.tar"]
)
def test_a_list_of_tars_has_an_end(urls: str) -> None:
    """Braces of millions of names are an error at once, not a list in memory."""
    with pytest.raises(TarUrlError, match="more than 1,000,000 tars"):
        expand_tar_urls(urls)


def test_a_checkpoint_holds_tensors_and_json(dataset_dir: Path, tmp_path: Path) -> None:
    """Every file of it is one or the other, by its own first bytes."""
    config = write_config(tmp_path / "config.yaml", dataset_dir, epochs=1)
    command = ["--config", config, "--run-dir", tmp_path / "run"]
    (finished,) = command_on_ranks(1, "aplantida_dist.train", command, tmp_path)
    assert finished.code == 0, finished.stderr
    (folder,) = (tmp_path / "run/checkpoints").glob("step_*")
    for path in folder.iterdir():
        match path.suffix:
            case ".safetensors":
                with safe_open(path, "numpy") as file:
                    assert list(file.keys())
            case ".json":
                json.loads(path.read_bytes())
            case _:
                assert path.name == "seen.npy"
                assert path.read_bytes().startswith(b"\x93NUMPY")
                assert b"'descr': '<i8'" in path.read_bytes()[:128]


# what would eat the memory

LIMIT_BYTES = 3 * 2**30
MEASURED = """\
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
from pathlib import Path
{code}
# Not ru_maxrss, which a process takes over from the one that started it.
print(next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").open() if line.startswith("VmHWM")))
"""


def peak_bytes_of(code: str) -> int:
    """The most memory that code took in a process of its own, which has no more than 3 GiB of addresses."""
    script = MEASURED.format(limit=LIMIT_BYTES, code=code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return int(finished.stdout.split()[-1])


def refusing(act: str, error: str, *, match: str) -> str:
    """Code that must raise."""
    return f"""
import re
try:
    {act}
except {error} as error:
    assert re.search({match!r}, str(error)), str(error)
else:
    raise AssertionError("not refused")
"""


def giant_png() -> bytes:
    """A sound PNG header of 60,000 × 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def giant_jpeg() -> bytes:
    """A sound JPEG whose frame header says 60,000 × 60,000 pixels."""
    content = bytearray(draw(1))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", 60_000, 60_000)
    return bytes(content)


def giant_webp() -> bytes:
    """A WebP with an extended header of 16,000 × 16,000 pixels, more than we take and no more than the format can."""
    body = (
        b"VP8X" + struct.pack("<I", 10) + bytes(4) + (15_999).to_bytes(3, "little") * 2 + b"VP8 " + struct.pack("<I", 0)
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


@pytest.mark.parametrize("content", [giant_png(), giant_jpeg(), giant_webp()], ids=["png", "jpeg", "webp"])
def test_a_giant_picture_is_refused_before_its_pixels_are_allocated(tmp_path: Path, content: bytes) -> None:
    """10.8 GB of pixels in a header of a few bytes."""
    path = put(tmp_path / "giant", content)
    code = "from aplantida_dist.data.decode import DecodeError, decode\n"
    code += refusing(
        f"decode(Path({str(path)!r}).read_bytes())",
        "DecodeError",
        match="pixels|could not|not a picture|do not begin|cannot",
    )
    assert peak_bytes_of(code) < 150 * 2**20


def tar_with_giant(path: Path, name: str, *, num_bytes: int, is_there: bool) -> Path:
    """A tar whose second member says that it has so many bytes; they may be there, as a hole in the file."""
    member = tarfile.TarInfo(name)
    member.size = num_bytes
    with path.open("wb") as file:
        picture = tarfile.TarInfo("a.jpg")
        content = draw(0)
        picture.size = len(content)
        file.write(picture.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(file.tell() + (num_bytes if is_there else 0) + 1024)
    return path


def test_a_json_member_of_a_gigabyte_is_left_out_unread(tmp_path: Path) -> None:
    """A sample of a foreign tar, the gigabyte really there."""
    path = tar_with_giant(tmp_path / "x.tar", "a.json", num_bytes=2**30, is_there=True)
    code = "from aplantida_dist.shards.tars import read_tars\n"
    code += f"source = read_tars({str(path)!r}, class_names=None)\n"
    code += "assert [(one.reason, 'longer than' in one.detail) for one in source.outside] == [('bad_metadata', True)]"
    assert peak_bytes_of(code) < 200 * 2**20


INDEXED = """
import numpy as np, os
from aplantida_dist.data.index import INDEX_DTYPE, FOREIGN_INDEX_DTYPE, ShardError, read_metadata, require_within
"""


def test_a_json_member_of_a_gigabyte_in_our_own_shard_is_refused(tmp_path: Path) -> None:
    """Its reader finds it by the headers behind the picture."""
    path = tar_with_giant(tmp_path / "x.tar", "a.json", num_bytes=2**30, is_there=True)
    code = INDEXED + f"descriptor = os.open({str(path)!r}, os.O_RDONLY)\n"
    code += f"index = np.array([(512, {len(draw(0))}, 0, 0)], dtype=INDEX_DTYPE)\n"
    code += refusing(
        "read_metadata(descriptor, index, 0)", "ShardError", match="states 1073741824 bytes, at most 16777216"
    )
    assert peak_bytes_of(code) < 200 * 2**20


@pytest.mark.parametrize("num_bytes", [-512, -1, 2**40, 2**63 - 1, -(2**62)])
@pytest.mark.parametrize("name", ["a.json", "b.jpg"])
def test_a_tar_header_of_an_impossible_size_is_an_error(tmp_path: Path, num_bytes: int, name: str) -> None:
    """Negative ones would send tarfile of Python before 3.11.14 back and round without end."""
    path = tar_with_giant(tmp_path / "x.tar", name, num_bytes=num_bytes, is_there=False)
    with pytest.raises(TarError, match=r"x\.tar: (is cut|is no tar|holds no tar header)"):
        read_tars(str(path), class_names=None)


def test_a_name_of_gigabytes_is_refused(tmp_path: Path) -> None:
    """GNU and pax headers hold the next member's name, which tarfile reads at once."""
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE):
        member = tarfile.TarInfo("x")
        member.type, member.size = kind, 2**31
        path = tmp_path / "x.tar"
        with path.open("wb") as file:
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.truncate(2**31 + 4096)
        code = "from aplantida_dist.shards.members import read_tar_members\n"
        code += f"assert 'a name or fields of 2147483648 bytes' in read_tar_members(Path({str(path)!r})).fault"
        assert peak_bytes_of(code) < 150 * 2**20


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 10), (511, 10), (512, 10_000), (9_991, 10), (10_001, 0), (2**63, 10), (2**64 - 1, 2**32 - 1), (512, 2**32 - 1)]
)  # fmt: skip
def test_an_index_that_points_outside_its_shard_is_refused(offset: int, length: int) -> None:
    """Of the picture and, in a foreign tar, of the .json; the last byte of the shard is inside."""
    act = "require_within(index, shard_bytes=10_000, path=Path('x.idx'))"
    code = INDEXED + f"index = np.array([(512, 10, 0, 0), ({offset}, {length}, 0, 0)], dtype=INDEX_DTYPE)\n"
    code += refusing(act, "ShardError", match=rf"x\.idx: row 1 puts an image of {length} bytes at {offset}")
    code += "index = np.array([(512, 9_488, 0, 0), (9_990, 10, 0, 0), (10_000, 0, 0, 0)], dtype=INDEX_DTYPE)\n" + act
    if offset > 512:
        code += f"\nindex = np.array([(512, 10, 0, 0, b'k' * 12, {offset}, {length})], dtype=FOREIGN_INDEX_DTYPE)\n"
        code += refusing(act, "ShardError", match=rf"row 0 puts an \.json of {length} bytes at {offset}")
    assert peak_bytes_of(code) < 150 * 2**20


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        ({3: 6}, r"row 3 has the label 6, of which the manifest counts no sample in this shard"),
        ({12: 2**32 - 1}, r"row 12 has the label 4294967295, of which the manifest counts no sample"),
        (dict.fromkeys(range(13), 0), r"13 rows have the label 0, the manifest counts \d"),
    ],
)
def test_an_index_with_a_label_that_is_none_is_refused(
    dataset_dir: Path, tmp_path: Path, labels: dict[int, int], fault: str
) -> None:
    """Also one whose digest the manifest has. The last label would be 32 GB of counts, and 6 a row that a head of 6 classes lacks."""
    copy = Path(shutil.copytree(dataset_dir, tmp_path / "copy"))
    index_path, manifest_path = copy / "train/shard-000001.idx", copy / "train/manifest.json"
    index = np.fromfile(index_path, dtype=INDEX_DTYPE)
    for row, label in labels.items():
        index["label"][row] = label
    index_path.write_bytes(index.tobytes())
    manifest = json.loads(manifest_path.read_text())
    manifest["shards"][1]["index_sha256"] = sha256_of_file(index_path)
    manifest_path.write_text(json.dumps(manifest))
    split = open_dataset(copy).open_split("train")
    with pytest.raises(ShardError, match=rf"shard-000001\.idx: {fault}"):
        split.read_index(1)
    command = ["--config", write_config(tmp_path / "config.yaml", copy), "--run-dir", tmp_path / "run"]
    (refused,) = command_on_ranks(1, "aplantida_dist.train", command, tmp_path)
    assert refused.code == 2
    assert re.search(rf"error: .*{fault}", refused.stderr)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_manifest_that_counts_a_class_beyond_the_map_is_refused(dataset_dir: Path, tmp_path: Path) -> None:
    """Before an index is read."""
    copy = Path(shutil.copytree(dataset_dir, tmp_path / "copy"))
    path = copy / "val/manifest.json"
    manifest = json.loads(path.read_text())
    for counts in (manifest["class_counts"], *(shard["class_counts"] for shard in manifest["shards"])):
        counts["6"] = counts.pop("5", 0)
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        ManifestError, match=r"manifest\.json: counts samples of the class 6, .* has the classes 0 to 5"
    ):
        open_dataset(copy).open_split("val")


# what would show


@pytest.mark.parametrize(
    ("name", "url"),
    [
        *((name, URL) for name in ("data.dataset", "model.init_from", "report.name", "report.tags")),
        ("data.dataset", SIGNED_URL),
        ("report.tags", f"https://example.org/?{SECRET}"),
    ],
)
def test_credentials_in_a_config_are_refused_and_not_repeated(
    dataset_dir: Path, tmp_path: Path, name: str, url: str
) -> None:
    """From the file and from the command line, before anything is written; the message does not tell them either."""
    config = write_config(tmp_path / "config.yaml", dataset_dir)
    value = f"[{url!r}]" if name == "report.tags" else url
    command = ["--config", config, "--run-dir", tmp_path / "run", f"{name}={value}"]
    (refused,) = command_on_ranks(1, "aplantida_dist.train", command, tmp_path)
    assert refused.code == 2
    assert f"{name}: found a URL with a user, a password or a query" in refused.stderr
    assert SECRET not in refused.stdout + refused.stderr
    assert not (tmp_path / "run").exists()
    config.write_text(config.read_text() + f"# no key\n{url}: 1\n")
    with pytest.raises(ConfigError) as error:
        load_config(config, [url, f"seed={url}"])
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("url", [URL, SIGNED_URL])
def test_credentials_in_records_are_refused(tmp_path: Path, url: str) -> None:
    """They would stand in KEY.json, in the ledger of the download and in three reports."""
    (tmp_path / "pictures").mkdir()
    records = put(tmp_path / "r.jsonl", json.dumps({"latin_name": "Acer", "image_url": url}).encode())
    with pytest.raises(
        LineError, match=r"r\.jsonl: line 1: its image_url holds a user, a password or a token"
    ) as error:
        read_jsonl(records, tmp_path / "pictures")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        [option, url, *more]
        for option, *more in (["--from-tars"], ["--from-folder"], ["--from-jsonl", "--image-dir", "x"])
        for url in (URL, SIGNED_URL)
    ],
)
def test_no_error_of_a_command_tells_credentials(tmp_path: Path, arguments: list[str]) -> None:
    """Whatever the message is, its URLs have lost them."""
    command = [sys.executable, ROOT / "shards/build.py", *arguments, "--out", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (finished.returncode, SECRET in finished.stdout + finished.stderr) == (2, False)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://u:p@h/x", "https://***@h/x"),
        ("a s3://key:se@cret@b/x?y=z@w b", "a s3://***@b/x?*** b"),
        ("https://token@h", "https://***@h"),
        ("https://h/x@y", "https://h/x@y"),
        ("me@example.org", "me@example.org"),
    ],
)
def test_what_credentials_are(text: str, told: str) -> None:
    """What stands before the @ of a URL's host; an address of mail and an @ in a path are none."""
    assert without_credentials(text) == told
    assert has_credentials(text) == (text != told)


BEARERS = (
    "token", "access_token", "X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "X-Goog-Signature", "sig", "key", "api_key", "apikey",
    "AWSAccessKeyId", "Signature", "Key-Pair-Id", "Policy", "password", "client_secret", "auth", "jwt",
)  # fmt: skip


@pytest.mark.parametrize("mark", ["?", "?v=1&", "#"])
@pytest.mark.parametrize("name", BEARERS)
def test_a_parameter_that_lets_its_bearer_in_is_a_credential(name: str, mark: str) -> None:
    """By whatever name, and first or not; of what is shown the whole query is gone, and the sentence around it stays."""
    url = f"https://example.org/x.tar{mark}{name}={SECRET}"
    assert has_credentials(url)
    for text in (f"{url}: not there", f"found '{url}', expected a path", f"({url.replace('://', ':/')})", f"a {url} b"):
        told = without_credentials(text)
        assert SECRET not in told
        assert told == text.replace(text[text.index(mark[0]) + 1 : text.index(SECRET) + len(SECRET)], "***")


@pytest.mark.parametrize("query", ["id=7&size=large", "keyword=rose", "monkey=1", "design=3", f"{SECRET}", "token="])
def test_any_query_is_hidden_and_only_some_are_credentials(query: str) -> None:
    """Records may have pictures at `?id=7`; a screen needs no query at all."""
    assert not has_credentials(f"https://h/x?{query}")
    assert without_credentials(f"https://h/x?{query}") == "https://h/x?***"


@pytest.mark.parametrize("text", [":/" * 50_000, "://@" * 30_000, "://?" + "a=b&" * 30_000, "://?a=" + "'" * 100_000])
def test_credentials_are_sought_in_linear_time(text: str) -> None:
    """What a server wrote may be long."""
    begun = time.process_time()
    has_credentials(text)
    without_credentials(text)
    assert time.process_time() - begun < 2


class Tags(HTMLParser):
    """The elements of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.add(tag)


def test_a_class_called_script_stays_text_in_every_report(tmp_path: Path) -> None:
    """The pages of a build and of an analysis, and report.md, whose readers pass HTML on."""
    lines = [{"latin_name": f"{EVIL} {number % 2}", "image_path": f"{number}.jpg"} for number in range(6)]
    lines += [{"latin_name": EVIL, "image_path": f"{EVIL.replace('/', '')}.jpg"}]
    for number in range(6):
        put(tmp_path / "pictures" / f"{number}.jpg", draw(number))
    put(tmp_path / "pictures" / f"{EVIL.replace('/', '')}.jpg", b"no picture")
    records = put(tmp_path / "`<b>.jsonl", "\n".join(map(json.dumps, lines)).encode())
    options = BuildOptions(seed=0, limits=ShardLimits(), num_workers=0, replace=False)
    build_dataset(read_jsonl(records, tmp_path / "pictures"), tmp_path / "set", options=options)
    page, markdown = ((tmp_path / "set" / name).read_text() for name in ("report.html", "report.md"))
    assert EVIL not in page
    assert "script" not in Tags(page).found
    assert "&lt;script&gt;" in page
    assert EVIL not in markdown
    assert "&lt;script&gt;" in markdown
    assert markdown.startswith("# What became of `'<b>.jsonl`")
