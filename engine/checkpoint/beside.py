"""For Hugging Face's Trainer: the state as safetensors beside its checkpoints, and the rate of every group in its log.

Trainer(..., optimizers=(opt, None), callbacks=[Beside()])
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from optimizers.contract import UsageError
from optimizers.rule_optimizer import RuleOptimizer

from .form import OPTIMIZER
from .plugged import save_state


class Beside(TrainerCallback):  # type: ignore[misc]
    """Writes `checkpoint-<step>/optimizer.safetensors`, which `load_state` and the engine's tools read.

    It logs `optim/<group>/lr`: the Trainer's own `learning_rate` is the first group's. Callbacks that come after it see
    what it adds. Raises UsageError where the optimizer is not one of `torch_optim`.
    """

    def on_save(self, args: Any, state: Any, control: Any, optimizer: Any = None, **others: Any) -> None:
        """After the Trainer has written its checkpoint; by one process."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_state(_own(optimizer), folder / OPTIMIZER)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **others: Any
    ) -> None:
        """Before the log is written by the callbacks that follow."""
        if optimizer is not None and logs is not None:
            logs |= {f"optim/{group['name']}/lr": float(group["lr"]) for group in _own(optimizer).param_groups}


def _own(optimizer: Any) -> RuleOptimizer:
    """The optimizer inside of what Accelerate puts around it."""
    while not isinstance(optimizer, RuleOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, RuleOptimizer):
        raise UsageError(f"Beside: got {type(optimizer).__name__}, expected an optimizer of optimizers.torch_optim")
    return optimizer
