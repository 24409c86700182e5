"""The shape of an encoder, BERT's or RoBERTa's, with its head; config.json as transformers reads and writes it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from .config import LARGEST

Head = Literal["classification", "regression", "masked"]

TYPES = ("bert", "roberta")
ARCHITECTURES = {
    ("bert", "masked"): "BertForMaskedLM",
    ("roberta", "masked"): "RobertaForMaskedLM",
    ("bert", "classification"): "BertForSequenceClassification",
    ("roberta", "classification"): "RobertaForSequenceClassification",
}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
FIXED: Mapping[str, Any] = {  # there is no other here
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "tie_word_embeddings": True,
    "pruned_heads": {},
}


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of a model. Fields are named as in Hugging Face's config.json where it has them; ValueError where they
    do not fit."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    """None: hidden_dropout_prob."""
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    model_type: str = "bert"
    head: Head = "masked"
    labels: tuple[str, ...] = ()
    """The classes' names, in the order of their numbers."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                least = 0 if field.name == "pad_token_id" else 1
                if type(value) is not int or not least <= value <= LARGEST:
                    raise ValueError(f"{field.name}: got {value!r}, expected a whole number of at least {least}")
            elif "dropout" in field.name and not (value is None and field.name == "classifier_dropout"):
                if type(value) not in (int, float) or not 0 <= value < 1:
                    raise ValueError(f"{field.name}: got {value!r}, expected a number from 0 to below 1")
            elif field.type is float and (type(value) not in (int, float) or not 0 < value < math.inf):
                raise ValueError(f"{field.name}: got {value!r}, expected a finite number above 0")
        if self.model_type not in TYPES:
            raise ValueError(f"model_type: got {self.model_type!r}, expected one of {', '.join(TYPES)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, expected a multiple of num_attention_heads = "
                f"{self.num_attention_heads}; change one of the two"
            )
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id: got {self.pad_token_id}, expected less than vocab_size = {self.vocab_size}"
            )
        if self.longest < 1:
            raise ValueError(
                f"max_position_embeddings: got {self.max_position_embeddings}, expected more than the {self.first} "
                "that come before the first token's"
            )
        if (self.head == "classification") != bool(self.labels) or len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels: got {self.labels} for the head {self.head!r}, expected a name for each class")

    @property
    def first(self) -> int:
        """The position of the first token: RoBERTa's count from behind that of padding."""
        return self.pad_token_id + 1 if self.model_type == "roberta" else 0

    @property
    def longest(self) -> int:
        """The most tokens of a row."""
        return self.max_position_embeddings - self.first

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for a row."""
        return max(len(self.labels), 1)

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers reads."""
        own = {k: v for k, v in asdict(self).items() if k not in ("head", "labels", "model_type")}
        kind = "masked" if self.head == "masked" else "classification"
        written = {
            "architectures": [ARCHITECTURES[self.model_type, kind]],
            "model_type": self.model_type,
            **own,
            "hidden_act": "gelu",
        }
        if self.head != "masked":
            names = self.labels or ("LABEL_0",)
            written["id2label"] = {str(i): name for i, name in enumerate(names)}
            written["label2id"] = {name: i for i, name in enumerate(names)}
            single = self.head == "classification"
            written["problem_type"] = "single_label_classification" if single else "regression"
        return written

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "EncoderConfig":
        """Read a config.json, with the head that its `architectures` and `problem_type` say, masked where they say
        none. ValueError where it lacks a size or asks for what no model here does."""
        kind = config.get("model_type")
        if kind not in TYPES:
            raise ValueError(f"config.json: model_type: got {kind!r}, expected an encoder: {' or '.join(TYPES)}")
        if missing := [name for name in SIZES if name not in config]:
            raise ValueError(f"config.json: {missing[0]}: got none, expected the size of the model; add it")
        for name, value in FIXED.items():
            if config.get(name, value) not in (value, None):
                raise ValueError(f"config.json: {name}: got {config[name]!r}, expected {value!r}; there is no other")
        known = {field.name for field in fields(cls)} - {"head", "labels"}
        given = {name: value for name, value in config.items() if name in known and value is not None}
        if kind == "roberta":  # what transformers takes where config.json says nothing
            given = {"pad_token_id": 1, **given}
        return cls(**given, **_head(config))


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Does a config.json describe one of these?"""
    return config.get("model_type") in TYPES


def _head(config: Mapping[str, Any]) -> dict[str, Any]:
    architecture = (config.get("architectures") or [""])[0]
    if not str(architecture).endswith("ForSequenceClassification"):
        return {}
    names = config.get("id2label") or {}
    if not isinstance(names, Mapping) or not all(str(i).isdecimal() for i in names):
        raise ValueError(f"config.json: id2label: got {names!r}, expected a name for each number of a class")
    labels = tuple(str(names[i]) for i in sorted(names, key=int))
    if config.get("problem_type") == "regression" or len(labels) == 1:
        return {"head": "regression"}
    return {"head": "classification", "labels": labels or ("LABEL_0", "LABEL_1")}
