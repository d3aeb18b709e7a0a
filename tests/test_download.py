"""Downloads: every URL ends as a whole picture or as a failure with a name, and no server is asked more than it bears."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import md5
from pathlib import Path
from typing import Any

import picture_server as web
import pytest
from picture_server import PictureServer, serve_pictures
from pictures import digests_of, draw, put

from aplantida_dist import __version__
from aplantida_dist.errors import UserError
from aplantida_dist.shards.download.downloader import download
from aplantida_dist.shards.download.failure import Failure
from aplantida_dist.shards.download.haul import Haul, to_text
from aplantida_dist.shards.download.ledger import LEDGER_FILE
from aplantida_dist.shards.download.manners import Manners, parse_retry_after
from aplantida_dist.shards.download.shelf import open_shelf
from aplantida_dist.shards.jsonl import read_shortfall
from aplantida_dist.shards.licence import ANY_LICENCE

ROOT = Path(__file__).parents[1]
FAST = Manners(
    connect_s=2.0,
    silence_s=0.8,
    request_s=1.6,
    first_wait_s=0.02,
    longest_quiet_s=3.0,
    picture_bytes=50_000,
    attempts=3,
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PictureServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with serve_pictures() as server:
        yield server


def name_of(url: str, suffix: str = "jpg") -> str:
    return f"{md5(url.encode()).hexdigest()}.{suffix}"


def pictures_in(folder: Path) -> dict[str, bytes]:
    """Everything in the folder but the ledger."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LEDGER_FILE}


def ledger_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {entry["url"]: entry for entry in map(json.loads, (folder / LEDGER_FILE).read_text().splitlines())}


def check_sum(haul: Haul, folder: Path) -> None:
    """Every URL once, and the bytes and files that were counted are those that lie there."""
    assert haul.num_urls == haul.num_fetched + len(haul.failures)
    assert haul.num_fetched == len(pictures_in(folder))
    assert haul.num_bytes == sum(map(len, pictures_in(folder).values()))


GOOD: dict[str, tuple[int, tuple[web.Answer, ...]]] = {
    "/sound.jpg": (1, (web.picture(1),)),
    "/a.png": (1, (web.picture(2, image_format="PNG"),)),
    "/a.webp": (1, (web.picture(3, image_format="WEBP"),)),
    "/no_suffix?id=4&größe=large": (1, (web.picture(4),)),
    "/429_then_200": (2, (web.status(429, Retry_After="0"), web.picture(5))),
    "/503_then_200": (2, (web.status(503), web.picture(6))),
    "/500_then_200": (3, (web.status(500), web.status(502), web.picture(7))),
    "/reset_then_200": (2, (web.reset, web.picture(8))),
    "/truncated_then_200": (2, (web.truncated(9), web.picture(9))),
    "/cut_then_200": (2, (web.cut_without_length(10), web.picture(10))),
    "/silent_then_200": (2, (web.silence, web.picture(11))),
    "/moved": (1, (web.redirect("/sound.jpg", code=301),)),
    "/slow": (1, (web.picture(12, after_s=0.2),)),
}
"""Path → requests that it takes, and the answers."""

