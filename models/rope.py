"""Rotary position embedding, plain or stretched over more positions than a model was first trained on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

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

    attention: ClassVar[float] = 1.0

    def stretched(self, frequency: Tensor, theta: float) -> Tensor:
        """Frequencies (D/2,) in radians a position -> those of the longer context, (D/2,)."""
        slow = frequency / self.factor
        if self.rope_type == "linear":
            return slow
        low, high = self.low_freq_factor, self.high_freq_factor
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)  # within the first context
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - share) * slow + share * frequency


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., arXiv 2309.00071), named as in config.json's rope_scaling.

    "NTK by parts" (section 3.2): a pair of elements that turns more than `beta_fast` times within the first context
    keeps its frequency, one that turns less than `beta_slow` times has it divided by `factor`, and those in between go
    from one to the other. Section 3.4: cos and sin are multiplied by 0.1 ln(factor) + 1, which divides the softmax's
    temperature by the square of that.

    Where this differs from the paper, and is as transformers has it: the way in between is a straight line in the
    number of the pair, not in its turns, and begins and ends at whole numbers (`truncate`). `attention_factor` takes
    the place of the product's number; `mscale` and `mscale_all_dim`, where both are given, make it a ratio of two.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    rope_type: ClassVar[str] = "yarn"

    @property
    def attention(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    def stretched(self, frequency: Tensor, theta: float) -> Tensor:
        """Frequencies theta^(-2i/D), (D/2,) in radians a position -> those of the longer context, (D/2,)."""
        size = 2 * len(frequency)
        first, last = self._pair(self.beta_fast, size, theta), self._pair(self.beta_slow, size, theta)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        share = (torch.arange(len(frequency), device=frequency.device) - first) / (max(last - first, 0) or 0.001)
        share = share.clamp(0, 1)
        return (1 - share) * frequency + share * frequency / self.factor

    def _pair(self, turns: float, size: int, theta: float) -> float:
        """The number, not a whole one, of the pair that turns so often within the first context."""
        return size * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def _temperature(self, times: float) -> float:
        return 0.1 * times * math.log(self.factor) + 1 if self.factor > 1 else 1.0


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., arXiv 2104.09864), pairing element i with i + D/2 ("rotate half").

    `cos` and `sin` are non-persistent buffers (positions, D/2), float32: element [t, i] belongs to the angle
    t * theta^(-2i/D), or what `scaling` makes of it and of the table. They stay float32 when the model is cast, and are
    computed on the host and then moved, so that they are the same on every device. All blocks of a model share one
    Rotary.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_size: int, positions: int, theta: float, scaling: Scaling | Yarn | None = None) -> None:
        super().__init__()
        self.head_size, self.positions, self.theta, self.scaling = head_size, positions, theta, scaling
        self.fill(torch.get_default_device())

    def fill(self, device: torch.device) -> None:
        """Compute both tables anew and put them on `device`."""
        exponent = torch.arange(0, self.head_size, 2, dtype=torch.float32, device="cpu") / self.head_size
        position = torch.arange(self.positions, dtype=torch.float32, device="cpu")
        frequency = 1.0 / self.theta**exponent
        times = 1.0
        if self.scaling is not None:
            frequency, times = self.scaling.stretched(frequency, self.theta), self.scaling.attention
        angle = torch.outer(position, frequency)
        for name, table in (("cos", angle.cos()), ("sin", angle.sin())):
            self.register_buffer(name, (table * times if times != 1 else table).to(device), persistent=False)

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
