"""The report of a build: report.json holds everything, report.md and report.html are for reading."""

from __future__ import annotations

from pathlib import Path

from aplantida_dist.files import write_json, write_whole
from aplantida_dist.shards.account import REPORT_FILES, Account, to_json
from aplantida_dist.shards.gallery import choose_galleries
from aplantida_dist.shards.report_page import to_html
from aplantida_dist.shards.report_text import to_markdown
from aplantida_dist.shards.thumbnails import preview_of


def save_report(account: Account, dataset_dir: Path) -> None:
    """Write the three files. The pictures on the page are decoded here, one at a time and in this process: a few hundred at most."""
    json_path, markdown_path, page_path = (dataset_dir / name for name in REPORT_FILES)
    write_json(json_path, to_json(account))
    write_whole(markdown_path, to_markdown(account).encode())
    galleries = choose_galleries(account)
    previews = {place: preview_of(place) for place in dict.fromkeys(galleries.places)}
    write_whole(page_path, to_html(account, galleries=galleries, previews=previews).encode())
