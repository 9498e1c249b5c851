"""Incremental detokenizer: text of tokens that come one by one, the same as decoding them all at once."""

from collections.abc import Sequence

from tokenizers import Tokenizer


class IncrementalDetokenizer:
    """The text of an output as its tokens come: each piece as soon as no later token can change it.

    A character cut between tokens waits for its rest; so does text that may be the beginning of a stop string. All
    pieces together are the text of all tokens, up to the first stop string to be complete.

    Args:
        stop: texts that end the output.
        context: tokens that the output continues; their last decide whether its first word begins with a space.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), context: Sequence[int] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._window = [token for token in context[-_WINDOW:] if token not in self._special]
        self._given = len(self._tokenizer.decode(self._window))  # characters of the window's text that are passed on
        self._withheld = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take the next token; the text that is certain now."""
        if self.stopped or token in self._special:
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        # The beginning of a character decodes to replacement marks, one or one for each byte of it.
        certain = text.rstrip(_REPLACEMENT)
        if len(text) - len(certain) > _LONGEST_CHARACTER:
            certain = text
        new = certain[self._given :]
        self._given = max(self._given, len(certain))
        if self._given == len(text):
            self._shrink()
        return self._pass_on(new)

    def finish(self) -> str:
        """The output has ended: the text that was waiting for more."""
        new = self._tokenizer.decode(self._window)[self._given :]
        self._given += len(new)
        text = self._pass_on(new) + self._withheld
        self._withheld = ""
        return "" if self.stopped and not text else text

    def _shrink(self) -> None:
        """Forget old tokens, where the text from the newer ones on does not depend on them."""
        if len(self._window) < 2 * _WINDOW:
            return
        tail = self._window[-_WINDOW:]
        text = self._tokenizer.decode(tail)
        # Marks mean that the cut went through a character; somewhere it will not, but do not wait for ever.
        if _REPLACEMENT not in text or len(self._window) >= 8 * _WINDOW:
            self._window, self._given = tail, len(text)

    def _pass_on(self, new: str) -> str:
        """Cut at a stop string; hold back what may become one."""
        text = self._withheld + new
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            # The first to be complete, as if characters came one by one: how they came in tokens must not matter.
            self.stopped, self._withheld = True, ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._withheld = text[len(text) - keep :]
        return text[: len(text) - keep]


_WINDOW = 8  # tokens that stay as context of the next one
_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 3  # bytes of a UTF-8 character short of its last


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
