"""Where front doors find each other: each has its worker put its address where the others' workers look."""

from collections.abc import Sequence
from contextlib import suppress

from launch.cluster.channel import Channel, ChannelLost


class Doors:
    """Addresses of front doors by server, as far as they are known.

    Attributes:
        own: of this server's, or "" where it takes no requests from others.
    """

    def __init__(self) -> None:
        self.own = ""
        self._channel: Channel | None = None
        self._known: dict[str, str] = {}

    def look(self, channel: Channel, name: str, names: Sequence[str]) -> dict[str, str]:
        """All that are known now; name: this server's, names: all of them."""
        if not self.own:
            return {}
        with suppress(ChannelLost):
            if channel is not self._channel:
                channel.put(f"door/{name}", self.own.encode())
                self._channel, self._known = channel, {}
            for other in names:
                if other != name and other not in self._known and (found := channel.look(f"door/{other}")):
                    self._known[other] = found.decode()
        return dict(self._known)
