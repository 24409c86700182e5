"""Rules whose slots are kept in fewer bytes: what they keep, that they move as before, and that a resume is bitwise."""

import pytest
import torch
from helpers.matrices import copied, hyper, randn, same

from optimizers.apply import move
from optimizers.compile import compiled
from optimizers.contract import Group, Kind, Rule, UsageError, state_bytes
from optimizers.kernel import make_kernel
from optimizers.random import Key, fold, word
from optimizers.registry import RULES
from optimizers.rules.adamw import adamw
from optimizers.rules.sgd import sgd
from optimizers.storage.slots import SCALE, decoded, encoded, unfit
from optimizers.storage.stored import keep, stored
from tests.support import RESUMES, WRAPPERS, Combination, outcome, small
from tests.support import RULES as ONE_A_FILE

KEPT = ("bf16", "int8")
each_dtype = pytest.mark.parametrize("dtype", KEPT)
HAVING = [name for name, family in RULES.items() if small(family).names(Kind.FIRST, Kind.SECOND)]
each_rule = pytest.mark.parametrize("name", HAVING)
one_a_file = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ONE_A_FILE else pytest.mark.slow) for name in HAVING]
)


def seed(*data: int | str) -> torch.Tensor:
    return torch.tensor(word(0, *data), dtype=torch.int32)


def steps(rule: Rule, p: torch.Tensor, count: int, lr: float, spread: float = 1.0) -> list[float]:
    """The losses of a noisy quadratic."""
    target, slots, losses = randn(*p.shape, seed=1), rule.init(p), []
    for t in range(count):
        g = p - target + spread * randn(*p.shape, seed=1000 + t)
        losses.append(float((p - target).square().sum()))
        if rule.refresh and t % rule.gap == 0:
            slots, _ = rule.refresh(g, slots, Key(t))
        p, slots, _ = move(rule, g, slots, p, hyper(lr * (1 - t / count)), seed=seed(t))
    return losses


@each_rule
@each_dtype
def test_it_keeps_what_it_says_and_mutates_nothing(name, dtype):
    rule, plain, p, g = (
        stored(small(RULES[name]), dtype, "bf16"),
        small(RULES[name]),
        randn(12, 40),
        randn(12, 40, seed=1),
    )
    slots = rule.init(p)
    assert set(slots) == {slot.name for slot in rule.slots}
    there = rule.init(torch.empty(12, 40, device="meta", dtype=torch.bfloat16))
    assert {n: (t.shape, t.dtype) for n, t in there.items()} == {n: (t.shape, t.dtype) for n, t in slots.items()}
    wanted = plain.init(p)
    assert {n: (t.shape, t.dtype) for n, t in decoded(slots).items()} == {
        n: (t.shape, t.dtype) for n, t in wanted.items()
    }
    for slot in plain.slots:
        if slot.kind in (Kind.FIRST, Kind.SECOND):
            byte = torch.uint8 if slot.kind == Kind.SECOND else torch.int8
            assert slots[slot.name].dtype == (byte if dtype == "int8" else torch.bfloat16)
            assert (slot.name + SCALE in slots) == (dtype == "int8")
        elif slot.kind == Kind.BASIS and wanted[slot.name].is_floating_point():
            assert slots[slot.name].dtype == torch.bfloat16
    if rule.refresh:
        slots, ok = rule.refresh(g, slots, Key(0))
        assert ok and rule.built(slots)
    _, slots, _ = move(rule, g, slots, p, hyper(0.01), seed=seed(0))
    before = copied(slots)
    _, new, _ = move(rule, randn(12, 40, seed=2), slots, p, hyper(0.01), seed=seed(1))
    assert same(slots, before)
    assert {n: (t.shape, t.dtype) for n, t in new.items()} == {n: (t.shape, t.dtype) for n, t in slots.items()}
    assert all(t.is_contiguous() for t in new.values()) and not unfit(new)
    if rule.refresh:  # a gradient that is not usable leaves everything bitwise as it is
        kept, ok = rule.refresh(torch.zeros(12, 40), slots, Key(1))
        assert not ok and same(kept, slots)


