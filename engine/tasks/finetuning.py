"""Fine-tuning with what it is judged by: answers to held-out prompts, and general text that it may forget."""

from collections.abc import Iterator, Mapping
from itertools import chain as joined
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batches, Tokens
from ..step.segments import Batch, Chain
from ..task import Sums
from .conversations import ConversationTask

GENERAL = "general"


class FinetuneTask(ConversationTask):
    """Conversations, evaluated on held-out ones (loss and share of tokens foreseen) and on general text, if any.

    Of the text as many windows are read as of held-out rows, evenly spaced; its metric is nats per token. A window has
    the form of a packed row, one document long, so that no segment is compiled anew for it.
    """

    def __init__(self, *given: Any, general: Tokens | None = None, **options: Any) -> None:
        """As ConversationTask's. Raises UsageError where the text is shorter than a sequence too."""
        super().__init__(*given, **options)
        self.general = Batches(general, self.sequence) if general else None

    def evaluation(self, count: int) -> Iterator[Batch]:
        return joined(super().evaluation(count), self._general(count))

    def evaluate(self, chain: Chain, params: Mapping[str, Tensor], batch: Batch) -> Sums:
        name = GENERAL if GENERAL in batch else "loss"
        batch = {field: t for field, t in batch.items() if field != GENERAL}
        judges = {} if name == GENERAL else {"accuracy": right}
        loss, count, said = chain.judged(dict(params), batch, judges)
        return {key: torch.stack([total.double(), count.double()]) for key, total in {name: loss, **said}.items()}

    def shown(self, metrics: Mapping[str, float]) -> str:
        said = f"held-out {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.1%}"
        return f"{said}  general {metrics[GENERAL]:.4f}" if GENERAL in metrics else said

    def _general(self, count: int) -> Iterator[Batch]:
        for batch in self.general.evaluation(count, self.most) if self.general else ():
            places = torch.arange(self.sequence).expand(count, -1).contiguous()
            whole = {"positions": places, "documents": torch.zeros_like(places), "supervised": places}
            yield {**batch, **whole, GENERAL: torch.ones(count)}


def right(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """How many targets are the likeliest token, 0-d; IGNORED ones never are."""
    likeliest: Tensor = module(x).argmax(-1)
    return likeliest.eq(batch["targets"]).sum()
