"""What a server finds out of its compiled steps before it serves on cards: memory, and the order of exchanges."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from launch.cluster.channel import OwnChannel
from launch.engine import programs
from launch.engine.memory import WORKSPACE_BYTES, workspace_bytes
from placement import InputError
from tests.helpers.cluster_of_devices import CONFIG

FIRST = "  %a = s32[3]{0} all-reduce(%x), channel_id=1\n  %b = f32[8,4]{1,0} ragged-all-to-all(%y), channel_id=2\n"
TURNED = "\n".join(reversed(FIRST.splitlines()))


def engine(temporary: int, text: str = FIRST):
    """An engine on a card whose steps need so much memory."""

    def program():
        memory = SimpleNamespace(temp_size_in_bytes=temporary)
        return SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: text)

    card = SimpleNamespace(platform="gpu")
    return SimpleNamespace(
        mesh=SimpleNamespace(devices=SimpleNamespace(flat=[card])),
        weights=SimpleNamespace(decoder=SimpleNamespace(embedding=jnp.zeros((2, 2), jnp.bfloat16))),
        config=CONFIG,
        batch_slots=8,
        chunk=64,
        compiled=lambda: {"decode": program(), "prefill": program()},
    )


def test_steps_that_need_more_than_is_reserved_are_refused_with_both_figures():
    programs.check_programs(engine(WORKSPACE_BYTES))
    with pytest.raises(InputError, match=f"needs {WORKSPACE_BYTES + 1} bytes.* {WORKSPACE_BYTES} are reserved"):
        programs.check_programs(engine(WORKSPACE_BYTES + 1))


def test_a_server_that_exchanges_in_another_order_is_named_on_all():
    orders = [programs.order_of_collectives(text) for text in (FIRST, FIRST, TURNED)]
    assert orders[0] == orders[1] != orders[2]
    names = ("a", "b", "c")
    for other, wrong in ((orders[1], False), (orders[2], True)):
        channel = OwnChannel()
        channel.put("1", f"decode={other}".encode())
        if not wrong:
            programs.compare_orders({"decode": orders[0]}, channel, 0, 2, names)
            continue
        with pytest.raises(InputError, match=r"^b: its steps exchange in another order"):
            programs.compare_orders({"decode": orders[0]}, channel, 0, 2, names)


def test_the_workspace_holds_what_programs_need():
    """Temporary bytes of prefill on three servers, the most of all, as compiled for an H100 with 8 batch slots and a chunk of
    64 (`launch bench programs`)."""
    from launch.bench.harness.gpu_models import MODELS

    for name, needed in (("mixtral", 27_825_904), ("deepseek-v2-lite", 16_098_312), ("qwen3-30b", 22_277_376)):
        assert needed < workspace_bytes(MODELS[name], 8, 2)
    assert workspace_bytes(CONFIG, 8) == WORKSPACE_BYTES
    assert workspace_bytes(MODELS["mixtral"], 8, 2) >= MODELS["mixtral"].expert_bytes(2)  # one at a time is written
