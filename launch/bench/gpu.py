"""`python -m launch bench gpu`: is what a card computes right, and how near to the card's own rates are its steps?

The report is one file, which is worth sending to the project: no card of ours has run this yet.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from dancemoe_jax.files import write_json
from dancemoe_jax.kernels.library import Kernels
from launch.bench.harness.gpu_checks import checks
from launch.bench.harness.gpu_models import MODELS
from launch.bench.harness.gpu_speed import BATCHES, PROMPTS, Ceilings, Model, cut, measure_ceilings, shrunk, with_shares
from placement import InputError
from placement.text_table import print_table
from placement.version import version

_FAMILIES = Path(__file__).parents[2] / "tests/fixtures/families"
_PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu-report.json"), metavar="FILE", help="the report (gpu-report.json)")
    add("--families", type=Path, metavar="DIR", help="small checkpoints with stored logits (default: the tests')")
    add("--models", default=",".join(MODELS), metavar="A,B", help="shapes to time (default: all three)")
    add("--seconds", type=float, default=780, help="begin nothing after so long (780)")
    add("--compare", action="store_true", help="time XLA without the project's kernels too")
    add("--dry-run", action="store_true", help="tiny shapes, on whatever device there is: does the script run?")
    add("--json", action="store_true", help="print the report instead of tables")


def run(args: argparse.Namespace) -> int:
    """Check, then time; the report is written after every part, so that a run that is cut short leaves one."""
    device, begin = jax.devices()[0], time.monotonic()
    if device.platform == "cpu" and not args.dry_run:
        raise InputError("no GPU: JAX finds CPUs only; install an extra, cuda12 or cuda13, or give --dry-run")
    unknown = [name for name in args.models.split(",") if name not in MODELS]
    if unknown:
        raise InputError(f"--models {unknown[0]}: unknown; known are {', '.join(MODELS)}")
    families = args.families or (_FAMILIES if _FAMILIES.is_dir() else None)
    report: dict[str, Any] = {**_about(device), "dry_run": args.dry_run, "checks": {}, "speed": []}
    console = Console(stderr=True)
    for part in _parts(args, families, device, report):
        console.print(f"{time.monotonic() - begin:6.1f} s  {part}", markup=False, highlight=False)
        report["seconds"] = round(time.monotonic() - begin, 1)
        report["complete"] = False
        write_json(args.out, report)
        if time.monotonic() - begin > args.seconds:
            console.print(f"stopped after {args.seconds:g} s", markup=False)
            break
    else:
        report["complete"] = True
        write_json(args.out, report)
    if args.json:
        print(json.dumps(report))
    else:
        _print(report)
        print(f"\nreport: {args.out}" + ("" if report["complete"] else " (not complete)"))
    return 0 if report["complete"] and all(check["passed"] for check in report["checks"].values()) else 1


def _parts(args: argparse.Namespace, families: Path | None, device: Any, report: dict[str, Any]) -> Iterator[str]:
    """Do one part after another, each added to the report before what was found is said."""
    for name, check in checks(families, device):
        report["checks"][name] = _guarded(check)
        yield f"{name}: {'passed' if report['checks'][name]['passed'] else 'FAILED'} {report['checks'][name]}"
    ceilings = measure_ceilings(device)
    report["ceilings"] = {"copy_bytes_s": ceilings.copy, "matmul_operations_s": ceilings.matmul}
    yield f"copies {ceilings.copy / 1e9:.0f} GB/s, multiplies {ceilings.matmul / 1e12:.1f} Tera operations/s in bfloat16"
    limit = ((device.memory_stats() or {}) if device.platform != "cpu" else {}).get("bytes_limit", 2**33)
    for name in args.models.split(","):
        for int8 in (False, True):
            config = shrunk(MODELS[name]) if args.dry_run else cut(MODELS[name], limit, 2, int8)
            model = Model(config, device, int8)
            for row in _timed(args, name, int8, model, ceilings):
                report["speed"].append(row)
                yield _said(row)
            del model


def _timed(
    args: argparse.Namespace, name: str, int8: bool, model: Model, ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    """Every kind of step of one model, as rows of the report."""
    most = 1 if args.dry_run else None
    for kind, size in [("decode", size) for size in BATCHES[:most]] + [("prefill", size) for size in PROMPTS[:most]]:
        both: tuple[Kernels, ...] = ("auto", "xla") if args.compare else ("auto",)
        for kernels in both:
            row = {"model": name, "layers": model.config.num_layers, "weights": "int8" if int8 else "bfloat16"}
            row |= {
                "step": kind,
                "tokens": size if isinstance(size, int) else f"{size[0]} x {size[1]}",
                "kernels": kernels,
            }
            take: Callable[..., dict[str, float]] = model.decode if kind == "decode" else model.prefill
            yield {**row, **_guarded(functools.partial(_shares, take, size, kernels, ceilings))}


def _shares(take: Callable[..., dict[str, float]], size: Any, kernels: Kernels, ceilings: Ceilings) -> Any:
    return with_shares(take(size, kernels), ceilings)


def _guarded(call: Any) -> dict[str, Any]:
    """What a part found, or that it could not be done: the others are worth having all the same."""
    try:
        return call()
    except Exception as error:
        return {"passed": False, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _about(device: Any) -> dict[str, Any]:
    """The card, what drives it, and when."""
    packages = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    stats = (device.memory_stats() or {}) if device.platform != "cpu" else {}
    return {
        "card": device.device_kind,
        "compute_capability": str(getattr(device, "compute_capability", "")),
        "memory_limit": stats.get("bytes_limit"),
        "platform": device.client.platform_version,
        "packages": packages,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "version": version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _said(row: dict[str, Any]) -> str:
    what = f"{row['model']} {row['weights']} {row['step']} {row['tokens']} {row['kernels']}"
    if "failed" in row:
        return f"{what}: FAILED {row['failed']}"
    return f"{what}: {1e3 * row['seconds']:.2f} ms, {row['of_floor']:.0%} of the floor"


def _print(report: dict[str, Any]) -> None:
    print(f"{report['card']}, jax {report['packages'].get('jax')}" + (", dry run" if report["dry_run"] else ""))
    rows = [(name, "passed" if own["passed"] else "FAILED") for name, own in report["checks"].items()]
    print_table(("check", "result"), rows)
    if report["speed"]:
        print("\nshares of what the card itself copies and multiplies")
        header = ("model", "weights", "step", "kernels", "ms", "memory", "matmul")
        print_table(header, [_row(own) for own in report["speed"]])


def _row(own: dict[str, Any]) -> tuple[str, ...]:
    shares = ("failed", "", "")
    if "failed" not in own:
        shares = (f"{1e3 * own['seconds']:.2f}", f"{own['of_memory_floor']:.0%}", f"{own['of_matmul_rate']:.0%}")
    return (own["model"], own["weights"], f"{own['step']} {own['tokens']}", own["kernels"], *shares)
