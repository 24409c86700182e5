"""The shape of a vision transformer; config.json as transformers reads and writes it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .config import LARGEST

FIXED: Mapping[str, Any] = {"hidden_act": "gelu"}  # there is no other here


@dataclass(frozen=True)
class ViTConfig:
    """Fields are named as in Hugging Face's config.json where it has them; ValueError where they do not fit."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    image_size: int = 224
    """Rows and columns of pixels."""
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    labels: tuple[str, ...] = ("0", "1")
    """The classes' names, in the order of their numbers."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or not 1 <= value <= LARGEST):
                raise ValueError(f"{field.name}: got {value!r}, expected a whole number of at least 1")
            if "dropout" in field.name:
                if type(value) not in (int, float) or not 0 <= value < 1:
                    raise ValueError(f"{field.name}: got {value!r}, expected a number from 0 to below 1")
            elif field.type is float and (type(value) not in (int, float) or not 0 < value < math.inf):
                raise ValueError(f"{field.name}: got {value!r}, expected a finite number above 0")
        if type(self.qkv_bias) is not bool:
            raise ValueError(f"qkv_bias: got {self.qkv_bias!r}, expected true or false")
        for name, of in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if getattr(self, name) % getattr(self, of):
                raise ValueError(
                    f"{name}: got {getattr(self, name)}, expected a multiple of {of} = {getattr(self, of)}; change one "
                    "of the two"
                )
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels: got {self.labels[:5]}, expected a name for each of two classes or more")

    @property
    def model_type(self) -> str:
        return "vit"

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers reads."""
        own = {name: value for name, value in asdict(self).items() if name != "labels"}
        return {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            **own,
            "hidden_act": "gelu",
            "id2label": {str(i): name for i, name in enumerate(self.labels)},
            "label2id": {name: i for i, name in enumerate(self.labels)},
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ViTConfig":
        """Read a config.json. ValueError where it asks for what no model here does."""
        if config.get("model_type") != "vit":
            raise ValueError(f"config.json: model_type: got {config.get('model_type')!r}, expected 'vit'")
        for name, value in FIXED.items():
            if config.get(name, value) != value:
                raise ValueError(f"config.json: {name}: got {config[name]!r}, expected {value!r}; there is no other")
        given = {f.name: config[f.name] for f in fields(cls) if f.name != "labels" and config.get(f.name) is not None}
        names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        if not isinstance(names, Mapping) or not all(str(i).isdecimal() for i in names):
            raise ValueError(
                f"config.json: id2label: got {str(names)[:60]}, expected a name for each number of a class"
            )
        labels = tuple(str(names[i]) for i in sorted(names, key=int))
        return cls(**given, labels=labels)
