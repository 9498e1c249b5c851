"""Small valid inputs for every reader and flag of `python -m placement`, and a run of it with one of them damaged."""

import base64
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import struct
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np

from placement import STRATEGIES, Cluster, Profile, plan
from placement.__main__ import main
from tests.fuzz.mutators import mutate, mutate_text
from tests.helpers.torch_files import torch_save

SECONDS = 10  # of one run, before it is called a hang
CLUSTER = """
[[server]]
name = "a"
host = "10.0.0.1:8476"
devices = [{ memory = "2KB", load_bandwidth = "2GB/s", speed = 1.5 }]
[[server]]
name = "b"
devices = [{ memory = "1.6KB" }, { memory = 1500 }]
[network]
bandwidth = "500Mbps"
latency = "0.2ms"
[[link]]
from = "a"
to = "b"
bandwidth = "100MB/s"
both = true
"""
CONFIG = {
    **{"model_type": "deepseek_v2", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "q_lora_rank": None},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 6, "n_shared_experts": 1},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1, "vocab_size": 50},
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 8, "modules_to_not_convert": ["gate"]},
}
FACTS = ["--name", "tiny", "--top-k", "2", "--hidden-size", "16", "--expert-bytes", "100", "--reserved-bytes", "9"]
SERVERS = ["--servers", "a,b", "--ranks-per-server", "1,2"]


@dataclass(frozen=True)
class Recipe:
    """A command line that succeeds: its files may be damaged, and the values of its flags."""

    command: str
    arguments: tuple[str, ...]
    files: tuple[str, ...]
    flags: tuple[str, ...] = field(default=())  # flags with values that may be added


def safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    header, content = {}, b""
    for key, array in tensors.items():
        data = array.astype("<i4").tobytes()
        header[key] = {
            "dtype": "I32",
            "shape": list(array.shape),
            "data_offsets": [len(content), len(content) + len(data)],
        }
        content += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def make_corpus(folder: Path) -> None:
    """Write all inputs into a folder."""
    rng = np.random.default_rng(0)
    (folder / "cluster.toml").write_text(CLUSTER)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "quantization_config"}))
    (folder / "hf/quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 8, "sym": True}))
    ids = rng.random((60, 3, 6)).argsort(-1)[..., :2].astype(np.uint8)
    meta = {"hidden_size": 16, "model": "tiny", "expert_bytes": 100, "reserved_bytes": 9}
    server, sequence = np.arange(60) // 30, np.arange(60) // 5
    profile = Profile.from_tokens(ids, server, sequence, servers=("a", "b"), experts=6, **meta)
    profile.save(folder / "profile.npz")
    Profile(rng.integers(1, 99, (2, 3, 6)), ("a", "b"), "tiny", 2, 16, 100, 9).save(folder / "counts.npz")
    cluster = Cluster.from_toml(folder / "cluster.toml")
    for name in ("uniform", "dance"):
        plan(profile, cluster, name).save(folder / f"{name}.json")
    slots = np.stack([(np.arange(9) + layer) % 6 for layer in range(3)])
    maps(folder, slots)
    counts = rng.integers(1, 50, (3, 6)).astype(np.int32)
    torch_save(folder / "stat.pt", {"rank": 0, "logical_count": counts[None], "extra": [1.5, "x", None, [counts]]})
    for rank in range(3):
        top = ids[20 * rank : 20 * rank + 20].transpose(1, 0, 2).astype(np.int32)
        physical = np.stack([np.bincount(layer.ravel(), minlength=9) for layer in top]).astype(np.int32)
        record = {"rank": rank, "global_physical_count": physical, "topk_ids_of_layer": top, "extend_seq_lens": [12, 8]}
        torch_save(
            folder / f"pass_{rank}.pt", {"records": [record], "last_physical_to_logical_map": slots.astype(np.int32)}
        )
    np.save(folder / "jax.npy", {"logical_count": counts, "timestamp": 1.5}, allow_pickle=True)  # pyright: ignore
    np.save(folder / "routed.npy", ids.astype(np.int16))
    lines = [{"server": name, "routed_experts": ids[s == server].tolist()} for s, name in enumerate("ab")]
    (folder / "routed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    packed = base64.b64encode((folder / "routed.npy").read_bytes()).decode()
    (folder / "packed.jsonl").write_text(json.dumps({"server": "a", "meta_info": {"routed_experts": packed}}) + "\n")
    (folder / "trt").mkdir()
    (folder / "trt/meta_info.json").write_text(json.dumps({"num_experts": 6, "num_experts_per_token": 2}))
    for rank in range(3):
        chosen = {f"1_{layer}": ids[20 * rank : 20 * rank + 20, layer - 1] for layer in (1, 2, 3)}
        summed = {key: np.bincount(values.ravel(), minlength=6) for key, values in chosen.items()}
        (folder / f"trt/rank{rank}.safetensors").write_bytes(safetensors(summed))
        (folder / f"trt/rank{rank}_raw.safetensors").write_bytes(safetensors(chosen))
    (folder / "costs.json").write_text(json.dumps({"prefill": [0.01, 1e-3, 1e-4], "decode": [0.01, 1e-3, 1e-4]}))
    arrivals(folder)


def maps(folder: Path, slots: np.ndarray) -> None:
    """Maps of every engine, slots [layers, physical experts] on three devices."""
    rows = slots.tolist()
    (folder / "map.json").write_text(json.dumps({"physical_to_logical_map": rows}))
    torch_save(folder / "map.pt", {"physical_to_logical_map": slots})
    text = "num_slots: 9  # slots\ninitial_global_assignments:\n" + "".join(
        f"  {i}: {row}\n" for i, row in enumerate(rows)
    )
    (folder / "map.yaml").write_text(text + "layer_updates_per_iter: 0\n")
    layers = [
        {
            **{"layer_id": i, "device_count": 3},
            "device_list": [{"device_id": d, "device_expert": row[3 * d : 3 * d + 3]} for d in range(3)],
        }
        for i, row in enumerate(rows)
    ]
    (folder / "ascend.json").write_text(json.dumps({"moe_layer_count": 3, "layer_list": layers}))
    pattern = np.zeros((3, 3, 6), np.int32)
    for layer, slot in itertools.product(range(3), range(9)):
        pattern[slot // 3, layer, slots[layer, slot]] = 1
    np.save(folder / "omni.npy", pattern)


def arrivals(folder: Path) -> None:
    """Requests in every layout that is read."""
    (folder / "ours.csv").write_text("t_s,prompt_tokens,output_tokens,server\n0,10,3,a\n4.5,20,1,b\n9,5,2,a\n")
    (folder / "azure.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,37,4\n2023-11-16 18:15:50.9951690,39,9\n"
    )
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    (folder / "burst.csv").write_text(head + "5,ChatGPT,47,8,55,Conversation log\n45,ChatGPT,9,0,9,Conversation log\n")
    lines = [{"timestamp": 27482 + i, "input_length": 95, "output_length": 5, "hash_ids": [46]} for i in range(3)]
    (folder / "mooncake.jsonl").write_text("\n".join(map(json.dumps, lines)))


def recipes() -> tuple[Recipe, ...]:
    """Command lines over every reader."""
    both = ("cluster.toml", "profile.npz")
    inputs = ("--cluster", "cluster.toml", "--profile", "profile.npz")
    planning = ("--seed", "--prior", "--exchange", "--active", "--prefill-tokens", "--decode-steps")
    found = [Recipe("plan", (*inputs, "--out", "new.json", "--strategy", name), both, planning) for name in STRATEGIES]
    found += [
        Recipe("plan", (*inputs, "--out", "new.json", "--previous", "uniform.json"), (*both, "uniform.json"), planning),
        Recipe("plan", (*inputs, "--out", "new.json", "--model", "config.json"), ("config.json", "profile.npz")),
        Recipe("plan", (*inputs, "--out", "new.json", "--equal-slots", "--json"), both, planning),
        Recipe("validate", ("--cluster", "cluster.toml", "--placement", "dance.json"), ("cluster.toml", "dance.json")),
        Recipe(
            "compare",
            (*inputs, "--eval", "counts.npz", "--strategies", "uniform,dance"),
            (*both, "counts.npz"),
            planning,
        ),
        Recipe(
            "diff",
            ("--cluster", "cluster.toml", "uniform.json", "dance.json", "--profile", "profile.npz"),
            ("uniform.json", "dance.json", *both),
            ("--horizon", "--stall", "--interference", "--chunks", *planning[2:]),
        ),
        Recipe("drift", ("--profile", "profile.npz", "--against", "counts.npz"), ("profile.npz", "counts.npz")),
        Recipe("model", ("config.json",), ("config.json",), ("--dtype",)),
        Recipe("model", ("hf", "--json"), ("hf/config.json", "hf/quantize_config.json")),
    ]
    simulate = (*inputs, "--strategies", "uniform")
    numbers = (
        "--stretch",
        "--duration",
        "--gap",
        "--batch",
        "--shift",
        "--replan",
        "--device-flops",
        "--seed",
        "--sequences",
    )
    found += [
        Recipe("simulate", (*simulate, "--arrivals", name), (name, name, *both), numbers)
        for name in ("ours.csv", "azure.csv", "burst.csv", "mooncake.jsonl")
    ]
    # Arrivals stay whole here: 100,000 tokens of one are as many steps, which is work and no fault.
    lock = (*simulate, "--arrivals", "ours.csv", "--lock-step", "--costs", "costs.json")
    found.append(Recipe("simulate", lock, ("costs.json",), ("--sequences", "--chunk", "--seed")))
    return (*found, *conversions())


def conversions() -> list[Recipe]:
    """Command lines of `convert` over every format."""
    flags = (
        "--experts",
        "--layers",
        "--first-layer",
        "--from",
        "--to",
        "--dtype",
        "--ranks-per-server",
        "--servers",
        "--top-k",
    )
    statistics = {
        **{"stat.pt": ("stat.pt",), "jax.npy": ("jax.npy",), "routed.npy": ("routed.npy",), "trt": ()},
        **{"routed.jsonl": ("routed.jsonl",), "packed.jsonl": ("packed.jsonl",)},
    }
    statistics["trt"] = tuple(
        f"trt/{name}" for name in ("meta_info.json", "rank0.safetensors", "rank1_raw.safetensors")
    )
    found = [
        Recipe("convert", (name, "--out", "new.npz", "--servers", "a,b", *FACTS), files, flags)
        if name not in ("trt", "routed.npy")
        else Recipe(
            "convert", (name, "--out", "new.npz", *(SERVERS if name == "trt" else SERVERS[:2]), *FACTS), files, flags
        )
        for name, files in statistics.items()
        if name != "routed.npy"
    ]
    found.append(
        Recipe("convert", ("routed.npy", "--out", "new.npz", "--servers", "a", *FACTS), ("routed.npy",), flags)
    )
    passes = tuple(f"pass_{rank}.pt" for rank in range(3))
    found.append(Recipe("convert", (*passes, "--out", "new.npz", *SERVERS, *FACTS), passes, flags))
    model = ("--servers", "a,b", "--model", "config.json")
    found.append(
        Recipe("convert", ("routed.jsonl", "--out", "new.npz", *model), ("config.json", "routed.jsonl"), flags)
    )
    for name in ("map.json", "map.pt", "map.yaml", "ascend.json", "omni.npy"):
        found.append(Recipe("convert", (name, "--out", "new.json", *SERVERS, *FACTS), (name,), flags))
    return [*found, Recipe("convert", ("dance.json", "--to", "omni-infer", "--out", "new.npy"), ("dance.json",), flags)]


class Hang(BaseException):
    """A run took longer than it may."""


def _stop(_: int, frame: FrameType | None) -> None:
    raise Hang("".join(traceback.format_stack(frame)[-3:]))


def damaged(seed: int, corpus: Path, folder: Path) -> list[str]:
    """A command line with a file or a flag damaged; the file is written into `folder`, beside links to the others."""
    rng = random.Random(seed)
    recipe = rng.choice(recipes())
    for name in folder.rglob("*"):
        if not name.is_dir():
            name.unlink()
    # Hard links: what writes a file anew, as ours do, leaves the original as it is.
    shutil.copytree(corpus, folder, dirs_exist_ok=True, copy_function=os.link)
    arguments = list(recipe.arguments)
    if rng.random() < 0.75:
        name = rng.choice(recipe.files)
        (folder / name).unlink()
        (folder / name).write_bytes(mutate((corpus / name).read_bytes(), rng))
    else:
        flags = [i for i, text in enumerate(arguments) if text.startswith("--") and i + 1 < len(arguments)]
        if recipe.flags and rng.random() < 0.6:
            arguments += [rng.choice(recipe.flags), rng.choice(("1", "2", "5s", "a,b", "0.5"))]
            flags = [len(arguments) - 2]
        at = rng.choice(flags or [0])
        if at + 1 < len(arguments) and not arguments[at + 1].startswith("--"):
            arguments[at + 1] = mutate_text(arguments[at + 1], rng)
    return [recipe.command, *arguments]


def run(arguments: Sequence[str]) -> str | None:
    """Run `python -m placement` in this process and folder; what went wrong, None where all is well."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("always")
            status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    except Hang as hang:
        return f"hang over {SECONDS} s: {hang}"
    except BaseException:  # whatever comes out of main is a traceback to its user
        return traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    said = err.getvalue()
    if status not in (0, 2):
        return f"exit {status}: {said[-300:]}"
    if status == 2 and said.count("\n") != 1:
        return f"exit 2 with {said.count(chr(10))} lines: {said[-300:]}"
    if status == 0 and "Warning" in said:
        return f"a warning: {said[-300:]}"
    return None
