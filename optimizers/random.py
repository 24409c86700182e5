"""Counter-based keys: a random draw is a pure function of (run seed, what it is for, step). There is no generator
state, so none has to be saved, and two processes with the same seed draw the same numbers.

What a device needs is drawn on that device, so that no step waits for a copy: devices of one kind draw the same
numbers, a CPU and a GPU do not."""

import hashlib
from typing import NewType

import torch
from torch import Tensor

Key = NewType("Key", int)


def fold(key: int, *data: int | str) -> Key:
    """A new key from a key and what the draw is for: `fold(seed, name, step)`. Always in [0, 2^63)."""
    text = "\0".join(f"{type(d).__name__}:{d}" for d in (int(key), *data))
    return Key(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1)


def word(key: int, *data: int | str) -> int:
    """32 random bits of a key, as a signed number: what an int32 tensor holds."""
    return (fold(key, *data) & 0xFFFFFFFF) - 2**31


def _generator(key: Key, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(key)


def normal(key: Key, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal float32."""
    return torch.randn(shape, generator=_generator(key, device), device=device)


def signs(key: Key, n: int, device: torch.device | str = "cpu") -> Tensor:
    """n independent signs, float32, each -1 or 1."""
    return (torch.randint(0, 2, (n,), generator=_generator(key, device), device=device) * 2 - 1).float()


def permutation(key: Key, n: int, device: torch.device | str = "cpu") -> Tensor:
    """A uniform permutation of range(n), int64."""
    return torch.randperm(n, generator=_generator(key, device), device=device)
