"""ResNets and ViTs: names, outputs and gradients are torchvision's and transformers', by segments."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.vision import LABELS, batch_of, resnet, stepped, vit, wide
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.step.segments import Chain, cut
from engine.step.step import Step
from models import vit_weights, weights
from models.layers import attach
from models.resnet import ResNet, ResNetConfig, preset
from models.vit_config import ViTConfig
from optimizers.contract import Group
from optimizers.partition import partition
from optimizers.random import Key
from optimizers.rules.adamw import adamw
from optimizers.wrappers.rso import rso

MODELS = {"resnet, cifar": resnet, "resnet": lambda: resnet(False), "vit": vit}
each = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def plain(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss in training mode and its gradients, by plain autograd."""
    loss = F.cross_entropy(model(batch["pixels"]), batch["targets"])
    params = dict(model.named_parameters())
    return loss, dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], within: float = 1e-4) -> None:
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, atol=within * float(g.abs().max() + 1), rtol=0, msg=name)


@each
@pytest.mark.parametrize("recompute", [False, True])
def test_segments_are_the_model(make: Any, recompute: bool) -> None:
    """Loss, gradients and running statistics of a step are those of the whole module, also where forwards are run
    twice: the statistics move once a micro-batch."""
    ours, theirs = make(), make()
    batches = [batch_of(seed=seed) for seed in (0, 1)]
    for batch in batches:
        batch["targets"][:2] = torch.tensor([2, -100])
    found = [plain(theirs, batch) for batch in batches]  # five targets each, so the mean of means is the mean
    loss, gradients = stepped(ours, batches, recompute=recompute)
    torch.testing.assert_close(loss, (found[0][0] + found[1][0]).detach() / 2, rtol=1e-5, atol=1e-5)
    assert_close(gradients, {name: (g + found[1][1][name]) / 2 for name, g in found[0][1].items()}, 1e-5)
    moved = dict(theirs.named_buffers())
    assert len(moved) == sum(3 for m in theirs.modules() if isinstance(m, nn.BatchNorm2d))
    for name, b in ours.named_buffers():
        torch.testing.assert_close(b, moved[name], rtol=1e-5, atol=1e-6, msg=name)


@each
def test_mixed_precision_is_the_model_within_what_bf16_can_say(make: Any) -> None:
    """Products in bf16, and gradients and weights in float32. Batch norms keep their weights in the dtype of their
    statistics, as kernels ask for, and these move as in float32."""
    ours, exact, batch = make(), make(), batch_of()
    loss, gradients = stepped(ours, [batch], compute_dtype=torch.bfloat16)
    expected, found = plain(exact, batch)
    assert float((loss - expected).abs() / expected) < 0.03
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    both = [torch.cat([grads[name].flatten() for name in found]) for grads in (gradients, found)]
    assert F.cosine_similarity(*both, dim=0) > 0.98
    for name, b in exact.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), b, rtol=0.05, atol=0.02, msg=name)


def test_resnet18_is_that_of_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    ours = ResNet(preset("resnet18", LABELS), seed=3)
    theirs = torchvision.models.resnet18(num_classes=len(LABELS))
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    wide(ours, 3)
    theirs.load_state_dict(ours.state_dict())
    batch = batch_of(64, 4)
    expected, gradients = plain(theirs.train(), batch)
    loss, got = stepped(ours, [batch])
    torch.testing.assert_close(loss, expected.detach(), atol=1e-4, rtol=0)
    assert_close(got, gradients)
    torch.testing.assert_close(ours.eval()(batch["pixels"]), theirs.eval()(batch["pixels"]), atol=1e-4, rtol=1e-4)


def test_resnet20_is_that_of_the_paper() -> None:
    """0.27 M parameters (Table 6 of arXiv 1512.03385), 19 convolutions, shortcuts without parameters."""
    with torch.device("meta"):
        model = ResNet(preset("resnet20", tuple("abcdefghij")))
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 19
    assert sum(name.startswith("layer") and "downsample" in name for name in model.state_dict()) == 0
    x = torch.randn(2, 16, 8, 8)
    second = resnet(widths=(16, 32)).layer2[0].downsample(x)
    assert torch.equal(second[:, :16], x[:, :, ::2, ::2]) and not second[:, 16:].any() and second.shape[1] == 32


def test_vit_is_that_of_transformers(tmp_path: Path) -> None:
    """By way of folders, whose names are those of published ones whatever names transformers has in memory."""
    transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    ours, batch = vit(), batch_of()
    vit_weights.save(tmp_path, ours)
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    logits = theirs(batch["pixels"]).logits
    assert logits.std() > 0.1, "small logits would be equal whatever the formula"
    torch.testing.assert_close(ours(batch["pixels"]), logits, atol=1e-4, rtol=0)
    F.cross_entropy(logits, batch["targets"]).backward()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    assert_close(stepped(ours, [batch])[1], load_file(tmp_path / "gradients" / weights.SINGLE))


