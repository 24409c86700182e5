"""A prompt as tokens, checked before anything long begins."""

from optimizers.contract import UsageError

from .tokenizer import Tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str, positions: int) -> tuple[list[int], str]:
    """What to continue, and a remark on what of it the tokenizer cannot say ("" where it can say everything).

    An empty prompt is the end of a document, after which a new one begins. Raises UsageError for a prompt that is not
    text, that says nothing to the tokenizer, or that is longer than the model's `positions`.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"--prompt: got bytes that are not UTF-8, at character {error.start}; write it in UTF-8, or set the "
            "terminal to it"
        ) from None
    packed = tokenizer.pack([prompt])
    ids, lost = packed.ids[0].tolist(), packed.lost[0]
    if (lost and len("".join(lost.split())) >= len("".join(prompt.split()))) or (prompt.strip() and not ids):
        raise UsageError(
            f"--prompt: got {prompt[:60]!r}, of which the tokenizer {tokenizer.name} can say nothing; give another, or "
            'an empty one (--prompt "") to start a new document'
        )
    if len(ids) > positions:
        raise UsageError(
            f"prompt: got {len(ids)} tokens, expected 1 to max_position_embeddings = {positions}; shorten it (--prompt)"
        )
    remark = f"--prompt: {lost[:20]!r} is unknown to the tokenizer" if lost else ""
    return ids or [tokenizer.eos], remark
