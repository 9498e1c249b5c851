"""Front doors find each other by their workers: all know those that take requests, in the next program too."""

from launch.cluster.channel import ChannelLost, OwnChannel
from launch.serve.doors import Doors

NAMES = ("edge-a", "edge-b", "edge-c")


def test_all_who_take_requests_are_known_and_nobody_else():
    channel, doors = OwnChannel(), {name: Doors() for name in NAMES}
    doors["edge-a"].own, doors["edge-b"].own = "10.0.0.1:5", "10.0.0.2:6"
    assert doors["edge-a"].look(channel, "edge-a", NAMES) == {}  # the other one has not said so yet
    assert doors["edge-b"].look(channel, "edge-b", NAMES) == {"edge-a": "10.0.0.1:5"}
    assert doors["edge-a"].look(channel, "edge-a", NAMES) == {"edge-b": "10.0.0.2:6"}
    assert doors["edge-c"].look(channel, "edge-c", NAMES) == {}


def test_the_next_program_is_told_anew():
    first, second, doors = OwnChannel(), OwnChannel(), [Doors(), Doors()]
    for own, name in zip(doors, NAMES, strict=False):
        own.own = name
        own.look(first, name, NAMES)
    assert doors[0].look(second, "edge-a", NAMES) == {}
    doors[1].own = "moved"
    doors[1].look(second, "edge-b", NAMES)
    assert doors[0].look(second, "edge-a", NAMES) == {"edge-b": "moved"}


def test_a_program_that_has_ended_leaves_what_is_known():
    class Lost(OwnChannel):
        def look(self, name: str) -> bytes | None:
            raise ChannelLost("gone")

    doors = Doors()
    doors.own = "10.0.0.1:5"
    assert doors.look(Lost(), "edge-a", NAMES) == {}
