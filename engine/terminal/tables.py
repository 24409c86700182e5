"""Tables that a terminal of any width shows whole: words give way, figures do not."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

WORDS = 28  # columns below which the column of words is no pleasure to read


class Fitting(NamedTuple):
    """A name, words and figures in each row. Where there is no room for a column each, what a row says of itself
    stands beside its name: the words, then every figure with its heading."""

    title: str
    name: str
    words: str
    figures: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[str]]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [max(map(len, column)) for column in zip(self.figures, *(row[2] for row in self.rows), strict=True)]
        names = max(map(len, (self.name, *(row[0] for row in self.rows))))
        room = options.max_width - names - sum(widths) - len(widths) - 4
        longest = max((len(line) for _, words, _ in self.rows for line in words.splitlines()), default=0)
        if room >= min(WORDS, longest):
            yield self._wide()
        elif options.max_width - names - 4 > max(map(len, self._pairs())):
            yield self._stacked(options.max_width - names - 4)
        else:
            yield self._single(options.max_width - 3)

    def _empty(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(self.name, no_wrap=True)
        table.add_column(self.words, overflow="fold")
        return table

    def _wide(self) -> Table:
        table = self._empty()
        for heading in self.figures:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, words, figures in self.rows:
            table.add_row(name, words, *figures)
        return table

    def _stacked(self, width: int) -> Table:
        table = self._empty()
        for name, words, figures in self.rows:
            table.add_row(name, "\n".join([words, *self._lines(figures, width)]))
        return table

    def _single(self, width: int) -> Table:
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(f"{self.name}, {self.words}", overflow="fold")
        for name, words, figures in self.rows:
            below = [*textwrap.wrap(words, width - 2), *self._lines(figures, width - 2)]
            table.add_row("\n".join([name, *(f"  {line}" for line in below)]))
        return table

    def _pairs(self) -> list[str]:
        return [f"{head} {text}," for _, _, texts in self.rows for head, text in zip(self.figures, texts, strict=True)]

    def _lines(self, figures: Sequence[str], width: int) -> list[str]:
        """Every figure after its heading, as many on a line as stand there whole."""
        pairs = (
            f"{heading} {figure}".replace(" ", "\0") for heading, figure in zip(self.figures, figures, strict=True)
        )
        lines = textwrap.wrap(", ".join(pairs), width, break_long_words=False, break_on_hyphens=False)
        return [line.replace("\0", " ") for line in lines]
