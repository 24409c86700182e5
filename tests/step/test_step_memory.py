"""What a step holds in memory, counted allocation by allocation."""

import pytest
import torch
from helpers.models import few_tokens, llama
from helpers.steps import hypers, make
from torch.nn.functional import cross_entropy

from engine.memory import counted_peak
from models.llama import Llama, LlamaConfig
from optimizers.rules.sgd import sgd

pytestmark = pytest.mark.run  # allocations are counted, which is slow

slow = pytest.mark.slow


# Memory, counted allocation by allocation.


WIDE = dict(vocab_size=16, hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2)
BLOCK = 4 * sum(p.numel() for p in Llama(LlamaConfig(num_hidden_layers=1, **WIDE)).model.layers.parameters())


def extra(layers: int, accumulation: int = 1, **options) -> float:
    """Peak of a step above weights and state, in blocks' worth of weights."""
    step = make(llama(layers, **WIDE), logits=2**24, **options)
    step(few_tokens(accumulation), hypers(0), 0)
    step(few_tokens(accumulation), hypers(1), 1)
    return counted_peak(lambda: step(few_tokens(accumulation), hypers(2), 2)) / BLOCK


def extra_of_plain_pytorch(layers: int) -> float:
    model = llama(layers, **WIDE)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    (batch,) = few_tokens(1)

    def step():
        cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["targets"].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return counted_peak(step) / BLOCK


def per_block(measure) -> float:
    """What one more block adds to the peak."""
    return (measure(12) - measure(4)) / 8


def test_plain_pytorch_holds_all_gradients():
    """The measure, checked where the answer is known."""
    assert 1 <= per_block(extra_of_plain_pytorch) < 1.2


@pytest.mark.parametrize(("recompute", "activations"), [(False, 0.2), (True, 0.01)])
def test_gradients_live_for_one_segment(recompute, activations):
    """What more blocks add are activations, or with recompute their inputs, but not gradients."""
    assert per_block(lambda layers: extra(layers, recompute=recompute)) < activations
    assert extra(12, recompute=recompute) < 3 + 12 * activations, "one block's gradients, temporaries of one tensor"


def test_with_recompute_accumulation_still_holds_the_gradients_of_one_segment():
    assert per_block(lambda layers: extra(layers, 4, recompute=True)) < 0.04
    assert extra(12, 4, recompute=True) < 3.5, "one block's gradients so far, one micro-batch's more, and temporaries"
    assert per_block(lambda layers: extra(layers, 4)) > 1, "stored activations cost all gradients, as documented"


def test_the_global_norm_holds_all_gradients_and_the_previous_norm_does_not():
    assert per_block(lambda layers: extra(layers, recompute=True, clip="global")) >= 1
    assert per_block(lambda layers: extra(layers, recompute=True, clip="previous")) < 0.01
    assert per_block(lambda layers: extra(layers, recompute=True, clip="tensor")) < 0.01


@pytest.mark.compiles
@slow
def test_a_compiled_update_adds_nothing_to_the_gradients_of_one_segment():
    for accumulation, held in ((1, 1), (4, 2)):
        got = extra(4, accumulation, mode="segments", recompute=True)
        assert held <= got < held + 0.4, (accumulation, got)


def test_the_head_never_holds_tokens_times_vocabulary():
    tokens, vocabulary = 512, 4096
    model = llama(1, vocab_size=vocabulary, hidden_size=8, intermediate_size=8)
    ids = torch.arange(tokens).view(tokens // 16, 16)
    data = [{"input_ids": ids, "targets": ids}]
    full = tokens * vocabulary * 4
    for logits, least, most in ((2**24, 2.0, 8.0), (vocabulary * 16, 0.0, 0.3)):
        step = make(model, sgd(0.0), logits=logits)
        peak = counted_peak(lambda step=step: step(data, hypers(0), 0)) / full
        assert least <= peak < most, "training"
        peak = counted_peak(lambda step=step: step.chain.loss(step.params, data[0])) / full
        assert least / 2 <= peak < most, "evaluation"
