"""How many kernels the update of a block launches, of each rule, and that no clock is advanced alone."""

import pytest
import torch
from helpers.kernels import counted
from helpers.matrices import randn

from optimizers.clock import CORRECTION, STEP, Clocks, clock, tick
from optimizers.contract import Rule
from optimizers.kernel import make_kernel
from optimizers.registry import RULES
from optimizers.rules.adamw import adamw
from tests.support import small

BLOCK = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48), (32,), (32,)]  # a LLaMA's
BOUNDS = {"adamw": 40, "snsm": 64, "sumo": 90}  # of which 9 norms and 9 updates are the tensors' own


@pytest.mark.compiles
@pytest.mark.parametrize("name", BOUNDS)
def test_an_update_of_a_block_launches_few_kernels(name, monkeypatch):
    rules = [small(RULES[name]) if len(shape) == 2 else adamw() for shape in BLOCK]
    params, grads = ([randn(*shape, seed=i + k) for i, shape in enumerate(BLOCK)] for k in (0, 50))
    hyper = {"lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.1)}
    clocks, slots = Clocks().of(
        [str(i) for i in range(len(BLOCK))], rules, [r.init(p) for r, p in zip(rules, params, strict=True)]
    )
    with counted(monkeypatch) as (compiler, found):
        compiler(make_kernel(rules))(grads, slots, params, [hyper] * len(BLOCK), hyper["lr"], None, clocks)
    assert len(found) == 1 and found[0].total <= BOUNDS[name], found


def tensors(rules: list[Rule]) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    params = [randn(3, 2, seed=i) for i in range(len(rules))]
    return params, [rule.init(p) for rule, p in zip(rules, params, strict=True)]


def test_clocks_in_one_piece_count_as_clocks_of_their_own():
    """Of tensors that have taken unequal numbers of steps, under two pairs of decays."""
    rules = [adamw(), adamw(betas=(0.8, 0.9)), adamw(), small(RULES["sgd"])]
    hyper = {"lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.1)}
    (params, together), (others, apart) = tensors(rules), tensors(rules)
    for slots in (together, apart):
        for _ in range(3):
            slots[2] |= tick(slots[2], (0.9, 0.999))[0]
    clocks, kernel = Clocks(), make_kernel(rules)
    for t in range(3):
        grads = [randn(3, 2, seed=7 * t + i) for i in range(len(rules))]
        rows, bare = clocks.of(["a", "b", "c", "d"], rules, together)
        assert len(rows) == 2 and not any(STEP in slots for slots in bare)
        kernel(grads, bare, params, [hyper] * 4, hyper["lr"], None, rows)
        kernel(grads, apart, others, [hyper] * 4, hyper["lr"], None)
    assert [slots[STEP].item() for slots in together[:3]] == [3, 3, 6]
    assert all(map(torch.equal, params, others))
    assert all(a[slot].equal(b[slot]) for a, b in zip(together, apart, strict=True) for slot in b)


def test_slots_that_somebody_has_replaced_are_gathered_anew():
    rules, clocks = [adamw(), adamw()], Clocks()
    _, slots = tensors(rules)
    before, _ = clocks.of(["a", "b"], rules, slots)
    assert clocks.of(["a", "b"], rules, slots)[0] == before, "and are not, as long as they are the same"
    parked = slots[1]
    slots[1] = rules[1].init(randn(3, 2)) | clock(randn(1))
    after, _ = clocks.of(["a", "b"], rules, slots)
    after[0].step.add_(1)
    assert slots[1][STEP] == slots[0][STEP] == 1 and parked[STEP] == 0, "what is frozen does not count"
    assert slots[1][CORRECTION].is_contiguous()
