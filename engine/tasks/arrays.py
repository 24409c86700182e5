"""Any module on rows that fit in memory: classification, regression, whatever a loss over a batch can say."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.contract import UsageError
from optimizers.random import fold

from ..data.order import Epochs
from ..step.segments import Batch, Chain, Segment, cut
from ..task import Sums, Task

Total = tuple[Tensor, Tensor | float]  # a sum over rows, and how many rows (or whatever else it is a mean over)
Loss = Callable[[nn.Module, Batch], Total]
Metrics = Callable[[nn.Module, Batch], Mapping[str, Total]]


class ArrayTask(Task):
    """Rows given as arrays: `train` and `validation` map a field's name to its values, one a row, in the first axis.

    `loss(module, batch) -> (sum, count)` gives the summed loss of a batch's rows, 0-d, and how many it is a sum over;
    `metrics(module, batch) -> {name: (sum, count)}` what an evaluation reports beside it, each as sum / count over all
    held-out rows. A batch maps each field to a tensor on the model's device. Rows come in a new pseudo-random order
    each pass; an evaluation reads all of `validation`, with the module in eval mode.

        def loss(module, batch):
            return F.cross_entropy(module(batch["x"]), batch["y"], reduction="sum"), len(batch["y"])

        task = ArrayTask(model, loss, train={"x": x, "y": y}, validation={"x": held_x, "y": held_y})
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        train: Mapping[str, Any],
        validation: Mapping[str, Any],
        metrics: Metrics | None = None,
        seed: int = 0,
    ) -> None:
        """Fields are tensors, arrays or lists of numbers. `seed` is that of the order of the rows. Raises UsageError
        where fields have different numbers of rows, or none, or differ between `train` and `validation`."""
        self.model, self.loss, self.metrics, self.seed = model, loss, metrics, seed
        self.train, self.validation = _fields("train", train), _fields("validation", validation)
        if self.train.keys() != self.validation.keys():
            raise UsageError(
                f"validation: got fields {sorted(self.validation)}, expected those of train, {sorted(self.train)}"
            )
        self.rows = len(next(iter(self.train.values())))
        self.epochs = Epochs(self.rows, fold(seed, "data"))
        self._hash = _hash(self.train)

    def segments(self) -> Sequence[Segment]:
        return cut(self.model, self.loss)

    def batch(self, position: int, count: int) -> Batch:
        chosen = torch.from_numpy(self.epochs.which(position, count))
        return {name: values[chosen] for name, values in self.train.items()}

    def evaluation(self, count: int) -> Iterator[Batch]:
        held_out = len(next(iter(self.validation.values())))
        for first in range(0, held_out, count):
            yield {name: values[first : first + count] for name, values in self.validation.items()}

    def evaluate(self, chain: Chain, params: Mapping[str, Tensor], batch: Batch) -> Sums:
        with torch.no_grad(), _in_eval_mode(self.model):
            found = {"loss": self.loss(self.model, batch)}
            found |= self.metrics(self.model, batch) if self.metrics else {}
        return {name: _total(name, total) for name, total in found.items()}

    def fingerprint(self) -> dict[str, Any]:
        return {"data": self._hash, "seed": self.seed}


def _fields(what: str, given: Mapping[str, Any]) -> dict[str, Tensor]:
    fields = {name: torch.as_tensor(values) for name, values in given.items()}
    if not fields or any(t.dim() == 0 or len(t) == 0 for t in fields.values()):
        shapes = {name: tuple(t.shape) for name, t in fields.items()}
        raise UsageError(f"{what}: got fields of shapes {shapes}, expected at least one field, and a row in each")
    if len({len(t) for t in fields.values()}) > 1:
        raise UsageError(f"{what}: got { ({n: len(t) for n, t in fields.items()}) } rows, expected equally many")
    return fields


def _hash(fields: Mapping[str, Tensor]) -> str:
    """Equal for equal names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name in sorted(fields):
        values = fields[name].cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _total(name: str, total: Total) -> Tensor:
    try:
        value, count = total
        pair = [torch.as_tensor(t, dtype=torch.float64).cpu() for t in (value, count)]
        return torch.stack(pair)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name}: got {str(total)[:80]}, expected a pair of numbers (sum, count): {error}") from None


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout is off and running statistics stand still; each module is afterwards in the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
