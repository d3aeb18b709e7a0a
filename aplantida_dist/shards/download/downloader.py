"""The downloader: asks for what is not there, many hosts at once and each within the manners."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from aplantida_dist.pace import LINE_EVERY_S, Pace
from aplantida_dist.shards.download.failure import Failure
from aplantida_dist.shards.download.haul import Haul
from aplantida_dist.shards.download.host import Host
from aplantida_dist.shards.download.manners import Manners
from aplantida_dist.shards.download.shelf import Shelf, open_shelf
from aplantida_dist.shards.download.web import Body, Redirect, Web, host_of

NO_ADDRESS = Failure("lasting", "no http or https address")


def download(urls: Sequence[str], image_dir: Path, *, manners: Manners) -> Haul:
    """Fetch the pictures of distinct URLs into a folder, each as md5(url) with the suffix that its bytes give it.

    A picture lies there whole and decodes to its end, or it does not lie there. Lasting failures are remembered in the folder's
    ledger and not asked for again. Ctrl-C and SIGTERM stop at once, say how far it came, and then take their usual course.
    Only for the main thread. Raises UserError where the folder cannot be written: a full disk is no failure of a picture.
    """
    with open_shelf(image_dir) as shelf:
        known = {url: shelf.known[url] for url in urls if url in shelf.known}
        run = _Run(_by_host(url for url in urls if url not in known), shelf, manners=manners)
        run.go()
        return Haul(
            num_urls=len(urls),
            num_fetched=shelf.num_pictures,
            num_bytes=shelf.num_bytes,
            num_known=len(known),
            failures=known | run.failures,
            given_up=tuple(host.given_up for host in run.hosts.values() if host.given_up is not None),
        )


def _by_host(urls: Iterable[str]) -> dict[str, list[str]]:
    """The URLs of each host, in their order. Whether a URL can be asked for at all shows when its turn comes."""
    of_host: defaultdict[str, list[str]] = defaultdict(list)
    for url in urls:
        try:
            # 35 times as fast as `host_of`, which for a million URLs takes 70 s.
            host = urlsplit(url).hostname or ""
        except ValueError:
            host = ""
        of_host[host].append(url)
    return of_host


class _Run:
    """One run over the URLs of all hosts. Each host has its lanes, a lane asks for one picture at a time."""

    def __init__(self, urls_of_host: Mapping[str, Sequence[str]], shelf: Shelf, *, manners: Manners) -> None:
        self.failures: dict[str, Failure] = {}
        self.hosts: dict[str, Host] = {}
        self._urls_of_host = urls_of_host
        self._shelf = shelf
        self._manners = manners
        self._in_all = asyncio.Semaphore(manners.in_all)
        self._num_urls = sum(map(len, urls_of_host.values()))
        self._pace = Pace(total=self._num_urls, doing="downloading")
        self._stopped_by: signal.Signals | None = None

    def go(self) -> None:
        """Work until every URL is fetched or failed, or until it is stopped."""
        try:
            asyncio.run(self._work())
        except asyncio.CancelledError:
            assert self._stopped_by is not None
            self._say_how_far("stopped")
            signal.raise_signal(self._stopped_by)
        except BaseExceptionGroup as group:
            self._say_how_far("broken off")
            raise group.exceptions[0] from None

    def _say_how_far(self, how: str) -> None:
        self._shelf.finish()
        print(
            f"download {how}: {self._shelf.num_pictures:,} of {self._num_urls:,} fetched, none of them half; the same command goes on from here",
            file=sys.stderr,
            flush=True,
        )

    async def _work(self) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        # The loop puts the default handlers back when it closes.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number, task)
        async with Web(self._manners) as web, asyncio.TaskGroup() as lanes:
            for name, urls in self._urls_of_host.items():
                waiting = iter(urls)
                for _ in range(min(self._manners.per_host, len(urls))):
                    lanes.create_task(self._lane(web, self._host(name), waiting))

    def _stop(self, number: signal.Signals, task: asyncio.Task[None]) -> None:
        self._stopped_by = number
        task.cancel()

    def _host(self, name: str) -> Host:
        if name not in self.hosts:
            self.hosts[name] = Host(name, self._manners)
        return self.hosts[name]

    async def _lane(self, web: Web, host: Host, waiting: Iterator[str]) -> None:
        """Picture after picture, off the one list that the lanes of a host share."""
        for url in waiting:
            failure = await self._fetch(web, url) if host.given_up is None else host.given_up
            if failure is not None:
                self.failures[url] = failure
            self._pace.tell(self._shelf.num_pictures + len(self.failures))

    async def _fetch(self, web: Web, url: str) -> Failure | None:
        """Ask for one picture until it is there, or its failure is known."""
        for attempt in range(self._manners.attempts):
            host, failure = await self._attempt(web, url)
            if failure is None or failure.kind != "passing":
                break
            wait_s = max(self._manners.wait_s(url, attempt=attempt), failure.retry_after_s or 0.0)
            if failure.asks_for_quiet:
                _keep_quiet(host, wait_s)
            elif attempt + 1 < self._manners.attempts:
                await asyncio.sleep(wait_s)
        host.note(failure)
        # What was never asked has no status; it cost no server anything, and is not worth a line of the ledger.
        if failure is not None and failure.kind == "lasting" and failure.status is not None:
            await self._shelf.remember(url, failure)
        return failure

    async def _attempt(self, web: Web, url: str) -> tuple[Host, Failure | None]:
        """Ask once, through redirects, each under the bounds of the host that it leads to; returns the host asked last."""
        address, status = url, None
        for _ in range(self._manners.redirects + 1):
            name = host_of(address)
            host = self._host(name or "")
            if name is None:
                return host, NO_ADDRESS
            async with self._turn(host):
                if host.given_up is not None:
                    return host, host.given_up
                answer = await web.ask(address)
                # Kept within the turn, so that no more than `in_all` pictures are ever in memory.
                if isinstance(answer, Body):
                    return host, await self._shelf.keep(url, answer)
            if not isinstance(answer, Redirect):
                return host, answer
            address, status = answer.url, answer.status
        return host, Failure("lasting", f"more than {self._manners.redirects} redirects", status=status)

    @asynccontextmanager
    async def _turn(self, host: Host) -> AsyncIterator[None]:
        """Wait until the host may be asked. Its quiet may begin while this waits for one of the places of all, so it is looked at last."""
        async with host.slots:
            while True:
                await asyncio.sleep(host.quiet_left_s() if host.given_up is None else 0)
                async with self._in_all:
                    if host.given_up is not None or host.quiet_left_s() <= 0:
                        yield
                        return


def _keep_quiet(host: Host, wait_s: float) -> None:
    host.keep_quiet(wait_s)
    if host.given_up is None and wait_s >= LINE_EVERY_S:
        print(f"downloading: {host.name} is left in peace for {wait_s:,.0f} s", file=sys.stderr, flush=True)
