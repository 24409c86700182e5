"""Tokenizers: text comes back, documents end in one way only, and whatever cannot be loaded says why."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as Core

from engine.data.tokenizer import load_tokenizer, train_bpe
from optimizers.core import UsageError

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
        ("vocab.txt", "[PAD]", "not a kind of file that holds a tokenizer"),
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
    with pytest.raises(UsageError, match=r"no token to end documents with; add one of <\|endoftext\|>"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "ids", "eos"),
    [("gpt2", [15496, 995], 50256), ("gpt-neox-20b", [12092, 1533], 0), ("mistral", [22557, 1526], 2)],
)
def test_published_tokenizers(shared: Path, name: str, ids: list[int], eos: int) -> None:
    tokenizer = load_tokenizer(str(shared / "data/tokenizers" / name))
    assert tokenizer.encode("Hello world") == ids and tokenizer.eos == eos
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(text)) == text
