"""Decoders of transformers that are none of ours, cut at their blocks: the same losses and gradients, by the engine.

All of this skips without transformers.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.grids import few
from helpers.steps import EPS
from torch import Tensor

from engine.step.segments import cut
from engine.step.step import Step
from models.foreign import adopt
from optimizers.contract import Group
from optimizers.partition import partition
from optimizers.rules.adamw import adamw

transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")

NONE = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8, **NONE}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "initializer_range": 0.2, **NONE}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", **GPT2, **NO_DROPOUT},
    "gemma": {"model_type": "gemma", **SIZES},
    "gemma2": {"model_type": "gemma2", **SIZES, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"model_type": "gemma3_text", **SIZES, "sliding_window": 8, "sliding_window_pattern": 2},
    "phi3": {"model_type": "phi3", **SIZES},
}
KINDS = {"gemma2": 2, "gemma3_text": 2}
each = pytest.mark.parametrize("name", MODELS)


def model_of(name: str, **change: Any) -> Any:
    config = transformers.AutoConfig.for_model(**{**MODELS[name], **change})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(97, (2, 25), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    targets[0, 3:6] = -100
    return {"input_ids": ids[:, :-1], "targets": targets}


def step_of(model: Any, **options: Any) -> Step:
    params = dict(model.named_parameters())
    optimizer = partition(params, [Group("all", adamw(eps=EPS), ("",), 1e-2, 0.0)])
    options = {"mode": "off", "logits": 97 * 8, **options}
    return Step(cut(model), params, optimizer, optimizer.init(params), **options)


def trained(step: Step, steps: int = 3) -> list[float]:
    hyper = {"all": {"lr": torch.tensor(1e-2), "weight_decay": torch.tensor(0.0)}}
    return [step([batch(i), batch(i + 10)], hyper, i).loss.item() for i in range(steps)]


def plainly(model: Any, steps: int = 3) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2, eps=EPS, weight_decay=0.0), []
    for i in range(steps):
        both = {k: torch.cat([batch(i)[k], batch(i + 10)[k]]) for k in batch()}
        logits = model(input_ids=both["input_ids"], use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), both["targets"].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("name", "recompute"), [*((name, False) for name in MODELS), ("gpt2", True), ("gemma2", True)])
def test_a_step_is_that_of_the_whole_model(name: str, recompute: bool) -> None:
    """Two micro-batches, tied weights, windows, capped logits: losses and weights of plain PyTorch."""
    whole, model = model_of(name), adopt(model_of(name))
    expected = plainly(whole)
    assert trained(step_of(model, recompute=recompute)) == pytest.approx(expected, rel=1e-4)
    for (n, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert (p - q).norm() <= 2e-3 * (q - dict(model_of(name).named_parameters())[n]).norm(), n


@each
def test_blocks_share_a_template_where_they_are_called_alike(name: str) -> None:
    model = adopt(model_of(name))
    step = step_of(model)
    assert len({kind for kind in step.chain.kinds if kind.startswith("block")}) == KINDS.get(name, 1)
    assert [s.kind for s in model.segments()] == ["embed", *["block"] * 4, "head"]
    assert {n for s in model.segments() for n in s.names.values()} == {n for n, _ in model.named_parameters()}


def test_the_model_stays_what_it_was() -> None:
    model = model_of("gemma2")
    names, modes = list(model.state_dict()), [m.training for m in model.modules()]
    adopt(model)
    assert list(model.state_dict()) == names and [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_cut_is_said() -> None:
    two = transformers.AutoConfig.for_model("t5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=97)
    with pytest.raises(
        ValueError, match="T5ForConditionalGeneration: got these lists of blocks: none; expected exactly"
    ):
        adopt(transformers.T5ForConditionalGeneration(two))
    model = adopt(model_of("gpt2"))
    first = model.segments()[0]
    with pytest.raises(ValueError, match="documents: got rows of several, expected one text a row"):
        first.call(first.module, None, {**batch(), "documents": batch()["targets"]})


@pytest.mark.compiles
@pytest.mark.parametrize("name", few(["gpt2", "gemma"], "gemma"))
def test_it_may_be_compiled(name: str, backend: str) -> None:
    model = adopt(model_of(name))
    assert trained(step_of(model, mode="segments"), 2) == pytest.approx(plainly(model_of(name), 2), rel=1e-4)
