"""A folder to fine-tune an encoder in: a tiny published BERT with its tokenizer, and tasks as GLUE has them."""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from helpers.encoders import config_of, wide
from models import encoder_weights
from models.encoder_config import EncoderConfig

WORDS = ["the", "a", "cat", "dog", "bird", "sings", "eats", "sees", "runs", "red", "blue", "small", "old", "and", "not"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    core.add_special_tokens(SPECIAL)
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return core


def byte_level() -> tokenizers.Tokenizer:
    """RoBERTa's kind."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return core


def model(folder: Path, kind: str = "bert", **changed: object) -> EncoderConfig:
    """A published encoder with the head of a masked LM, and its tokenizer."""
    folder.mkdir(parents=True)
    core = wordpiece() if kind == "bert" else byte_level()
    dropped = dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    config = config_of(kind, "masked", vocab_size=core.get_vocab_size(), **{**dropped, **changed})
    encoder_weights.save(folder, wide(config))
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": config.longest}))
    return config


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS[:-1], k=draw.randint(3, 7)))


def tasks(folder: Path, train: int = 40, held_out: int = 11) -> Path:
    """Tasks whose labels can be learned: does a text hold a word?"""
    draw = random.Random(0)
    for name, count in (("train", train), ("dev", held_out)):
        rows = [(sentence(draw), sentence(draw) + " not" * (i % 2)) for i in range(count)]
        entailed = ["not_entailment" if "not" in b else "entailment" for _, b in rows]
        _tsv(folder / f"RTE/{name}.tsv", ["index", "sentence1", "sentence2", "label"], [
            [str(i), a, b, label] for i, ((a, b), label) in enumerate(zip(rows, entailed, strict=True))
        ])  # fmt: skip
        marked = [["x", str(int("not" not in b)), "*" * (i % 2), b] for i, (_, b) in enumerate(rows)]
        _tsv(folder / f"CoLA/{name}.tsv", [], marked)
        scored = [[str(i), "g", "f", "y", "0", "s", "s", a, b, f"{b.count('e'):.3f}"] for i, (a, b) in enumerate(rows)]
        header = ["index", "genre", "filename", "year", "old_index", "source1", "source2"]
        _tsv(folder / f"STS-B/{name}.tsv", [*header, "sentence1", "sentence2", "score"], scored)
    return folder


def _tsv(file: Path, header: list[str], rows: list[list[str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join("\t".join(row) + "\n" for row in ([header] if header else []) + rows))


def folder(at: Path, kind: str = "bert") -> Path:
    """`model` and `glue` in the folder `at`, which is returned."""
    model(at / "model", kind)
    tasks(at / "glue")
    return at
