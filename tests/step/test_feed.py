"""Batches that are read ahead are those that are asked for, and no buffer is written that a copy still reads."""

import pytest
import torch
from torch import Tensor

from engine.loop.feed import BUFFERS, Feed

CPU = torch.device("cpu")


class Copies:
    """A device whose copies are done when somebody waits for them: until then a buffer must stay as it is."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def event(self) -> "Copies.Event":
        return Copies.Event(self.log)

    class Event:
        def __init__(self, log: list[str]) -> None:
            self.log, self.pending = log, False

        def record(self) -> None:
            assert not self.pending, "sent again before anybody filled it"
            self.pending = True
            self.log.append("sent")

        def synchronize(self) -> None:
            self.log.append("waited" if self.pending else "free")
            self.pending = False


def read(position: int, rows: int) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(position, position + rows), "targets": torch.full((rows, 2), float(position))}


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return all(x.keys() == y.keys() and all(x[n].equal(y[n]) for n in x) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_whatever_was_read_ahead_the_batches_are_those_of_the_positions(ahead, count):
    copies, reads = Copies(), []

    def noted(position: int, rows: int) -> dict[str, Tensor]:
        reads.append(position)
        return read(position, rows)

    feed = Feed(noted, CPU, ahead, pin=torch.empty_like, event=copies.event)
    for step in range(2 * BUFFERS + 1):
        positions = [4 * (count * step + j) for j in range(count)]
        assert same(feed.batches(positions, 4), [read(p, 4) for p in positions])
        feed.read([p + 4 * count for p in positions], 4)
    if ahead:
        assert reads == [4 * i for i in range(count * (2 * BUFFERS + 2))], "each once, in order"
    assert ("waited" in copies.log) == ahead, "before a buffer is filled again"


def test_what_was_read_for_nothing_is_read_again():
    """A mask, a longer run or another size may ask for something else."""
    feed = Feed(read, CPU, True, pin=torch.empty_like, event=Copies().event)
    feed.batches([0], 4)
    feed.read([4], 4)
    assert same(feed.batches([40], 4), [read(40, 4)]) and same(feed.batches([44], 2), [read(44, 2)])
    assert same(feed.batches([0, 2], 2), [read(0, 2), read(2, 2)])


def test_fields_come_and_go_with_the_batch():
    kinds = [{"a": torch.ones(2)}, {"b": torch.ones(3)}, {"a": torch.zeros(2), "b": torch.ones(3)}]
    feed = Feed(lambda position, rows: kinds[position], CPU, True, pin=torch.empty_like, event=Copies().event)
    for i, expected in enumerate(kinds):
        assert same(feed.batches([i], 1), [expected])
