"""Whether a card computes what it should: family fixtures, the bundled model beside a CPU and shared by two
processes, a migration in place."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.checkpoint.reader import ExpertFile
from dancemoe_jax.expert_parallel.migrate import Staged, commit
from dancemoe_jax.expert_parallel.pool import fill_pool, pool_layout
from dancemoe_jax.expert_parallel.tables import assign_slots, routing_tables
from dancemoe_jax.inference.generate import generate
from dancemoe_jax.inference.state import init_state
from dancemoe_jax.inference.steps import Weights, decode_step, place_decoder, place_tables, prefill
from dancemoe_jax.mesh import make_mesh
from launch.bench.harness.gpu_ranks import texts_of_ranks

# Of logits in float32, against the largest; what the fixtures are held to everywhere.
TOLERANCE = 1e-4
_PROMPT = 24
_TEXTS = ("def main(", "12 + 34 =", "The ")
_TOKENS = 24

Check = dict[str, Any]


class _Served:
    """A model on one device, every expert in a slot of its own and one slot free."""

    def __init__(self, path: Path, device: Any) -> None:
        self.file = ExpertFile(path)
        config, self.mesh = self.file.config, make_mesh([device])
        experts = np.ones((1, config.num_moe_layers, config.num_experts), bool)
        self.layout = pool_layout([experts.size + 1])
        self.slots = assign_slots(self.layout, experts)
        pool = fill_pool(self.mesh, self.layout, self.slots, self.file.read)
        self.weights = Weights(place_decoder(self.file.decoder(), self.mesh), pool, self.tables())
        self.shapes: dict[str, Any] = {"config": config, "layout": self.layout, "mesh": self.mesh}

    def tables(self) -> Any:
        return place_tables(routing_tables(self.layout, self.slots), self.mesh)

    def texts(self) -> list[list[int]]:
        prompts = [self.file_tokens(text) for text in _TEXTS]
        return generate(self.weights, prompts, _TOKENS, **self.shapes)

    def file_tokens(self, text: str) -> list[int]:
        return list(text.encode()[:_PROMPT])

    def move_all(self) -> None:
        """Every expert to the next slot, in the pool's own memory, as a migration between two steps does."""
        new = np.where(self.slots >= 0, (self.slots + 1) % self.layout.capacity[0], -1).astype(np.int32)
        writes = [
            (int(slot), self.file.read(layer, expert)) for (_, layer, expert), slot in np.ndenumerate(new) if slot >= 0
        ]
        pool = commit(self.weights.pool, self.layout, self.mesh, Staged(new, {0: writes}))
        self.slots = new
        self.weights = self.weights._replace(pool=pool, tables=self.tables())


def check_family(path: Path, device: Any) -> Check:
    """A fixture's logits, prefilled and decoded, against those that transformers stored beside it."""
    served = _Served(path, device)
    with np.load(path / "logits.npz", allow_pickle=False) as stored:
        tokens, expected = stored["tokens"][None], stored["logits"]
    rows, total = tokens.shape[1:]
    grid = np.zeros((1, rows), np.int32)
    order, ones = np.arange(rows, dtype=np.int32)[None], np.ones((1, rows), bool)
    state = init_state(served.file.config, served.mesh, rows)
    state, result = prefill(
        served.weights, state, tokens[:, :, :_PROMPT], order, grid, grid + _PROMPT, **served.shapes, all_logits=True
    )
    found = [np.asarray(result.logits)[0]]
    for position in range(_PROMPT, total):
        state, result = decode_step(
            served.weights, state, tokens[:, :, position], grid + position, ones, **served.shapes
        )
        found.append(np.asarray(result.logits)[0, :, None])
    logits = np.concatenate(found, axis=1)
    error = float(np.abs(logits - expected).max() / np.abs(expected).max())
    same = bool((logits.argmax(-1) == expected.argmax(-1)).all())
    return {"passed": same and error <= TOLERANCE, "error": error, "same_tokens": same}


def check_bundled(device: Any) -> Check:
    """The bundled model's greedy texts on the card and on this machine's CPU."""
    texts = [_Served(bundled_model(), on).texts() for on in (device, jax.devices("cpu")[0])]
    return {"passed": texts[0] == texts[1], "tokens": sum(map(len, texts[0]))}


def check_migration(device: Any) -> Check:
    """All experts change their slots while the model serves: same texts, same memory, nothing compiled again."""
    served = _Served(bundled_model(), device)
    before, pointers = served.texts(), _pointers(served.weights.pool)
    served.move_all()  # what a commit takes is compiled with the first
    served.texts()
    compiled = _programs()
    served.move_all()
    after = served.texts()
    again = _programs() - compiled
    in_place = _pointers(served.weights.pool) == pointers
    return {
        "passed": before == after and in_place and not again,
        "same_tokens": before == after,
        "in_place": in_place,
        "recompiled": again,
    }


def check_two_ranks(device: Any) -> Check:
    """The bundled model's texts, its experts shared by two processes on the card, and by none."""
    served = _Served(bundled_model(), device)
    prompts = [served.file_tokens(text) for text in _TEXTS]
    shared, whole = texts_of_ranks(prompts, _TOKENS, device.platform), served.texts()
    return {"passed": shared == whole, "tokens": sum(map(len, shared))}


def checks(families: Path | None, device: Any) -> Iterator[tuple[str, Callable[[], Check]]]:
    """All checks, by name."""
    for path in sorted(families.iterdir()) if families else []:
        if (path / "logits.npz").exists():
            yield f"family {path.name}", lambda path=path: check_family(path, device)
    yield "bundled model against the CPU", lambda: check_bundled(device)
    yield "migration in place", lambda: check_migration(device)
    yield "two processes on the card", lambda: check_two_ranks(device)


def _programs() -> int:
    """Steps compiled so far."""
    steps: tuple[Any, ...] = (decode_step, prefill)
    return sum(step._cache_size() for step in steps)


def _pointers(pool: Any) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(pool) for shard in leaf.addressable_shards]
