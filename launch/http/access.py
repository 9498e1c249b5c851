"""Who may ask: bearer tokens of users, and one of the operator's own. Tokens come from files and are never written anywhere."""

import hashlib
import hmac
import ipaddress
import os
from pathlib import Path

from starlette.requests import Request as HttpRequest

from launch.cluster.secret import warn_of_readers
from launch.http.book import Refused
from placement import InputError

_SHORTEST = 16  # characters of a token
_LARGEST = 2**20  # bytes of a file


class Access:
    """Checks the tokens of requests.

    Args:
        tokens: file of the users' tokens, one a line; without it anyone may ask who reaches the address.
        operator: file of the operator's token; without it operators are those who come from this machine itself.

    Raises:
        InputError: a file cannot be read, or holds no token that is long enough.
    """

    def __init__(self, tokens: Path | None, operator: Path | None) -> None:
        self._users = _read(tokens, "--tokens") if tokens else []
        self._operators = _read(operator, "--operator-token") if operator else []

    @property
    def open_to_all(self) -> bool:
        """Whether users need no token."""
        return not self._users

    def check_user(self, request: HttpRequest) -> None:
        """Raises Refused where a user's token is wanted and is not there."""
        if self._users and not _holds(request, [*self._users, *self._operators]):
            raise Refused(401, "no token that is known here; send Authorization: Bearer TOKEN")

    def check_operator(self, request: HttpRequest) -> None:
        """Raises Refused where the request is not an operator's."""
        if self._operators:
            if not _holds(request, self._operators):
                raise Refused(401, "no operator's token; send Authorization: Bearer TOKEN")
        elif not _from_here(request):
            raise Refused(403, "operators come from this machine itself, unless there is an --operator-token")


def _read(file: Path, flag: str) -> list[bytes]:
    try:
        with open(file, "rb") as stream:
            data = stream.read(_LARGEST)
            mode = os.fstat(stream.fileno()).st_mode
    except OSError as error:
        raise InputError(f"{flag} {file}: cannot be read ({error.strerror}); give another file") from None
    lines = [line.strip() for line in data.split(b"\n")]
    tokens = [line for line in lines if line and not line.startswith(b"#")]
    if not tokens or min(map(len, tokens)) < _SHORTEST:
        raise InputError(f"{flag} {file}: must hold tokens of at least {_SHORTEST} characters, one a line")
    warn_of_readers(flag, file, mode)
    return [_digest(token) for token in tokens]


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _holds(request: HttpRequest, known: list[bytes]) -> bool:
    """Whether the request's token is one of those known; takes as long whichever it is."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    digest, found = _digest(token.strip().encode()), False
    for one in known:
        found |= hmac.compare_digest(one, digest)
    return found and kind.lower() == "bearer"


def _from_here(request: HttpRequest) -> bool:
    """Whether client and name of the server are this machine's own: a page from elsewhere, opened in a browser here, can
    have any name lead to this machine, but it cannot hide the name."""
    name = (request.url.hostname or "").strip("[]")
    return _is_loopback(request.client.host if request.client else "") and (name == "localhost" or _is_loopback(name))


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
