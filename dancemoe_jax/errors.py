"""The errors that this package raises for input that cannot be used; the message names what, where and the remedy."""


class DanceMoEError(ValueError):
    """Input that cannot be used. The base of this package's errors; the message is one line with the remedy."""


class ModelError(DanceMoEError):
    """Files of a model that cannot be used: configuration, weights, tokenizer, or a store of checkpoints."""


class PlacementError(DanceMoEError):
    """A placement that cannot be put in force: it does not fit the pools, or leaves an expert on no device."""


class ArgumentError(DanceMoEError):
    """An argument whose type, shape or dtype does not fit; the message begins with the argument's name."""


class RequestError(DanceMoEError):
    """A prompt, conversation or sampling parameter that cannot be served."""
