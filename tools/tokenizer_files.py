"""A tokenizer's files as Hugging Face publishes them, made from whatever form it was loaded from."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from engine.data.ending import END_OF_TEXT, TOKENIZER_CONFIG, read_beside
from engine.data.tokenizer import Tokenizer
from optimizers.contract import UsageError

WHOLE, MAP, GENERATION = "tokenizer.json", "special_tokens_map.json", "generation_config.json"
AS_THEY_ARE = ("chat_template.jinja", "chat_template.json", "added_tokens.json")
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Written(NamedTuple):
    """What was written beside the weights."""

    files: list[str]
    ids: dict[str, int]  # "eos_token_id" and others, for config.json
    remark: str


def write(folder: Path, tokenizer: Tokenizer, positions: int) -> Written:
    """Write them into a folder that exists. What lies beside the tokenizer's own files is kept: its chat template,
    other special tokens, settings of generation. Raises UsageError where a file beside it is damaged."""
    beside = tokenizer.files[0].parent if tokenizer.files else None
    found, remark = _vocabulary(folder, tokenizer)
    said = dict(read_beside(beside, TOKENIZER_CONFIG)) if beside else {}
    mapped = dict(read_beside(beside, MAP)) if beside else {}
    core = tokenizers.Tokenizer.from_file(str(folder / WHOLE)) if (folder / WHOLE).is_file() else None
    end = core.id_to_token(tokenizer.eos) if core else dict(tokenizer.settings).get("eos_token")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if core else "LlamaTokenizer",
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
        **{name: mapped[name] for name in TOKENS if name in mapped},
        **said,
        "eos_token": end,
    }
    special = {**mapped, **{name: config[name] for name in TOKENS if config.get(name) is not None}}
    ids = {f"{name}_id": _id(core, config.get(name)) for name in TOKENS[:3]}
    ids["eos_token_id"] = tokenizer.eos
    known = {name: i for name, i in ids.items() if i is not None}
    generation = dict(read_beside(beside, GENERATION)) if beside else {}
    for name, content in ((TOKENIZER_CONFIG, config), (MAP, special), (GENERATION, {**known, **generation})):
        _json(folder / name, content)
        found.append(name)
    for name in AS_THEY_ARE:
        if beside and (beside / name).is_file():
            shutil.copyfile(beside / name, folder / name)
            found.append(name)
    return Written(found, known, remark)


def _vocabulary(folder: Path, tokenizer: Tokenizer) -> tuple[list[str], str]:
    """The vocabulary as tokenizer.json; a sentencepiece model stays what it is, and the remark says so."""
    first = tokenizer.files[0] if tokenizer.files else None
    if first is not None and first.suffix == ".model":
        shutil.copyfile(first, folder / "tokenizer.model")
        return ["tokenizer.model"], "a sentencepiece model; transformers reads it where sentencepiece is installed"
    if first is not None and first.suffix == ".json" and len(tokenizer.files) == 1:
        shutil.copyfile(first, folder / WHOLE)
    elif first is None:
        _bytes(tokenizer).save(str(folder / WHOLE))
    elif len(tokenizer.files) == 2:
        _gpt2(tokenizer).save(str(folder / WHOLE))
    else:
        _wordpiece(tokenizer).save(str(folder / WHOLE))
    return [WHOLE], ""


def _bytes(tokenizer: Tokenizer) -> Any:
    """The tokenizer of bytes: an id is the byte it stands for."""
    vocabulary = {character: byte for byte, character in enumerate(_alphabet())}
    core: Any = tokenizers.Tokenizer(tokenizers.models.BPE({**vocabulary, END_OF_TEXT[0]: tokenizer.eos}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens([END_OF_TEXT[0]])
    return core


def _alphabet() -> list[str]:
    """The character by which byte-level tokenizers write each byte: its own where it is printed, else from U+0100."""
    printed = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    hidden = [b for b in range(256) if b not in printed]
    return [chr(b) if b in printed else chr(256 + hidden.index(b)) for b in range(256)]


def _gpt2(tokenizer: Tokenizer) -> Any:
    vocabulary, merges = map(str, tokenizer.files)
    core: Any = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocabulary, merges))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens([core.id_to_token(tokenizer.eos)])
    return core


def _wordpiece(tokenizer: Tokenizer) -> Any:
    settings = dict(tokenizer.settings)
    core: Any = tokenizers.Tokenizer(tokenizers.models.WordPiece.from_file(str(tokenizer.files[0]), unk_token="[UNK]"))
    core.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=bool(settings["do_lower_case"]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    core.decoder = tokenizers.decoders.WordPiece()
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", str(settings["eos_token"]))
    core.add_special_tokens([token for token in dict.fromkeys(special) if core.token_to_id(token) is not None])
    return core


def _id(core: Any, token: Any) -> int | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    found: int | None = core.token_to_id(text) if core is not None and isinstance(text, str) else None
    return found


def _json(file: Path, content: Mapping[str, Any]) -> None:
    try:
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{file.name}: got text that is not Unicode ({error.reason}); repair it there") from None
