"""What `tools.plan` answers: sizes, bad arguments, what fits, and the mildest change that does."""

import functools
import json
import shlex
from pathlib import Path

import pytest
from helpers.plans import TINY, predicted, settings
from helpers.runs import Done, tool

from engine.planner.plan import Plan
from engine.tasks.config import LanguageConfig
from recipes.plan import in_paper_units
from recipes.registry import parsed
from tools.paper_units import PUBLISHED, published_as
from tools.plan import candidates, changed, halves, main, own_flags, positive, proposal, size

ROOT = Path(__file__).resolve().parents[2]


# The command line.


def test_sizes_are_read_with_their_units():
    assert size("24GiB") == 24 * 2**30
    assert size("1.5 GB") == 1_500_000_000
    assert size("800mib") == 800 * 2**20
    for text in ("24", "GiB", "-1GiB", "0GiB", "24 apples"):
        with pytest.raises(ValueError, match="such as 24GiB"):
            size(text)
    assert positive("32000") == 32000
    with pytest.raises(ValueError, match="whole number"):
        positive("-1")
    assert list(halves(9)) == [4, 2, 1]


@pytest.mark.run
@pytest.mark.parametrize(
    "arguments",
    [
        ["snsm", "--fit"],
        ["snsm", "--fit=lots"],
        ["../x"],
        ["no_such"],
        ["omgd", "toy"],
        [],
        ["snsm", "--vocabulary", "no"],
    ],
)
def test_bad_arguments_end_with_two(arguments):
    assert main(arguments) == 2


SMALL = ["--size.hidden-size", "32", "--size.intermediate-size", "48", "--size.num-hidden-layers", "2"]
SMALL += [
    "--size.num-attention-heads",
    "4",
    "--sequence",
    "32",
    "--micro-batch",
    "2",
    "--compile",
    "off",
    "--device",
    "cpu",
]


def command(*arguments: str) -> Done:
    return tool(ROOT, shlex.join(["tools.plan", *arguments]))


@pytest.mark.run
def test_the_command_says_what_fits_and_its_exit_code_too():
    asked = command("baseline", *SMALL, "--json")
    assert asked.code == 0, asked.err
    content = json.loads(asked.out)
    need, least = content["asked"]["bytes"], content["asked"]["weights"] + content["asked"]["state"]
    assert "fits" not in content
    close = command("baseline", *SMALL, "--fit", f"{(least + need) // 2}B")
    assert close.code == 0, close.err
    assert "--recompute" in close.out.splitlines()[-1]
    assert "\x1b" not in close.out, "plain when piped"
    never = command("baseline", *SMALL, "--fit", f"{least}B")
    assert never.code == 3, never.err
    assert "nothing does" in never.out and "0.00" not in never.out.splitlines()[-1]
    assert command("baseline", *SMALL, "--fit", "1GiB", "--micro-batch", "0").code == 2


@pytest.mark.run
def test_a_proposal_is_planned_to_fit_and_is_the_mildest():
    config = settings(8, 32, compile="off")

    @functools.cache
    def measure(config: LanguageConfig) -> Plan:
        return predicted("adamw", TINY, config, 1)

    needs = {
        (recompute, batch): measure(
            settings(batch, 32, compile="off", recompute=recompute, accumulation=8 // batch)
        ).bytes
        for recompute, batch in ((False, 8), (True, 8), (True, 4), (True, 2), (True, 1))
    }
    for limit, flags in (
        (needs[True, 8], "--recompute"),
        (needs[True, 8] - 1, "--micro-batch 4 --accumulation 2 --recompute"),
        (needs[True, 2], "--micro-batch 2 --accumulation 4 --recompute"),
    ):
        found = proposal(config, limit, measure)
        assert found is not None
        assert changed(config, found[0]) == flags
        assert measure(found[0]).bytes <= limit
        assert found[0].micro_batch * found[0].accumulation == 8
    assert proposal(config, needs[True, 1] // 2, measure) is None


@pytest.mark.parametrize(("flags", "method"), [("adamw", "Adam"), ("scale --rest scale", "SCALE")])
@pytest.mark.parametrize("model", ["60m", pytest.param("7b", marks=pytest.mark.slow)])
def test_weights_and_state_in_the_units_of_papers_are_what_papers_say(flags, method, model):
    config = parsed(shlex.split(f"baseline --model {model} --optimizer {flags}"), "")
    ours, said = in_paper_units(config), PUBLISHED[model][method][0]
    assert (ours.weights + ours.state) / 1e9 == pytest.approx(said, abs=0.006)
    assert published_as(config) == model


def test_in_the_units_of_papers_a_byte_is_a_byte_and_anything_longer_is_two():
    def counted(flags: str) -> int:
        return in_paper_units(parsed(shlex.split(f"baseline {flags}"), "")).state

    whole, halves, bytes_ = (counted(f"--moments-dtype {kept}") for kept in ("fp32", "bf16", "int8"))
    assert whole == halves
    assert 0.5 * whole < bytes_ < 0.52 * whole


def test_the_table_of_papers_is_asked_for_by_a_flag_and_is_for_their_sizes():
    asked, rest = own_flags(["baseline", "--paper-units", "--lr", "1"])
    assert asked.paper_units and rest == ["baseline", "--lr", "1"]
    assert not own_flags(["baseline"])[0].paper_units
    assert published_as(parsed(["baseline", "--model", "60m", "--size.hidden-size", "256"], "")) == ""


def test_fewer_bytes_for_the_same_state_are_proposed_before_a_smaller_rank():
    config = parsed(shlex.split("sumo demo --micro-batch 1 --accumulation 1 --recompute"), "")
    tried = [changed(config, c) for group in candidates(config) for c in group]
    assert tried[:3] == [
        "--bases-dtype bf16",
        "--moments-dtype bf16 --bases-dtype bf16",
        "--moments-dtype int8 --bases-dtype bf16",
    ]
    assert "--rest adam_sn" in tried[3] and "--rest scale" in tried[4]
    assert all("--rank" in flags and "--rest scale" in flags for flags in tried[5:]) and len(tried) > 5
    plain = parsed(shlex.split("baseline --micro-batch 1 --accumulation 1 --recompute --moments-dtype bf16"), "")
    tried = [changed(plain, c) for group in candidates(plain) for c in group]
    assert tried[0] == "--moments-dtype int8", "AdamW has no bases, and bf16 is there already"
