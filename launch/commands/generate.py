"""`python -m launch generate`: continue prompts, each by its own sampling rules, text streamed as it comes."""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dancemoe_jax.checkpoint.bundled import bundled_model
from dancemoe_jax.errors import ModelError
from dancemoe_jax.inference.finite import all_finite, not_finite
from dancemoe_jax.inference.prompts import check_prompt
from dancemoe_jax.inference.sampling import SamplingRows, choose, stack_params
from dancemoe_jax.inference.sampling_params import SamplingParams
from dancemoe_jax.inference.state import init_state
from dancemoe_jax.inference.steps import decode_step, prefill
from dancemoe_jax.mesh import sharded
from dancemoe_jax.text.detokenizer import IncrementalDetokenizer
from dancemoe_jax.text.tokenizer import TokenizerBundle, load_tokenizer_bundle
from launch.engine.single_process import Local, load
from launch.model_flags import read_shape
from placement import InputError
from placement.files import parse_json

CHUNK = 64


@dataclasses.dataclass
class Prompt:
    """One prompt and what has become of it."""

    text: str
    ids: list[int]
    params: SamplingParams
    output: list[int] = dataclasses.field(default_factory=list)
    continuation: str = ""
    reason: str = ""
    problem: str = ""


def run(args: argparse.Namespace) -> None:
    """Print each prompt and its continuation.

    Raises:
        DanceMoEError, InputError: the model, a flag or a prompt cannot be used, or a prompt leaves no room in the context,
            or the model makes NaN or infinity of it; the others are printed first.
    """
    if args.max_tokens < 1:
        raise InputError(f"--max-tokens {args.max_tokens}: must be at least 1")
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        stop_tokens=tuple(args.stop_token),
    )
    path = args.model or bundled_model()
    config = read_shape(path, args)
    bundle = load_tokenizer_bundle(path, config)
    prompts = [_encode(bundle, given, args.chat, params) for given in _read_prompts(args)]
    for number, prompt in enumerate(prompts):
        check_prompt(config, prompt.ids, "--prompt" if args.prompt is not None else f"prompt {number + 1}")
    stream = len(prompts) == 1 and not args.json
    if stream:
        print(prompts[0].text, end="", flush=True)
    on_text = functools.partial(print, end="", flush=True) if stream else None
    continue_prompts(load(path, config, args), bundle, prompts, on_text)
    for prompt in prompts:
        if args.json:
            print(json.dumps(_as_json(prompt)))
        else:
            print("" if stream else prompt.text + prompt.continuation)
    if failed := [number for number, prompt in enumerate(prompts, 1) if prompt.problem]:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise ModelError(f"prompt {failed[0]}{more}: {prompts[failed[0] - 1].problem}")


def _as_json(prompt: Prompt) -> dict[str, Any]:
    result = {
        "prompt": prompt.text,
        "text": prompt.continuation,
        "prompt_tokens": len(prompt.ids),
        "tokens": prompt.output,
        "finish_reason": prompt.reason,
    }
    return result | ({"error": prompt.problem} if prompt.problem else {})


