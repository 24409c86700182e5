"""Chat templates: the one that lies beside a checkpoint's tokenizer, rendered as `transformers` renders it.

A template is a program that somebody else wrote. It runs in jinja2's sandbox, where it changes and imports nothing.
"""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from optimizers.contract import UsageError

from ..ending import TOKENIZER_CONFIG, read_beside

Message = Mapping[str, Any]  # "role", "content" and whatever else the template reads

FILE = "chat_template.jinja"
REASONING = ("reasoning_content", "thinking", "reasoning")  # what holds a message's reasoning, by descending usage
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TemplateFault(ValueError):
    """A template that cannot render these messages, or that refuses them; the message says why."""


class ChatTemplate:
    """Messages to text. `fingerprint` is equal for equal templates and special tokens."""

    def __init__(
        self, source: str, special: Mapping[str, Any] | None = None, date: datetime.date | None = None
    ) -> None:
        """`special` holds the tokens that templates name, such as bos_token; `date` is what `strftime_now` takes for
        today (None: today). Raises UsageError for a text that is no template."""
        self.source, self.special, self.date = source, dict(special or {}), date
        content = json.dumps([source, sorted(self.special.items())])
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        try:
            self._compiled = self._environment().from_string(source)
        except jinja2.TemplateError as error:
            raise UsageError(f"chat template: not one that jinja2 can read ({error}); repair {FILE}") from None

    @property
    def dated(self) -> bool:
        """May what it renders depend on today's date?"""
        return "strftime_now" in self.source

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **given: Any,
    ) -> str:
        """The text of a conversation; `given` are further variables. Raises TemplateFault."""
        chat = [_readable(message) for message in messages]
        variables = {**self.special, "tools": tools, "documents": None, **given}
        try:
            return self._compiled.render(messages=chat, add_generation_prompt=add_generation_prompt, **variables)
        except Exception as error:  # a template may fail in any way that a program can
            raise TemplateFault(" ".join(str(error).split()) or type(error).__name__) from None

    def _environment(self) -> jinja2.Environment:
        made = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        made.filters["tojson"] = _tojson
        made.globals["raise_exception"] = _raise
        made.globals["strftime_now"] = lambda form: (self.date or datetime.datetime.now()).strftime(form)
        return made


def load_template(folder: Path, date: datetime.date | None = None) -> ChatTemplate | None:
    """The template of a checkpoint's folder, or None where it has none. `chat_template.jinja` goes before the field of
    tokenizer_config.json, where it is a text or a list of named ones ("default" is taken). Raises UsageError."""
    config = read_beside(folder, TOKENIZER_CONFIG)
    special = {**read_beside(folder, "special_tokens_map.json"), **config}
    tokens = {name: _content(special[name]) for name in _SPECIAL if special.get(name) is not None}
    source: Any = config.get("chat_template")
    if isinstance(source, list):
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if (path := folder / FILE).is_file():
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: cannot be read ({error}); repair or remove it") from None
    return ChatTemplate(source, tokens, date) if isinstance(source, str) else None


def _readable(message: Message) -> dict[str, Any]:
    """A message without what is null, its reasoning under every name that templates read."""
    said = {key: value for key, value in message.items() if value is not None}
    reasoning = next((said[name] for name in REASONING if name in said), None)
    return said if reasoning is None else {"thinking": reasoning, **said, REASONING[0]: reasoning}


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Not jinja2's own, which escapes HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says; here it is read and says nothing: masks come from prefixes."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 asks for a set)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
