"""The one exception of the package. Wrong arguments raise ValueError or TypeError instead."""


class PromoeError(RuntimeError):
    """Say what was expected, what came instead, and what to do about it."""