def continue_prompts(
    local: Local, bundle: TokenizerBundle, prompts: Sequence[Prompt], on_text: Callable[[str], Any] | None = None
) -> None:
    """Fill in every prompt's output, continuation and reason to end (`"stop"`, `"length"`, or `"error"` with its problem).

    Args:
        on_text: called with each piece of the first prompt's text as soon as it is certain.
    """
    config, mesh = local.config, local.shapes["mesh"]
    rows = -(-len(prompts) // mesh.size)
    grid = (mesh.size, rows)
    by_slot = {(i % mesh.size, i // mesh.size): prompt for i, prompt in enumerate(prompts)}
    params = {slot: prompt.params for slot, prompt in by_slot.items()}
    per_device = [stack_params([params.get((device, row)) for row in range(rows)]) for device in range(mesh.size)]
    rules = SamplingRows(*(np.stack(column) for column in zip(*per_device, strict=True)))
    streams = [IncrementalDetokenizer(bundle.tokenizer, prompt.params.stop, prompt.ids) for prompt in prompts]
    seen, old = jnp.zeros((*grid, config.vocab_size), bool, device=sharded(mesh)), np.zeros(grid, bool)
    state: Any = init_state(config, mesh, rows, local.weights.decoder.embedding[...].dtype)
    length, tokens = np.zeros(grid, np.int32), np.zeros((*grid, -(-config.max_position // CHUNK) * CHUNK), np.int32)
    for at, prompt in by_slot.items():
        length[at] = len(prompt.ids)
        tokens[at][: len(prompt.ids)] = prompt.ids
    index, current = np.zeros(grid, np.int32), np.zeros(grid, np.int32)
    sequences, active = np.broadcast_to(np.arange(rows, dtype=np.int32), grid), length > 0
    for start in range(0, int(length.max()), CHUNK):
        chunk, lengths = tokens[:, :, start : start + CHUNK], np.clip(length - start, 0, CHUNK)
        starts = np.full(grid, start, np.int32)
        state, result = prefill(local.weights, state, chunk, sequences, starts, lengths, **local.shapes)
        valid = np.arange(CHUNK) < lengths[:, :, None]
        seen, chosen = choose(seen, chunk, valid, old, result.logits, rules, index, mesh=mesh)
        current = np.where(lengths > 0, np.asarray(chosen), current)
        _end_broken(config, by_slot, active, np.asarray(result.finite_layers))
    while True:
        for number, (at, prompt) in enumerate(by_slot.items()):
            if active[at]:
                piece, active[at] = _accept(config, bundle, prompt, streams[number], int(current[at]))
                if on_text and number == 0:
                    on_text(piece)
        if not active.any():
            break
        index = index + active
        state, result = decode_step(local.weights, state, current, length, active, **local.shapes)
        length = length + active
        rows = (current[:, :, None], active[:, :, None], old)
        seen, chosen = choose(seen, *rows, result.logits, rules, index, mesh=mesh)
        current = np.where(active, np.asarray(chosen), current)
        _end_broken(config, by_slot, active, np.asarray(result.finite_layers))


def _end_broken(config, by_slot: dict[tuple[int, int], Prompt], active: np.ndarray, finite_layers: np.ndarray) -> None:
    """End the prompts whose numbers are not finite any more."""
    for at, prompt in by_slot.items():
        if active[at] and finite_layers[at] < all_finite(config):
            prompt.reason, prompt.problem, active[at] = "error", not_finite(config, int(finite_layers[at])), False


def _accept(
    config, bundle: TokenizerBundle, prompt: Prompt, stream: IncrementalDetokenizer, token: int
) -> tuple[str, bool]:
    """Take a prompt's next token: the text that is certain now, and whether the prompt goes on."""
    stop_token_ids = bundle.eos_tokens | {config.eos_token} | set(prompt.params.stop_tokens)
    piece = ""
    if token in stop_token_ids:
        prompt.reason = "stop"
    else:
        prompt.output.append(token)
        piece = stream.push(token)
        room = len(prompt.ids) + len(prompt.output) < config.max_position
        if stream.stopped:
            prompt.reason = "stop"
        elif len(prompt.output) == prompt.params.max_tokens or not room:
            prompt.reason = "length"
    if prompt.reason:
        piece += stream.finish()
    prompt.continuation += piece
    return piece, not prompt.reason


def _encode(bundle: TokenizerBundle, given: str | list, chat: bool, params: SamplingParams) -> Prompt:
    if isinstance(given, str) and not chat:
        return Prompt(given, bundle.encode(given), params)
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return Prompt(bundle.render_chat(messages), bundle.encode_chat(messages), params)


def _read_prompts(args: argparse.Namespace) -> list[str | list]:
    """Texts or conversations."""
    if args.prompt is not None:
        text = _read("--prompt", "-") if args.prompt == "-" else args.prompt
        # Bytes of a command line that are no text arrive as lone surrogates, which no tokenizer and no terminal takes.
        return [text.encode(errors="replace").decode()]
    # A newline alone ends a line: U+2028, U+0085 and form feeds are characters of a prompt.
    text = _read("--prompt-file", args.prompt_file).removeprefix("\ufeff")
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"--prompt-file {args.prompt_file}: holds no prompt; write one a line")
    return [_parse_line(args.prompt_file, number, line) for number, line in lines]


def _parse_line(file: str, number: int, line: str) -> str | list:
    if not line.lstrip().startswith("{"):
        return line
    given = parse_json(line, f"--prompt-file {file}: line {number}")
    known = [given[key] for key in ("prompt", "messages") if key in given]
    if len(known) != 1 or not isinstance(known[0], str if "prompt" in given else list):
        raise InputError(f'--prompt-file {file}: line {number} must have either a text "prompt" or a list "messages"')
    return known[0]


def _read(flag: str, file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode()
    except OSError as error:
        raise InputError(f"{flag} {file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        where = "standard input" if file == "-" else "the file"
        raise InputError(f"{flag} {file}: {where} is not UTF-8 text ({error.reason} at byte {error.start})") from None
