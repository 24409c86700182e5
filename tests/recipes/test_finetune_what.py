"""What of a model and of its conversations is fine-tuned: frozen tensors, wrapped rules, answers of several turns."""

import json
from pathlib import Path

import pytest
from helpers.chats import INST, turns
from helpers.finetuning import FLAGS, folder, write
from helpers.runs import assert_identical, here, newest, tool

from models import weights
from recipes.finetune import Finetune, rate_of
from recipes.registry import parsed

LINE = FLAGS + "--eval-every 50 --no-eval-first --warmup 0 --schedule constant --lr 1e-3 "


@pytest.mark.run
@pytest.mark.parametrize("flags", ["--optimizer sumo --rank 4", "--optimizer omgd --active 1 --period 1step"])
def test_what_is_frozen_stays_to_the_bit_and_has_no_state(tmp_path: Path, flags: str) -> None:
    folder(tmp_path)
    done = here(tmp_path, f"{LINE} --steps 3 --freeze embed_tokens layers.1. v_proj --out run {flags}")
    assert done.code == 0, done
    found, before = newest(tmp_path / "run"), dict(weights.load(tmp_path / "model").named_parameters())
    frozen = {name for name in before if any(part in name for part in ("embed_tokens", "layers.1.", "v_proj"))}
    assert 0 < len(frozen) < len(before)
    assert not frozen & found.state.keys()
    same = {name for name, p in before.items() if p.equal(found.params[name])}
    assert same == frozen


@pytest.mark.run
@pytest.mark.parametrize("name", ["omgd+sumo", "rso+adam_snsm", "lisa+muon"])
def test_any_rule_is_wrapped_and_goes_on_to_the_bit(tmp_path: Path, name: str) -> None:
    """Its slots are the rule's, in what the wrapper lets train."""
    folder(tmp_path)
    own = {"omgd+sumo": "--rank 4 --active 1 --period 2step", "lisa+muon": "--active 1 --period 2step"}
    flags = own.get(name, "--rank 8 --inner-rank 2 --period 2 --update-proj-gap 2")
    line = f"{LINE} --optimizer {name} {flags} --save-every 3 --eval-every 3"
    for more in ("--steps 5 --out whole", "--steps 3 --out parts", "--steps 5 --out parts --resume auto"):
        done = here(tmp_path, f"{line} {more}")
        assert done.code == 0, done
    assert_identical(tmp_path / "parts", tmp_path / "whole")
    state = newest(tmp_path / "whole").state
    slots = [state[n] for n in state if n.endswith("q_proj.weight")]
    assert len(slots) == (4 if name.startswith("rso") else 1)
    inner = {"omgd+sumo": "basis", "rso+adam_snsm": "P", "lisa+muon": "momentum_buffer"}[name]
    assert all(any(inner in slot for slot in own) for own in slots), slots[0].keys()


def test_options_of_a_wrapped_rule_are_flags_and_come_back(tmp_path: Path) -> None:
    at = str(folder(tmp_path) / "model")
    line = f"finetune {at} --sequence 48 --optimizer rso+sumo --rank 8 --inner-rank 2 --period 7"
    found = parsed(line.split(), "test")
    assert isinstance(found, Finetune) and found.trains == "rso+sumo"
    assert (found.options.rank, found.options.inner_rank, found.options.period) == (8, 2, 7)
    assert found.rule().options == Finetune.rules()["sumo"].default(rank=2)
    assert found.lr == rate_of("sumo")[0] * 2e-5 and "which moves B" in rate_of("rso+sumo")[1]
    done = tool(tmp_path, "recipes.finetune model --optimizer omgd+galore --help")
    assert done.code == 0 and all(flag in done.out for flag in ("--active", "--period", "--rank", "--update-proj-gap"))
    assert "omgd+galore}" in done.out.replace("\n", "").replace("│", "").replace(" ", "") and "lisa+sgd" not in done.out


TURNS = [{"messages": turns(f"a {i}", f"b {i}", f"c {i}", f"d {i}")} for i in range(8)]


@pytest.mark.parametrize(
    ("train_on", "trained"),
    [
        ("assistant", ["b {}<|im_end|>", "d {}<|im_end|>"]),
        ("last", ["d {}<|im_end|>"]),
        ("all", ["[INST] a {} [/INST] b {}<|im_end|>[INST] c {} [/INST] d {}<|im_end|>"]),
    ],
)
def test_which_turns_are_trained(tmp_path: Path, train_on: str, trained: list[str]) -> None:
    """As the run shows it, in brackets."""
    write(folder(tmp_path, template=INST) / "turns.jsonl", TURNS)
    line = f"{LINE.replace('chats.jsonl', 'turns.jsonl')} --dry-run --train-on {train_on} --out run"
    done = here(tmp_path, line)
    assert done.code == 0, done
    assert f"trained: {train_on}" in done.out
    shown = done.out.split("of them trained (in ⟦⟧)\n")[1].strip()
    number = shown.split("INST] a ")[1][0]
    assert [part.partition("⟧")[0] for part in shown.split("⟦")[1:]] == [t.replace("{}", number) for t in trained]


@pytest.mark.run
def test_a_config_alone_is_planned_as_its_folder(tmp_path: Path) -> None:
    folder(tmp_path)
    line = "--data chats.jsonl --sequence 48 --compile off --json"
    plans = [
        json.loads(tool(tmp_path, f"tools.plan finetune {at} {line}").out) for at in ("model", "model/config.json")
    ]
    assert plans[0] == plans[1] and plans[0]["asked"]["bytes"] > 0
    config = parsed(["finetune", str(tmp_path / "model/config.json"), "--sequence", "48"], "test")
    assert config.init == tmp_path / "model"
