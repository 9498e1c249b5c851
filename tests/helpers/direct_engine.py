"""The engine of `launch serve`'s flags in a process of its own, called directly: asked by lines of standard input, how many
answers at once, it says tokens a second and seconds to the first token (median of the answers)."""

import argparse
import json
import statistics
import sys
import time

from dancemoe_jax.checkpoint.bundled import bundled_model
from launch import arguments
from launch.cluster.compile_cache import use_compile_cache
from launch.cluster.devices import ordered_devices
from launch.engine.engine import Engine
from launch.engine.loading import load
from launch.engine.memory import alone
from launch.engine.request import Request
from launch.model_flags import read_shape
from launch.serve.warm_up import warm_up


def engine(flags: list[str]) -> Engine:
    """As `launch serve` makes it, on one device."""
    parser = argparse.ArgumentParser()
    arguments.serve(parser)
    args = parser.parse_args(flags)
    args.devices = 1
    path = args.model or bundled_model()
    config = read_shape(path, args)
    cluster = alone(config, args.sequences)
    how = {"sequences": args.sequences, "chunk": args.max_step_tokens, "dtype": args.dtype}
    loaded = load(path, config, cluster, ordered_devices(cluster), **how)
    warm_up(loaded.engine, "direct")
    return loaded.engine


def answer(engine: Engine, prompt: str, batch: int, tokens: int) -> tuple[float, float]:
    begin, firsts = time.perf_counter(), {}
    requests = [Request(0, list(prompt.encode()), tokens, 0.0) for _ in range(batch)]
    for number, request in enumerate(requests):
        request.on_token = lambda _, own=number: firsts.setdefault(own, time.perf_counter() - begin) < 0
        engine.submit(request)
    while not all(request.reason for request in requests):
        engine.step()
    rate = sum(len(request.output) for request in requests) / (time.perf_counter() - begin)
    while not engine.asleep:
        engine.step()
    return rate, statistics.median(firsts.values())


if __name__ == "__main__":
    use_compile_cache(None)
    ready = engine(sys.argv[1:])
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answer(ready, asked["prompt"], asked["batch"], asked["tokens"])), flush=True)
