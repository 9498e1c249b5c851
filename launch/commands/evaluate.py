"""`python -m launch evaluate`: what a model knows of held-out text, and how far its routing tells domains apart.

Bits per byte of every domain beside `zlib -9` on the same bytes, exact match on sums that training never showed, and
the share of a domain's assignments that go to the quarter of experts that each domain uses most.
"""

import argparse
import functools
import json
import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.checkpoint.reader import Model, load_model, on_device
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.model.decoder import Decoder, Experts, forward
from dancemoe_jax.model.experts import grouped_experts
from launch.corpus import Domain, held_out_sums, load_domains, read_domains
from placement import InputError
from placement.text_table import print_table, print_text

BATCH = 16
LONGEST_WINDOW = 1024
SHOWN_LINES = 8  # worked lines before a question


class Scores(NamedTuple):
    """Of each window of a text, in order: nats of its scored tokens, and where their layers' routers sent them."""

    nats: np.ndarray  # [windows]
    counts: np.ndarray  # int64 [windows, layers, experts]


def run(args: argparse.Namespace) -> None:
    """Evaluate and print.

    Raises:
        DanceMoEError, InputError: the model, a flag or a domain cannot be used.
    """
    if args.bytes < 1000:
        raise InputError(f"--bytes {args.bytes}: must be at least 1000")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: must not be negative")
    model = load_model(args.model or bundled_model())
    built_in = () if args.domain else load_domains(args.seed, train=False).values()
    domains = list(built_in) or read_domains(args.domain, args.seed)
    result = evaluate(model, domains, args.bytes)
    if args.json:
        print(json.dumps(result))
    else:
        _print(result)


def evaluate(model: Model, domains: list[Domain], limit: int = 200_000) -> dict[str, Any]:
    """All figures of a model as JSON-ready values.

    Args:
        limit: bytes of held-out text to read of each domain.
    """
    config, experts = model.config, on_device(model.config, model.experts)
    text, halves = {}, []
    for domain in domains:
        documents = head(domain.held_out, limit)
        raw = "".join(documents).encode()
        scores = score_text(config, model.decoder, experts, encode(model.tokenizer, documents, config))
        text[domain.name] = {
            "bytes": len(raw),
            "bits_per_byte": float(scores.nats.sum() / np.log(2) / len(raw)),
            "zlib_bits_per_byte": 8 * len(zlib.compress(raw, 9)) / len(raw),
        }
        middle = len(scores.nats) // 2
        halves.append((scores.counts[:middle].sum(0), scores.counts[middle:].sum(0)))
    share = top_quarter_share(np.stack([a for a, _ in halves]), np.stack([b for _, b in halves]))
    others = share[~np.eye(len(domains), dtype=bool)]
    result: dict[str, Any] = {
        "text": text,
        "routing": {
            "domains": [domain.name for domain in domains],
            "top_quarter_share": share.tolist(),
            "own": float(np.diag(share).mean()),
            "others": float(others.mean()) if others.size else None,
        },
    }
    arithmetic = next((domain for domain in domains if domain.name == "arithmetic"), None)
    if arithmetic is not None:
        right, total = sums_right(model, experts, arithmetic)
        result["sums"] = {"asked": total, "right": right, "exact_match": right / total}
    return result


def head(documents: tuple[str, ...], limit: int) -> list[str]:
    """The first documents, the last of them cut so that all together have at most `limit` bytes."""
    result = []
    for document in documents:
        result.append(document.encode()[:limit].decode(errors="ignore"))
        limit -= len(result[-1].encode())
        if limit <= 0:
            break
    return [document for document in result if document]


def encode(tokenizer: Tokenizer, documents: list[str], config: ModelConfig) -> np.ndarray:
    """Documents as one stream int32 [tokens]: end of text, document, end of text, document, ..., end of text."""
    end = [] if config.eos_token is None else [config.eos_token]
    stream = list(end)
    for document in documents:
        stream += tokenizer.encode(document, add_special_tokens=False).ids + end
    return np.array(stream, np.int32)


def score_text(config: ModelConfig, decoder: Decoder, experts: Experts, stream: np.ndarray) -> Scores:
    """Score every token of a stream but the first exactly once.

    Windows of `max_position` tokens (of 1024 where the context is longer) overlap by half, and a window scores only
    what the one before it did not reach: so every token has half a window before it, except at the beginning.
    """
    inputs, targets, scored = windows(stream, min(config.max_position, LONGEST_WINDOW))
    nats, counts = [], []
    for start in range(0, len(inputs), BATCH):
        rows = slice(start, start + BATCH)
        # The last batch is filled with windows that score nothing, so that one shape serves all.
        fill = ((0, BATCH - len(inputs[rows])), (0, 0))
        batch = (np.pad(array[rows], fill) for array in (inputs, targets, scored))
        window_nats, window_counts = _score(config, decoder, experts, *batch)
        nats.append(np.asarray(window_nats))
        counts.append(np.asarray(window_counts, np.int64))
    return Scores(np.concatenate(nats)[: len(inputs)], np.concatenate(counts)[: len(inputs)])


