"""A model by its name on the Hub, which stands here for a folder of files: fetched in parts, or refused in one line."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.finetuning import FLAGS, folder
from helpers.runs import here, refused, tool

from recipes.registry import parsed

LINE = FLAGS.replace("finetune model", "finetune some-one/tiny.chat") + "--steps 2 --dry-run --out run"


class Hub:
    """What snapshot_download asked for; it copies files that match into a folder named as the cache's are."""

    def __init__(self, at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source, self.asked = at / "published", list[tuple[str, list[str], str | None]]()
        shutil.move(at / "model", self.source)
        self.snapshot = at / "cache/models--some-one--tiny.chat/snapshots/0a1b"
        module: Any = ModuleType("huggingface_hub")
        module.snapshot_download = self.download
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)

    def download(self, name: str, *, allow_patterns: list[str], revision: str | None = None) -> str:
        self.asked.append((name, allow_patterns, revision))
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for file in self.source.glob(pattern):
                shutil.copyfile(file, self.snapshot / file.name)
        return str(self.snapshot)


@pytest.mark.run
def test_a_name_is_fetched_and_its_weights_when_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(folder(tmp_path), monkeypatch)
    plan = "tools.plan finetune {} --data chats.jsonl --sequence 48 --compile off --json"
    done = tool(tmp_path, plan.format("some-one/tiny.chat"))
    assert done.code == 0, done
    assert json.loads(done.out) == json.loads(tool(tmp_path, plan.format("published")).out)
    assert not list(hub.snapshot.glob("*.safetensors")) and (hub.snapshot / "chat_template.jinja").is_file()
    done = here(tmp_path, LINE)
    assert done.code == 0, done
    found = parsed(["finetune", "some-one/tiny.chat", "--sequence", "48"], "test")
    assert found.init == hub.snapshot and found.tokenizer == str(hub.snapshot) and found.named == "tiny.chat"
    assert "put into the checkpoint's chat template" in done.out
    assert len(list(hub.snapshot.glob("*.safetensors"))) == len(list(hub.source.glob("*.safetensors"))) == 3
    assert hub.asked[2] == ("some-one/tiny.chat", hub.asked[2][1], "0a1b") and "*.safetensors" in hub.asked[2][1]
    before = len(hub.asked)
    assert here(tmp_path, LINE).code == 0 and len(hub.asked) == before + 1, "weights that are there were fetched again"
    next(hub.snapshot.glob("*.safetensors")).unlink()
    assert here(tmp_path, LINE).code == 0 and len(hub.asked) == before + 3


def test_a_folder_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(folder(tmp_path), monkeypatch)
    shutil.copytree(hub.source, tmp_path / "some-one/tiny.chat")
    assert here(tmp_path, LINE).code == 0 and not hub.asked


def test_what_cannot_be_fetched_is_one_line_with_the_way_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(folder(tmp_path), monkeypatch)
    way = "hf download some-one/tiny.chat --local-dir tiny.chat"

    def fails(*given: Any, **asked: Any) -> str:
        raise OSError("no route\nto the Hub")

    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", fails)
    line = refused(here(tmp_path, LINE), 2)
    assert "could not be fetched (no route to the Hub)" in line and way in line and not hub.asked
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    line = refused(here(tmp_path, LINE), 2)
    assert "pip install 'leanstep[hf]'" in line and way in line
