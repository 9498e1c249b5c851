"""Which strategies there are, by name: those of this package, those that a caller registers, and those in a file."""

import importlib.util
import inspect
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from placement.costs.hosting import at_home, layer_hosts
from placement.data.problem import Problem
from placement.files import InputError, show
from placement.strategies.baselines import redundance, smartmoe, uniform
from placement.strategies.dance import dance
from placement.strategies.eplb import eplb, eplb_nodup
from placement.strategies.exact.optimum import exact
from placement.strategies.latency.plan import latency
from placement.strategies.layer_ranges import parallax, pipeline
from placement.strategies.swift import swift

# strategy(problem, *, previous: bool [D, L, E] | None, seed: int) -> bool [D, L, E]; pure.
Strategy = Callable[..., np.ndarray]
STRATEGIES: dict[str, Strategy] = {
    "uniform": uniform,
    "redundance": redundance,
    "smartmoe": smartmoe,
    "eplb": eplb,
    "eplb-nodup": eplb_nodup,
    "swift": swift,
    "pipeline": pipeline,
    "parallax": parallax,
    "dance": dance,
    "latency": latency,
    "exact": exact,
}
HOSTED = ("pipeline", "parallax")  # layers' attention and KV cache are where the layers are; others leave it at home
_FORM = "strategy(problem, *, previous=None, seed=0)"
_files: dict[str, Strategy] = {}


def register(name: str, function: Strategy) -> None:
    """Add a strategy of one's own, which `plan` and every command of this process then know by its name.

    Args:
        name: letters, digits, "-", "_" and ".", not yet in use.
        function: `function(problem, *, previous, seed)`: a `Problem`, the placement in force (bool [D, L, E] or None) and a
            number for what is drawn at random. It returns bool [D, L, E], which expert is on which device: every expert
            somewhere, every device within `problem.budget` bytes. It must be pure: equal inputs, equal plans.

    Raises:
        InputError: the name cannot be used or is another strategy's, or the function cannot be called in this way.

    >>> def first_device(problem, *, previous=None, seed=0):
    ...     resident = np.zeros((len(problem.budget), *problem.shape[1:]), bool)
    ...     resident[0] = True
    ...     return resident
    >>> register("first-device", first_device)
    >>> strategy_named("first-device") is first_device
    True
    >>> del STRATEGIES["first-device"]
    """
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "-_." for c in name):
        raise InputError(f'strategy name {show(name)}: use letters, digits, "-", "_" and "."')
    if STRATEGIES.get(name, function) is not function:
        raise InputError(f"strategy name {show(name)}: another strategy has it; choose another name")
    STRATEGIES[name] = _checked(function, f"strategy {name}")


def strategy_named(name: str, where: str = "strategy") -> Strategy:
    """The strategy of a name, or of a file: `path/to/file.py:function`. A file's code runs with the caller's rights.

    Raises:
        InputError: there is none of this name, or the file or its function cannot be used.
    """
    known = STRATEGIES.get(name) or _files.get(name)
    if known is not None:
        return known
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise InputError(
            f"{where}: {show(name)} is unknown; choose from {', '.join(STRATEGIES)}, or name path/to/file.py:function"
        )
    _files[name] = _from_file(path, function, where)
    return _files[name]


def home_strategies() -> list[str]:
    """Names of the strategies that leave a layer's attention and KV cache at home, as this project serves."""
    return [name for name in STRATEGIES if name not in HOSTED]


def strategy_hosts(name: str, problem: Problem, resident: np.ndarray) -> np.ndarray | None:
    """Who hosts each source's layers under a strategy's plan, int64 [N, L]; None is at home.

    Args:
        name: of the strategy; resident: its plan, bool [D, L, E].
    """
    if name not in HOSTED:
        return None
    host = layer_hosts(problem, resident)
    return None if (host == at_home(problem)).all() else host


def strategy_names(text: str, where: str = "--strategies") -> list[str]:
    """Names in a text such as "eplb,dance,mine.py:best", each once, all of them usable.

    Raises:
        InputError: one is not.

    >>> strategy_names("eplb, dance,eplb")
    ['eplb', 'dance']
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        strategy_named(name, where)
    return names


def _from_file(path: str, function: str, where: str) -> Strategy:
    if not Path(path).is_file():
        raise InputError(f"{where}: {path}: no such file")
    stem = "placement_strategy_" + "".join(c if c.isalnum() else "_" for c in os.path.abspath(path))
    spec = importlib.util.spec_from_file_location(stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file's code raises is its author's to correct
        detail = show(" ".join(f"{type(error).__name__}: {error}".split()), 160).strip("'\"")
        raise InputError(f"{path}: cannot be loaded: {detail}") from error
    found = getattr(module, function, None)
    if found is None:
        raise InputError(f"{path}: has no function {show(function)}; name one that is {_FORM}")
    return _checked(found, f"{path}: {function}")


def _checked(function: Strategy, where: str) -> Strategy:
    if not callable(function):
        raise InputError(f"{where} = {show(function)}: must be a function {_FORM}")
    try:
        inspect.signature(function).bind(None, previous=None, seed=0)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: cannot be called as {_FORM}: {error}") from None
    return function
