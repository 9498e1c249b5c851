"""Where front doors listen, by `--http HOST:PORT`."""

from collections.abc import Callable, Sequence

from launch.cluster.addresses import LOOPBACK, join_address, split_address

DEFAULT_PORT = 8000


def listening_at(given: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT", ":PORT" (this machine's loopback) or a host alone.

    Raises:
        InputError: it is neither.

    >>> listening_at(":8080"), listening_at("[::1]:9000")
    (('127.0.0.1', 8080), ('::1', 9000))
    """
    return split_address(f"{LOOPBACK}{given}" if given.startswith(":") else given, "--http", DEFAULT_PORT)


def one_each(given: str) -> Callable[[int], Sequence[str]]:
    """Flags of the n-th of several front doors on this machine, which listen at ports that follow each other.

    >>> one_each("127.0.0.1:8000")(2)
    ['--http', '127.0.0.1:8002']
    """
    host, port = listening_at(given)
    return lambda n: ["--http", join_address(host, port + n)]
