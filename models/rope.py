"""Rotary position embedding, plain or stretched over more positions than a model was first trained on."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Scaling:
    """How the angles of a longer context are made, named as in config.json's rope_scaling.

    "linear" divides every frequency by `factor`. "llama3" does so where a whole turn takes more positions than
    original_max_position_embeddings / low_freq_factor, leaves those that take fewer than
    original_max_position_embeddings / high_freq_factor, and goes from one to the other in between.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def stretched(self, frequency: Tensor) -> Tensor:
        """Frequencies (D/2,) in radians a position -> those of the longer context, (D/2,)."""
        slow = frequency / self.factor
        if self.rope_type == "linear":
            return slow
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)  # within the first context
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - share) * slow + share * frequency


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., arXiv 2104.09864), pairing element i with i + D/2 ("rotate half").

    `cos` and `sin` are non-persistent buffers (positions, D/2), float32: element [t, i] belongs to the angle
    t * theta^(-2i/D), or what `scaling` makes of it. They stay float32 when the model is cast, and are computed on the
    host and then moved, so that they are the same on every device. All blocks of a model share one Rotary.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_size: int, positions: int, theta: float, scaling: Scaling | None = None) -> None:
        super().__init__()
        self.head_size, self.positions, self.theta, self.scaling = head_size, positions, theta, scaling
        self.fill(torch.get_default_device())

    def fill(self, device: torch.device) -> None:
        """Compute both tables anew and put them on `device`."""
        exponent = torch.arange(0, self.head_size, 2, dtype=torch.float32, device="cpu") / self.head_size
        position = torch.arange(self.positions, dtype=torch.float32, device="cpu")
        frequency = 1.0 / self.theta**exponent
        angle = torch.outer(position, self.scaling.stretched(frequency) if self.scaling else frequency)
        self.register_buffer("cos", angle.cos().to(device), persistent=False)
        self.register_buffer("sin", angle.sin().to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        """Follow the model to another device but not to another dtype; `to_empty` leaves filled tables too."""
        self.fill(fn(self.cos).device)
        return self

    def forward(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """Rotate x (B, heads, T, D) whose first token stands at position `start`, in float32; returns x's dtype.

        A tensor (B, T) holds the position of every token; the caller guarantees that they are below T.
        """
        stop = x.shape[-2] + (start if isinstance(start, int) else 0)
        if stop > self.positions:
            raise ValueError(
                f"sequence: got {stop} tokens, expected at most max_position_embeddings = {self.positions}; "
                "shorten the sequence or build the model with more positions"
            )
        if isinstance(start, int):
            cos, sin = self.cos[start:stop], self.sin[start:stop]
        else:
            cos, sin = self.cos[start].unsqueeze(1), self.sin[start].unsqueeze(1)
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
