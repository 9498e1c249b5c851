"""`python -m launch bench requests URL`: load on any server of OpenAI's completions API, in an open loop.

Requests are sent when they arrive, by a Poisson process or a file of arrivals, whether or not earlier ones are answered.
"""

import argparse
import asyncio
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from launch.bench.requests_picture import check_picture, draw_requests
from launch.bench.sent_request import Sent
from launch.corpus import load_domains, prompts
from placement import InputError
from placement.data.arrivals import Arrivals
from placement.files import parse_json
from placement.text_table import print_table

_PERCENTILES = (50, 90, 95, 99)
_PROMPT_IDS = (32, 127)  # printable bytes; every vocabulary has them as ids


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("url", help="of the server, such as http://127.0.0.1:8000")
    add("--model", help="its name (default: the first that the server lists)")
    add("--rate", type=float, default=1.0, metavar="R", help="requests a second, by a Poisson process (1)")
    add("--arrivals", metavar="FILE", help="arrivals instead: our CSV, or Azure's, BurstGPT's or Mooncake's")
    add("--stretch", type=float, default=1.0, metavar="F", help="factor on the times of the file (1)")
    add("--duration", type=float, default=60.0, metavar="S", help="seconds in which requests arrive (60)")
    add("--prompt", type=int, default=32, metavar="N", help="tokens of a prompt, longest one with --arrivals (32)")
    add("--output", type=int, default=32, metavar="N", help="tokens of an answer, longest one with --arrivals (32)")
    add("--domain", help="prompts from held-out text of this domain of the bundled model: code, prose or arithmetic")
    add("--user", help="who asks, as requests say it")
    add("--first", type=float, default=1.0, metavar="S", help="objective: seconds to the first token (1)")
    add("--each", type=float, default=0.1, metavar="S", help="objective: seconds for each further token (0.1)")
    add("--token-file", type=Path, metavar="FILE", help="the bearer token to send")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds for an answer (600)")
    add("--seed", type=int, default=0, help="of arrivals and prompts (0)")
    add("--json", action="store_true", help="print one JSON object")
    add("--picture", type=Path, metavar="FILE", help="draw the times of all requests: .png or .svg")


def run(args: argparse.Namespace) -> int:
    """Send the load and print what came of it; 1 where nothing was answered.

    Raises:
        InputError: a flag, the file or the server cannot be used.
    """
    for flag in ("rate", "stretch", "duration", "prompt", "output", "first", "each", "timeout"):
        if not getattr(args, flag) > 0:
            raise InputError(f"--{flag} {getattr(args, flag)}: must be greater than 0")
    if args.picture:
        check_picture(args.picture)
    arrivals = _from_file(args) if args.arrivals else _poisson(args)
    found, seconds = asyncio.run(_send_all(args, arrivals))
    result = summary(found, seconds, args.first, args.each)
    if args.picture:
        words = f"{args.url}: {result['answered']} of {result['requests']} requests answered"
        draw_requests(found, f"{words}, {result['tokens_per_s']} tokens/s", args.picture)
    if args.json:
        print(json.dumps(result))
    else:
        _print(result)
    return 0 if result["answered"] else 1


def _from_file(args: argparse.Namespace) -> Arrivals:
    found = Arrivals.load(args.arrivals, ["server"], stretch=args.stretch, duration=args.duration, seed=args.seed)
    prompt, output = np.minimum(found.prompt, args.prompt), np.minimum(found.output, args.output)
    return Arrivals(found.seconds, found.server, np.maximum(prompt, 1), np.maximum(output, 1))


def _poisson(args: argparse.Namespace) -> Arrivals:
    rng = np.random.default_rng(args.seed)
    gaps = rng.exponential(1 / args.rate, max(1, round(2 * args.rate * args.duration) + 20))
    seconds = np.cumsum(gaps)
    seconds = seconds[seconds < args.duration]
    if not len(seconds):
        raise InputError(f"--rate {args.rate:g}: no request arrives within {args.duration:g} s; give a higher one")
    return Arrivals(
        seconds,
        np.zeros(len(seconds), np.int64),
        np.full(len(seconds), args.prompt),
        np.full(len(seconds), args.output),
    )


