"""GPT-2 against transformers: names, logits, gradients by segments; caches, documents, folders there and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.step import templates
from engine.step.segments import cut
from engine.step.step import Step
from models import shards, weights
from models.gpt2 import PRESETS, Gpt2
from models.gpt2_config import Gpt2Config
from models.sampling import generate
from optimizers.contract import Group
from optimizers.partition import partition
from optimizers.rules.sgd import sgd

SHAPES = {
    "small": Gpt2Config(97, 32, 3, 4, 64),
    "another inner size": Gpt2Config(97, 24, 2, 2, 48, 40, layer_norm_epsilon=1e-3),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)


def wide(config: Gpt2Config, seed: int = 1) -> Gpt2:
    """A model whose weights are large enough for every part to show, norms and biases included."""
    model = Gpt2(replace(config, initializer_range=0.3), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 0.0 if name.endswith(".bias") else 1.0, 0.3, generator=generator)
    return model


def ids_of(config: Gpt2Config, tokens: int = 40) -> Tensor:
    return torch.randint(config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(0))


def theirs_of(ours: Gpt2) -> Any:
    """transformers' model of our config.json with our weights."""
    transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    config = transformers.AutoConfig.for_model(**ours.config.to_hf())
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert {n: p.shape for n, p in theirs.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}
    assert theirs.load_state_dict(ours.state_dict(), strict=False).unexpected_keys == []
    theirs.tie_weights()
    return theirs


def mean_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def stepped(model: Gpt2, ids: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, and the gradients with which SGD at rate 1 moved."""
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = {name: p.clone() for name, p in params.items()}
    optimizer = partition(params, [Group("all", sgd(0.0), ("",), 1.0, 0.0)])
    step = Step(cut(model), params, optimizer, optimizer.init(params), **{"mode": "off", **options})
    loss = step([{"input_ids": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}]).loss
    return loss, {name: before[name] - p for name, p in params.items()}


@shapes
def test_logits_and_gradients_are_those_of_transformers(config: Gpt2Config) -> None:
    ours, ids = wide(config), ids_of(config)
    theirs = theirs_of(ours)
    expected = theirs(ids).logits
    assert expected.std() > 0.5, "small logits would be equal whatever the formula"
    torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)
    loss = mean_loss(expected, ids)
    loss.backward()
    found, gradients = stepped(ours, ids)
    torch.testing.assert_close(found, loss.detach(), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.loss(ids[:, :-1], ids[:, 1:]), loss, atol=1e-4, rtol=0)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-4 * float(p.grad.abs().max() + 1), rtol=0)


def test_blocks_share_a_template_and_recompute_draws_the_same() -> None:
    model = wide(replace(SHAPES["small"], residual_dropout=0.2, embedding_dropout=0.1, attention_dropout=0.3))
    kinds, apart = templates.kinds(model.segments())
    assert kinds == ["embed", "block", "block", "block", "head"] and not apart
    ids = ids_of(model.config)
    loss, gradients = stepped(model, ids)
    again, recomputed = stepped(model, ids, recompute=True)
    plain, _ = stepped(wide(SHAPES["small"]), ids)
    assert loss == again and loss != plain, "dropout is drawn, and twice the same"
    for name, g in gradients.items():
        torch.testing.assert_close(recomputed[name], g, atol=1e-5, rtol=1e-4)


def test_what_is_generated_with_caches_is_what_the_whole_text_says() -> None:
    model = wide(SHAPES["small"]).eval()
    prompt = ids_of(model.config)[0, :7].tolist()
    text = list(prompt)
    for token in generate(model, prompt, 30, temperature=0):
        assert token == int(model(torch.tensor([text]))[0, -1].argmax())
        text.append(token)
    assert len(text) == 37


def test_documents_of_a_row_do_not_see_each_other() -> None:
    model, ids = wide(SHAPES["small"]).eval(), ids_of(SHAPES["small"], 12)[:1]
    number = torch.tensor([[0] * 5 + [1] * 7])
    batch = {"input_ids": ids, "documents": number, "positions": torch.tensor([[*range(5), *range(7)]])}
    x = None
    for segment in model.segments()[:-1]:
        x = segment.call(segment.module, x, batch)
    assert isinstance(x, Tensor)
    apart = torch.cat([model(ids[:, :5]), model(ids[:, 5:])], 1)
    torch.testing.assert_close(model.logits(model.transformer.ln_f(x)), apart, atol=1e-4, rtol=1e-4)


def test_folders_are_read_with_and_without_the_prefix_and_their_old_buffers(tmp_path: Path) -> None:
    model = wide(SHAPES["small"])
    named = dict(model.named_parameters())
    for prefix, more in (("transformer.", {}), ("", {"h.0.attn.bias": torch.ones(1, 1, 64, 64)})):
        folder = tmp_path / f"x{prefix}"
        folder.mkdir()
        own = {name.replace("transformer.", prefix): p.detach() for name, p in named.items()} | more
        shapes = {name: tuple(p.shape) for name, p in own.items()}
        weights.save(folder, model.config.to_hf(), shapes, torch.float32, own.__getitem__, 10**9)
        read = weights.load(folder)
        assert isinstance(read, Gpt2) and read.config == model.config
        assert all(p.equal(named[name]) for name, p in read.named_parameters())
    assert shards.head(tmp_path / "x" / weights.SINGLE).keys() > {"wte.weight", "h.0.attn.bias"}


def test_a_folder_of_transformers_is_read_and_what_we_write_is_read_there(tmp_path: Path) -> None:
    model, ids = wide(SHAPES["small"]), ids_of(SHAPES["small"])
    theirs = theirs_of(model)
    theirs.save_pretrained(tmp_path / "theirs")
    read = weights.load(tmp_path / "theirs")
    torch.testing.assert_close(read(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    named = dict(read.named_parameters())
    (tmp_path / "ours").mkdir()
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    weights.save(tmp_path / "ours", read.config.to_hf(), shapes, torch.float32, named.__getitem__, 40_000)
    assert (tmp_path / "ours" / weights.INDEX).is_file()
    back = type(theirs).from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(back(ids).logits, theirs(ids).logits)


def test_a_config_is_read_as_it_is_written_and_as_transformers_means_it() -> None:
    for config in (*SHAPES.values(), *PRESETS.values(), replace(SHAPES["small"], residual_dropout=0.25)):
        assert Gpt2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert Gpt2Config.from_hf({"model_type": "gpt2"}) == replace(
        PRESETS["124m"], embedding_dropout=0.1, residual_dropout=0.1, attention_dropout=0.1
    )
    with torch.device("meta"):
        assert Gpt2(PRESETS["124m"]).num_parameters() == 124_439_808
        assert 10e6 < Gpt2(PRESETS["demo"]).num_parameters() < 12e6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_function": "relu"}, "activation_function: got 'relu', expected 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: got True, expected False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: got False, expected True"),
        ({"rotary_dim": 3}, "rotary_dim: got 3, which no gpt2 here knows"),
        ({"n_head": 5}, "hidden_size: got 32, expected a multiple of num_attention_heads = 5"),
        ({"n_layer": 0}, "num_hidden_layers: got 0, expected a whole number of at least 1"),
        ({"resid_pdrop": 1.0}, "residual_dropout: got 1.0, expected a share of at least 0 and below 1"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon: got 0, expected a finite number above 0"),
    ],
)
def test_what_a_config_cannot_say(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Gpt2Config.from_hf({**SHAPES["small"].to_hf(), **change})
