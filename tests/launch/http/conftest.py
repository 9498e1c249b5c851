"""One front door for the tests of a module that leave it as it is."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from launch.__main__ import main
from tests.helpers.front_door import Door, front_door


@pytest.fixture(scope="module")
def door(tmp_path_factory) -> Iterator[Door]:
    with front_door(tmp_path_factory.mktemp("door")) as opened:
        yield opened


@pytest.fixture
def generated(capsys) -> Callable[..., dict[str, Any]]:
    """What `generate` answers to a prompt, with flags by name."""

    def generate(prompt: str, **flags: Any) -> dict[str, Any]:
        given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        assert main(["generate", "--json", "--context", "128", f"--prompt={prompt}", *given]) == 0
        return json.loads(capsys.readouterr().out)

    return generate
