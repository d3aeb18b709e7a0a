"""Addresses: where a dataset lies that is in no folder here, and how a file comes from there. The one file that knows fsspec."""

from __future__ import annotations

import errno
import itertools
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from aplantida_dist.credentials import without_credentials
from aplantida_dist.errors import UserError

SCHEMES = ("s3", "gs", "http", "https")
"""The schemes of an address; the extra [remote] of this package installs what reads them."""
CONNECT_S = 10.0
SILENT_S = 30.0
"""A server that sends nothing for so long is given up, and asked again."""
META_PATIENCE_S = 60.0
"""How long a class map or a manifest is asked for before a run gives up."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_WORTH_ANOTHER_TRY = (408, 425, 429)
"""What HTTP says of the client's requests that time may mend; the other 4xx will be the same the next time."""

Value = TypeVar("Value")


class AddressError(UserError):
    """An address that cannot be read: a scheme that is not known, nothing there, or no answer for too long."""


class TransferError(UserError):
    """A file did not come as it should; another try may bring it, `most_tries` of them at most."""

    most_tries = math.inf


@dataclass(frozen=True)
class Address:
    """A URL without credentials, to be used as a path is: joined by `/`, named, asked for, read."""

    url: str

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def scheme(self) -> str:
        return self.url.partition(":")[0]

    def exists(self) -> bool:
        """Whether a file is there, of one byte or more. Not fsspec's own question, to which a failing server answers no."""
        try:
            persist(lambda: self._ask(lambda system: system.cat_file(self.url, 0, 1)), patience_s=META_PATIENCE_S)
        except FileNotFoundError:
            return False
        return True

    is_file = exists

    def read_bytes(self) -> bytes:
        """All that is there. Raises FileNotFoundError, or AddressError."""
        content: bytes = persist(
            lambda: self._ask(lambda system: system.cat_file(self.url)), patience_s=META_PATIENCE_S
        )
        return content

    def copy_to(self, path: Path, *, most_bytes: int) -> None:
        """Write what is there to a file, in one try. Raises FileNotFoundError, OSError of a full disk, TransferError, or AddressError."""
        bound = _Bound(most_bytes)
        self._ask(lambda system: system.get_file(self.url, str(path), callback=bound))

    def _ask(self, act: Callable[[Any], Value]) -> Value:
        """Do something with the file system of this scheme, once; its many errors become those that are told above."""
        try:
            return act(_file_system(self.scheme))
        except (UserError, FileNotFoundError):
            raise
        except ImportError as error:
            raise AddressError(
                f"{self}: {self.scheme}:// cannot be read here ({_cause(error)}); run `pip install '.[remote]'`"
            ) from error
        except PermissionError as error:
            raise AddressError(
                f"{self}: access is denied ({_cause(error)}); give credentials in the environment, as the store's own tools take them"
            ) from error
        # Each library behind fsspec has exceptions of its own: those of aiohttp and botocore share no base but this.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            status = getattr(error, "status", 0)
            if isinstance(status, int) and 400 <= status < 500 and status not in _WORTH_ANOTHER_TRY:
                raise AddressError(f"{self}: the server refuses it: {_cause(error)}; look at the address") from error
            raise TransferError(f"{self}: {_cause(error)}") from error


Place = Path | Address
"""Where a dataset or a file of it lies."""


def place_of(text: str) -> Place:
    """What a dataset's name in a config or command means: an address where it has a scheme, else a path. Raises AddressError."""
    scheme, colon, _ = text.partition(":")
    is_url = bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text))
    if not is_url and not (colon and scheme == "pipe"):
        return Path(text)
    if without_credentials(text) != text:
        raise AddressError(
            f"{without_credentials(text)}: holds a user, a password or a query, which would be shown; take it out, and give "
            "credentials in the environment"
        )
    if scheme not in SCHEMES:
        raise AddressError(
            f"{text}: the scheme {scheme!r} is not read; give a path, or an address of {', '.join(SCHEMES)}"
        )
    return Address(text.rstrip("/"))


def copy(place: Place, path: Path, *, most_bytes: int) -> None:
    """Write what lies at a place to a file, in one try; the errors are those of `Address.copy_to`."""
    if isinstance(place, Address):
        place.copy_to(path, most_bytes=most_bytes)
        return
    try:
        shutil.copyfile(place, path)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TransferError(_cause(error)) from error


def persist(act: Callable[[], Value], *, patience_s: float) -> Value:
    """Do something until it brings no TransferError, with pauses that double; AddressError once `patience_s` are over, or its tries."""
    pause_s, begun_s = _FIRST_PAUSE_S, time.monotonic()
    for tries in itertools.count(1):
        try:
            return act()
        except TransferError as error:
            tried_s = time.monotonic() - begun_s
            if tries >= error.most_tries or tried_s + pause_s > patience_s:
                raise AddressError(f"{error} (tried {tries} times in {tried_s:.1f} s)") from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    raise AssertionError("counting has no end")


class _Bound(fsspec.callbacks.Callback):  # type: ignore[misc]
    """Ends a transfer that brings more than it should, before it fills the disk."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__()
        self._most_bytes = most_bytes

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self._most_bytes:
            raise TransferError(f"more than the {self._most_bytes} bytes that the manifest says have come")


def _file_system(scheme: str) -> Any:
    """fsspec's own instance of this process: it keeps one for each set of options, and makes a new one after a fork."""
    match scheme:
        case "http" | "https":
            import aiohttp  # of the extra [remote]

            # Its own limit of five minutes a request is one on how large a shard may be.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENT_S)
            return fsspec.filesystem(scheme, client_kwargs={"timeout": timeout, "trust_env": True})
        case "s3":
            waits = {"connect_timeout": CONNECT_S, "read_timeout": SILENT_S, "retries": {"max_attempts": 1}}
            return fsspec.filesystem(scheme, config_kwargs=waits, use_listings_cache=False)
        case _:
            return fsspec.filesystem(scheme, use_listings_cache=False)


def _cause(error: Exception) -> str:
    """An exception in one line, without credentials."""
    text = " ".join(str(error).split())
    return without_credentials(f"{type(error).__name__}: {text}" if text else type(error).__name__)
