"""Which format rows have, found by their keys, and what a row of each says."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from .masks import ASSISTANT, Fault
from .mawps import is_mawps, pair

Format = Literal["messages", "sharegpt", "prompt/completion", "alpaca", "mawps", "text"]

KNOWN = (
    "messages; conversations (from, value); prompt and completion; instruction and output; sQuestion, lEquations and "
    "lSolutions; text"
)

_LISTS = ("messages", "conversations", "conversation")
_ROLES = {"human": "user", "gpt": ASSISTANT, "bing": ASSISTANT, "chatgpt": ASSISTANT, "bard": ASSISTANT}
_ROLES |= {"model": ASSISTANT, "observation": "tool", "function_response": "tool", "tool_response": "tool"}
_KEPT = {"user", ASSISTANT, "system", "tool", "developer"}

_TASK = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_PAIRED = ", paired with an input that provides further context"


class Fields(NamedTuple):
    """The fields of prompt and completion where they have other names, such as "question" and "answer"."""

    prompt: str = ""
    completion: str = ""


class Said(NamedTuple):
    """A row as a conversation (`messages`), as plain texts (`parts`, each trained or not), or, often, as both."""

    messages: tuple[dict[str, Any], ...] = ()
    answers: tuple[int, ...] | None = None
    """The messages among which the assistant's are trained; None: all."""
    parts: tuple[tuple[str, bool], ...] = ()
    tools: tuple[Any, ...] | None = None


def format_of(row: Mapping[str, Any], fields: Fields = Fields()) -> Format | None:  # noqa: B008 (a tuple)
    """The format of a row, the first that its keys allow; None where they allow none."""
    if fields.prompt or fields.completion:
        return "prompt/completion" if {fields.prompt, fields.completion} <= row.keys() else None
    for name in _LISTS:
        if isinstance(row.get(name), list | tuple):
            first = next(iter(row[name]), None)
            return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
    if {"prompt", "completion"} <= row.keys():
        return "prompt/completion"
    if {"instruction", "output"} <= row.keys():
        return "alpaca"
    if is_mawps(row):
        return "mawps"
    return "text" if "text" in row else None


def said(row: Mapping[str, Any], form: Format, fields: Fields, joint: str) -> Said:
    """What a row of this format says. `joint` stands between plain prompt and completion. Raises Fault."""
    if format_of(row, fields) != form:
        raise Fault(f"got the fields {sorted(row)}; expected {form}, as in the first row")
    if form in ("messages", "sharegpt"):
        return _conversation(row)
    if form == "prompt/completion":
        names = fields.prompt or "prompt", fields.completion or "completion"
        return _pair(row[names[0]], row[names[1]], names, joint, _tools(row))
    if form == "alpaca":
        return _alpaca(row)
    if form == "mawps":
        return _pair(*pair(row), ("question", "answer"), joint, None)
    text = _text(row["text"], "text")
    if not text.strip():
        raise Fault("nothing to train on: the text is empty; remove the row")
    return Said(parts=((text, True),))


def _conversation(row: Mapping[str, Any]) -> Said:
    name = next(name for name in _LISTS if isinstance(row.get(name), list | tuple))
    messages = _messages(row[name], name)
    if isinstance(row.get("system"), str) and row["system"].strip() and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": row["system"]}, *messages)
    return Said(messages, tools=_tools(row))


def _pair(prompt: Any, completion: Any, names: tuple[str, str], joint: str, tools: tuple[Any, ...] | None) -> Said:
    """Texts, or lists of messages: then the assistant's in the completion are trained, not those in the prompt."""
    if isinstance(prompt, list | tuple) or isinstance(completion, list | tuple):
        before = _messages(prompt, names[0]) if not isinstance(prompt, str) else (_user(prompt),)
        after = _messages(completion, names[1]) if not isinstance(completion, str) else (_assistant(completion),)
        return Said(before + after, tuple(range(len(before), len(before) + len(after))), tools=tools)
    prompt, completion = _text(prompt, names[0]), _text(completion, names[1])
    if not completion.strip():
        raise Fault(f"the {names[1]} is empty; remove the row")
    return Said((_user(prompt), _assistant(completion)), None, ((prompt + joint, False), (completion, True)), tools)


def _alpaca(row: Mapping[str, Any]) -> Said:
    """Plain, it is put as Stanford's Alpaca put it; as a conversation, the input follows the instruction."""
    instruction, output = (_text(row[name], name) for name in ("instruction", "output"))
    given = _text(row.get("input") or "", "input")
    if not output.strip():
        raise Fault("the output is empty; remove the row")
    asked = _TASK.format(_PAIRED if given else "") + f"\n\n### Instruction:\n{instruction}"
    asked += (f"\n\n### Input:\n{given}" if given else "") + "\n\n### Response:"
    history = []
    for turn in row.get("history") or ():
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise Fault(f"history: got {str(turn)[:60]!r}; expected pairs of an instruction and its output")
        history += [_user(_text(turn[0], "history")), _assistant(_text(turn[1], "history"))]
    system = row.get("system")
    before = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    user = _user(f"{instruction}\n\n{given}" if given else instruction)
    plain = () if history or before else ((asked, False), (output, True))
    return Said((*before, *history, user, _assistant(output)), None, plain)


def _messages(value: Any, name: str) -> tuple[dict[str, Any], ...]:
    """A list of messages, sharegpt's turned into ours. Raises Fault."""
    if not isinstance(value, list | tuple) or not value:
        raise Fault(f"{name}: got {str(value)[:60]!r}; expected a list of at least one message")
    return tuple(_message(message, f"{name}, message {k}") for k, message in enumerate(value, start=1))


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise Fault(f"{where}: got {str(message)[:60]!r}; expected an object with role and content")
    message = {key: value for key, value in message.items() if value is not None}  # parquet has all fields in all rows
    if "from" in message and "role" not in message:
        role = str(message["from"]).lower()
        if role not in _ROLES and role not in _KEPT:
            raise Fault(f"{where}: from: got {role!r}; expected one of {sorted(_KEPT | _ROLES.keys())}")
        kept = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": _ROLES.get(role, role), "content": message.get("value"), **kept}
    if not isinstance(message.get("role"), str):
        raise Fault(f"{where}: got the fields {sorted(message)}; expected role and content, or from and value")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise Fault(f"{where}: no content; expected a text")
    if content is not None and not isinstance(content, str | list | tuple):
        raise Fault(f"{where}: content: got {str(content)[:60]!r}; expected a text")
    return dict(message)


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...] | None:
    tools = row.get("tools")
    return tuple(tools) if isinstance(tools, Sequence) and not isinstance(tools, str) and tools else None


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Fault(f"{name}: got {str(value)[:60]!r}; expected a text")
    return value


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": ASSISTANT, "content": text}
