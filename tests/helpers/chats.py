"""Chat templates as checkpoints have them, cut down to what matters, and a tokenizer that knows their marks."""

import json
from pathlib import Path

import tokenizers

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Mistral's and Llama 2's: roles must alternate, the content is stripped, an end token closes the answer only.
INST = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{{- ' ' + message['content'] | trim + eos_token }}
{%- endif %}
{% endfor %}"""

# Qwen3's: reasoning stays in the answers after the last question only, and is put in, empty, where there is none.
THINKING = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<|im_start|>assistant\n<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' }}
        {{- message.content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# Those that train by marks: tags that say what is generated, and a role that is passed over.
GENERATION = """{% for message in messages %}
{% if message.role == 'assistant' %}
{{- '<|assistant|>' }}{% generation %}{{ message.content }}<|end|>{% endgeneration %}
{%- elif message.role == 'user' %}
{{- '<|user|>' + message.content }}
{%- elif message.role == 'system' and loop.first %}
{{- '<|system|>' + message.content | tojson }}{% continue %}
{%- endif %}
{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "inst": INST, "thinking": THINKING, "generation": GENERATION}

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|assistant|>", "<|user|>", "<|end|>")


def checkpoint(folder: Path, template: str | None = CHATML, texts: tuple[str, ...] = ()) -> Path:
    """A folder with a byte-level tokenizer, merges of `texts` in it, and a template."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(MARKS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts or ("the answer is four, and the question was how many there are",) * 3, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    config = {"bos_token": "<|im_start|>", "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    """Contents said by user and assistant in turns."""
    said = [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + said
