"""Texts that are prepared for training: documents in, a folder of shards out."""

from pathlib import Path

from engine.data.prepare import prepare
from engine.data.request import Request


def prepared(folder: Path, train: str, validation: str = "xyz" * 10, shard_tokens: int = 7, **fields: object) -> Path:
    """A prepared folder of one document a split, as bytes."""
    (folder / "t.txt").write_text(train)
    (folder / "v.txt").write_text(validation)
    data = {"data": (str(folder / "t.txt"),), "validation": (str(folder / "v.txt"),)}
    return prepare(folder / "out", Request(**data, shard_tokens=shard_tokens, **fields))
