"""A folder to fine-tune in: a tiny published model that chats, conversations, and general text."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from helpers.chats import CHATML, checkpoint, turns
from helpers.families import config_of, wide
from models import weights

FLAGS = (
    "finetune model --data chats.jsonl --compile off --no-check-memory --sequence 48 --micro-batch 2 --accumulation 2 "
    "--log-every 1 --samples 1 --sample-tokens 4 "
)


def rows(count: int = 24) -> list[dict[str, Any]]:
    return [{"messages": turns(f"{i} and {i}", f"is {2 * i}")} for i in range(count)]


def write(file: Path, said: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in said))


def folder(at: Path, name: str = "qwen3", template: str | None = CHATML) -> Path:
    """`model`, in files of two shards, `chats.jsonl` and `general.txt` in the folder `at`, which is returned."""
    checkpoint(at / "model", template)
    model = wide(replace(config_of(name), vocab_size=320))
    params = dict(model.named_parameters())
    shapes = {n: tuple(p.shape) for n, p in params.items()}
    half = sum(p.numel() for p in params.values()) * 2
    weights.save(at / "model", model.config.to_hf(), shapes, torch.float32, params.__getitem__, half)
    write(at / "chats.jsonl", rows())
    (at / "general.txt").write_text("the answer is four, and the question was how many there are\n\n" * 30)
    return at