def test_a_vit_goes_into_a_folder_and_comes_back(tmp_path: Path) -> None:
    """With its classes as it was; for others, and from a body alone, with a classifier that the seed draws."""
    ours = vit()
    whole, body = tmp_path / "whole", tmp_path / "body"
    for folder in (whole, body):
        folder.mkdir()
    vit_weights.save(whole, ours)
    again = vit_weights.load(whole)
    assert again.config == ours.config and all(map(torch.equal, again.parameters(), ours.parameters()))
    own = {n.removeprefix("vit."): p for n, p in ours.named_parameters() if n.startswith("vit.")}
    own["pooler.dense.weight"] = torch.zeros(16, 16)  # as the published in21k model has it
    shapes = {n: tuple(p.shape) for n, p in own.items()}
    weights.save(body, {**ours.config.to_hf(), "id2label": {"0": "a", "1": "b"}}, shapes, torch.float32, own.get, 2**30)
    for folder, labels in ((whole, ("x", "y")), (body, LABELS), (body, ())):
        model = vit_weights.load(folder, labels, seed=3)
        assert torch.equal(model.vit.layernorm.weight, ours.vit.layernorm.weight)
        assert vit_weights.found_in(folder, model).drawn == ("classifier.weight", "classifier.bias")
        assert torch.equal(model.classifier.weight, vit_weights.load(folder, labels, seed=3).classifier.weight)
    other = vit_weights.empty(ViTConfig(**{**vars(ours.config), "num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"encoder.layer.3\S*: got no such tensor"):
        vit_weights.found_in(whole, other)


def test_configs_are_read_as_they_are_written() -> None:
    for model, kind in ((vit(), ViTConfig), (resnet(), ResNetConfig)):
        assert kind.from_hf(json.loads(json.dumps(model.config.to_hf()))) == model.config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "bert"}, "model_type: got 'bert', expected 'vit'"),
        ({"hidden_act": "relu"}, "hidden_act: got 'relu', expected 'gelu'"),
        ({"patch_size": 3}, "image_size: got 16, expected a multiple of patch_size = 3"),
        ({"num_attention_heads": 3}, "hidden_size: got 16, expected a multiple of num_attention_heads = 3"),
        ({"num_channels": 0}, "num_channels: got 0, expected a whole number of at least 1"),
        ({"id2label": {"0": "a"}}, "labels: got .*, expected a name for each of two classes or more"),
    ],
)
def test_what_a_config_cannot_say(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ViTConfig.from_hf({**vit().config.to_hf(), **change})


@each
def test_memory_comes_a_tensor_at_a_time(make: Any) -> None:
    """A model on the meta device is, allocated and drawn, one that was made with memory."""
    expected = type(make())(make().config, seed=5)
    with torch.device("meta"):
        model = type(expected)(expected.config)
    model.allocate("cpu")
    model.init_weights(5)
    for (name, t), (_, other) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(t, other), name


@pytest.mark.compiles
@pytest.mark.parametrize(
    "make",
    [pytest.param(own, id=name, marks=[] if name == "vit" else pytest.mark.slow) for name, own in MODELS.items()],
)
def test_compiled_is_as_uncompiled_and_equal_blocks_share_a_graph(make: Any, backend: str) -> None:
    batch = batch_of()
    expected, got = (stepped(make(), [batch], mode=mode) for mode in ("off", "segments"))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    assert_close(got[1], expected[1])
    forwards = Chain(cut(make())).forwards
    assert list(forwards) == (
        ["embed", "block", "head"] if make is vit else ["stem", "block", "block 2", "block 3", "head"]
    )


def test_subspaces_train_the_layers_of_a_vit() -> None:
    """RSO's tap on Linears: W holds what B learned."""
    model = vit()
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = [name for name in params if name.endswith("dense.weight")]
    base = partition(params, [Group("adamw", adamw(), ("",), 1e-2, 0.0)])
    optimizer = rso(base, params, names, 4, 3, Key(0))
    attach(model, names, 4, "merged")
    step = Step(cut(model), params, optimizer, optimizer.init(params), mode="off")
    before, losses = {name: params[name].clone() for name in names}, []
    for i in range(6):
        step.switch(i)
        losses.append(float(step([batch_of()]).loss))
    assert losses[-1] < losses[0] and all(not params[name].equal(before[name]) for name in names)
