"""Which characters of a rendered conversation are trained.

A template is asked for the messages up to each one of the assistant, and for those with it. What the second text has
behind the first belongs to that message. This holds only where the first is a prefix of the second, and the second one
of the whole: a template that writes the past anew (Qwen3's drops old reasoning) is refused with what to do.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from .template import REASONING, ChatTemplate, Message, TemplateFault

TrainOn = Literal["all", "assistant", "last"]
Span = tuple[int, int]

ASSISTANT = "assistant"
STAND_IN = "\ufdd0content\ufdd1"  # between two code points that are no characters, so that no text holds it


class Example(NamedTuple):
    """One example as text. `spans` are the trained characters [start, stop), ascending and apart."""

    text: str
    spans: tuple[Span, ...]
    ended: bool
    """Does the text end with a mark of its own? Where not, the tokenizer's end token follows, and is trained."""


class Fault(ValueError):
    """An example that cannot be trained on; the message says why and what to do."""


def rendered(
    template: ChatTemplate,
    messages: Sequence[Message],
    train_on: TrainOn = "assistant",
    answers: Sequence[int] | None = None,
    tools: Sequence[Any] | None = None,
) -> Example:
    """A conversation as text, and what of it is trained.

    "assistant": every message of the assistant, its end mark with it; "last": the last one alone; "all": every
    character. `answers` are the messages (by number) among which those of the assistant are trained, None for all.
    What a template writes before the content of a message is trained only where the message holds more than content.
    Raises Fault.
    """
    for number, message in enumerate(messages, start=1):
        if message["role"] == ASSISTANT and _empty(message):
            raise Fault(f"message {number} (assistant) is empty; remove it, or the example")
    whole = _render(template, messages, len(messages), tools)
    said = [
        k for k, m in enumerate(messages) if m["role"] == ASSISTANT and (answers is None or k in answers)
    ]  # messages that may be trained
    if not said:
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        raise Fault(f"no message of the assistant to train on (roles: {roles}); remove the example")
    _all_are_said(template, messages, tools, whole)
    if train_on == "all":
        return Example(whole, ((0, len(whole)),), _ends(whole, messages[-1]))
    spans: list[Span] = []
    ended = True
    for k in said if train_on == "assistant" else said[-1:]:
        start, stop, ended = _span(template, messages, k, tools, whole)
        if start >= stop:
            raise Fault(f"message {k + 1}: the chat template writes nothing of it; repair the template or remove it")
        spans.append((start, stop))
    return Example(whole, tuple(spans), ended or said[-1] != len(messages) - 1)


def plain(parts: Sequence[tuple[str, bool]], train_on: TrainOn = "assistant") -> Example:
    """Texts joined as they are, each trained or not; with "all", all of them. Raises Fault where none is trained."""
    spans, at = [], 0
    for text, trained in parts:
        if text and (trained or train_on == "all"):
            spans.append((at, at + len(text)))
        at += len(text)
    if not spans:
        raise Fault("nothing to train on: the completion is empty; remove the example")
    return Example("".join(text for text, _ in parts), tuple(spans), False)


def _span(
    template: ChatTemplate, messages: Sequence[Message], k: int, tools: Sequence[Any] | None, whole: str
) -> tuple[int, int, bool]:
    """What message k adds and is trained: [start, stop), and whether a mark ends it."""
    before = _render(template, messages, k, tools) if k else ""
    after = whole if k == len(messages) - 1 else _render(template, messages, k + 1, tools)
    _prefix(before, after, k)
    if after is not whole:
        _prefix(after, whole, k + 1)
    asked = _render(template, messages, k, tools, ask=True) if k else ""
    start, stop = max(_shared(asked, after), len(before)), len(before) + len(after[len(before) :].rstrip())
    around = _around(template, messages, k, tools, after)
    if (
        around is None
    ):  # the template makes something else of the content: what is asked for is not trained, all else is
        return start, stop, True
    head, tail = around
    ended = bool(tail.strip())
    return start if _more_than_content(messages[k]) else head, stop if ended else len(after) - len(tail), ended


def _around(
    template: ChatTemplate, messages: Sequence[Message], k: int, tools: Sequence[Any] | None, after: str
) -> tuple[int, str] | None:
    """Where the content of message k begins in `after`, the text of the messages up to it, and what follows it; None
    where it does not stand there as it is. Found by putting something else in its place."""
    content = messages[k].get("content")
    if not isinstance(content, str) or not content.strip():
        return None
    try:
        other = template.render([*messages[:k], {**messages[k], "content": STAND_IN}], tools=tools)
    except TemplateFault:
        return None
    head, found, tail = other.partition(STAND_IN)
    middle = after[len(head) : len(after) - len(tail)]
    same = found and after.startswith(head) and after.endswith(tail) and middle.strip() == content.strip()
    return (len(head), tail) if same else None


def _more_than_content(message: Message) -> bool:
    return any(message.get(name) for name in (*REASONING, "tool_calls"))


def _empty(message: Message) -> bool:
    content = message.get("content")
    return not _more_than_content(message) and (not content or (isinstance(content, str) and not content.strip()))


def _ends(whole: str, last: Message) -> bool:
    content = last.get("content")
    return not (isinstance(content, str) and whole.rstrip().endswith(content.strip()))


def _render(
    template: ChatTemplate, messages: Sequence[Message], count: int, tools: Sequence[Any] | None, ask: bool = False
) -> str:
    try:
        return template.render(messages[:count], tools=tools, add_generation_prompt=ask)
    except TemplateFault as error:
        raise Fault(f"the chat template refuses the first {count} messages ({error}); repair the example") from None


def _all_are_said(template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any] | None, whole: str) -> None:
    """Raises Fault for a message that makes no difference: the template leaves it out, as it does not know the role."""
    for k, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            continue
        try:
            without = template.render([*messages[:k], *messages[k + 1 :]], tools=tools)
        except TemplateFault:
            continue  # it is needed
        if without == whole:
            raise Fault(
                f"message {k + 1}: the chat template writes nothing of a message of role {message['role']!r} here; "
                "give it a role that the template knows, or remove the message"
            )


def _prefix(first: str, second: str, number: int) -> None:
    """Raises Fault where the text of `number` messages is no prefix of the text of more."""
    if second.startswith(first):
        return
    at = _shared(first, second)
    raise Fault(
        f"the chat template changes what it wrote of the first {number} messages once more follow: "
        f"{first[at : at + 40]!r} becomes {second[at : at + 40]!r}; train the last answer only (--train-on last), or "
        "give the checkpoint another chat_template.jinja"
    )


def _shared(a: str, b: str) -> int:
    """How many characters are the same from the start on."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
