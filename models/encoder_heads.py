"""Heads of an encoder, and their losses: of each row, or of masked tokens. Letters in shapes as in `encoder`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoder_config import EncoderConfig
from .layers import Linear
from .segment import IGNORED, Batch, Loss


class Pooler(nn.Module):
    """What the first token says of its row: (B, T, C) -> (B, C)."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(c.hidden_size, c.hidden_size, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class BertRows(nn.Module):
    """The last segment of BERT: (B, T, C) -> (B, K). It owns nothing: its parts are the model's."""

    def __init__(self, pooler: nn.Module, classifier: nn.Module, p: float) -> None:
        super().__init__()
        self.pooler, self.classifier, self.dropout = pooler, classifier, nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.pooler(x)))


class RobertaRows(nn.Module):
    """RoBERTa's head, and its last segment: (B, T, C) -> (B, K)."""

    def __init__(self, c: EncoderConfig, p: float) -> None:
        super().__init__()
        self.dense = Linear(c.hidden_size, c.hidden_size, bias=True)
        self.out_proj = Linear(c.hidden_size, c.outputs, bias=True)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x[:, 0])))))


class BertTokens(nn.Module):
    """BERT's masked-LM head, by its names; the output matrix is the embedding's."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.predictions = Predictions(c)

    def tail(self, weight: Tensor) -> tuple["Tokens", dict[str, str]]:
        """The last segment, of the head's own parts and the embedding, and the names of its parameters in the model,
        but for that one."""
        own = self.predictions
        names = _tail("cls.predictions", "cls.predictions.transform", "LayerNorm")
        return Tokens(own.transform.dense, own.transform.LayerNorm, weight, own.bias), names


class Predictions(nn.Module):
    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.transform = Transform(c)


class Transform(nn.Module):
    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.dense = Linear(c.hidden_size, c.hidden_size, bias=True)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)


class RobertaTokens(nn.Module):
    """The same of RoBERTa's."""

    def __init__(self, c: EncoderConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.dense = Linear(c.hidden_size, c.hidden_size, bias=True)
        self.layer_norm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def tail(self, weight: Tensor) -> tuple["Tokens", dict[str, str]]:
        """As BERT's."""
        return Tokens(self.dense, self.layer_norm, weight, self.bias), _tail("lm_head", "lm_head", "layer_norm")


def _tail(bias: str, prefix: str, norm: str) -> dict[str, str]:
    dense = {f"dense.{leaf}": f"{prefix}.dense.{leaf}" for leaf in ("weight", "bias")}
    return {
        "bias": f"{bias}.bias",
        **dense,
        **{f"norm.{leaf}": f"{prefix}.{norm}.{leaf}" for leaf in ("weight", "bias")},
    }


class Tokens(nn.Module):
    """The last segment of a masked LM: (..., C) -> logits (..., V). It owns nothing."""

    def __init__(self, dense: nn.Module, norm: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.dense, self.norm, self.weight, self.bias = dense, norm, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x))), self.weight, self.bias)


def class_loss(module: nn.Module, x: Tensor | None, batch: Batch) -> Loss:
    """Last segment: x (B, T, C), targets (B,) int64 -> summed cross entropy, and how many targets there are."""
    targets = batch["targets"]
    loss = F.cross_entropy(module(x).float(), targets, ignore_index=IGNORED, reduction="sum")
    return loss, (targets != IGNORED).sum()


def number_loss(module: nn.Module, x: Tensor | None, batch: Batch) -> Loss:
    """Last segment: x (B, T, C), targets (B,) float32 -> summed squared error, and how many targets there are."""
    targets = batch["targets"]
    there = ~targets.isnan()
    errors = torch.where(there, module(x).float()[:, 0] - targets, 0.0)
    return errors.square().sum(), there.sum()


def token_loss(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """Last segment: x (..., C), targets (...) int64 -> summed cross entropy, 0-d float32."""
    logits, targets = module(x), batch["targets"]
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
