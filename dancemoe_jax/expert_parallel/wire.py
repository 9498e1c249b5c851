"""How a row of a layer's tokens looks on the wire: its vector, routing weights and slots, as 16-bit words."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dancemoe_jax.expert_parallel.links import Links


class LayerRows(NamedTuple):
    """One layer's tokens on one device, and how a row of theirs looks on the wire (uint16: x, weights, codes).

    A code names a slot on the server that the row goes to: 1 + slot + slots * (index of the device there); 0 for none.
    """

    links: Links
    me: jax.Array
    wire: Any
    x: jax.Array
    topk_weights: jax.Array
    device: jax.Array
    slot: jax.Array

    def pack(self, _, index, target):
        """Rows `index` of the tokens as the server of device `target` reads them."""
        server, index_on_server = jnp.array(self.links.server), jnp.array(self.links.index_on_server)
        device = self.device[index]
        there = (device >= 0) & (server[device] == jnp.broadcast_to(server[target], index.shape)[:, None])
        code = jnp.where(there, 1 + self.slot[index] + self.links.slots * index_on_server[device], 0)
        return jnp.concatenate(
            [
                to_words(self.x[index].astype(self.wire)),
                to_words(self.topk_weights[index].astype(jnp.float32)),
                code.astype(jnp.uint16),
            ],
            axis=1,
        )

    def unpack(self, packed):
        """x, weights, and codes of packed rows."""
        k = self.device.shape[1]
        x = from_words(packed[:, : -3 * k], self.wire).astype(self.x.dtype)
        weights = from_words(packed[:, -3 * k : -k], jnp.float32).astype(self.topk_weights.dtype)
        return x, weights, packed[:, -k:].astype(jnp.int32)


def to_words(a):
    """uint16 [n, …] of the bits of a [n, …]."""
    if a.dtype.itemsize == 2:
        return jax.lax.bitcast_convert_type(a, jnp.uint16)
    return jax.lax.bitcast_convert_type(a, jnp.uint16).reshape(len(a), -1)


def from_words(words, dtype):
    if jnp.dtype(dtype).itemsize == 2:
        return jax.lax.bitcast_convert_type(words, dtype)
    return jax.lax.bitcast_convert_type(words.reshape(len(words), -1, 2), dtype)
