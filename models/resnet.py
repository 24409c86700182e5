"""ResNets with torchvision's parameter names (He, Zhang, Ren & Sun, arXiv 1512.03385): stem -> blocks -> head.

ResNet-18 is torchvision's. ResNet-20 is the paper's for CIFAR (section 4.2): a stem of 3 x 3 without pooling, three
stages of three blocks with 16, 32 and 64 channels, and where a stage begins a shortcut without parameters (option A):
every second pixel, and channels of zeros.

Letters in shapes: B images, C channels, H and W pixels, K classes. A batch holds "pixels" (B, C, H, W) float32 and
"targets" (B,) int64; a target that is IGNORED does not count. Running statistics of batch norm are buffers, and state
of the segment that owns them: they move once a micro-batch, also where the weights beside them are frozen.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import draw_normal
from .encoder_heads import class_loss
from .layers import allocate
from .segment import Batch, Segment

MODEL_TYPE = "resnet-torchvision"


@dataclass(frozen=True)
class ResNetConfig:
    """The shape of a model. ValueError where it does not fit."""

    blocks: tuple[int, ...]
    """Blocks in each stage."""
    widths: tuple[int, ...]
    """Channels in each stage."""
    cifar: bool = False
    """The small stem, and shortcuts without parameters."""
    channels: int = 3
    """Of an image."""
    labels: tuple[str, ...] = ()
    """The classes' names, in the order of their numbers."""

    def __post_init__(self) -> None:
        if len(self.blocks) != len(self.widths) or min((*self.blocks, *self.widths, self.channels), default=0) < 1:
            raise ValueError(
                f"blocks and widths: got {self.blocks} and {self.widths} for {self.channels} channels, as many of each "
                "expected, all of at least 1"
            )
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels: got {self.labels[:5]}, expected a name for each of two classes or more")

    def to_hf(self) -> dict[str, Any]:
        """What a checkpoint's config.json says. Hugging Face has no such model: the names are torchvision's."""
        own = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"architectures": ["ResNet"], "model_type": MODEL_TYPE, **own}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ResNetConfig":
        """Read what `to_hf` made. Raises ValueError."""
        names = [field.name for field in fields(cls)]
        if config.get("model_type") != MODEL_TYPE or any(name not in config for name in names):
            raise ValueError(f"config.json: got {str(dict(config))[:80]}, expected a ResNet's, as runs here write it")
        own: dict[str, Any] = {n: tuple(v) if isinstance(v := config[n], list) else v for n in names}
        return cls(**own)


def _preset(blocks: tuple[int, ...], widths: tuple[int, ...], cifar: bool) -> ResNetConfig:
    return ResNetConfig(blocks, widths, cifar, labels=tuple(map(str, range(2))))


PRESETS: dict[str, ResNetConfig] = {  # of two classes; others by dataclasses.replace
    "resnet20": _preset((3, 3, 3), (16, 32, 64), True),
    "resnet18": _preset((2, 2, 2, 2), (64, 128, 256, 512), False),
}


def preset(name: str, labels: tuple[str, ...], channels: int = 3) -> ResNetConfig:
    """One of `PRESETS` for these classes and images. Raises ValueError."""
    return replace(PRESETS[name], labels=labels, channels=channels)


def _conv(channels: int, out: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False)


class Pad(nn.Module):
    """Option A's shortcut: (B, C, H, W) -> (B, out, H / stride, W / stride), with channels of zeros behind."""

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))