@one_a_file
@each_dtype
def test_it_solves_a_noisy_quadratic_as_float32_does(name, dtype):
    rule, p = small(RULES[name], **({"eps": 0.1} if name == "adam_sm" else {})), randn(24, 32)
    losses = {lr: steps(rule, p, 60, lr) for lr in (0.5, 0.1, 1.0, 0.02, 5.0)}
    lr, plain = min(losses.items(), key=lambda item: item[1][-1])
    kept = steps(stored(rule, dtype, "bf16"), p, 60, lr)
    assert plain[-1] < 0.5 * plain[0], "it learns"
    assert abs(kept[-1] - plain[-1]) < 0.05 * (plain[0] - plain[-1])
    assert kept != plain


def test_float32_is_the_rule_itself_and_what_changes_nothing_is_refused():
    rule = adamw()
    assert stored(rule) is rule and stored(sgd(0.0), "int8") is not rule
    assert stored(plain := sgd(0.0), "int8", "bf16") is plain, "it keeps nothing"
    groups = [Group("a", rule, ("a",), 0.1), Group("b", rule, ("",), 0.1)]
    one, other = keep(groups, "int8", "fp32")
    assert one.rule is other.rule and one.rule.draws and one.rule.settings()["moments_dtype"] == "int8"
    with pytest.raises(UsageError, match="bases_dtype: got 'bf16', which changes nothing: adamw keep no bases"):
        keep(groups, "fp32", "bf16")
    with pytest.raises(UsageError, match="moments_dtype: got 'bf16', which changes nothing: sgd"):
        keep([Group("a", sgd(0.0), ("",), 0.1)], "bf16", "fp32")
    with pytest.raises(UsageError, match="adamw: moments_dtype must be one of .* got 'fp8'"):
        stored(rule, "fp8")


@pytest.mark.parametrize("shape", [(64, 512), (512, 48), (300,), (77, 1)])
def test_state_takes_the_bytes_that_it_says(shape):
    numbers, p = torch.Size(shape).numel(), torch.empty(shape, device="meta")
    clock = 4 + 2 * 8
    assert state_bytes(stored(adamw(), "bf16").init(p)) == clock + 4 * numbers
    scales = {(64, 512): 128, (512, 48): 512, (300,): 2, (77, 1): 1}[shape]
    assert state_bytes(stored(adamw(), "int8").init(p)) == clock + 2 * (numbers + 4 * scales)


@each_dtype
def test_a_decay_below_half_a_unit_in_the_last_place_still_decays(dtype):
    """v <- 0.999 v over 1000 steps without a gradient: 0.3677 of it is left, and none of it is zero. One entry of each
    block stays where it is, or the bytes would stay and only the scale decay."""
    rule, p, g = stored(adamw(), dtype), torch.zeros(8, 512), randn(8, 512).abs() + 0.1
    g[:, ::256] = 6.0
    _, slots, _ = move(rule, g, rule.init(p), p, hyper(0.0), seed=seed("first"))
    first = decoded(slots)["exp_avg_sq"]
    still = torch.zeros_like(g)
    still[:, ::256] = first[:, ::256].sqrt()
    for t in range(1000):
        _, slots, _ = move(rule, still, slots, p, hyper(0.0), seed=seed(t))
    left = (decoded(slots)["exp_avg_sq"] / first)[still == 0]
    error = left.std() / left.numel() ** 0.5
    assert (left > 0).all()
    assert abs(float(left.mean()) - 0.999**1000) < 5 * error and error < 0.01
    nearest = first
    for _ in range(1000):
        nearest = (nearest * 0.999).to(torch.bfloat16).float()
    assert float((nearest / first).mean()) > 0.9, "to nearest it would not have"


