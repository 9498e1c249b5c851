"""The examples in docstrings of `placement` print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import placement

MODULES = [name for _, name, _ in pkgutil.walk_packages(placement.__path__, "placement.") if "__main__" not in name]
# What README and the docstrings call public; each has an example.
PUBLIC = ("plan", "evaluate", "register", "should_migrate", "shrink", "drift", "diff")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("name", placement.__all__)
def test_public_names_are_documented(name):
    found = getattr(placement, name)
    if callable(found):
        assert found.__doc__
        assert "\n" in found.__doc__ or len(found.__doc__) < 120
    if name in PUBLIC:
        assert ">>> " in str(found.__doc__)
