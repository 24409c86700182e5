"""Tokenizers: text comes back, documents end in one way only, and whatever cannot be loaded says why."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as Core
from tokenizers import models

from engine.data.tokenizer import load_tokenizer, train_bpe
from optimizers.contract import UsageError

SAMPLES = [
    "",
    "a",
    "Hello, world!\n",
    " two  spaces\t",
    "naïve café — 東京 🙂",
    "end</s> <|endoftext|> [SEP]",
    "\r\n\0",
]
CORPUS = ["the cat sat on the mat and the dog sat on the cat\n" * 4, "def f(x):\n    return x + 1\n" * 4]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer.json, and the same vocabulary in GPT-2's form beside it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tokenizer.json").write_text(train_bpe(CORPUS, 280))
    Core.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=file, model_type="bpe", vocab_size=300, hard_vocab_limit=False,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    return path


def changed(path: Path, out: Path, **fields: object) -> Path:
    """A copy of a tokenizer.json with some of its fields changed."""
    out.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return out


def test_bytes_are_their_own_ids() -> None:
    byte = load_tokenizer("byte")
    assert (byte.name, byte.vocab_size, byte.eos) == ("byte", 257, 256)
    assert byte.encode("hé") == [104, 195, 169]
    assert byte.encode_batch(["a", "", "bc"]) == [[97], [], [98, 99]]
    assert byte.decode([104, 195, 169, byte.eos]) == "hé"


@pytest.mark.parametrize("kind", ["byte", "tokenizer.json", "vocab.json", "pieces"])
def test_text_comes_back_and_no_text_is_the_end_of_text(kind: str, trained: Path, pieces: Path) -> None:
    tokenizer = load_tokenizer({"byte": "byte", "pieces": str(pieces)}.get(kind, str(trained / kind)))
    for text, ids in zip(SAMPLES, tokenizer.encode_batch(SAMPLES), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.encode(text) == ids


@pytest.mark.parametrize("kind", ["byte", "tokenizer.json", "vocab.json", "pieces"])
def test_any_ids_can_be_decoded(kind: str, trained: Path, pieces: Path) -> None:
    tokenizer = load_tokenizer({"byte": "byte", "pieces": str(pieces)}.get(kind, str(trained / kind)))
    assert isinstance(tokenizer.decode([*range(tokenizer.vocab_size), -1, 10**12]), str)
    assert tokenizer.decode([tokenizer.eos, -5, 10**9]) == ""


def test_invalid_utf8_is_replaced(trained: Path) -> None:
    assert load_tokenizer("byte").decode([0xFF, 65]) == "\ufffdA"


def test_training_is_deterministic_and_bounded(trained: Path) -> None:
    assert train_bpe(CORPUS, 280) == (trained / "tokenizer.json").read_text()
    tokenizer = load_tokenizer(str(trained))
    assert tokenizer.vocab_size == 280 and tokenizer.eos == 0
    assert len(tokenizer.encode(CORPUS[0])) < len(CORPUS[0]) / 2
    with pytest.raises(UsageError, match=r"train_bpe: got 256; expected at least 257"):
        train_bpe(CORPUS, 256)


def test_the_gpt2_pair_under_either_name_by_either_file(trained: Path, tmp_path: Path) -> None:
    expected = load_tokenizer(str(trained / "tokenizer.json"))
    shutil.copy(trained / "vocab.json", tmp_path / "encoder.json")
    shutil.copy(trained / "merges.txt", tmp_path / "vocab.bpe")
    for spec in (
        trained / "vocab.json",
        trained / "merges.txt",
        tmp_path / "encoder.json",
        tmp_path / "vocab.bpe",
        tmp_path,
    ):
        tokenizer = load_tokenizer(str(spec))
        assert tokenizer.encode_batch(SAMPLES) == expected.encode_batch(SAMPLES)
        assert tokenizer.eos == expected.eos and len(tokenizer.files) == 2


def test_a_folder_means_its_tokenizer(trained: Path, pieces: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(trained)).files == (trained / "tokenizer.json",)
    assert load_tokenizer(str(pieces.parent)).files == (pieces,)
    with pytest.raises(UsageError, match="no tokenizer in this folder"):
        load_tokenizer(str(tmp_path))


def test_settings_that_cut_or_pad_are_put_aside(trained: Path, tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": 8,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    path = changed(trained / "tokenizer.json", tmp_path / "other.json", truncation=cut, padding=pad)
    assert load_tokenizer(str(path)).encode_batch(SAMPLES) == load_tokenizer(str(trained)).encode_batch(SAMPLES)


def test_the_fingerprint_is_of_the_content(trained: Path, pieces: Path, tmp_path: Path) -> None:
    copy = changed(trained / "tokenizer.json", tmp_path / "copy.json", version="1.0")
    shutil.copy(trained / "tokenizer.json", tmp_path / "same.json")
    prints = [load_tokenizer(str(path)).fingerprint for path in (trained, tmp_path / "same.json", copy, pieces)]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize("spec", ["gpt-5", "missing/tokenizer.json"])
def test_an_unknown_spec_lists_what_is_accepted(spec: str) -> None:
    with pytest.raises(UsageError, match=r"neither a name nor a file.*'byte', .*tokenizer.json.*sentencepiece"):
        load_tokenizer(spec)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.csv", "[PAD]", "not a kind of file that holds a tokenizer"),
        ("vocab.txt", "[PAD]", "no token to end documents with"),
        ("tokenizer.json", "{", "not a tokenizer.json"),
        ("tokenizer.model", "no model", "not a sentencepiece model"),
        ("vocab.json", "{}", "merges.txt is not beside it"),
        ("vocab.bpe", "", "encoder.json is not beside it"),
    ],
)
def test_files_that_hold_no_tokenizer(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        load_tokenizer(str(tmp_path / name))
    assert name in str(error.value)


def test_a_damaged_pair(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "merges.txt", tmp_path / "merges.txt")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UsageError, match=r"vocab.json, merges.txt: damaged"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_needs_an_end_of_text(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UsageError, match=r"no token to end documents with; add one of <\|endoftext\|>.*--eos"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path), "a").eos == 0


# Which token ends a document


def ending(folder: Path, special: list[str], plain: Sequence[str] = ("</s>",), **files: object) -> Path:
    """A folder with a byte-level tokenizer.json that has these tokens, and JSON files beside it."""
    core = Core(models.BPE({chr(97 + i): i for i in range(26)}, []))
    core.add_tokens(list(plain))
    core.add_special_tokens(special)
    folder.mkdir(exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("files", "token", "remark"),
    [
        ({"tokenizer_config": {"eos_token": "<eos>"}}, "<eos>", ""),
        ({"tokenizer_config": {"eos_token": {"content": "<eos>", "lstrip": False}}}, "<eos>", ""),
        ({"special_tokens_map": {"eos_token": "<eos>"}}, "<eos>", ""),
        ({"generation_config": {"eos_token_id": 27}}, "<bos>", ""),
        ({"generation_config": {"eos_token_id": [28, 27]}}, "<eos>", "generation_config.json names '<bos>' .27."),
        ({"config": {"eos_token_id": 28}}, "<eos>", ""),
        ({"config": {"text_config": {"eos_token_id": 28}}}, "<eos>", ""),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 28}}, "<eos>", ""),
        (
            {"tokenizer_config": {"eos_token": "<eos>"}, "config": {"eos_token_id": 26}},
            "<eos>",
            "'<eos>' .28., by tokenizer_config.json; config.json names '</s>' .26.",
        ),
        (
            {"tokenizer_config": {"eos_token": "<gone>"}, "config": {"eos_token_id": 28}},
            "<eos>",
            "tokenizer_config.json names '<gone>', which the vocabulary does not have",
        ),
        ({"config": {"eos_token_id": 1000}}, "<eos>", "config.json names 1000, which the vocabulary does not have"),
        ({"config": {"eos_token_id": -1}}, "<eos>", "config.json names -1, which"),
        ({"config": {"eos_token_id": True}}, "<eos>", ""),
        ({}, "<eos>", ""),  # the only special one of the usual names
    ],
)
def test_the_files_beside_a_tokenizer_name_the_end(
    tmp_path: Path, files: dict[str, object], token: str, remark: str
) -> None:
    tokenizer = load_tokenizer(str(ending(tmp_path, ["<bos>", "<eos>"], **files)))
    assert tokenizer.eos == {"</s>": 26, "<bos>": 27, "<eos>": 28}[token]
    assert re.search(remark, tokenizer.remark) if remark else tokenizer.remark == ""


def test_several_ends_and_none(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(ending(tmp_path, ["<eos>", "</s>"], [])))
    assert tokenizer.decode([tokenizer.eos]) == "" and "the first of </s> <eos> in the vocabulary" in tokenizer.remark
    folder = ending(tmp_path / "none", ["<stop>"], [], config={"eos_token_id": 99})
    with pytest.raises(UsageError, match=r"no token to end.*--eos .*special tokens are <stop>; .*config.json names 99"):
        load_tokenizer(str(folder))
    with pytest.raises(UsageError, match=r"tokenizer_config.json: cannot be read .*--eos"):
        load_tokenizer(str(ending(tmp_path / "damaged", ["<eos>"], tokenizer_config="{")))


@pytest.mark.parametrize(("asked", "eos"), [("<eos>", 28), ("28", 28), (28, 28), ("a", 0), ("0", 0)])
def test_a_user_names_the_end(tmp_path: Path, asked: str | int, eos: int) -> None:
    folder = ending(tmp_path, ["<bos>", "<eos>"], tokenizer_config={"eos_token": "<bos>"})
    tokenizer = load_tokenizer(str(folder), asked)
    assert tokenizer.eos == eos and tokenizer.remark == ""
    (tmp_path / "copy").mkdir()
    tokenizer.copy_to(tmp_path / "copy")
    assert load_tokenizer(str(tmp_path / "copy")).eos == eos
    assert load_tokenizer(str(tmp_path / "copy")).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("asked", ["<gone>", "29", 29, -1, ""])
def test_an_end_that_is_not_there(tmp_path: Path, asked: str | int) -> None:
    with pytest.raises(UsageError, match=r"--eos: got .* expected a token or an id of the vocabulary of .*json"):
        load_tokenizer(str(ending(tmp_path, ["<bos>", "<eos>"])), asked)
    with pytest.raises(UsageError, match="--eos: got .*'byte' documents end with id 256"):
        load_tokenizer("byte", asked)


def test_sentencepiece_ends_with_what_the_folder_says_then_with_its_own(pieces: Path, tmp_path: Path) -> None:
    assert load_tokenizer(str(pieces)).eos == 2 and load_tokenizer(str(pieces), "<s>").eos == 1
    shutil.copy(pieces, tmp_path / "tokenizer.model")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1]}')
    assert load_tokenizer(str(tmp_path)).eos == 1


def test_capitals_of_a_wordpiece_list(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n[SEP]\nthe\ncafe\ncaf\n##e\n")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("The Café") == [2, 3] and tokenizer.eos == 1
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = load_tokenizer(str(tmp_path / "vocab.txt"))
    assert cased.encode("The Café") == [0, 0] and cased.fingerprint != tokenizer.fingerprint
    (tmp_path / "copy").mkdir()
    cased.copy_to(tmp_path / "copy")
    assert load_tokenizer(str(tmp_path / "copy")).encode("The the") == [0, 2]


@pytest.mark.parametrize(
    ("name", "ids", "eos"),
    [
        ("gpt2", [15496, 995], 50256),
        ("gpt-neox-20b", [12092, 1533], 0),
        ("mistral", [22557, 1526], 2),
        ("bert-base-uncased", [7592, 2088], 102),
    ],
)
def test_published_tokenizers(shared: Path, name: str, ids: list[int], eos: int) -> None:
    tokenizer = load_tokenizer(str(shared / "data/tokenizers" / name))
    assert tokenizer.encode("Hello world") == ids and tokenizer.eos == eos
    if name.startswith("bert"):
        assert tokenizer.decode(tokenizer.encode("Naïve cafés, unbelievably!")) == "naive cafes, unbelievably!"
        return
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(text)) == text