def test_ten_thousand_tiny_steps_move_a_bfloat16_weight_by_the_right_amount():
    """Each is 1/4000 of the distance to the next bfloat16."""
    p, rule, size = torch.ones(1024, dtype=torch.bfloat16), stored(sgd(0.9), "bf16"), 2.0**-8 / 4000
    g, slots, drawn = torch.ones(1024), rule.init(p), seed()
    for t in range(10_000):
        p, slots, _ = move(rule, g, slots, p, hyper(size / 10), seed=drawn.copy_(seed(t)))
    moved = 1 - p.double()
    wanted = size * (10_000 - 10 + sum(0.9**k for k in range(1, 200)))
    error = moved.std() / 1024**0.5
    assert abs(float(moved.mean()) - wanted) < 5 * error + 0.002 * wanted and error < 0.02 * wanted
    assert torch.equal(torch.ones(3, dtype=torch.bfloat16) - size, torch.ones(3, dtype=torch.bfloat16)), "to nearest"


def test_encoding_keeps_what_was_not_moved_and_reads_the_form_from_the_tensors():
    rule = stored(RULES["galore"](rank=4), "int8", "bf16")
    slots, _ = rule.refresh(randn(12, 40), rule.init(randn(12, 40)), Key(0))
    seen = decoded(slots)
    assert encoded(seen, seen, slots) == slots, "the same objects"
    again = encoded(decoded(slots), seen, slots, rule.names(Kind.SECOND))
    assert same(again, slots), "nearest levels of decoded values are those that were decoded"
    for slot, bad in (("exp_avg", torch.zeros(4, 40)), ("exp_avg" + SCALE, torch.zeros(3, 1))):
        assert unfit({**slots, slot: bad}) == "exp_avg"


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("names", "dtype"),
    [(("adamw",), "int8"), *(pytest.param(tuple(HAVING), dtype, marks=pytest.mark.slow) for dtype in KEPT)],
    ids=str,
)
def test_compiled_equals_eager(names, dtype):
    """But for entries that stand between two levels to the last bit, which may go to either."""
    rules = [stored(small(RULES[name]), dtype, "bf16") for name in names]
    ends = []
    for make in (compiled, lambda kernel: kernel):
        params = [randn(12, 64, seed=i) for i in range(len(rules))]
        slots = [rule.init(p) for rule, p in zip(rules, params, strict=True)]
        kernel = make(make_kernel(rules, stochastic=False))
        for t in range(3):
            grads = [randn(12, 64, seed=40 + t) for _ in params]
            for i, rule in enumerate(rules):
                if rule.refresh and t == 0:
                    slots[i] = rule.refresh(grads[i], slots[i], fold(0, i, t))[0]
            drawn = torch.stack([seed(t, i) for i in range(len(rules))])
            kernel(grads, slots, params, [hyper(0.01, 0.1)] * len(rules), torch.tensor(1.0), drawn)
        ends.append((params, [decoded(own) for own in slots]))
    for i, name in enumerate(names):
        (p, own), (q, other) = ((params[i], slots[i]) for params, slots in ends)
        torch.testing.assert_close(
            p, q, rtol=0, atol=2e-3 if name == "muon" else 5e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
        for slot in own:
            apart = (own[slot] - other[slot]).abs() > 1e-5 * other[slot].abs().amax()
            assert apart.float().mean() < 0.02, (name, slot)


COVERING = [(rule, "none") for rule in ONE_A_FILE] + [("adamw", "omgd"), ("sumo", "rso"), ("adamw", "rso over omgd")]
GRID = [(rule, wrapper, dtype) for rule in ONE_A_FILE for wrapper in WRAPPERS for dtype in KEPT]


@pytest.mark.run
@pytest.mark.parametrize(
    ("rule", "wrapper", "dtype"),
    [pytest.param(*one, marks=() if one[:2] in COVERING and one[2] == "int8" else pytest.mark.slow) for one in GRID],
)
def test_it_resumes_to_the_bit_as_float32_does(rule, wrapper, dtype):
    assert outcome(Combination(rule, wrapper, moments=dtype)) == outcome(Combination(rule, wrapper))
    if (rule, wrapper) in COVERING:
        assert outcome(Combination(rule, wrapper, "bf16-sr", moments=dtype)) == RESUMES
