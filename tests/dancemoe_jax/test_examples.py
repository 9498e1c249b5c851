"""The examples in docstrings do what they show, and names mean what they look like."""

import doctest
import importlib
import importlib.util
import operator
import pkgutil
import types
from pathlib import Path

import pytest

import dancemoe_jax

MODULES = sorted(module.name for module in pkgutil.walk_packages(dancemoe_jax.__path__, "dancemoe_jax."))


def source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


WITH_EXAMPLES = [name for name in MODULES if ">>>" in source(name)]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_found_under_its_name(name):
    importlib.import_module(name)
    found = operator.attrgetter(name.partition(".")[2])(dancemoe_jax)
    assert isinstance(found, types.ModuleType), f"{name} is shadowed by {found!r}"


def test_what_is_exported_has_a_docstring_and_exists():
    for name in dancemoe_jax.__all__:
        assert getattr(dancemoe_jax, name).__doc__, name
