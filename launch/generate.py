"""`python -m launch generate`: continue a prompt on one device, the likeliest token each time."""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

from dancemoe_jax.checkpoint import ExpertFile, bundled_model
from dancemoe_jax.config import ModelConfig
from dancemoe_jax.generate import Weights, check_prompt, generate, place_decoder, place_tables
from dancemoe_jax.mesh import make_mesh
from dancemoe_jax.pool import fill_pool, pool_layout
from dancemoe_jax.tables import assign_slots, routing_tables
from dancemoe_jax.tokenizer import load_tokenizer
from placement import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=None, help="model directory (default: the bundled model)")
    parser.add_argument("--prompt", required=True, help="text to continue; - reads all of standard input as it is")
    parser.add_argument("--max-tokens", type=int, default=100, help="tokens to generate at most (100)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")


def run(args: argparse.Namespace) -> None:
    """Print the prompt and its continuation.

    Raises:
        ModelError, InputError: the model or the prompt cannot be used, or the prompt leaves no room in the context.
    """
    if args.max_tokens < 1:
        raise InputError(f"--max-tokens {args.max_tokens}: must be at least 1")
    text = _read_stdin() if args.prompt == "-" else args.prompt
    # Bytes of a command line that are no text arrive as lone surrogates, which no tokenizer and no terminal takes.
    text = text.encode(errors="replace").decode()
    path = args.model or bundled_model()
    config = ModelConfig.from_hf(path)
    tokenizer = load_tokenizer(path, config)
    prompt = tokenizer.encode(text, add_special_tokens=False).ids
    check_prompt(config, prompt, "--prompt")
    weights, shapes = _one_device(path)
    output = generate(weights, [prompt], args.max_tokens, **shapes)[0]
    continuation = tokenizer.decode(output)
    if args.json:
        print(json.dumps({"prompt": text, "text": continuation, "prompt_tokens": len(prompt), "tokens": output}))
    else:
        print(text + continuation)


def _one_device(path: Path):
    """Weights with every expert on the first device, and the static shapes that go with them."""
    file, mesh = ExpertFile(path), make_mesh(jax.devices()[:1])
    grid = (1, file.config.num_layers, file.config.num_experts)
    layout = pool_layout([grid[1] * grid[2]])
    slots = assign_slots(layout, np.ones(grid, bool))
    tables = place_tables(routing_tables(slots, np.zeros(1, int)), mesh)
    weights = Weights(place_decoder(file.decoder(), mesh), fill_pool(mesh, layout, slots, file.read), tables)
    return weights, {"config": file.config, "layout": layout, "mesh": mesh}


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"--prompt -: standard input is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