async def _send_all(args: argparse.Namespace, arrivals: Arrivals) -> tuple[list[Sent], float]:
    """All requests, each when it is due, and the seconds until the last has ended."""
    try:
        import httpx
    except ImportError:
        raise InputError("bench requests needs httpx; pip install 'dancemoe-jax[test]'") from None
    headers = {"authorization": f"Bearer {args.token_file.read_text().strip()}"} if args.token_file else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=args.url, headers=headers, timeout=args.timeout, limits=limits) as client:
        try:
            model = args.model or (await client.get("/v1/models")).json()["data"][0]["id"]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise InputError(
                f"{args.url}: lists no models ({type(error).__name__}: {error}); is a server there?"
            ) from None
        rng, begin = np.random.default_rng(args.seed), time.monotonic()
        who = {"user": args.user} if args.user else {}

        async def one(due: float, prompt: list[int] | str, most: int) -> Sent:
            sent = Sent(due=due)
            await asyncio.sleep(max(0.0, begin + due - time.monotonic()))
            body = {"model": model, "prompt": prompt, "max_tokens": most, "temperature": 0, "stream": True, **who}
            body["stream_options"] = {"include_usage": True}
            try:
                async with client.stream("POST", "/v1/completions", json=body) as reply:
                    sent.status = reply.status_code
                    async for line in reply.aiter_lines():
                        _read(line, sent, time.monotonic() - begin - due)
            except (httpx.HTTPError, InputError) as error:
                sent.error = type(error).__name__
            return sent

        tasks = [
            one(float(due), prompt, int(most))
            for due, prompt, most in zip(arrivals.seconds, _prompts(args, arrivals, rng), arrivals.output, strict=True)
        ]
        return await asyncio.gather(*tasks), time.monotonic() - begin


def _prompts(args: argparse.Namespace, arrivals: Arrivals, rng: np.random.Generator) -> list[list[int] | str]:
    """Random tokens, or pieces of a domain's text."""
    sizes = arrivals.prompt.tolist()
    if args.domain is None:
        return [rng.integers(*_PROMPT_IDS, size).tolist() for size in sizes]
    domains = load_domains(args.seed, train=False)
    if args.domain not in domains:
        raise InputError(f"--domain {args.domain}: known are {', '.join(domains)}")
    pieces = prompts(domains[args.domain], len(sizes), max(sizes), args.seed)
    return [piece.decode("utf-8", "ignore")[-size:] for piece, size in zip(pieces, sizes, strict=True)]


def _read(line: str, sent: Sent, now: float) -> None:
    """Take a line of a stream."""
    if not line.startswith("data: {"):
        return
    event = parse_json(line[6:], "a line of the stream")
    if "error" in event:
        sent.error = str(event["error"].get("message"))[:200]
    elif event["choices"]:
        sent.tokens += 1
        sent.first = now if math.isnan(sent.first) else sent.first
        sent.last = now
    if usage := event.get("usage"):
        sent.tokens = usage["completion_tokens"]  # a chunk may hold several


def summary(sent: list[Sent], seconds: float, first: float, each: float) -> dict[str, Any]:
    """What came of requests.

    Args:
        seconds: that it took; first, each: objectives, seconds to the first token and for each further one.

    Returns:
        Requests by status, percentiles of the three times, tokens a second, and goodput: requests a second whose answer
        was whole and within both objectives.
    """
    good = [one for one in sent if one.good]
    met = [one for one in good if one.first <= first and not one.each > each]
    times = {
        "first_s": [one.first for one in good],
        "each_s": [one.each for one in good if one.tokens > 1],
        "whole_s": [one.last for one in good],
    }
    percentiles = {
        name: {f"p{p}": round(float(np.percentile(values, p)), 4) for p in _PERCENTILES} if values else None
        for name, values in times.items()
    }
    return {
        "requests": len(sent),
        "answered": len(good),
        "statuses": {str(status): n for status, n in sorted(Counter(one.status for one in sent).items())},
        "errors": dict(Counter(one.error for one in sent if one.error)),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(sum(one.tokens for one in good) / seconds, 1),
        "goodput_per_s": round(len(met) / seconds, 3),
        **percentiles,
    }


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['requests']} requests in {result['seconds']} s, {result['answered']} answered: {result['statuses']}"
    )
    for error, count in result["errors"].items():
        print(f"{count} ended with: {error}")
    rows = [
        [name, *(f"{1e3 * value:.1f}" for value in result[key].values())]
        for key, name in (("first_s", "first token"), ("each_s", "each further"), ("whole_s", "whole answer"))
        if result[key]
    ]
    print_table(["ms", *(f"p{p}" for p in _PERCENTILES)], rows)
    print(f"{result['tokens_per_s']} tokens a second; within the objective {result['goodput_per_s']} requests a second")
