"""Bfloat16 weights with their last bits: exact to 2^-16, right on average, and bitwise after a resume."""

import pytest
import torch
from helpers.matrices import hyper, randn

from optimizers.apply import move
from optimizers.contract import Group, Kind, UsageError
from optimizers.convert import convert
from optimizers.partition import partition
from optimizers.random import Key, word
from optimizers.registry import RULES
from optimizers.rounding import draws
from optimizers.rules.adamw import adamw
from optimizers.rules.muon import muon
from optimizers.rules.sgd import sgd
from optimizers.storage.last_bits import LAST_BITS, extended, join, split
from optimizers.storage.stored import stored
from tests.support import RESUMES, WRAPPERS, Combination, outcome, small
from tests.support import RULES as ONE_A_FILE


def seed(i: int) -> torch.Tensor:
    return torch.tensor(word(i), dtype=torch.int32)


def test_the_two_parts_are_the_weight_to_within_two_to_the_minus_sixteen():
    x = torch.cat(
        [randn(4096), randn(4096, seed=1) * 1e-30, randn(4096, seed=2) * 1e30, torch.tensor([0.0, -0.0, 1.0])]
    )
    for noise in (None, draws(seed(0), x, 5)):
        high, last = split(x, noise)
        weight = high.to(torch.bfloat16)
        assert torch.equal(weight.float(), high) and last.dtype == torch.int8
        assert ((join(weight, last) - x).abs() <= (2.0**-16 if noise is None else 2.0**-15) * x.abs()).all()
        again, same = split(join(weight, last), noise)
        assert torch.equal(again, high) and torch.equal(same, last), "what was kept is kept"
        assert ((high - x).abs() <= 2.0**-8 * x.abs() + (2.0**-15) * x.abs()).all(), "the model shows the nearest one"
    for bad in (float("inf"), -float("inf"), float("nan")):
        high, last = split(torch.tensor([bad, 1.0]))
        torch.testing.assert_close(join(high.to(torch.bfloat16), last), torch.tensor([bad, 1.0]), equal_nan=True)


def test_what_is_below_the_last_bits_is_rounded_right_on_average():
    x, count = randn(512), 1000
    found = torch.stack(
        [join(*(lambda h, q: (h.to(torch.bfloat16), q))(*split(x, draws(seed(i), x, 5)))) for i in range(count)]
    )
    low, high = found.double().amin(0), found.double().amax(0)
    moves = high > low
    p = ((x.double() - low) / (high - low)).clamp(1e-3, 1 - 1e-3)
    errors = ((found.double().mean(0) - x.double()) / ((high - low) * (p * (1 - p) / count).sqrt()))[moves]
    assert moves.float().mean() > 0.9 and errors.abs().max() < 5 and errors.sum().abs() < 4 * len(errors) ** 0.5


@pytest.mark.parametrize("name", ["adamw", "muon", "sumo"])
def test_a_weight_goes_where_a_float32_one_goes(name):
    """Closer by far than one that is rounded stochastically at every step."""
    apart = {}
    for kind in ("fp32", "bf16-sr", "bf16+8"):
        p = randn(16, 24).to(torch.bfloat16).to(torch.float32 if kind == "fp32" else torch.bfloat16)
        rule = extended(small(RULES[name])) if kind == "bf16+8" else small(RULES[name])
        slots = rule.init(p)
        for t in range(60):
            g = randn(16, 24, seed=10 + t) + 0.3
            if rule.refresh and t % rule.gap == 0:
                slots, _ = rule.refresh(g, slots, Key(t))
            p, slots, _ = move(rule, g, slots, p, hyper(1e-3, 0.1), seed=seed(t), stochastic=kind == "bf16-sr")
        apart[kind] = join(p, slots[LAST_BITS]) if kind == "bf16+8" else p.float()
    error = {kind: float((apart[kind] - apart["fp32"]).norm()) for kind in ("bf16-sr", "bf16+8")}
    assert error["bf16+8"] < 0.03 * error["bf16-sr"]
    assert error["bf16+8"] < 0.5 * 60**0.5 * 2.0**-15 * float(apart["fp32"].norm()), "a walk of 60 roundings"


def test_ten_thousand_steps_below_the_last_bit_move_it_by_the_right_amount():
    p, rule, size = torch.ones(1024, dtype=torch.bfloat16), extended(sgd(0.0)), 2.0**-16 / 8
    slots, g = rule.init(p), torch.ones(1024)
    for t in range(10_000):
        p, slots, _ = move(rule, g, slots, p, hyper(size), seed=seed(t), stochastic=False)
    moved = 1 - join(p, slots[LAST_BITS]).double()
    error = moved.std() / 1024**0.5
    assert abs(float(moved.mean()) - 1e4 * size) < 5 * error and error < 0.01 * 1e4 * size


def test_it_is_a_slot_of_any_rule_and_goes_over_to_another_one():
    p = randn(16, 24).to(torch.bfloat16)
    old, new = extended(stored(adamw(), "int8")), extended(muon())
    assert old.names(Kind.BITS) == (LAST_BITS,) and old.settings()["last_bits"] is True
    slots = old.init(p)
    for t in range(3):
        p, slots, _ = move(old, randn(16, 24, seed=t), slots, p, hyper(1e-3), seed=seed(t), stochastic=False)
    assert slots[LAST_BITS].any()

    def owning(rule):
        return partition({"w": p}, [Group("all", rule, ("",), 0.1)])

    for rule in (new, extended(RULES["scale"]()), extended(adamw())):
        state, _ = convert({"w": p}, {"w": slots}, owning(old), owning(rule), 3, Key(0))
        assert state["w"][LAST_BITS].equal(slots[LAST_BITS])
    with pytest.raises(UsageError, match="last bits are of bfloat16 weights, got torch.float32"):
        new.init(randn(4, 4))


COVERING = [("adamw", "none"), ("sumo", "omgd"), ("snsm", "norms")]


@pytest.mark.run
@pytest.mark.parametrize(
    ("rule", "wrapper"),
    [
        pytest.param(rule, wrapper, marks=() if (rule, wrapper) in COVERING else pytest.mark.slow)
        for rule in ONE_A_FILE
        for wrapper in WRAPPERS
    ],
)
def test_it_resumes_to_the_bit_or_says_that_it_cannot(rule, wrapper):
    found = outcome(Combination(rule, wrapper, "bf16+8", moments="bf16"))
    if "rso" in wrapper:
        assert "last bits" in found and found.startswith("refused")
    else:
        assert found in (RESUMES, outcome(Combination(rule, wrapper, "bf16")))
    if (rule, wrapper) in COVERING:
        assert found == RESUMES
