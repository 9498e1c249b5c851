"""The errors that this package raises for input that cannot be used; the message names what, where and the remedy."""


class ModelError(ValueError):
    """A model directory, checkpoint or prompt that cannot be used; the message is one line with the remedy."""
