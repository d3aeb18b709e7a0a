"""The web: one request, bounded in time and bytes, and its answer as a value. Only importer of httpx2."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import TracebackType

import httpx2

from aplantida_dist import __version__
from aplantida_dist.credentials import without_credentials
from aplantida_dist.shards.download.failure import Failure
from aplantida_dist.shards.download.manners import Manners, parse_retry_after

USER_AGENT = f"aplantida_dist/{__version__}"
# identity: a picture is compressed already, and a small answer must not unpack into a huge one.
HEADERS = {
    "User-Agent": USER_AGENT,
    "Accept": "image/jpeg, image/png, image/webp, */*;q=0.1",
    "Accept-Encoding": "identity",
}
# The standard's phrases and not the server's, so that reports count them together.
PHRASES = {status.value: status.phrase for status in HTTPStatus}
TOO_OFTEN = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
ASK_LATER = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
REFUSALS = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED)
LONGEST_WORD_OF_SERVERS = 200


@dataclass(frozen=True, slots=True)
class Body:
    """What came with 200, to its end. `has_length` says that the server stated where the end is, so that no cut went unseen."""

    content: bytes
    status: int
    content_type: str
    has_length: bool


@dataclass(frozen=True, slots=True)
class Redirect:
    """Where the server says that the picture is."""

    url: str
    status: int


Answer = Body | Redirect | Failure


def host_of(url: str) -> str | None:
    """The host that a URL asks, in lower case and without the port; None for what is no http or https address."""
    try:
        address = httpx2.URL(url)
        # An empty or overlong label, or a port beyond 65535, would fail deep inside the connection and not as an error of httpx2.
        address.raw_host.decode().encode("idna")
    except (httpx2.InvalidURL, UnicodeError):
        return None
    is_askable = address.scheme in ("http", "https") and (address.port or 0) < 2**16
    return address.host if is_askable and address.host else None


class Web:
    """The client of one download. Proxies and certificates follow the environment (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE); no
    cookie is kept, no .netrc is read.
    """

    def __init__(self, manners: Manners) -> None:
        self._manners = manners
        self._client = httpx2.AsyncClient(
            headers=HEADERS,
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=httpx2.Timeout(manners.silence_s, connect=manners.connect_s, pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=manners.in_all),
        )

    async def __aenter__(self) -> Web:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def ask(self, url: str) -> Answer:
        """Ask once, following nothing. What goes wrong on the way is a Failure; nothing but cancellation is raised."""
        manners = self._manners
        try:
            async with asyncio.timeout(manners.request_s), self._client.stream("GET", url) as response:
                return await self._read(response)
        except TimeoutError:
            return Failure("passing", f"not complete within {manners.request_s:g} s")
        except httpx2.ConnectTimeout:
            return Failure("passing", f"no connection within {manners.connect_s:g} s")
        except httpx2.TimeoutException:
            return Failure("passing", f"silent for {manners.silence_s:g} s")
        except httpx2.ConnectError as error:
            return Failure("passing", "no connection", _short(str(error) or type(error).__name__))
        except (httpx2.RequestError, ValueError) as error:
            # httpx2 2.16 raises ValueError for a Location without a host, such as //x@:80/.
            return Failure("passing", "connection broken", _short(str(error) or type(error).__name__))

    async def _read(self, response: httpx2.Response) -> Answer:
        if response.has_redirect_location:
            return _redirect_of(response)
        if response.status_code != HTTPStatus.OK:
            return _failure_of(response)
        stated = response.headers.get("Content-Length")
        most = self._manners.picture_bytes
        if stated is not None and int(stated) > most:
            return Failure(
                "lasting", "too_large", f"{int(stated):,} bytes, at most {most:,} are fetched", HTTPStatus.OK
            )
        content = bytearray()
        async for part in response.aiter_bytes():
            content += part
            if len(content) > most:
                return Failure("lasting", "too_large", f"more than {most:,} bytes", HTTPStatus.OK)
        has_length = stated is not None or "Transfer-Encoding" in response.headers
        content_type = _short(response.headers.get("Content-Type", "no type"))
        return Body(bytes(content), response.status_code, content_type, has_length)


def _redirect_of(response: httpx2.Response) -> Redirect | Failure:
    following = response.next_request
    if following is not None and host_of(str(following.url)) is not None:
        return Redirect(str(following.url), response.status_code)
    target = _short(without_credentials(response.headers["Location"]))
    return Failure("lasting", "redirect to no http or https address", target, response.status_code)


def _failure_of(response: httpx2.Response) -> Failure:
    """A status other than 200: a server's trouble passes, 401 and 403 may be mended by the next run, the rest lasts."""
    status = response.status_code
    reason = f"HTTP {status} {PHRASES.get(status, '')}".rstrip()
    if status in TOO_OFTEN:
        asked_s = parse_retry_after(response.headers.get("Retry-After", ""), now=datetime.now(UTC))
        return Failure("passing", reason, status=status, asks_for_quiet=True, retry_after_s=asked_s)
    if status >= 500 or status in ASK_LATER:
        return Failure("passing", reason, status=status)
    return Failure("refused" if status in REFUSALS else "lasting", reason, status=status)


def _short(text: str) -> str:
    """What a server wrote, on one line that a report can hold."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_WORD_OF_SERVERS else line[:LONGEST_WORD_OF_SERVERS] + "…"
