"""The state of a plugged-in optimizer as the engine writes it: `optimizer.safetensors`, in both directions.

save_state(opt, Path("out/optimizer.safetensors"))      beside whatever else a host saves
load_state(opt, Path("out/optimizer.safetensors"))      or a checkpoint of the engine: runs/sumo/step-00001000
"""

import json
import os
from pathlib import Path

from optimizers.contract import State, UsageError
from optimizers.rule_optimizer import RuleOptimizer

from .reader import read
from .rules import RuleRecord, read_rules, rules_head
from .status import read_status, write_status
from .store import flatten
from .tensorfile import CheckpointError, TensorFile, write

COUNT = "count"  # in the head: steps that were taken


def save_state(opt: RuleOptimizer, file: Path) -> None:
    """Write the state and who owns what to `file`, whole or not at all; it holds tensors and JSON, no code.

    Raises CheckpointError where it cannot be read back as it is, UsageError where groups were added later: the engine
    has one clock for all; OSError where the disk refuses.
    """
    counts = sorted({group["count"] for group in opt.param_groups})
    if len(counts) > 1:
        raise UsageError(f"groups have taken {counts} steps, expected one number; save opt.state_dict() instead")
    state = opt.named_state()
    head = {**rules_head(opt.owners(), 1.0), **opt.metadata, **write_status(state), COUNT: str(counts[0])}
    fresh = file.with_name(f".{file.name}.tmp")
    try:
        write(fresh, flatten(state), head)
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)


def load_state(opt: RuleOptimizer, source: Path, count: int | None = None) -> int:
    """Put a state that `save_state` or the engine wrote into `opt`, bit by bit; returns the steps that it counts.

    `source` is a file or a checkpoint's folder, which is verified. `count` is for a file of the engine without its
    folder, which does not say how many steps were taken. Weights are not touched. Raises CheckpointError where it is
    damaged, of another rule or options or another wrapper, UsageError where names, shapes or dtypes differ,
    having changed nothing.
    """
    if source.is_dir():
        reader = read(source)
        file, count = reader.state, reader.step
    else:
        file = TensorFile(source)
        count = int(file.head[COUNT]) if COUNT in file.head else count
    if count is None:
        raise UsageError(
            f"{source}: does not say how many steps were taken; give count=..., or its checkpoint's folder"
        )
    owners, parked = read_status(file)
    if parked:
        raise CheckpointError(f"{source}: has parked tensors, which only the engine keeps; expected none")
    theirs = {key: said for key, said in file.head.items() if key == "traversal" or key.startswith("rso.")}
    if differ := sorted(key for key in theirs | opt.metadata if file.head.get(key) != opt.metadata.get(key)):
        raise CheckpointError(
            f"{source}: {differ[0]}: was saved under {file.head.get(differ[0], 'no such wrapper')}, expected "
            f"{opt.metadata.get(differ[0], 'none')}; make the optimizer with the same wrapper and seed"
        )
    _check_rules(source, read_rules(file), opt)
    state: State = {owner: {slot: file.read(key) for slot, key in slots.items()} for owner, slots in owners.items()}
    opt.load_named_state(state, count)
    return count


def _check_rules(source: Path, saved: dict[str, RuleRecord], opt: RuleOptimizer) -> None:
    """Raises CheckpointError where a parameter was trained by another rule, or one with other options."""
    for name, group in opt.owners().items():
        if (record := saved.get(name)) is None:
            continue
        mine = json.loads(json.dumps(group.rule.settings()))
        if record.rule != group.rule.name or dict(record.options) != mine:
            differ = {key: value for key, value in record.options.items() if mine.get(key, mine) != value}
            raise CheckpointError(
                f"{source}: {name} was trained by {record.rule} {differ}, expected {group.rule.name} "
                f"{ ({key: mine.get(key) for key in differ}) }; make the optimizer like it"
            )
