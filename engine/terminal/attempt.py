"""Reports and pictures made after a run was saved: where one fails, the failure is a line and the run still
succeeded."""

from collections.abc import Callable


def attempt(told: Callable[[], str], not_done: str) -> str:
    """What `told` says, or in one line why it could not: "not `not_done`: ..."."""
    try:
        return told()
    except Exception as error:  # of whatever kind: a finished run is finished
        why = " ".join(str(error).split())[:300]
        return f"not {not_done}: {type(error).__name__}{': ' * bool(why)}{why}"
