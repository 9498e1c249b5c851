"""Caches cut into pages, and what attention over them has to give."""

import jax.numpy as jnp
import numpy as np

from dancemoe_jax.inference.cache import PAGE
from dancemoe_jax.model.attention import attend


def paged(rng, *caches):
    """Caches [layers, slots, positions, heads, width] (or None) as pages in random places, some unused, and their table."""
    layers, slots, positions = caches[0].shape[:3]
    blocks = -(-positions // PAGE)
    count = layers * slots * blocks
    table = rng.permutation(count + 7)[:count].reshape(layers, slots, blocks).astype(np.int32)
    pools = []
    for cache in caches:
        if cache is None:
            pools.append(None)
            continue
        padded = np.zeros((layers, slots, blocks * PAGE, *cache.shape[3:]), cache.dtype)
        padded[:, :, :positions] = cache
        pool = np.full((count + 7, PAGE, *cache.shape[3:]), 1, cache.dtype)
        pool[table] = padded.reshape(layers, slots, blocks, PAGE, *cache.shape[3:])
        pools.append(jnp.asarray(pool))
    return (*pools, jnp.asarray(table))


def over_whole_context(
    q, keys, values, layer, slot, start, length, *, scale, window=None, sinks=None, value_width=None
):
    """Plain softmax attention over caches [layers, slots, positions, heads, width]; zeros for tokens that do not count."""

    def of_rows(cache):
        own = cache[layer][slot]
        return own.view(jnp.bfloat16).astype(jnp.float32) if own.dtype == jnp.uint16 else own

    k = of_rows(keys)
    v = k[..., :value_width] if values is None else of_rows(values)
    counts = jnp.arange(q.shape[1])[None] < length[:, None]
    positions = jnp.where(counts, start[:, None] + jnp.arange(q.shape[1])[None], 0)
    every = jnp.broadcast_to(jnp.arange(k.shape[1])[None], k.shape[:2])
    reach = None if window is None else jnp.int32(window)
    out = attend(q.astype(jnp.float32), k, v, positions, every, scale, reach, sinks)
    return jnp.where(counts[:, :, None, None], out, 0)
