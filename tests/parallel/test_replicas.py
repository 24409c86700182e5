"""A step in several processes equals that in one: weights, losses and norms; and without the sums it does not.

Two processes add two numbers, and so does one with two micro-batches: these are equal to the bit. Where more are added,
or those of a tied matrix, the order of the sum differs.
"""

from typing import NamedTuple

import pytest
import torch
from helpers.group import together
from helpers.models import batches, copied, distance, llama
from torch import Tensor, nn

from engine.step.processes import ALONE, Alone, Processes, Replicas
from engine.step.segments import cut
from engine.step.step import Step
from optimizers.contract import Group, UsageError
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.registry import RULES
from optimizers.rules.adamw import adamw
from tests.support import MATRICES, small, wrapped

pytestmark = pytest.mark.run
STEPS = 7  # refreshes are every 4, turns every 3 or 4
ROUNDING = 1e-5  # of float32 sums in another order, after 7 steps


class Case(NamedTuple):
    rule: str = "adamw"
    wrapper: str = "none"
    clip: str = "none"
    recompute: bool = False
    tied: bool = False
    micro_batches: int = 1  # of a process

    def step(self, processes: Processes = ALONE) -> Step:
        torch.manual_seed(0)
        model = llama(tied=self.tied)
        params = dict(model.named_parameters())
        groups = [
            Group("rule", small(RULES[self.rule]), (MATRICES,), 1e-2),
            Group("rest", adamw(eps=1e-4), ("",), 1e-3),
        ]
        optimizer = wrapped(self.wrapper, partition(params, groups), model, params)
        state = optimizer.init(params)
        options = dict(mode="off", recompute=self.recompute, clip=self.clip, clip_norm=0.3, logits=97 * 8)
        return Step(cut(model), params, optimizer, state, key=Key(3), processes=processes, **options)

    def trained(self, processes: Processes, world: int) -> dict[str, Tensor]:
        """Weights, state, losses and norms after training on the micro-batches of `world` processes."""
        step, numbers = self.step(processes), []
        for i in range(STEPS):
            step.switch(i)
            result = step(batches(i, self.micro_batches * world)[processes.rank :: processes.world], step=i)
            numbers.append(torch.stack([result.loss, result.norm]))
        state = {f"{name}/{slot}": t for name, slots in copied(step.state).items() for slot, t in slots.items()}
        return {**{n: p.detach().clone() for n, p in step.params.items()}, **state, "numbers": torch.stack(numbers)}


FEW = [
    Case(),
    Case("sumo", clip="global"),
    Case("snsm", "omgd", clip="previous", recompute=True),
    Case("adamw", "rso", clip="tensor"),
    Case("adamw", tied=True, micro_batches=2),
]


def trained(cases: list[Case], alike: bool = True) -> list[dict[str, Tensor]]:
    """In a process of several: what each case comes to. Not `alike`: gradients are not summed."""
    processes = Replicas()
    if not alike:
        processes.reduce = Alone().reduce  # type: ignore[method-assign]
    return [case.trained(processes, processes.world) for case in cases]


def check(cases: list[Case], world: int, folder) -> None:
    answers = together(world, folder, trained, cases)
    for i, case in enumerate(cases):
        alone = case.trained(ALONE, world)
        for answer in answers:
            assert answer[i].keys() == alone.keys(), case
            assert all(torch.equal(answer[i][n], answers[0][i][n]) for n in alone), f"processes differ: {case}"
            if world == 2 and case.micro_batches == 1 and not case.tied:
                assert [n for n in alone if not torch.equal(answer[i][n], alone[n])] == [], case
            else:
                floats = {n: t for n, t in alone.items() if n in case.step().params or n == "numbers"}
                assert distance({n: answer[i][n] for n in floats}, floats) < ROUNDING, case


def test_two_processes_give_the_numbers_of_one(tmp_path):
    check(FEW, 2, tmp_path)


def refusals() -> dict[str, str]:
    """In a process of two: what is said of settings that differ, and of what cannot be right; and the bytes summed."""
    processes, said = Replicas(), {}

    def message(name: str, call) -> None:
        try:
            call()
        except UsageError as error:
            said[name] = str(error)

    other = Case(clip="tensor" if processes.rank else "global")
    message("settings", lambda: other.step(processes)(batches(0), step=0))

    def weights() -> None:
        step = Case().step(processes)
        with torch.no_grad():
            next(iter(step.params.values())).mul_(1 + processes.rank)
        step(batches(0), step=0)

    message("weights", weights)
    message("buffers", lambda: plain(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), processes))
    message("mean", lambda: plain(nn.Linear(4, 4), processes)([{"x": torch.ones(2, 4)}]))
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.forward = model[0].forward  # the second one is not used
    message("unused", lambda: plain(model, processes, count=2.0)([{"x": torch.ones(2, 4)}]))
    return said


def plain(model: nn.Module, processes: Processes, count: float | None = None) -> Step:
    """The step of a chain of one whose loss is a mean, or a sum with a count."""
    params = dict(model.named_parameters())
    optimizer = partition(params, [Group("all", adamw(), ("",), 1e-2)])

    def loss(module: nn.Module, batch: dict[str, Tensor]):
        value = module(batch["x"]).square().mean()
        return value if count is None else (value * count, torch.tensor(count))

    return Step(cut(model, loss), params, optimizer, optimizer.init(params), mode="off", processes=processes)


def bytes_summed() -> dict[str, int]:
    """In a process of two: bytes of gradients that a step sums, by wrapper."""
    found = {}
    for wrapper in ("none", "rso", "omgd"):
        processes = Replicas()
        step = Case(wrapper=wrapper).step(processes)
        step.switch(0)
        step(batches(0), step=0)
        found[wrapper] = processes.reduced_bytes
        found[f"{wrapper} trains"] = sum(
            4 * p.numel() for p in step.optimizer.split(step.params, step.state)[0].values()
        )
    return found


def others() -> tuple[list[dict[str, Tensor]], dict[str, str], dict[str, int]]:
    """All that needs two processes, in one pair of them: they take long to start."""
    return trained(FEW[:1], alike=False), refusals(), bytes_summed()


def test_what_is_summed_and_what_is_refused(tmp_path):
    answers = together(2, tmp_path, others)
    alone = FEW[0].trained(ALONE, 2)
    for (unsummed,), said, summed in answers:
        assert distance({"x": unsummed["numbers"]}, {"x": alone["numbers"]}) > 100 * ROUNDING, "no negative control"
        assert said.keys() == {"settings", "weights", "buffers", "mean", "unused"}
        assert "clipping is not the same in all processes" in said["settings"]
        assert "the sum of weights is not the same" in said["weights"]
        assert "1.running_mean" in said["buffers"] and "one process only" in said["buffers"]
        assert "mean of means" in said["mean"]
        assert "'1.weight' has no gradient" in said["unused"]
        assert all(summed[name] == summed[f"{name} trains"] for name in ("none", "rso", "omgd")), summed
        assert summed["rso"] < summed["none"] > summed["omgd"]


def test_a_group_is_asked_for():
    with pytest.raises(UsageError, match="torchrun"):
        Replicas()
