"""A compiled fine-tuning run on packed rows: the losses of an uncompiled one, and graphs of the first step alone."""

from pathlib import Path

import pytest
from helpers.chats import INST, turns
from helpers.finetuning import FLAGS, folder, write
from helpers.models import graphs
from helpers.runs import column, here
from torch._dynamo.utils import counters

from engine.data.chat.packing import Packed
from engine.data.chat.reader import Examples
from engine.loop.metrics import Metrics

LINE = FLAGS + "--sequence 64 --steps 10 --no-eval-first --eval-every 50 --warmup 2 --lr 3e-4 --optimizer adam_sn "


@pytest.mark.compiles
@pytest.mark.run
def test_compiled_losses_are_those_uncompiled_and_nothing_is_compiled_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    chats = [{"messages": turns(f"{i}", "so " * (1 + i % 7))} for i in range(60)]
    write(folder(tmp_path, template=INST) / "chats.jsonl", chats)
    after, show = dict[int, int](), Metrics.show

    def shown(self: Metrics, done: int, text: str = "") -> None:
        show(self, done, text)
        after.setdefault(done, graphs())

    monkeypatch.setattr(Metrics, "show", shown)
    counters.clear()
    for mode in ("segments", "off"):
        done = here(tmp_path, f"{LINE} --compile {mode} --out {mode}")
        assert done.code == 0, done
    (prepared,) = (tmp_path / "runs/.data").iterdir()
    rows = Packed(Examples(prepared), 64)
    assert max(map(len, rows.rows)) > 1 and len({rows.batch(i, 2)["supervised"].shape for i in range(0, 20, 2)}) > 1
    assert sorted(after) == [*range(1, 11)]
    assert after[1] == after[10] == 6, "forward of embedding, block and head, and an update of each"
    losses = [[loss for _, loss in column(tmp_path / mode, "train/loss")] for mode in ("segments", "off")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0] - 0.1
