"""Chat templates: rendered as transformers renders them, and which characters of the text are trained."""

import datetime
import json
from pathlib import Path

import pytest
from helpers.chats import CHATML, GENERATION, INST, TEMPLATES, THINKING, checkpoint, turns

from engine.data.chat.masks import Fault, TrainOn, plain, rendered
from engine.data.chat.template import ChatTemplate, TemplateFault, load_template
from optimizers.contract import UsageError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def marked(template: str, messages: list, train_on: TrainOn = "assistant", **options: object) -> str:
    """The text with what is trained in brackets."""
    example = rendered(ChatTemplate(template, SPECIAL), messages, train_on, **options)
    text = example.text
    for start, stop in reversed(example.spans):
        text = f"{text[:start]}⟦{text[start:stop]}⟧{text[stop:]}"
    return text


# Templates


def test_texts_as_they_were_recorded() -> None:
    chat = turns("How many?", "Four.", "Sure?", system="Count.")
    assert ChatTemplate(CHATML).render(chat, add_generation_prompt=True) == (
        "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\nFour.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ChatTemplate(INST, SPECIAL).render(chat[1:]) == "<s>[INST] How many? [/INST] Four.</s>[INST] Sure? [/INST]"
    assert ChatTemplate(GENERATION).render(turns("a<b", "c", system='é"')) == (
        '<|system|>"é\\""<|user|>a<b<|assistant|>c<|end|>'
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_as_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = checkpoint(tmp_path / "model", TEMPLATES[name])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    ours = load_template(folder)
    assert ours is not None
    for chat in (turns("a", " b "), turns("a\n", "b", "c", "d & <e>"), turns("x")):
        for ask in (False, True):
            expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
            assert ours.render(chat, add_generation_prompt=ask) == expected


def test_where_a_template_is_looked_for(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", None)
    assert load_template(folder) is None
    config = folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ bos_token }}d"}]
    for source in ("{{ bos_token }}d", named):
        config.write_text(json.dumps({"bos_token": {"content": "<b>"}, "chat_template": source}))
        found = load_template(folder)
        assert found is not None and found.render([]) == "<b>d"
    (folder / "chat_template.jinja").write_text("file")
    found = load_template(folder)
    assert found is not None and found.render([]) == "file"
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UsageError, match=r"not one that jinja2 can read .*repair chat_template\.jinja"):
        load_template(folder)


def test_the_date_is_said_not_taken() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", date=datetime.date(2024, 7, 26))
    assert template.dated and template.render([]) == "26 Jul 2024"
    assert not ChatTemplate(CHATML).dated


REACHING = ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}"]


@pytest.mark.parametrize("source", REACHING)
def test_a_template_cannot_reach_out(source: str) -> None:
    with pytest.raises(TemplateFault):
        ChatTemplate(source).render([])


# What is trained


def test_answers_are_trained_with_their_end_and_nothing_else() -> None:
    chat = turns("one", "two", "three", "four")
    start = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    between = "\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
    assert marked(CHATML, chat) == f"{start}⟦two<|im_end|>⟧{between}⟦four<|im_end|>⟧\n"
    assert marked(CHATML, chat, "last") == f"{start}two<|im_end|>{between}⟦four<|im_end|>⟧\n"
    assert marked(CHATML, chat, "all") == f"⟦{start}two<|im_end|>{between}four<|im_end|>\n⟧"
    assert marked(CHATML, chat, answers=(3,)) == marked(CHATML, chat, "last")


def test_a_mark_that_only_answers_have_and_roles_that_alternate() -> None:
    expected = "<s>[INST] one [/INST] ⟦two</s>⟧[INST] three [/INST] ⟦four</s>⟧"
    assert marked(INST, turns("one", "two", "three", "four")) == expected


def test_tags_for_what_is_generated_change_nothing() -> None:
    assert marked(GENERATION, turns("a", "b")) == "<|user|>a<|assistant|>⟦b<|end|>⟧"


def test_reasoning_that_the_template_put_in_is_not_trained_and_one_that_the_data_holds_is() -> None:
    put = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦b<|im_end|>⟧\n"
    assert marked(THINKING, turns("a", "b")) == put
    said = turns("a", "b")
    said[1]["reasoning"] = "hm"
    assert "assistant\n⟦<think>\nhm\n</think>\n\nb<|im_end|>⟧\n" in marked(THINKING, said)


@pytest.mark.parametrize("content", ["think", "s", "im_end", "assistant", "user\na"])
def test_an_answer_that_also_stands_in_the_marks(content: str) -> None:
    head = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert marked(THINKING, turns("a", content)) == f"{head}<think>\n\n</think>\n\n⟦{content}<|im_end|>⟧\n"
    assert marked(INST, turns("a", content)) == f"<s>[INST] a [/INST] ⟦{content}</s>⟧"


def test_an_answer_that_the_template_changes_is_trained_from_where_it_is_asked_for() -> None:
    upper = CHATML.replace("message['content']", "message['content'].upper()")
    assert marked(upper, turns("a", "b")).endswith("<|im_start|>assistant\n⟦B<|im_end|>⟧\n")


def test_a_template_that_writes_the_past_anew_is_refused_but_for_the_last_answer() -> None:
    chat = turns("a", "b", "c", "d")
    with pytest.raises(Fault, match=r"changes what it wrote of the first 2 messages .*--train-on last"):
        marked(THINKING, chat)
    assert marked(THINKING, chat, "last").endswith(
        "user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦d<|im_end|>⟧\n"
    )


def test_a_question_that_is_written_anew_once_it_is_answered_is_refused() -> None:
    """Mistral's puts the system's message into the last question."""
    moving = "{% for m in messages %}{{ '{' + m.role + ('!' if loop.last else '') + m.content + '}' }}{% endfor %}"
    with pytest.raises(Fault, match=r"changes what it wrote of the first 1 messages .*'!a\}' becomes 'a\}"):
        marked(moving, turns("a", "b"))
    with pytest.raises(Fault, match="changes what it wrote"):
        marked(moving, turns("a", "b"), "last")
    assert marked(moving, turns("a", "b"), "all") == "⟦{usera}{assistant!b}⟧"


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        (CHATML, turns("a", "b", "c", " \n"), r"message 4 \(assistant\) is empty"),
        (CHATML, turns("a"), r"no message of the assistant to train on \(roles: user\)"),
        (INST, turns("a", "b", system="s"), r"refuses the first 3 messages \(Conversation roles must alternate"),
        (GENERATION, [*turns("a"), {"role": "bird", "content": "x"}, turns("", "b")[1]], "writes nothing of .* 'bird'"),
        (CHATML, [{"role": "user"}, {"role": "assistant", "content": "b"}], "refuses the first 2 messages"),
    ],
)
def test_what_cannot_be_trained_on(template: str, chat: list, expected: str) -> None:
    with pytest.raises(Fault, match=expected):
        marked(template, chat)


def test_an_answer_without_an_end_gets_one() -> None:
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    example = rendered(ChatTemplate(bare), turns("a", "b"))
    assert not example.ended and example.text[slice(*example.spans[0])] == "b"
    assert rendered(ChatTemplate(CHATML), turns("a", "b")).ended


def test_plain_texts() -> None:
    assert plain([("ab", False), ("cd", True)]) == ("abcd", ((2, 4),), False)
    assert plain([("ab", False), ("cd", True)], "all").spans == ((0, 2), (2, 4))
    with pytest.raises(Fault, match="the completion is empty"):
        plain([("ab", False), ("", True)])
