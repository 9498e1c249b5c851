"""From what a client asks for to requests in the book: tokenizing, limits, one request for each answer. Knows no HTTP."""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dancemoe_jax.errors import DanceMoEError, RequestError
from dancemoe_jax.model.config import ModelConfig
from dancemoe_jax.text.grammar import Grammars
from dancemoe_jax.text.tokenizer import TokenizerBundle
from launch.engine.request import Request
from launch.http import tool_calls
from launch.http.book import Accepted, Book, Refused
from launch.http.fields import Wanted
from launch.http.formats import AnswerSchema
from launch.http.supervisor import Supervisor
from launch.serve.requests import RequestMaker, Text
from placement import InputError

_SHORT = 2000  # characters of a prompt that are tokenized at once, without a thread: it takes less than handing over


class Service:
    """A model that can be asked.

    Args:
        names: that the model answers to, the first of which it calls itself; server: index of this one.

    Attributes:
        route: called with each accepted request, before it is served; may hand it to another server.
        book, supervisor: what is under way, and who serves it; created: when it began, seconds since 1970.
        harmony: as the bundle has it.
    """

    def __init__(
        self,
        bundle: TokenizerBundle,
        config: ModelConfig,
        names: tuple[str, ...],
        server: int,
        book: Book,
        supervisor: Supervisor,
    ) -> None:
        self.config, self.bundle, self.names, self.server = config, bundle, names, server
        self.book, self.supervisor = book, supervisor
        self.created = int(time.time())
        self._maker, self.harmony = RequestMaker(bundle, config), bundle.harmony
        self._grammars = Grammars(lambda: bundle, config)
        self._threads = ThreadPoolExecutor(2, "tokenizer")
        self.route: Callable[[Accepted], None] = lambda _: None

    async def accept(self, wanted: Wanted) -> list[Accepted]:
        """Own an answer to each of the prompts, `n` times, from now on.

        Raises:
            Refused: the model is another, a field means nothing, a prompt does not fit, or there is no room.
        """
        if wanted.model not in (None, "", *self.names):
            raise Refused(404, f"the model {wanted.model[:100]!r} does not exist; here is {self.names[0]!r}", "model")
        self.supervisor.check_hope()
        count = len(wanted.prompts) * wanted.n
        self.book.check_room(count)
        await self._check_schema(wanted.schema)
        prompts = [await self.encode(prompt) for prompt in wanted.prompts]
        most = self.config.max_position if wanted.max_tokens is None else wanted.max_tokens
        keep = tool_calls.MARKS if wanted.tools else ()
        made = []
        with Refusing():
            for prompt in prompts:
                for choice in range(wanted.n):
                    given = {**wanted.params, "max_tokens": most, "seed": (wanted.seed + choice) % 2**32}
                    own = {"chat": wanted.chat, "keep": keep}
                    request, text = self._maker.request(prompt, given, self.server, time.monotonic(), **own)
                    request.wants_servers = wanted.servers
                    request.check(self.config, replays=False)
                    made.append((request, text))
        schema = wanted.schema.text if wanted.schema else None
        self.book.check_room(count)  # others may have come meanwhile
        accepted = [self.book.accept(request, text, wanted.logprobs, wanted.user, schema) for request, text in made]
        for one in accepted:
            self.route(one)
        self.supervisor.flush()
        return accepted

    async def accept_line(self, given: dict[str, Any]) -> Accepted:
        """Own an answer to a line of requests, as soon as it gets a batch slot at once: others do not wait for it.

        Raises:
            Refused: it cannot be answered, or the server ends.
        """

        def make() -> tuple[Request, Text]:
            with Refusing():
                request, text = self._maker.make(given, self.server, time.monotonic())
                request.check(self.config, replays=False)
            return request, text

        request, text = await asyncio.get_running_loop().run_in_executor(self._threads, make)
        while True:
            self.supervisor.check_hope()
            try:
                self.book.check_room(1)
                if self.book.wait()[0] == 0:
                    break
            except Refused as error:
                if error.status != 429:
                    raise
            self.book.changed.clear()
            await self.book.changed.wait()
        accepted = self.book.accept(request, text)
        self.supervisor.flush()
        return accepted

    async def encode(self, given: Mapping[str, Any]) -> list[int]:
        """Token ids of a prompt as `fields` reads it. Raises Refused."""
        prompt, variables = given.get("prompt"), given.get("variables", {})
        if isinstance(prompt, list):
            return prompt
        with Refusing():
            if isinstance(prompt, str) and len(prompt) <= _SHORT:
                return self._maker.prompt(given)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, lambda: self._maker.prompt(given, **variables))

    async def _check_schema(self, schema: AnswerSchema | None) -> None:
        if schema is not None:
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(self._threads, self._grammars.check, schema.text)
            except RequestError as error:
                raise Refused(400, f"{schema.field}: {error}", schema.field) from None

    def piece(self, token: int) -> str:
        """The text of a token by itself; special tokens have theirs too."""
        return self.bundle.tokenizer.decode([token], skip_special_tokens=False)

    def leave(self, answers: list[Accepted]) -> None:
        """The client has gone: nobody waits for these any more."""
        for accepted in answers:
            self.book.fail(accepted.number, 499, "the client has gone")


class Refusing:
    """Within the block what cannot be used is refused with its reason."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, InputError | DanceMoEError):
            raise Refused(400, " ".join(str(error).split())) from None
