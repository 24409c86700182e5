"""Encoders: names, logits and gradients are transformers', by segments; weights from whatever folder and back."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.encoders import HEADS, KINDS, batch_of, config_of, wide
from torch import Tensor, nn

from engine.step.segments import Chain, cut
from engine.step.step import Step
from models import encoder_weights, weights
from models.encoder import Encoder, SelfAttention
from models.encoder_config import EncoderConfig
from models.layers import attach
from optimizers.contract import Group
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.adamw import adamw
from optimizers.rules.sgd import sgd
from optimizers.wrappers.rso import rso

every = [(kind, head) for kind in KINDS for head in HEADS]
each = pytest.mark.parametrize(("kind", "head"), every, ids=[f"{kind}, {head}" for kind, head in every])


def theirs_of(ours: Encoder) -> Any:
    """transformers' model of our config.json with our weights."""
    transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    hf = ours.config.to_hf()
    config = transformers.AutoConfig.for_model(**hf)
    theirs = getattr(transformers, hf["architectures"][0])._from_config(config, attn_implementation="eager").eval()
    assert {n: p.shape for n, p in theirs.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}
    assert theirs.load_state_dict(ours.state_dict(), strict=False).unexpected_keys == []
    theirs.tie_weights()
    return theirs


def logits_of(theirs: Any, batch: dict[str, Tensor]) -> Tensor:
    return theirs(**{name: t for name, t in batch.items() if name != "targets"}).logits


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return (logits[:, 0] - targets)[~targets.isnan()].square().mean()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@each
def test_logits_and_gradients_are_those_of_transformers(kind: str, head: Any) -> None:
    """Gradients as a step takes them: one segment after another, padding and rows without target among them."""
    ours = wide(config_of(kind, head))
    theirs, batch = theirs_of(ours), batch_of(ours.config)
    expected = logits_of(theirs, batch)
    shown = batch["attention_mask"].bool() if head == "masked" else slice(None)
    assert expected[shown].std() > 0.02, "small logits would be equal whatever the formula"
    got = ours(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
    torch.testing.assert_close(got[shown], expected[shown], atol=1e-4, rtol=0)
    loss = mean_loss(expected, batch["targets"])
    loss.backward()
    found, gradients = stepped(ours, batch)
    torch.testing.assert_close(found, loss.detach(), atol=1e-4, rtol=0)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-4 * float(p.grad.abs().max() + 1), rtol=0)


