"""Errors of a model's files and shapes as errors of a flag."""

from collections.abc import Iterator
from contextlib import contextmanager

from optimizers.contract import UsageError


@contextmanager
def usage(flag: str) -> Iterator[None]:
    """Raises UsageError, which names the flag unless that is empty, for a ValueError inside."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{flag}: {error}" if flag else str(error)) from None
