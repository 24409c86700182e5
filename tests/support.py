"""What works with what: combinations that tests/wrappers/test_support.py runs, and the table in docs/choosing.md.

    python -m tests.support       run them all, write docs/support.json and the table in docs/choosing.md

A combination trains a small LLaMA, is saved, is read back into another model, and trains on. It "resumes" where the
result equals that of the run without a break, to the bit; it is "refused" where a UsageError says that it cannot be.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine import checkpoint
from engine.step.segments import cut
from engine.step.step import Step
from models.layers import attach
from models.llama import Llama, LlamaConfig
from optimizers.contract import Family, Group, Kind, Optimizer, Params, Rule, UsageError
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.registry import RULES as FAMILIES
from optimizers.rules.adamw import adamw
from optimizers.storage.stored import BasesDtype, MomentsDtype, keep
from optimizers.wrappers.norms import norm_masks
from optimizers.wrappers.omgd import omgd
from optimizers.wrappers.rso import rso
from optimizers.wrappers.traversal import layers, traversal

from .helpers.models import copied

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "docs" / "support.json", ROOT / "docs" / "choosing.md"
BEGIN, END = "<!-- support: begin -->\n", "<!-- support: end -->"

RANK, BREAK, STEPS, HOLD = (
    4,
    3,
    6,
    2,
)  # HOLD: steps between two masks, or two P, so that a resume stands between switches
WRAPPERS = ("none", "omgd", "lisa", "rso", "rso products", "omgd over rso", "rso over omgd", "norms", "omgd over omgd")
PRECISIONS = ("fp32", "bf16", "bf16-sr", "mixed")
MATRICES = r"_proj\.weight$"
RESUMES = "resumes"


def small(family: Family[Any], **options: Any) -> Rule:
    """The rule with these options, and with a subspace that fits a small model, if it has one."""
    given = {"rank": RANK, "update_proj_gap": 4}
    known = {field.name for field in fields(family.options)}
    return family(**{name: value for name, value in given.items() if name in known} | options)


# Of the registry, one rule a file: those of one file differ in numbers, not in what they hold and when.
RULES: dict[str, Rule] = {}
for family in FAMILIES.values():
    file = family.options.__module__
    if file not in {type(rule.options).__module__ for rule in RULES.values()}:
        RULES[family.name] = small(family)


class Combination(NamedTuple):
    rule: str
    wrapper: str
    precision: str = "fp32"
    recompute: bool = False
    compiled: bool = False
    moments: MomentsDtype = "fp32"

    @property
    def key(self) -> str:
        run = ("compiled" if self.compiled else "eager", "recompute" if self.recompute else "stored")
        return "/".join((self.rule, self.wrapper, self.precision, *run))


def combinations() -> Iterator[Combination]:
    """All that are run: everything uncompiled; compiled, each rule by itself and each wrapper over AdamW, in fp32."""
    for rule in RULES:
        for wrapper in WRAPPERS:
            for precision in PRECISIONS:
                for recompute in (False, True):
                    yield Combination(rule, wrapper, precision, recompute)
    for rule in RULES:
        yield Combination(rule, "none", compiled=True)
    for wrapper in WRAPPERS[1:]:
        yield Combination("adamw", wrapper, compiled=True)


def wrapped(wrapper: str, base: Optimizer, model: Llama, params: Params) -> Optimizer:
    """`base` under the wrapper of this name; "a over b" is a of b of it."""
    wrapper, _, inner = wrapper.partition(" over ")
    if inner:
        base = wrapped(inner, base, model, params)
    matrices = [name for name in params if "_proj" in name]
    if wrapper in ("omgd", "lisa"):
        masks = traversal(layers(params), Key(1), active=1, period=HOLD, replacement=wrapper == "lisa")
        return omgd(base, params, masks, "none" if wrapper == "lisa" else "grad")
    if wrapper == "norms":
        return omgd(base, params, norm_masks(layers(params), Key(1), active=1, period=HOLD), "none")
    if wrapper.startswith("rso"):
        form = "products" if wrapper.endswith("products") else "merged"
        optimizer = rso(base, params, matrices, 2 * RANK, HOLD, Key(2), form)
        attach(model, matrices, 2 * RANK, form)
        return optimizer
    return base


def step_of(one: Combination, seed: int) -> Step:
    """The training step of a fresh model."""
    shape = LlamaConfig(32, 16, 24, 2, 2, max_position_embeddings=8)
    model = Llama(shape, seed=seed)
    if one.precision.startswith("bf16"):
        model.to(torch.bfloat16)
    params = dict(model.named_parameters())
    groups = [Group(one.rule, RULES[one.rule], (MATRICES,), 1e-2), Group("rest", adamw(eps=1e-6), ("",), 1e-3)]
    bases: BasesDtype = "bf16" if one.moments != "fp32" and RULES[one.rule].names(Kind.BASIS) else "fp32"
    optimizer = wrapped(
        one.wrapper, partition(params, keep(groups, one.moments, bases, one.precision == "bf16+8")), model, params
    )
    return Step(
        cut(model),
        params,
        optimizer,
        optimizer.init(params),
        mode="segments" if one.compiled else "off",
        recompute=one.recompute,
        compute_dtype=torch.bfloat16 if one.precision == "mixed" else None,
        stochastic_rounding=one.precision == "bf16-sr",
        key=Key(3),
    )


def train(step: Step, start: int, end: int) -> None:
    """Steps [start, end) on data that are a function of the step."""
    groups = {group.name: group for group in step.optimizer.owner.values()}
    hypers = {n: {"lr": torch.tensor(g.lr), "weight_decay": torch.tensor(0.01)} for n, g in groups.items()}
    for i in range(start, end):
        ids = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(i))
        step.switch(i)
        step([{"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}], hypers, i)


@torch.no_grad()
def outcome(one: Combination) -> str:
    """RESUMES, or "refused: …", or what is wrong."""
    try:
        straight = step_of(one, seed=0)
    except UsageError as error:
        return f"refused: {str(error).splitlines()[0]}"
    with torch.enable_grad():
        train(straight, 0, BREAK)
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.save(Path(folder), BREAK, straight.params, straight.state, {}, {})
        saved = checkpoint.load(path)
        again = step_of(one, seed=9)
        checkpoint.restore_into(again.params, saved.params)
        again.state.clear()
        again.state.update(copied(saved.state))
    with torch.enable_grad():
        train(straight, BREAK, STEPS)
        train(again, BREAK, STEPS)
    equal = all(torch.equal(p, again.params[name]) for name, p in straight.params.items())
    equal &= all(torch.equal(t, again.state[n][s]) for n, slots in straight.state.items() for s, t in slots.items())
    finite = all(p.isfinite().all() for p in straight.params.values())
    return RESUMES if equal and finite else "not finite" if not finite else "differs after a resume"


def table(record: dict[str, str]) -> str:
    """The matrix in Markdown: a row a rule, a column a wrapper."""
    notes: dict[str, int] = {}
    heads = ["", *("alone" if wrapper == "none" else wrapper for wrapper in WRAPPERS)]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for rule in RULES:
        cells = []
        for wrapper in WRAPPERS:
            own = {key: said for key, said in record.items() if key.split("/")[:2] == [rule, wrapper]}
            eager = {key: said for key, said in own.items() if "/eager/" in key}
            if all(said == RESUMES for said in own.values()):
                cells.append("yes, also compiled" if len(own) > len(eager) else "yes")
            else:
                bad = {key: said for key, said in own.items() if said != RESUMES}
                which = "no" if len(bad) == len(own) else f"{len(own) - len(bad)} of {len(own)}"
                numbers = sorted({notes.setdefault(said, len(notes) + 1) for said in bad.values()})
                cells.append(f"{which} ({', '.join(map(str, numbers))})")
        rows.append(f"| {rule} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n" + "".join(f"\n({number}) {said}\n" for said, number in notes.items())


def page(text: str, record: dict[str, str]) -> str:
    """The page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table(record) + END + rest.partition(END)[2]


def main() -> None:
    record = {}
    for one in combinations():
        record[one.key] = outcome(one)
        print(f"{one.key}: {record[one.key]}", flush=True)
    RECORD.write_text(json.dumps(record, indent=0) + "\n")
    PAGE.write_text(page(PAGE.read_text(), record))


if __name__ == "__main__":
    main()
