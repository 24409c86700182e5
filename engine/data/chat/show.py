"""An example as it is trained: its text, what is trained of it in colour, or in brackets where there is no colour."""

from rich.console import Console
from rich.text import Text

from ..tokenizer import Tokenizer
from .reader import Examples

OPEN, CLOSE = "⟦", "⟧"  # around what is trained
TRAINED, READ = "bold green", "dim"


def show(console: Console, tokenizer: Tokenizer, examples: Examples, k: int = 0, limit: int = 4000) -> None:
    """Print example k with its place and counts; of a longer one, the first `limit` tokens."""
    size, trained = int(examples.sizes[k]), int(examples.trained[k])
    colour = console.is_terminal and console.color_system is not None
    how = "in colour" if colour else f"in {OPEN}{CLOSE}"
    console.print(f"{examples.place(k)}: {size:,} tokens, {trained:,} of them trained ({how})", highlight=False)
    ids, mask = examples.read(k)
    text = marked(tokenizer, ids[:limit].tolist(), mask[:limit].tolist(), colour)
    if size > limit:
        text.append(f"… and {size - limit:,} tokens more", style="italic")
    console.print(text, highlight=False, soft_wrap=True)


def marked(tokenizer: Tokenizer, ids: list[int], trained: list[bool], colour: bool) -> Text:
    """The text of ids, marks such as `<|im_end|>` written out, with what is trained in a style or in brackets."""
    text, start = Text(), 0
    while start < len(ids):
        stop = next((i for i in range(start, len(ids)) if trained[i] != trained[start]), len(ids))
        said = written(tokenizer, ids[start:stop])
        if not colour and trained[start]:
            said = f"{OPEN}{said}{CLOSE}"
        text.append(said, style=(TRAINED if trained[start] else READ) if colour else "")
        start = stop
    return text


def written(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Ids as text: between marks they are decoded together, since a character may be several tokens."""
    parts, between = [], list[int]()
    for i in ids:
        if (mark := tokenizer.marks.get(i)) is None:
            between.append(i)
            continue
        parts += [tokenizer.decode(between), mark]
        between = []
    return "".join([*parts, tokenizer.decode(between)])
