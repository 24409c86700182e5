"""A conversation as the tokens after which a model answers, as it saw them in training."""

from collections.abc import Sequence

from optimizers.contract import UsageError

from ..tokenizer import Tokenizer
from .template import ChatTemplate, Message, TemplateFault


def asking(tokenizer: Tokenizer, template: ChatTemplate | None, messages: Sequence[Message], what: str) -> list[int]:
    """Messages, the last one the user's, as tokens; without a template the text of the last one alone.

    Raises UsageError, which begins with `what`, where the template refuses them or the tokenizer has no marks.
    """
    if template is None:
        return tokenizer.encode(str(messages[-1]["content"])) or [tokenizer.eos]
    if tokenizer.spans is None:
        raise UsageError(f"{what}: tokenizer {tokenizer.name} has no marks for turns; give a tokenizer.json")
    try:
        text = template.render(messages, add_generation_prompt=True)
    except TemplateFault as error:
        raise UsageError(f"{what}: the chat template refuses it: {error}; say it otherwise") from None
    return [int(i) for i in tokenizer.spans([text])[0].ids]
