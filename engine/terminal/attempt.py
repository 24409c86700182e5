"""What comes after the work is done: it may fail, and the work is done all the same."""

from collections.abc import Callable


def attempt(told: Callable[[], str], not_done: str) -> str:
    """What `told` says, or in one line why it could not: "not `not_done`: ..."."""
    try:
        return told()
    except Exception as error:  # of whatever kind: a finished run is finished
        why = " ".join(str(error).split())[:300]
        return f"not {not_done}: {type(error).__name__}{': ' * bool(why)}{why}"