def stepped(model: Encoder, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step, and the gradients with which SGD at rate 1 moved."""
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = {name: p.clone() for name, p in params.items()}
    optimizer = partition(params, [Group("all", sgd(0.0), ("",), 1.0, 0.0)])
    step = Step(cut(model), params, optimizer, optimizer.init(params), **{"mode": "off", **options})
    loss = step([batch]).loss
    return loss, {name: before[name] - p for name, p in params.items()}


@each
def test_padding_is_not_seen(kind: str, head: Any) -> None:
    ours = wide(config_of(kind, head))
    batch = batch_of(ours.config)
    ids = batch["input_ids"][3:4, :11]
    alone = ours(ids, batch["token_type_ids"][3:4, :11])
    among = ours(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])[3:4]
    torch.testing.assert_close(alone, among[:, :11] if head == "masked" else among, atol=1e-4, rtol=1e-4)


def test_a_config_is_read_as_it_is_written() -> None:
    for kind, head in every:
        config = config_of(kind, head, classifier_dropout=0.25)
        assert EncoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "t5"}, "model_type: got 't5', expected an encoder: bert or roberta"),
        ({"hidden_act": "relu"}, "hidden_act: got 'relu', expected 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: got 'relative_key'"),
        ({"num_attention_heads": 5}, "hidden_size: got 32, expected a multiple of num_attention_heads = 5"),
        ({"hidden_size": 0}, "hidden_size: got 0, expected a whole number of at least 1"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob: got 1.0, expected a number from 0 to below 1"),
        ({"id2label": ["no"]}, "id2label: got .*, expected a name for each number of a class"),
    ],
)
def test_what_a_config_cannot_say(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EncoderConfig.from_hf({**config_of().to_hf(), **change})


def bare(folder: Path, model: Encoder, old: bool = False) -> Path:
    """A folder as a model without a head is published, from that model's body; `old`: under names of TensorFlow."""
    folder.mkdir()
    prefix = f"{model.config.model_type}."
    own = {name.removeprefix(prefix): p for name, p in model.named_parameters() if name.startswith(prefix)}
    if old:
        own = {
            name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): p for name, p in own.items()
        }
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    config = {**model.config.to_hf(), "architectures": ["BertModel"]}
    weights.save(folder, config, shapes, torch.float32, own.__getitem__, 2**30)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_body_takes_any_head(tmp_path: Path, kind: str) -> None:
    ours = wide(config_of(kind))
    batch = batch_of(ours.config)
    expected = ours.base(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
    for name, old in (("new", False), ("old", True)):
        folder = bare(tmp_path / name, ours, old)
        for head, labels in (("classification", ("a", "b")), ("masked", ())):
            model = encoder_weights.load(folder, head, labels, seed=3)
            assert torch.equal(
                model.base(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]), expected
            )
            drawn = encoder_weights.sources(model, folder).drawn
            assert drawn and all(n.startswith(("classifier", "cls", "lm_head")) for n in drawn), drawn
            twin = encoder_weights.load(folder, head, labels, seed=3)
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_folder_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    ours = wide(config_of())
    (tmp_path / "whole").mkdir()
    encoder_weights.save(tmp_path / "whole", ours)
    again = encoder_weights.load(tmp_path / "whole")
    assert again.config == ours.config and all(map(torch.equal, again.parameters(), ours.parameters()))
    two = encoder_weights.empty(replace(ours.config, labels=("a", "b")))
    with pytest.raises(ValueError, match=r"classifier.weight: got the shape \[3, 32\], expected \[2, 32\]; this head"):
        encoder_weights.sources(two, tmp_path / "whole")
    assert "classifier.weight" in encoder_weights.sources(two, tmp_path / "whole", new_head=True).drawn
    for layers, said in ((4, r"encoder.layer.3\S*: got no such tensor"), (2, r"encoder.layer.2\S*: got a tensor that")):
        other = encoder_weights.empty(replace(ours.config, num_hidden_layers=layers))
        with pytest.raises(ValueError, match=said):
            encoder_weights.sources(other, tmp_path / "whole")


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_drawn_by_key(recompute: bool) -> None:
    """The same draws with recompute as without; others at another step."""
    config = config_of(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    model, batch = wide(config).train(), batch_of(config)
    losses = [stepped(model, batch, recompute=again, key=Key(5)) for again in (False, recompute)]
    assert losses[0][0] == losses[1][0]
    for name, g in losses[0][1].items():
        torch.testing.assert_close(losses[1][1][name], g, rtol=1e-5, atol=1e-6)
    assert stepped(model, batch, key=Key(6))[0] != losses[0][0]


@pytest.mark.compiles
@pytest.mark.parametrize(
    ("kind", "head"), [pytest.param(*every[0], marks=pytest.mark.slow), every[5]], ids=["bert", "roberta, masked"]
)
def test_compiled_is_as_uncompiled_and_blocks_share_a_graph(kind: str, head: Any, backend: str) -> None:
    model = wide(config_of(kind, head))
    batch = batch_of(model.config)
    plain, ours = stepped(model, batch), stepped(model, batch, mode="segments")
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=1e-5)
    for name, g in plain[1].items():
        torch.testing.assert_close(ours[1][name], g, atol=1e-4 * float(g.abs().max() + 1), rtol=0)
    assert len(Chain(cut(model)).forwards) == 3


def test_subspaces_train_the_layers_of_an_encoder() -> None:
    """RSO's tap on Linears with biases: after a period W holds what B learned."""
    model = wide(config_of())
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = [name for name in params if name.endswith("dense.weight") and ".layer." in name]
    base = partition(params, [Group("adamw", adamw(), ("",), 1e-2, 0.0)])
    optimizer = rso(base, params, names, 4, 3, Key(0))
    attach(model, names, 4, "merged")
    step = Step(cut(model), params, optimizer, optimizer.init(params), mode="off")
    before, losses = {name: params[name].clone() for name in names}, []
    for i in range(6):
        step.switch(i)
        losses.append(float(step([batch_of(model.config)]).loss))
    assert losses[-1] < losses[0] and all(not params[name].equal(before[name]) for name in names)
    assert math.isfinite(losses[-1])


@pytest.mark.skipif("LEANSTEP_MINILM" not in os.environ, reason="LEANSTEP_MINILM names no folder with all-MiniLM-L6-v2")
def test_minilm_is_that_of_transformers() -> None:
    """The real one: logits and gradients, by our reader of its folder and by theirs."""
    transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    folder = Path(os.environ["LEANSTEP_MINILM"])
    ours = encoder_weights.load(folder, "classification", ("no", "yes"))
    model = transformers.AutoModelForSequenceClassification
    theirs = model.from_pretrained(folder, attn_implementation="eager").eval()
    theirs.load_state_dict({n: p for n, p in ours.state_dict().items() if n.startswith("classifier")}, strict=False)
    batch = batch_of(ours.config)
    with torch.no_grad():
        expected = logits_of(theirs, batch)
        got = ours(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    mean_loss(logits_of(theirs, batch), batch["targets"].clamp(max=1)).backward()
    for module in ours.modules():  # a step trains, and theirs is in evaluation mode
        if isinstance(module, nn.Dropout | SelfAttention):
            module.p = ours.dropout = 0.0
    _, gradients = stepped(ours, {**batch, "targets": batch["targets"].clamp(max=1)})
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-4 * float(p.grad.abs().max() + 1), rtol=0)
