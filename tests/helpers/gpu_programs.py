"""Run by test_gpu_programs.py: compiles steps of a small model for GPUs that are not there, and prints what they do."""

import json
import re
import sys

import jax
import jax.numpy as jnp

from dancemoe_jax.expert_parallel.pool import _write as write
from dancemoe_jax.expert_parallel.pool import write_rows
from dancemoe_jax.inference import steps
from dancemoe_jax.model.config import ModelConfig
from launch.bench.harness.gpu_program import summary
from launch.bench.harness.gpu_target import lower_step, target_mesh
from launch.cluster.gpu import prepare_gpu

CONFIG = ModelConfig(2048, 256, 6, 8, 2, 64, 16, 4, 128, max_position=1024, tie_embeddings=False)
SEQUENCES, CHUNK = 8, 64
# Keys of all sequences, in bfloat16.
CACHE = CONFIG.num_layers * SEQUENCES * CONFIG.max_position * CONFIG.cache_widths[0] * 2
# One layer of Mixtral's: the largest blocks of the kernels, in the type that takes most shared memory.
WIDE = ModelConfig(2048, 4096, 1, 32, 8, 128, 8, 2, 14336, max_position=1024, tie_embeddings=False)


def facts(lowered) -> dict:
    """A step's figures, how often it adds floats by a scatter, and the precision of its products of float32."""
    compiled = lowered.compile()
    text = compiled.as_text()
    own = summary(compiled, 16)
    adds = re.findall(r"= (?:f32|bf16)\S* scatter\(.*", text)
    own["float_scatters"] = [line[:200] for line in adds if "unique_indices=true" not in line and _adds(text, line)]
    own["gathers"] = re.findall(r"= (.*) all-gather(?:-start)?\(", text)
    own["imprecise"] = [
        line[:300]
        for line in re.findall(r".* dot\(.*", text)
        if re.search(r"dot\(%\S+, ", line) and "highest" not in line
    ]
    return own


def _adds(text: str, line: str) -> bool:
    """Whether a scatter adds: others set, each place once."""
    name = re.search(r"to_apply=%?([\w.\-]+)", line)
    body = re.search(rf"%?{re.escape(name[1])} \(.*?\n\}}", text, re.S) if name else None
    return bool(body and " add(" in body[0])


def unknown_card(mesh, both):
    """A step for a GPU that the kernels are not for."""
    known, steps.gpu_kernels = steps.gpu_kernels, lambda kernels, devices: "loop"
    try:
        return lower_step(mesh=mesh, wire_dtype=jnp.bfloat16, **both)  # another argument, so that it is traced again
    finally:
        steps.gpu_kernels = known


def main() -> None:
    prepare_gpu([], [], None)
    one, three, four = (target_mesh(topology) for topology in ("1x1x1", "3x1x1", "1x1x4"))
    ampere = target_mesh("1x1x1", "sm_86")
    both = {"config": CONFIG, "sequences": SEQUENCES}
    found = {
        "decode": facts(lower_step(mesh=one, **both)),
        "prefill": facts(lower_step(mesh=one, chunk=CHUNK, **both)),
        "float32": facts(lower_step(mesh=one, dtype=jnp.float32, **both)),
        "int8, sm_86": facts(lower_step(mesh=ampere, int8=True, **both)),
        "three servers": facts(lower_step(mesh=three, **both)),
        "four cards": facts(lower_step(mesh=four, one_server=True, **both)),
        "loop": facts(lower_step(mesh=one, kernels="xla", **both)),
        "wide, sm_86": facts(lower_step(WIDE, ampere, sequences=1, chunk=256, dtype=jnp.float32)),
        "unknown card": facts(unknown_card(one, both)),
        "version": jax.__version__,
        "cache_bytes": CACHE,
        "layer_cache_bytes": CACHE // CONFIG.num_layers,
        "layers": CONFIG.num_layers,
    }
    sharding = jax.sharding.SingleDeviceSharding(one.devices.flat[0])

    def array(*shape, of=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, of, sharding=sharding)

    rows = write_rows(3 * 4096 * 14336 * 2)
    bank, values = ((array(n, 28672, 4096), array(n, 4096, 14336)) for n in (20, rows))
    memory = write.lower(bank, array(rows, of=jnp.int32), values).compile().memory_analysis()
    found["write"] = {
        "rows": rows,
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "bank": 20 * 3 * 4096 * 14336 * 2,
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
