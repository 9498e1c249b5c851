"""Requests as JSON lines in, answers as JSON lines out."""

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dancemoe_jax.errors import DanceMoEError
from dancemoe_jax.inference.sampling import SamplingParams
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.text.detokenizer import IncrementalDetokenizer
from dancemoe_jax.text.tokenizer import TokenizerBundle
from launch.engine.host import Host
from launch.engine.request import Request
from placement import Cluster, InputError

_AT_ONCE = 64  # requests of a server that are read ahead of their turn
_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)}


class Feeder:
    """Requests from lines to a host, and their answers to standard output as they end.

    Args:
        shares: takes a share of the lines that name no server; one that has come later does not.
    """

    def __init__(self, bundle: TokenizerBundle, config: ModelConfig, lines: Any, shares: bool) -> None:
        self.bundle, self.config = bundle, config
        self.finished = threading.Event()
        self._lines, self._shares = lines, shares
        self._print = threading.Lock()

    def start(self, host: Host, cluster: Cluster) -> None:
        """Feed a host from now on."""
        self.host = host
        self.take_in(cluster)
        threading.Thread(target=self._feed, args=(len(cluster.names),), daemon=True).start()

    def take_in(self, cluster: Cluster) -> None:
        """The cluster has other servers from now on."""
        self.names = cluster.names

    def _feed(self, servers: int) -> None:
        """Serve all lines that are this server's: those that name it, and its share of those that name none."""
        name = self.names[self.host.server]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            unnamed = 0
            for number, line in enumerate(self._lines, 1):
                if not line.strip():
                    continue
                given = self._parse(line)
                if isinstance(given, dict) and "server" in given:
                    mine = given["server"] == name or (given["server"] not in self.names and self.host.server == 0)
                else:
                    mine, unnamed = self._shares and unnamed % servers == self.host.server, unnamed + 1
                if mine:
                    pool.submit(self._answer, number, given)
        self.host.finish()
        self.finished.set()

    def _parse(self, line: str) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            return f"not JSON ({error})"

    def _answer(self, number: int, given: Any) -> None:
        begin = time.monotonic()
        answer: dict[str, Any] = {"id": given.get("id", number) if isinstance(given, dict) else number}
        try:
            request, text = self._request(given)
            answer["server"] = self.names[self.host.server]
            stream = self.host.submit(request)
            for _ in stream:
                pass
            text.finish()
            output = request.output
            if output and output[-1] in request.stop_token_ids:
                output = output[:-1]
            answer |= {
                "text": text.text,
                "tokens": output,
                "prompt_tokens": len(request.prompt),
                "finish_reason": stream.reason,
                "seconds": round(time.monotonic() - begin, 4),
            }
        except (InputError, DanceMoEError) as error:
            answer["error"] = f"line {number}: {' '.join(str(error).split())}"
        with self._print:
            print(json.dumps(answer), flush=True)

    def _request(self, given: Any) -> "tuple[Request, _Text]":
        """A request out of a line, and what gathers its text."""
        if not isinstance(given, dict):
            raise InputError(given if isinstance(given, str) else "must be a JSON object with prompt or messages")
        unknown = set(given) - _FIELDS - {"id", "server", "prompt", "messages"}
        if unknown:
            raise InputError(f"{sorted(unknown)[0]!r} is unknown; known are {', '.join(sorted(_FIELDS))}")
        if "server" in given and given["server"] not in self.names:
            raise InputError(f"server {given['server']!r} is unknown; known are {', '.join(self.names)}")
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if key in _FIELDS
        }
        params = SamplingParams(**values)
        if isinstance(given.get("prompt"), str) and "messages" not in given:
            prompt = self.bundle.encode(given["prompt"])
        elif isinstance(given.get("messages"), list) and "prompt" not in given:
            prompt = self.bundle.encode_chat(given["messages"])
        else:
            raise InputError("must have either a text prompt or a list messages")
        own = set() if self.config.eos_token is None else {self.config.eos_token}
        stop_token_ids = frozenset(self.bundle.eos_tokens | own | set(params.stop_tokens))
        text = _Text(IncrementalDetokenizer(self.bundle.tokenizer, params.stop, prompt), stop_token_ids)
        request = Request(
            self.host.server,
            prompt,
            params.max_tokens,
            time.monotonic(),
            params=params,
            stop_token_ids=stop_token_ids,
            on_token=text.on_token,
        )
        return request, text


class _Text:
    """An answer's text, from its tokens."""

    def __init__(self, stream: IncrementalDetokenizer, stop_token_ids: frozenset[int]) -> None:
        self.stream, self.stop_token_ids, self.text = stream, stop_token_ids, ""

    def on_token(self, token: int) -> bool:
        """Take a token; whether a stop text has ended the answer."""
        if token not in self.stop_token_ids:
            self.text += self.stream.push(token)
        return self.stream.stopped

    def finish(self) -> None:
        self.text += self.stream.finish()