def windows(stream: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and which targets are scored, each [windows, width]; padded at the end with unscored zeros."""
    stride = max(1, width // 2)
    count = 1 + max(0, -(-(len(stream) - 1 - width) // stride))
    padded = np.zeros((count - 1) * stride + width + 1, np.int32)
    padded[: len(stream)] = stream
    index = np.arange(count)[:, None] * stride + np.arange(width)
    fresh = np.arange(width) >= np.where(np.arange(count) == 0, 0, width - stride)[:, None]
    return padded[index], padded[index + 1], fresh & (index + 1 < len(stream))


@functools.partial(jax.jit, static_argnames="config")
def _score(config: ModelConfig, decoder: Decoder, experts: Experts, inputs, targets, scored):
    logits, topk_ids = forward(config, decoder, experts, inputs, moe=_grouped_moe)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    rows = len(inputs)
    ids = topk_ids.reshape(config.num_moe_layers, rows, -1)  # [layers, rows, width * k]
    layer, row = jnp.arange(config.num_moe_layers)[:, None, None], jnp.arange(rows)[None, :, None]
    counted = jnp.repeat(scored, config.top_k, axis=1).astype(jnp.int32)
    counts = jnp.zeros((rows, config.num_moe_layers, config.num_experts), jnp.int32).at[row, layer, ids].add(counted)
    return jnp.where(scored, losses, 0).sum(1), counts


def _grouped_moe(h, weights, topk_weights, topk_ids, logits):
    return grouped_experts(h, weights.w_in, weights.w_out, topk_weights, topk_ids), topk_ids


def top_quarter_share(rank_by: np.ndarray, measure_on: np.ndarray) -> np.ndarray:
    """How well one domain's favourite experts serve another.

    Args:
        rank_by: counts [domains, layers, experts] that choose each domain's top quarter of every layer's experts.
        measure_on: counts of other text of the same domains.

    Returns:
        Share [d, e] of domain e's assignments that go to domain d's top quarter, mean over layers; 0.25 when even.
    """
    quarter = max(1, rank_by.shape[2] // 4)
    top = np.argsort(-rank_by, axis=2, kind="stable")[:, :, :quarter]
    frequency = measure_on / np.maximum(measure_on.sum(2, keepdims=True), 1)
    layers = np.arange(rank_by.shape[1])[:, None]
    return np.array([[f[layers, chosen].sum(1).mean() for f in frequency] for chosen in top])


def sums_right(model: Model, experts: Experts, arithmetic: Domain) -> tuple[int, int]:
    """How many held-out sums of two-digit numbers the model answers, and how many there are.

    A prompt is a few held-out worked lines and `a + b =`. The greedy answer is ` c` and a line break exactly if each of
    these tokens is the likeliest one after those before it, so one forward pass decides without generating.
    """
    config = model.config
    pairs = held_out_sums()
    lines = [line for document in arithmetic.held_out for line in document.split("\n") if line]
    rows = np.zeros((len(pairs), config.max_position), np.int32)
    answer = np.zeros(rows.shape, bool)
    for i, (a, b) in enumerate(pairs):
        prompt = model.tokenizer.encode(question(lines, a, b, SHOWN_LINES, i), add_special_tokens=False).ids
        ids = model.tokenizer.encode(f" {a + b}\n", add_special_tokens=False).ids
        tokens = [*prompt, *ids][-config.max_position :]
        rows[i, : len(tokens)] = tokens
        answer[i, len(tokens) - len(ids) : len(tokens)] = True
    # All prompts are short, so most of the context is padding that need not be computed.
    width = min(config.max_position, -(-(int(np.flatnonzero(answer.any(0)).max()) + 1) // 32) * 32)
    right = 0
    for start in range(0, len(rows), 4 * BATCH):
        batch, scored = rows[start : start + 4 * BATCH, :width], answer[start : start + 4 * BATCH, :width]
        padded = np.pad(batch, ((0, 4 * BATCH - len(batch)), (0, 0)))
        greedy = np.asarray(_greedy(config, model.decoder, experts, padded))[: len(batch)]
        wrong = scored[:, 1:] & (greedy[:, :-1] != batch[:, 1:])
        right += int((~wrong.any(1)).sum())
    return right, len(pairs)


def question(lines: list[str], a: int, b: int, shown: int, seed: int) -> str:
    """Worked lines about other numbers than a and b together, then `a + b =`."""
    rng = np.random.default_rng(seed)
    start = int(rng.integers(len(lines)))
    chosen, numbers = [], sorted((a, b, a + b))
    for step in range(len(lines)):
        if len(chosen) == shown:
            break
        line = lines[(start + step) % len(lines)]
        if sorted(int(n) for n in re.findall(r"\d+", line)) != numbers:
            chosen.append(line)
    return "\n".join([*chosen, f"{a} + {b} ="])


@functools.partial(jax.jit, static_argnames="config")
def _greedy(config: ModelConfig, decoder: Decoder, experts: Experts, tokens):
    return jnp.argmax(forward(config, decoder, experts, tokens, moe=_grouped_moe)[0], axis=-1)


def _print(result: dict[str, Any]) -> None:
    text = [
        [name, f"{v['bytes']:,}", f"{v['bits_per_byte']:.3f}", f"{v['zlib_bits_per_byte']:.3f}"]
        for name, v in result["text"].items()
    ]
    print_table(["domain", "bytes", "model", "zlib -9"], text, title="held-out text, bits per byte; less is better")
    routing = result["routing"]
    shares = [
        [name, *(f"{100 * v:.1f} %" for v in row)]
        for name, row in zip(routing["domains"], routing["top_quarter_share"], strict=True)
    ]
    print()
    title = "share of a domain's expert calls (column) that go to the quarter of experts that another (row) uses most"
    print_table(["chosen by", *routing["domains"]], shares, title=title)
    others = "" if routing["others"] is None else f", of other domains {100 * routing['others']:.1f} %"
    print_text(f"of the own domain {100 * routing['own']:.1f} %{others}; 25 % would be no preference")
    if "sums" in result:
        sums = result["sums"]
        print(
            f"\nheld-out two-digit sums: {sums['right']} of {sums['asked']} right ({100 * sums['exact_match']:.1f} %)"
        )