class Block(nn.Module):
    """relu(bn(conv(relu(bn(conv x)))) + shortcut x): (B, C, H, W) -> (B, out, H / stride, W / stride)."""

    def __init__(self, channels: int, out: int, stride: int, padded: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, out, 3, stride), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = _conv(out, out, 3, 1), nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if (stride, channels) != (1, out):
            project = nn.Sequential(_conv(channels, out, 1, stride), nn.BatchNorm2d(out))
            self.downsample = Pad(out - channels, stride) if padded else project

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Stem(nn.Module):
    """The first segment's module. It owns nothing: its parts are the model's. (B, C, H, W) of any dtype -> (B, ...)."""

    def __init__(self, conv1: nn.Module, bn1: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.conv1, self.bn1, self.pooled = conv1, bn1, pooled

    def forward(self, pixels: Tensor) -> Tensor:
        weight = self.conv1.weight
        assert isinstance(weight, Tensor)
        x = F.relu(self.bn1(self.conv1(pixels.to(weight.dtype))))
        return F.max_pool2d(x, 3, 2, 1) if self.pooled else x


class Head(nn.Module):
    """The last segment's module: the mean over pixels, and a linear layer. It owns nothing. (B, C, H, W) -> (B, K)."""

    def __init__(self, fc: nn.Module) -> None:
        super().__init__()
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class ResNet(nn.Module):
    """A ResNet of basic blocks: forward (B, C, H, W) -> logits (B, K)."""

    def __init__(self, config: ResNetConfig, seed: int = 0) -> None:
        super().__init__()
        c = self.config = config
        first = c.widths[0]
        self.conv1, self.bn1 = _conv(c.channels, first, *((3, 1) if c.cifar else (7, 2))), nn.BatchNorm2d(first)
        before = first
        for stage, (blocks, width) in enumerate(zip(c.blocks, c.widths, strict=True)):
            made = []
            for i in range(blocks):
                made.append(Block(before, width, 2 if stage and not i else 1, c.cifar))
                before = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*made))
        self.fc = nn.Linear(before, len(c.labels))
        self.init_weights(seed)

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, block) in order."""
        for stage in range(len(self.config.blocks)):
            name = f"layer{stage + 1}"
            for i, block in enumerate(self.get_submodule(name).children()):
                yield f"{name}.{i}", block

    def forward(self, pixels: Tensor) -> Tensor:
        x = Stem(self.conv1, self.bn1, not self.config.cifar)(pixels)
        for _, block in self.blocks():
            x = block(x)
        return Head(self.fc)(x)

    def allocate(self, device: torch.device | str) -> None:
        """Give a model that was made on the meta device memory on `device`, a tensor at a time, in the dtypes it has.
        Parameters hold nothing until `init_weights` or a checkpoint fills them; running statistics are fresh ones."""
        allocate(self, device)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, b in module.named_buffers(recurse=False):
                    setattr(module, name, torch.empty_like(b, device=device) if b.is_meta else b)
                module.reset_running_stats()

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """As torchvision draws them, on the host: convolutions from N(0, 2 / fan out), the head evenly from
        +- 1 / sqrt(fan in); norms become the identity. On the meta device nothing is filled."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.is_meta:
                continue
            if name.startswith("fc."):
                drawn = torch.empty(p.shape, dtype=torch.float32, device="cpu")
                p.copy_(drawn.uniform_(-1, 1, generator=generator) / math.sqrt(self.fc.in_features))
            elif p.ndim == 4:
                draw_normal(p, math.sqrt(2 / (p.shape[0] * p[0, 0].numel())), generator)
            else:
                p.fill_(1.0 if name.endswith("weight") else 0.0)

    def segments(self) -> list[Segment]:
        """stem -> block x N -> head. The modules in it are the model's own: call it after moving the model."""
        stem, head = Stem(self.conv1, self.bn1, not self.config.cifar), Head(self.fc)
        return [
            Segment("stem", stem.train(self.training), _own(stem), first, buffers=_state(stem)),
            *(
                Segment("block", block, _own(block, f"{name}."), within, buffers=_state(block, f"{name}."))
                for name, block in self.blocks()
            ),
            Segment("head", head.train(self.training), _own(head), class_loss),
        ]


def _own(module: nn.Module, prefix: str = "") -> dict[str, str]:
    return {name: prefix + name for name, _ in module.named_parameters()}


def _state(module: nn.Module, prefix: str = "") -> dict[str, str]:
    return {name: prefix + name for name, _ in module.named_buffers()}


def first(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """First segment: batch["pixels"] (B, C, H, W) -> the residual stream."""
    return module(batch["pixels"])


def within(module: nn.Module, x: Tensor | None, batch: Batch) -> Tensor:
    """One block, which sees nothing of the batch."""
    return module(x)
