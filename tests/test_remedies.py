"""What messages advise can be done: flags and commands that they name exist, values that they give as examples are taken."""

import argparse
import ast
import importlib
import re
import tomllib

import pytest

import launch.__main__
import placement.__main__
from launch import arguments
from launch.cluster.addresses import split_address
from launch.commands.migrate import request
from placement import Cluster, InputError
from placement.commands.bench import _size
from placement.data.arrivals import _date
from placement.units import parse_bytes, parse_rate, parse_seconds
from tests.helpers.paths import ROOT

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*(?![\w])")
COMMAND = re.compile(r"python -m (launch|placement) ([a-z]+)(?: (--?[a-z-]+))?")
EXAMPLE = re.compile(r"(?:for example|such as) (?:memory = )?\"?([^\"]+?)\"?$")
# Of other programs, which messages name too.
OTHERS = {"--help", "--version"}


def text_of(node: ast.AST) -> str:
    """A literal's text, what is filled in left out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return "…" if isinstance(node, ast.FormattedValue) else ""


def messages(package: str) -> list[tuple[str, str]]:
    """Where, and the text of everything that is raised or logged in a package's code, or shown as help; no HTML or CSS."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                texts = [text_of(argument) for argument in (*node.args, *(k.value for k in node.keywords))]
                found += [
                    (f"{path.relative_to(ROOT)}:{node.lineno}", text)
                    for text in texts
                    if " " in text and "<" not in text and "var(" not in text
                ]
    return found


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def launch_flags() -> dict[str, set[str]]:
    """Flags of each command."""
    found = {}
    for name in launch.__main__.COMMANDS:
        parser = argparse.ArgumentParser()
        if name == "bench":
            found[name] = set()
            from launch.bench.run import WHAT

            for what in WHAT:
                parser = argparse.ArgumentParser()
                importlib.import_module(f"launch.bench.{what}").add_arguments(parser)
                found[name] |= options(parser)
        else:
            getattr(arguments, name)(parser)
            found[name] = options(parser)
    return found


def placement_flags() -> dict[str, set[str]]:
    found = {}
    for name in placement.__main__.COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"placement.commands.{name}").add_arguments(parser)
        found[name] = options(parser)
    return found


@pytest.fixture(scope="module")
def flags():
    return {"launch": launch_flags(), "placement": placement_flags()}


@pytest.mark.parametrize("package", ["placement", "dancemoe_jax", "launch"])
def test_flags_that_messages_name_exist(package, flags):
    every = OTHERS | {"--log-level", "--log-json"}
    for known in (flags["placement"], flags["launch"]) if package != "placement" else (flags["placement"],):
        every |= set().union(*known.values())
    named = {(flag, where) for where, text in messages(package) for flag in FLAG.findall(text)}
    assert named
    unknown = sorted((flag, where) for flag, where in named if flag not in every)
    assert not unknown


@pytest.mark.parametrize("package", ["placement", "dancemoe_jax", "launch"])
def test_a_command_s_own_messages_name_its_own_flags(package, flags):
    """A module of a command speaks of that command, unless it says of which other."""
    wrong = []
    for where, text in messages(package):
        program, _, rest = where.partition("/commands/")
        own = flags.get(program, {}).get(rest.partition(".")[0]) if rest else None
        if own is None or "python -m" in text or "`" in text:
            continue
        wrong += [(flag, where) for flag in FLAG.findall(text) if flag not in own | OTHERS]
    assert not wrong


def test_commands_that_messages_name_exist_with_their_flags(flags):
    named = [
        (where, *match.groups())
        for package in ("placement", "dancemoe_jax", "launch")
        for where, text in messages(package)
        for match in COMMAND.finditer(text)
    ]
    assert named
    for where, program, command, flag in named:
        assert command in flags[program], where
        assert flag is None or not flag.startswith("--") or flag in flags[program][command], where


def refusal(call, *given) -> str:
    with pytest.raises(InputError) as refused:
        call(*given)
    return str(refused.value)


NOTHING = dict.fromkeys(("abort", "to", "add", "drain", "undrain", "plan", "dry_run"))
CASES = [
    *((lambda text: parse_bytes(text, "memory"), wrong) for wrong in ("12", "x", "0B", "9" * 40 + "GB")),
    *((lambda text: parse_rate(text, "bandwidth"), wrong) for wrong in ("12", "x", "0Mbps", "1e40Gbps")),
    *((lambda text: parse_seconds(text, "latency"), wrong) for wrong in ("12", "x", "1e30s")),
    (lambda text: split_address(text, "--coordinator"), "nowhere"),
    (_size, "58x256"),
    (lambda text: _date(text, "arrived_at"), "yesterday"),
    (lambda text: request(argparse.Namespace(**NOTHING | {"memory": [text]})), "edge-c/0"),
]


@pytest.mark.parametrize(("call", "wrong"), CASES, ids=[str(number) for number in range(len(CASES))])
def test_an_example_in_a_refusal_is_taken(call, wrong):
    message = refusal(call, wrong)
    example = EXAMPLE.search(message)
    assert example, message
    call(example[1])


@pytest.mark.parametrize(
    ("parse", "where"), [(parse_bytes, "memory"), (parse_rate, "bandwidth"), (parse_seconds, "latency")]
)
def test_units_in_a_refusal_are_taken(parse, where):
    _, _, units = refusal(parse, "12 parsecs", where).partition("use one of ")
    assert units
    for unit in units.split(", "):
        assert parse(f"12{unit}", where) > 0


def test_an_example_of_a_cluster_file_is_taken():
    for tables in ({"name": "a"}, {"name": "a", "devices": [{}]}, {"name": "a", "devices": []}):
        message = refusal(Cluster.from_dict, {"server": [tables]})
        example = re.search(r"\{?\s*memory = \"[^\"]+\"\s*\}?", message)
        assert example, message
        device = tomllib.loads(f"x = {{ {example[0].strip('{} ')} }}")["x"]
        Cluster.from_dict({"server": [{"name": "a", "devices": [device]}]})
