"""The shelf: the folder of pictures as a download writes it, by one thread, each picture whole or not at all."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from aplantida_dist.errors import UserError
from aplantida_dist.files import write_whole
from aplantida_dist.shards.audit import Fault, audit_picture
from aplantida_dist.shards.download.failure import Failure
from aplantida_dist.shards.download.ledger import Ledger, open_ledger
from aplantida_dist.shards.download.web import Body
from aplantida_dist.shards.jsonl import stem_of_url

LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.(jpg|png|webp)\.[0-9]+\.part")
Result = TypeVar("Result")


class ShelfError(UserError):
    """A folder that cannot take pictures."""


class Shelf:
    """What is put here stays: a write that has begun is done and counted, also when the one who awaits it is cancelled.

    `known` are the failures that the ledger held when the shelf was opened. Writing raises UserError.
    """

    def __init__(self, image_dir: Path, *, ledger: Ledger, pen: ThreadPoolExecutor) -> None:
        self.known = ledger.failures
        self.num_pictures = self.num_bytes = 0
        self._image_dir = image_dir
        self._ledger = ledger
        self._pen = pen

    async def keep(self, url: str, body: Body) -> Failure | None:
        """Write the picture of a URL under the suffix that its bytes give it; what does not decode to its end is a Failure."""
        return await self._with_pen(partial(self._keep, url, body))

    async def remember(self, url: str, failure: Failure) -> None:
        """Write a lasting failure into the ledger."""
        await self._with_pen(partial(self._ledger.remember, url, failure))

    def finish(self) -> None:
        """Wait for what has begun; nothing can be written after it."""
        self._pen.shutdown()

    def _keep(self, url: str, body: Body) -> Failure | None:
        found = audit_picture(body.content, with_looks=False)
        if isinstance(found, Fault):
            # Without a stated length a cut looks like an end: what does not decode may come whole the next time.
            may_be_cut = found.reason == "undecodable" and not body.has_length
            detail = f"{found.detail}, sent as {body.content_type}"
            return Failure("passing" if may_be_cut else "lasting", found.reason, detail, body.status)
        write_whole(self._image_dir / f"{stem_of_url(url)}.{found.suffix}", body.content)
        self.num_pictures += 1
        self.num_bytes += len(body.content)
        return None

    async def _with_pen(self, act: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pen, act)


@contextmanager
def open_shelf(image_dir: Path) -> Iterator[Shelf]:
    """Make the folder if need be, hold it against other downloads, and clear away what a killed one left half written."""
    try:
        image_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShelfError(f"{image_dir}: cannot be made: {error.strerror}; choose another --image-dir") from error
    with open_ledger(image_dir) as ledger, ThreadPoolExecutor(1) as pen:
        # Under the ledger's lock, so that no other download is writing one of these.
        for path in image_dir.iterdir():
            if LEFTOVER.fullmatch(path.name):
                path.unlink()
        yield Shelf(image_dir, ledger=ledger, pen=pen)
