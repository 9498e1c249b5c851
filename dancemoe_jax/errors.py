"""The errors that this package raises for input that cannot be used; the message names what, where and the remedy."""

import reprlib
from typing import Any

_LONGEST = 1000  # characters of a message
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxlevel = 80, 80, 8, 8, 3


def show(value: Any) -> str:
    """A value as it stands in a message: on one line, and short however large or deep it is.

    >>> show(["mixtral", [0] * 1000])
    "['mixtral', [0, 0, 0, 0, 0, 0, 0, 0, ...]]"
    """
    return _SHORT.repr(value)


class DanceMoEError(ValueError):
    """Input that cannot be used. The base of this package's errors.

    The message is one line with the remedy. What it cites may come from a damaged file, so line breaks become spaces, and the
    middle of a very long message is left out.

    >>> DanceMoEError("config.json: " + "x" * 5000 + "\\n; download it again").args[0][-30:]
    'xxxxxxxxxx ; download it again'
    """

    def __init__(self, message: str):
        text = " ".join(message.splitlines())
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} […] {text[-_LONGEST // 2 :]}"
        super().__init__(text)


class ModelError(DanceMoEError):
    """Files of a model that cannot be used: configuration, weights, tokenizer, or a store of checkpoints."""


class PlacementError(DanceMoEError):
    """A placement that cannot be put in force: it does not fit the pools, or leaves an expert on no device."""


class ArgumentError(DanceMoEError):
    """An argument whose type, shape or dtype does not fit; the message begins with the argument's name."""


class RequestError(DanceMoEError):
    """A prompt, conversation or sampling parameter that cannot be served."""
