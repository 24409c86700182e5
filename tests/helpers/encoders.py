"""Small encoders of both kinds, whose every part shows in what they give."""

from typing import Any

import torch
from torch import Tensor

from models.encoder import Encoder
from models.encoder_config import EncoderConfig, Head

KINDS = ("bert", "roberta")
HEADS: tuple[Head, ...] = ("classification", "regression", "masked")


def config_of(kind: str = "bert", head: Head = "classification", **changed: Any) -> EncoderConfig:
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    own = dict(pad_token_id=1, type_vocab_size=1) if kind == "roberta" else dict(pad_token_id=0)
    labels = ("no", "yes", "perhaps") if head == "classification" else ()
    shape = {**sizes, **own, "max_position_embeddings": 64, "model_type": kind, "head": head, "labels": labels}
    dropped = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return EncoderConfig(**{**shape, **dropped, **changed})


def wide(config: EncoderConfig, seed: int = 1) -> Encoder:
    """A model whose weights are large enough for every part to show, norms and biases included."""
    model, draw = Encoder(config, seed).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(torch.randn(p.shape, generator=draw), alpha=0.3)
            elif "embeddings" not in name:
                p.mul_(8)
    return model


def batch_of(config: EncoderConfig, rows: int = 4, tokens: int = 20, seed: int = 0) -> dict[str, Tensor]:
    """Rows of several lengths, filled up, in two parts where the model tells them apart; one row has no target."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (rows, tokens), generator=draw)
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    for i in range(rows):
        mask[i, tokens - 3 * i :] = 0
    ids[mask == 0] = config.pad_token_id
    if config.type_vocab_size > 1:
        types[:, 4:8] = 1
    if config.head == "classification":
        targets = torch.randint(config.outputs, (rows,), generator=draw)
        targets[1] = -100
    elif config.head == "regression":
        targets = torch.randn(rows, generator=draw)
        targets[1] = torch.nan
    else:
        targets = torch.where((torch.rand(ids.shape, generator=draw) < 0.3) & (mask > 0), ids, -100)
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask, "targets": targets}
