"""What a tokenizer cannot say is counted and, above a share, refused, whatever kind of tokenizer it is."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from helpers.grids import few
from tokenizers import decoders, models, normalizers, pre_tokenizers

from engine.data import Tokens, read_index
from engine.data.losses import NOTHING_UNKNOWN, counted, in_words
from engine.data.prepare import cached, prepare
from engine.data.request import Request
from engine.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from engine.data.unknown import Packed
from optimizers.contract import UsageError
from tools.prepare import main

ENGLISH = ["the cat sat on the mat", "a dog and a cat", "Äpfel und Birnen", "the dog sat"]
WORDS = sorted({word for text in ENGLISH for word in text.split()} - {"Äpfel", "und", "Birnen"})
JAPANESE = "東京は日本の首都です"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LEADING = "".join(map(chr, range(0xC0, 0x100)))  # how byte-level vocabularies write the first bytes of characters
LETTERS = list("abcdefghijklmnopqrstuvwxyz ")


def _save(core: tokenizers.Tokenizer, folder: Path) -> str:
    level = isinstance(core.pre_tokenizer, pre_tokenizers.ByteLevel)
    spaced = isinstance(core.pre_tokenizer, pre_tokenizers.WhitespaceSplit)
    if not spaced:
        core.decoder = decoders.ByteLevel() if level else decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["</s>"])
    core.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def bpe(folder: Path, extra: tuple[str, ...] = (), **options: object) -> str:
    merges = [("t", "h"), ("th", "e"), ("c", "a")]
    vocabulary = _ids([*extra, *LETTERS, "th", "the", "ca"])
    return _save(tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options)), folder)


def byte_level(folder: Path, missing: str = "") -> str:
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(missing))
    core = tokenizers.Tokenizer(models.BPE(vocab=_ids(alphabet), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _save(core, folder)


def words(folder: Path, unknown: bool, piece: bool = False) -> str:
    vocabulary = _ids([*["[UNK]"] * unknown, *WORDS])
    model = (models.WordPiece if piece else models.WordLevel)(vocabulary, unk_token="[UNK]")
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _save(core, folder)


def unigram(folder: Path, unknown: int | None = None, fallback: bool = False) -> str:
    pieces = [*(["<unk>"] if unknown == 0 else []), *(BYTES if fallback else []), *LETTERS, "the", "cat"]
    model = models.Unigram([(piece, -1.0 - k) for k, piece in enumerate(pieces)], unknown, fallback)
    return _save(tokenizers.Tokenizer(model), folder)


def pieces(folder: Path, fallback: bool) -> str:
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH[:2] * 9), model_writer=content, vocab_size=300, hard_vocab_limit=False,
        byte_fallback=fallback, normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(content.getvalue())
    return str(folder / "tokenizer.model")


def bert(folder: Path, unknown: bool = True) -> str:
    tokens = ["[PAD]", *["[UNK]"] * unknown, "[CLS]", "[SEP]", *WORDS, "##s"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return str(folder / "vocab.txt")


def gpt2(folder: Path, complete: bool = True) -> str:
    core = tokenizers.Tokenizer.from_str(train_bpe(ENGLISH, 257))
    core.model.save(str(folder))
    if not complete:
        vocabulary = json.loads((folder / "vocab.json").read_text())
        (folder / "vocab.json").write_text(
            json.dumps({t: i for t, i in vocabulary.items() if not set(t) & set(LEADING)})
        )
    return str(folder / "vocab.json")


SAY_ALL: dict[str, Callable[[Path], str]] = {
    "byte": lambda folder: "byte",
    "bpe, byte fallback": lambda folder: bpe(folder, ("<unk>", *BYTES), unk_token="<unk>", byte_fallback=True),
    "bpe, byte fallback without unk": lambda folder: bpe(folder, tuple(BYTES), byte_fallback=True),
    "byte-level bpe": byte_level,
    "byte-level bpe without bytes that no text has": lambda folder: byte_level(folder, "ÀÁõö÷øùúûüýþÿ"),
    "gpt-2's pair": gpt2,
    "unigram, byte fallback": lambda folder: unigram(folder, 0, True),
    "sentencepiece, byte fallback": lambda folder: pieces(folder, True),
}
LOSE: dict[str, Callable[[Path], str]] = {
    "bpe without unk": bpe,
    "bpe": lambda folder: bpe(folder, ("<unk>",), unk_token="<unk>"),
    "bpe, fused unk": lambda folder: bpe(folder, ("<unk>",), unk_token="<unk>", fuse_unk=True),
    "bpe whose unk is not in it": lambda folder: bpe(folder, unk_token="<nowhere>"),
    "bpe, half of the bytes": lambda folder: bpe(folder, tuple(BYTES[:128]), byte_fallback=True),
    "byte-level bpe, bytes missing": lambda folder: byte_level(folder, LEADING),
    "gpt-2's pair, bytes missing": lambda folder: gpt2(folder, False),
    "word level": lambda folder: words(folder, True),
    "word level without unk": lambda folder: words(folder, False),
    "word piece": lambda folder: words(folder, True, True),
    "word piece without unk": lambda folder: words(folder, False, True),
    "vocab.txt": bert,
    "vocab.txt without unk": lambda folder: bert(folder, False),
    "unigram": lambda folder: unigram(folder, 0),
    "unigram without unk": unigram,
    "sentencepiece": lambda folder: pieces(folder, False),
}


@pytest.fixture(params=LOSE)
def losing(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(LOSE[request.param](tmp_path))


@pytest.mark.parametrize("kind", SAY_ALL)
def test_a_tokenizer_with_every_byte_loses_nothing(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(SAY_ALL[kind](tmp_path))
    texts = [*ENGLISH, JAPANESE, "🙂"]
    packed = tokenizer.pack(texts)
    assert packed.lost == [""] * 6
    assert [tokenizer.decode(ids).strip() for ids in packed.ids] == texts


def test_what_is_lost_is_the_text_that_cannot_be_said(losing: Tokenizer) -> None:
    ids, lost = losing.pack(["the cat sat", JAPANESE, "", f"the cat {JAPANESE[:3]} sat"])
    assert lost[0] == lost[2] == "" and lost[1] == JAPANESE and lost[3].strip() == JAPANESE[:3]
    assert len(ids[0]) and not len(ids[2])
    for row in ids:
        assert all(0 <= i < losing.vocab_size and i != losing.eos for i in row.tolist())
    assert "the" in losing.decode(ids[0]) and losing.decode(ids[0]) == losing.decode(losing.encode("the cat sat"))


@pytest.mark.parametrize("kind", ["bpe without unk", "bpe", "unigram", "word level", "sentencepiece"])
def test_the_ids_are_the_librarys(kind: str, tmp_path: Path) -> None:
    path = LOSE[kind](tmp_path)
    texts = [ENGLISH[0], "a xé東京 catthe", JAPANESE]
    if kind == "sentencepiece":
        expected = sentencepiece.SentencePieceProcessor(model_file=path).encode(texts)
    else:
        expected = [row.ids for row in tokenizers.Tokenizer.from_file(path).encode_batch(texts)]
    assert load_tokenizer(path).encode_batch(texts) == expected


def test_added_tokens_keep_their_ids_where_an_unknown_token_is_lent(tmp_path: Path) -> None:
    core = tokenizers.Tokenizer.from_file(unigram(tmp_path))
    core.add_tokens(["<extra>"])
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    text = "the <extra> cat"
    expected = core.encode("the ").ids + [core.token_to_id("<extra>")] + core.encode(" cat").ids
    assert tokenizer.encode(text) == expected
    lossy = tokenizer.pack([text + JAPANESE])
    assert lossy.ids[0].tolist() == expected and lossy.lost == [JAPANESE]


def test_tokens_added_to_a_lossy_bpe_keep_their_ids(tmp_path: Path) -> None:
    core = tokenizers.Tokenizer.from_file(byte_level(tmp_path, LEADING))
    core.add_tokens(["  ", "   "])
    core.save(str(tmp_path / "tokenizer.json"))
    text = "the  cat   sat"
    assert load_tokenizer(str(tmp_path)).encode(text) == core.encode(text).ids


def test_what_a_normaliser_changes_is_not_lost(tmp_path: Path) -> None:
    core = tokenizers.Tokenizer.from_file(bpe(tmp_path))
    core.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pack(["Thé CAT", "ﬁn", "cafe\u0301"]).lost == ["", "", ""]
    assert tokenizer.decode(tokenizer.encode("Thé CAT")).replace(" ", "") == "thecat"


def test_an_unknown_token_written_in_the_text_is_said(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(words(tmp_path, True))
    assert tokenizer.pack(["the [UNK] sat", "the mouse sat"]).lost == ["", "mouse"]


def test_chance_in_a_bpe_is_put_aside(tmp_path: Path) -> None:
    path = bpe(tmp_path, dropout=0.5)
    tokenizer = load_tokenizer(path)
    assert len({tuple(tokenizer.encode("the the cat the")) for _ in range(20)}) == 1


# In a corpus


def corpus(folder: Path, english: int = 60, japanese: int = 50) -> Path:
    path = folder / "corpus.jsonl"
    texts = [f"the cat sat on the mat {'and the dog ' * (k + 1)}" for k in range(english)] + [JAPANESE] * japanese
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.mark.parametrize("kind", few(LOSE, *list(LOSE)[::4]))
def test_a_corpus_that_cannot_be_said_is_refused_and_said(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = LOSE[kind](tmp_path)
    arguments = [str(tmp_path / "out"), "--data", str(corpus(tmp_path)), "--tokenizer", tokenizer]
    assert main([*arguments, "--validation-fraction", "0.2"]) == 2
    said = capsys.readouterr()
    assert "ready" not in said.out and said.err.count("\n") == 1
    for part in ("500 of", "in 50 documents", "'東京", "corpus.jsonl, document 61", "--allow-unknown"):
        assert part in said.err
    assert main([*arguments, "--validation-fraction", "0.2", "--allow-unknown", "0.5"]) == 0
    assert "in 50 documents, are unknown to the tokenizer" in capsys.readouterr().out.replace("\n", " ")
    index = read_index(tmp_path / "out")
    assert index["unknown"]["characters"] == 500 and index["unknown"]["documents"] == 50
    left_out = index["unknown"]["left_out"]
    assert sum(split["documents"] for split in index["splits"].values()) == 110 - left_out
    assert left_out == (50 if "without" in kind or "not in it" in kind or "half" in kind else 0)


def test_a_small_share_is_allowed_and_said_every_time(tmp_path: Path) -> None:
    request = Request(data=(str(corpus(tmp_path, 200, 1)),), tokenizer=bpe(tmp_path))
    said: list[str] = []
    for _ in range(2):
        said.clear()
        out = cached(tmp_path / "cache", request, lambda what, done, total: said.append(what))
        assert any("10 of" in line and "in 1 document, are unknown" in line for line in said)
        assert any("1 document left out, as no token comes of it" in line for line in said)
    assert len(Tokens(out)) > 0
    strict = Request(data=request.data, tokenizer=request.tokenizer, allow_unknown=0)
    with pytest.raises(UsageError, match=r"10 of .* allowed are 0.00%"):
        cached(tmp_path / "cache", strict)


def test_no_document_that_says_nothing_has_an_end(tmp_path: Path) -> None:
    for name, texts in (("train", [" \n ", "the cat", " "]), ("validation", ["a dog"])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data, validation = ((str(tmp_path / f"{name}.jsonl"),) for name in ("train", "validation"))
    out = prepare(tmp_path / "out", Request(data, validation, bert(tmp_path)))
    index = read_index(out)
    assert index["unknown"]["characters"] == 0 and index["unknown"]["left_out"] == 2
    ids = [i for side in ("train", "validation") for i in Tokens(out, side).read(0, len(Tokens(out, side))).tolist()]
    assert ids.count(index["tokenizer"]["eos"]) == 2 and len(ids) == 6


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none(share: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="allow_unknown: got .*; expected a share, from 0 to 1"):
        prepare(tmp_path / "out", Request(allow_unknown=share))


def test_counts_survive_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["engine.data.request"], "BATCH", 200)
    request = Request((str(corpus(tmp_path)),), tokenizer=bpe(tmp_path), allow_unknown=1)
    expected = read_index(prepare(tmp_path / "whole", request))
    calls = 0

    def stop(what: str, done: int, total: int) -> None:
        nonlocal calls
        calls += what == "tokenising"
        if calls == len(ENGLISH) * 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "broken", request, stop)
    assert read_index(prepare(tmp_path / "broken", request)) == expected


def test_published_tokenizers_in_japanese(shared: Path) -> None:
    folder = shared / "data/tokenizers"
    for name in ("gpt2", "gpt-neox-20b", "mistral"):
        assert load_tokenizer(str(folder / name)).pack([JAPANESE, "🙂 naïve"]).lost == ["", ""]
    lost = load_tokenizer(str(folder / "bert-base-uncased")).pack([JAPANESE, "Hello 🙂 naïve café", "x" * 101]).lost
    assert lost[1:] == ["🙂", "x" * 101] and set(lost[0]) < set(JAPANESE)


def test_an_unknown_line_end_is_shown():
    """White space is what a terminal does not show: it is named where nothing else is unknown."""
    said = in_words(counted(NOTHING_UNKNOWN, Packed([[1]], ["\n\n"]), ["a.txt, document 1"]), 10)
    assert said == (
        "2 of 10 characters (20.00%), in 1 document, are unknown to the tokenizer, such as '\\n'; the first in a.txt, "
        "document 1"
    )