BAD: dict[str, tuple[str, str, int, tuple[web.Answer, ...]]] = {
    "/404": ("lasting", "HTTP 404 Not Found", 1, (web.status(404),)),
    "/410": ("lasting", "HTTP 410 Gone", 1, (web.status(410),)),
    "/204": ("lasting", "HTTP 204 No Content", 1, (web.raw(b"HTTP/1.1 204 No Content\r\n\r\n"),)),
    "/666": ("passing", "HTTP 666", 3, (web.status(666),)),
    "/403": ("refused", "HTTP 403 Forbidden", 1, (web.status(403),)),
    "/429": ("passing", "HTTP 429 Too Many Requests", 3, (web.status(429),)),
    "/500": ("passing", "HTTP 500 Internal Server Error", 3, (web.status(500),)),
    "/html": ("lasting", "not_a_picture", 1, (web.content(b"<html>sign in</html>", "text/html"),)),
    "/empty": ("lasting", "not_a_picture", 1, (web.content(b""),)),
    "/gif": ("lasting", "other_format", 1, (web.picture(20, image_format="GIF"),)),
    "/half": ("lasting", "undecodable", 1, (web.content(draw(21)[:-200]),)),
    "/cut": ("passing", "undecodable", 3, (web.cut_without_length(22),)),
    "/truncated": ("passing", "connection broken", 3, (web.truncated(23),)),
    "/huge": ("lasting", "too_large", 1, (web.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"),)),
    "/endless": ("lasting", "too_large", 1, (web.endless,)),
    "/drip": ("passing", "not complete within 1.6 s", 3, (web.drip,)),
    "/drip_headers": ("passing", "not complete within 1.6 s", 3, (web.drip_headers,)),
    "/silence": ("passing", "silent for 0.8 s", 3, (web.silence,)),
    "/reset": ("passing", "connection broken", 3, (web.reset,)),
    "/garbage": ("passing", "connection broken", 3, (web.raw(b"\x16\x03\x01 not HTTP\r\n\r\n"),)),
    "/bad_length": ("passing", "connection broken", 3, (web.raw(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"),)),
    "/loop": ("lasting", "more than 5 redirects", 6, (web.redirect("/loop"),)),
    "/to_file": ("lasting", "redirect to no http or https address", 1, (web.redirect("file:///etc/passwd"),)),
    "/to_port": ("lasting", "redirect to no http or https address", 1, (web.redirect("http://127.0.0.1:99999/"),)),
    "/to_nothing": ("lasting", "redirect to no http or https address", 1, (web.redirect("http://a..b/"),)),
    "/to_no_host": ("passing", "connection broken", 3, (web.redirect("//x@:80/"),)),
    "/to_404": ("lasting", "HTTP 404 Not Found", 1, (web.redirect("/404", code=307),)),
    "/nowhere": ("lasting", "HTTP 302 Found", 1, (web.status(302),)),
}
"""Path → what becomes of it, its reason, the requests that it takes, and the answers."""

NO_ADDRESSES = (
    "file:///etc/passwd",
    "ftp://x/y.jpg",
    "pictures/1.jpg",
    "http://127.0.0.1:99999/",
    "http://[::1/",
    "https://a..b/",
)


def test_every_url_ends_as_a_whole_picture_or_as_a_failure_with_a_name(server: PictureServer, tmp_path: Path) -> None:
    """Whatever a server does; and the next run asks neither for what is there nor for what failed for good."""
    urls = [server.put(path, *answers) for path, (_, answers) in GOOD.items()]
    bad_urls = {server.put(path, *answers): path for path, (*_, answers) in BAD.items()}
    # Paths travel percent-encoded.
    server.answers["/no_suffix?id=4&gr%C3%B6%C3%9Fe=large"] = server.answers.pop("/no_suffix?id=4&größe=large")
    manners = replace(FAST, per_host=12, failures_in_a_row=99)
    haul = download([*urls, *bad_urls, *NO_ADDRESSES], tmp_path, manners=manners)

    check_sum(haul, tmp_path)
    number_of = {url: number for number, url in enumerate(urls, start=1)}
    number_of[server.url("/moved")], number_of[server.url("/slow")] = 1, 12
    formats = {2: "PNG", 3: "WEBP"}
    assert pictures_in(tmp_path) == {
        name_of(url, {2: "png", 3: "webp"}.get(number, "jpg")): draw(number, image_format=formats.get(number, "JPEG"))
        for url, number in number_of.items()
    }
    found = {path: (haul.failures[url].kind, haul.failures[url].reason) for url, path in bad_urls.items()}
    assert found == {path: (kind, reason) for path, (kind, reason, *_) in BAD.items()}
    assert {url: str(haul.failures[url]) for url in NO_ADDRESSES} == dict.fromkeys(
        NO_ADDRESSES, "no http or https address"
    )
    shared = {"/sound.jpg": 2, "/404": 2}  # asked for by the redirects too
    expected = (
        {path: num for path, (num, _) in GOOD.items()} | {path: num for path, (_, _, num, _) in BAD.items()} | shared
    )
    expected["/no_suffix?id=4&gr%C3%B6%C3%9Fe=large"] = expected.pop("/no_suffix?id=4&größe=large")
    assert server.num_requests == expected
    lasting = {url for url, path in bad_urls.items() if BAD[path][0] == "lasting"}
    assert set(ledger_of(tmp_path)) == lasting
    assert ledger_of(tmp_path)[server.url("/404")]["status"] == 404

    server.forget()
    again = download([*bad_urls, *NO_ADDRESSES], tmp_path, manners=manners)
    assert set(server.num_requests) == {path for path, (kind, *_) in BAD.items() if kind != "lasting"}
    assert again.failures == haul.failures
    assert again.num_known == len(lasting)


@pytest.mark.parametrize("in_all", [1, 16])
def test_nothing_is_asked_of_a_host_while_it_wants_quiet(server: PictureServer, tmp_path: Path, in_all: int) -> None:
    """Retry-After holds for all pictures of the host, those that wait for a place among all too, and for those of no other."""
    first = server.put("/first", web.status(429, Retry_After="1"), web.picture(1))
    urls = [first, *(server.put(f"/{number}", web.picture(number, after_s=0.05)) for number in range(2, 8))]
    server.put("/elsewhere", web.picture(8, after_s=0.1))
    elsewhere = server.url("/elsewhere", host="localhost")
    haul = download([*urls, elsewhere], tmp_path, manners=replace(FAST, in_all=in_all))
    assert haul.num_fetched == 8
    refused_s, came_s = server.times_s["/first"]
    assert came_s - refused_s >= 1.0
    others_s = sorted(time_s for path, times_s in server.times_s.items() if path[1:].isdigit() for time_s in times_s)
    # Where there is room for two, the other lane had sent its request before it could know.
    assert all(time_s - refused_s >= 1.0 for time_s in others_s[in_all > 1 :])
    assert server.times_s["/elsewhere"][0] - refused_s < 1.0


def test_a_host_that_wants_too_much_quiet_is_given_up_for_this_run_only(server: PictureServer, tmp_path: Path) -> None:
    """Its other pictures are not asked for and not remembered as failed; other hosts go on."""
    urls = [server.put(f"/{number}", web.status(503, Retry_After="3600")) for number in range(20)]
    for number in range(100, 105):
        server.put(f"/{number}", web.picture(number))
    others = [server.url(f"/{number}", host="localhost") for number in range(100, 105)]
    haul = download(urls + others, tmp_path, manners=FAST)
    assert haul.num_fetched == 5
    assert sum(int(path[1:]) < 20 for path in server.num_requests) <= FAST.per_host
    assert {failure.kind for failure in haul.failures.values()} == {"refused"}
    assert [failure.detail for failure in haul.given_up] == [
        "127.0.0.1: it asks for 3,600 s of quiet, at most 3 are waited"
    ]
    assert "host given up for this run: 127.0.0.1: it asks for 3,600 s" in to_text(haul)
    assert ledger_of(tmp_path) == {}
    for number in range(20):
        server.put(f"/{number}", web.picture(number))
    assert download(urls, tmp_path, manners=FAST).num_fetched == 20


@pytest.mark.parametrize("answer", [web.status(500), web.status(403), web.reset])
def test_a_host_that_only_fails_is_not_asked_for_ever(
    server: PictureServer, tmp_path: Path, answer: web.Answer
) -> None:
    """It is given up after so many pictures in a row, whatever the failure, unless an answer comes between."""
    urls = [server.put(f"/{number}", answer) for number in range(60)]
    manners = replace(FAST, first_wait_s=0.001, failures_in_a_row=5)
    haul = download(urls, tmp_path, manners=manners)
    assert len(haul.failures) == 60
    assert 5 <= len(server.num_requests) <= 5 + manners.per_host
    assert [failure.detail.split(", the last")[0] for failure in haul.given_up] == [
        "127.0.0.1: 5 pictures in a row failed"
    ]
    server.forget()
    for number in range(0, 60, 3):
        server.put(f"/{number}", web.status(404))
    assert download(urls, tmp_path / "other", manners=manners).given_up == ()
    assert len(server.num_requests) == 60


@pytest.mark.parametrize(("per_host", "in_all"), [(1, 9), (2, 9), (4, 9), (3, 4), (1, 1)])
def test_no_more_requests_are_open_than_allowed(
    server: PictureServer, tmp_path: Path, per_host: int, in_all: int
) -> None:
    """At each host and in all, as the server counts; a redirect to a host waits for its turn there. What is allowed is used."""
    for number in range(30):
        server.put(f"/{number}", web.picture(number, after_s=0.02))
        server.put(f"/to/{number}", web.redirect(server.url(f"/{number}")))
    urls = [server.url(f"/{number}") for number in range(15)]
    urls += [server.url(f"/to/{number}", host="localhost") for number in range(15, 30)]
    haul = download(urls, tmp_path, manners=replace(FAST, per_host=per_host, in_all=in_all))
    assert haul.num_fetched == 30
    assert server.most_at_once["127.0.0.1"] == min(per_host, in_all)
    assert server.most_at_once["localhost"] <= per_host
    assert server.most_at_once[""] <= min(2 * per_host, in_all)


def test_the_project_says_who_asks_and_asks_without_history(server: PictureServer, tmp_path: Path) -> None:
    """A plain User-Agent; no cookie comes back."""
    with_cookie = server.put("/a", web.status(404, Set_Cookie="who=you; Path=/"))
    download([with_cookie, server.put("/b", web.picture(1))], tmp_path, manners=Manners(per_host=1))
    assert server.headers["/b"]["User-Agent"] == f"aplantida_dist/{__version__}"
    assert "Cookie" not in server.headers["/b"]


def test_a_ledger_survives_a_cut_and_forgets_what_is_deleted(server: PictureServer, tmp_path: Path) -> None:
    """A last line without its end is dropped, a deleted line is asked for again, any other bad line is an error."""
    urls = [server.put(f"/{number}", web.status(404)) for number in range(3)]
    download(urls, tmp_path, manners=FAST)
    path = tmp_path / LEDGER_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    assert {json.loads(line)["url"] for line in lines} == set(urls)
    for cut in (1, 20, len(lines[2]) - 1):
        path.write_bytes(lines[0] + lines[1] + lines[2][:cut])
        server.forget()
        assert download(urls, tmp_path, manners=FAST).num_known == 2
        assert sum(server.num_requests.values()) == 1
        assert set(ledger_of(tmp_path)) == set(urls)
    path.write_bytes(b"{}\n" + lines[0])
    with pytest.raises(UserError, match=r"download\.jsonl: line 1: no 'url' with a 'reason'.*delete the line"):
        download(urls, tmp_path, manners=FAST)


@pytest.mark.parametrize(
    ("text", "expected_s"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 37.0),
        ("Sun, 06 Nov 1994 08:48:37 GMT", 0.0),
        ("Sun, 06 Nov 1994 08:49:37 -0000", 37.0),
        ("Sun, 06 Nov 99999999999999999999 08:49:37 GMT", None),
        ("9" * 400, float("inf")),
        ("", None),
        ("-1", None),
        ("soon", None),
        ("1.5", None),
        ("٣", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(text: str, expected_s: float | None) -> None:
    """RFC 9110, 10.2.3; a past date asks for nothing."""
    assert parse_retry_after(text, now=datetime(1994, 11, 6, 8, 49, tzinfo=UTC)) == expected_s


def test_waits_double_and_differ_by_url() -> None:
    """Within half and one and a half of the doubling, the same in every run."""
    manners = Manners(first_wait_s=2.0)
    for attempt in range(4):
        waits_s = [manners.wait_s(f"http://x/{number}", attempt=attempt) for number in range(200)]
        assert 1.0 * 2**attempt <= min(waits_s) < 1.1 * 2**attempt
        assert 2.9 * 2**attempt < max(waits_s) <= 3.0 * 2**attempt
        assert len(set(waits_s)) == 200
    assert manners.wait_s("http://x/1", attempt=0) == manners.wait_s("http://x/1", attempt=0)


def test_a_haul_is_told_by_reason() -> None:
    """The sum, the reasons from frequent to rare, what comes again."""
    gone, busy = Failure("lasting", "HTTP 404 Not Found", status=404), Failure("passing", "silent for 30 s")
    haul = Haul(5, 2, 3_400_000, 1, {"a": gone, "b": gone, "c": busy}, ())
    assert to_text(haul).splitlines() == [
        "download: 5 URLs = 2 fetched (3.4 MB) + 3 failed",
        "        2  HTTP 404 Not Found",
        "        1  silent for 30 s",
        "1 of them failed for good in an earlier run and were not asked for again",
        "1 of them may pass: the same command asks for them again",
    ]


# The command, from records to a dataset.


def write_records(folder: Path, urls: list[str], **fields: Any) -> Path:
    lines = [
        json.dumps({"latin_name": ("Acer campestre", "Betula pendula")[number % 2], "image_url": url, **fields})
        for number, url in enumerate(urls)
    ]
    return put(folder / "records.jsonl", "\n".join(lines).encode())


def command(folder: Path, *arguments: str, out: str = "set") -> list[str]:
    records, pictures = str(folder / "records.jsonl"), str(folder / "pictures")
    return [
        sys.executable, str(ROOT / "shards" / "build.py"), "--from-jsonl", records, "--image-dir", pictures,
        "--workers", "0", "--out", str(folder / out), *arguments,
    ]  # fmt: skip


def run(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        arguments, capture_output=True, text=True, check=False, env=environment, timeout=120, **options
    )


def report_of(dataset_dir: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((dataset_dir / "report.json").read_text())
    return report


def test_records_become_a_dataset_and_what_did_not_come_is_in_its_report(server: PictureServer, tmp_path: Path) -> None:
    """Each record is a sample or left out with its reason; the dataset is the same after the second run, which asks for nothing."""
    urls = [server.put(f"/{number}.jpg", web.picture(number)) for number in range(12)]
    gone, page = server.url("/gone.jpg"), server.put("/page", web.content(b"<html></html>", "text/html"))
    put(tmp_path / "pictures" / name_of(urls[3]), draw(3))
    write_records(tmp_path, [*urls, gone, page, gone, "file:///etc/passwd", urls[0]])
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('\n{"latin_name": "Acer campestre", "image_path": "away.jpg", "image_url": "http://127.0.0.1/x"}\n')

    done = run(command(tmp_path, "--download"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "pictures of 1 records are there already" in done.stdout
    assert "download: 14 URLs = 11 fetched" in done.stdout
    assert "not_downloaded" in done.stdout
    assert server.num_requests == {
        **{f"/{number}.jpg": 1 for number in range(12) if number != 3},
        "/gone.jpg": 1,
        "/page": 1,
    }
    report = report_of(tmp_path / "set")
    assert report["num_files"] == report["num_samples"] + report["num_left_out"] == 18
    assert {row["source"]: (row["reason"], row["detail"]) for row in report["left_out"]} == {
        "records.jsonl:13": ("not_downloaded", f"HTTP 404 Not Found ({gone})"),
        "records.jsonl:14": (
            "not_downloaded",
            f"not_a_picture: 13 bytes that do not begin as any picture does, sent as text/html ({page})",
        ),
        "records.jsonl:15": ("not_downloaded", f"HTTP 404 Not Found ({gone})"),
        "records.jsonl:16": ("not_downloaded", "no http or https address (file:///etc/passwd)"),
        "records.jsonl:17": ("duplicate", "same bytes as records.jsonl:1"),
        "records.jsonl:18": ("missing", "no away.jpg"),
    }

    server.forget()
    done = run(command(tmp_path, "--download", out="again"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "download: 3 URLs = 0 fetched (0.0 MB) + 3 failed" in done.stdout
    assert server.num_requests == {}
    assert digests_of(tmp_path / "again") == digests_of(tmp_path / "set")
    assert run(command(tmp_path, out="without")).returncode == 0
    assert report_of(tmp_path / "without")["left_out_by_reason"]["missing"] == 5


def test_pictures_under_other_licences_are_not_fetched(server: PictureServer, tmp_path: Path) -> None:
    """A URL is asked for when all its records may be used, for the strictest one counts; the others are in the report."""
    urls = [server.put(f"/{number}.jpg", web.picture(number)) for number in range(8)]
    write_records(tmp_path, urls, license="cc-by")
    other = server.put("/nc.jpg", web.picture(100))
    extra = [{"image_url": other, "license": "cc-by-nc"}, {"image_url": urls[0], "license": "all rights reserved"}]
    with (tmp_path / "records.jsonl").open("a") as file:
        file.writelines("\n" + json.dumps({"latin_name": "Acer campestre", **fields}) for fields in extra)
    done = run(command(tmp_path, "--download", "--require-license", "commercial"))
    assert (done.returncode, done.stderr) == (0, "")
    assert set(server.num_requests) == {f"/{number}.jpg" for number in range(1, 8)}
    assert "2 URLs are not fetched" in done.stdout
    assert {row["source"]: row["reason"] for row in report_of(tmp_path / "set")["left_out"]} == {
        f"records.jsonl:{line}": "not_downloaded" for line in (1, 9, 10)
    }


def start(folder: Path, *, at_least: int) -> subprocess.Popen[str]:
    """Start the command, and wait until so many pictures lie there."""
    process = subprocess.Popen(
        command(folder, "--download", "--per-host", "2"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline_s = time.monotonic() + 60
    while len(list((folder / "pictures").glob("*.jpg"))) < at_least:
        assert time.monotonic() < deadline_s
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_download_goes_on_where_it_was(
    server: PictureServer, tmp_path: Path, number: signal.Signals
) -> None:
    """Nothing half lies there, and the second run asks for the rest alone."""
    urls = [server.put(f"/{number}.jpg", web.picture(number, after_s=0.04)) for number in range(40)]
    urls += [server.put(f"/gone/{number}", web.status(404)) for number in range(3)]
    write_records(tmp_path, urls[::-1])
    process = start(tmp_path, at_least=8)
    process.send_signal(number)
    sent_s = time.monotonic()
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - sent_s < 5.0
    assert process.returncode == {signal.SIGINT: 130}.get(number, -number)
    pictures = tmp_path / "pictures"
    there = {path.name for path in pictures.glob("[!.]*.jpg")}
    assert 8 <= len(there) < 40
    contents = {name_of(url): draw(picture) for picture, url in enumerate(urls[:40])}
    assert all((pictures / name).read_bytes() == contents[name] for name in there)
    if number != signal.SIGKILL:
        assert pictures_in(pictures).keys() == there
        assert f"download stopped: {len(there)} of 43 fetched, none of them half; the same command goes on" in stderr
        assert "Traceback" not in stderr
    put(pictures / f".{name_of(urls[0])}.4711.part", b"half")

    server.forget()
    shortfall = read_shortfall(tmp_path / "records.jsonl", pictures, requirement=ANY_LICENCE)
    assert (shortfall.num_there, len(shortfall.urls)) == (len(there), 43 - len(there))
    assert download(shortfall.urls, pictures, manners=FAST).num_fetched == 40 - len(there)
    assert server.num_requests == {
        f"/{number}.jpg": 1 for number, url in enumerate(urls[:40]) if name_of(url) not in there
    }
    assert pictures_in(pictures) == contents


def test_a_disk_that_is_full_is_one_error_and_no_failed_picture(server: PictureServer, tmp_path: Path) -> None:
    """The run ends with the path; no half file stays, and nothing is remembered against the servers."""
    urls = [
        server.put(f"/{number}", web.content(draw(number, image_format="PNG", width=90, height=90)))
        for number in range(30)
    ]
    urls.insert(0, server.put("/small", web.picture(1)))
    write_records(tmp_path, urls)
    done = run(
        command(tmp_path, "--download", "--per-host", "1"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    )
    assert done.returncode == 2
    stopped, error = done.stderr.splitlines()
    assert stopped.startswith("download broken off: 1 of 31 fetched")
    assert error.startswith(f"error: {tmp_path}/pictures/")
    assert "File too large; make room" in error
    assert set(pictures_in(tmp_path / "pictures")) == {name_of(urls[0])}
    assert ledger_of(tmp_path / "pictures") == {}
    assert not (tmp_path / "set").exists()


def test_two_downloads_do_not_share_a_folder(server: PictureServer, tmp_path: Path) -> None:
    """The second says so at once; that the lock goes with a killed process is seen where one is killed."""
    url = server.put("/1.jpg", web.picture(1))
    with open_shelf(tmp_path), pytest.raises(UserError, match=r"download\.jsonl: is in use by another download"):
        download([url], tmp_path, manners=FAST)
    assert download([url], tmp_path, manners=FAST).num_fetched == 1


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """With its path, before anything is asked for."""
    put(tmp_path / "file", b"")
    with pytest.raises(UserError, match=r"file: cannot be made: .*choose another --image-dir"):
        download(["http://127.0.0.1/x"], tmp_path / "file", manners=FAST)
    (tmp_path / LEDGER_FILE).mkdir()
    with pytest.raises(UserError, match=r"download\.jsonl: cannot be written: Is a directory"):
        download(["http://127.0.0.1/x"], tmp_path, manners=FAST)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--from-jsonl", "x", "--image-dir", "y", "--per-host", "3"], "--per-host belongs to --download"),
        (["--from-folder", "x", "--download"], "--download belongs to --from-jsonl"),
    ],
)
def test_options_that_mean_nothing_are_errors(tmp_path: Path, arguments: list[str], expected: str) -> None:
    """One line, exit code 2."""
    done = run([sys.executable, str(ROOT / "shards" / "build.py"), *arguments, "--out", str(tmp_path / "set")])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert expected in done.stderr


def test_nothing_is_asked_for_before_all_records_are_understood(server: PictureServer, tmp_path: Path) -> None:
    """A bad last line is an error before the first request, and not after a night of downloading."""
    write_records(tmp_path, [server.put("/1.jpg", web.picture(1))])
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('\n{"latin_name": "", "image_url": "http://x/y"}')
    done = run(command(tmp_path, "--download"))
    assert done.returncode == 2
    assert "records.jsonl: line 2: no 'latin_name'" in done.stderr
    assert server.num_requests == {}
    assert not (tmp_path / "pictures").exists()
