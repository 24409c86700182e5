"""Every family against transformers: the same names, logits and gradients; and config.json there and back.

What needs transformers skips without it.
"""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.families import FAMILIES, LLAMA3, YARN, config_of, wide
from torch import Tensor

from engine.step import templates
from models.config import DecoderConfig
from models.decoder import Decoder
from models.rope import Rotary, Scaling, Yarn

TOKENS = 40  # more than any sliding window here
families = pytest.mark.parametrize("name", FAMILIES)


def ids_of(config: DecoderConfig) -> Tensor:
    return torch.randint(config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def theirs_of(hf: dict[str, Any], ours: Decoder) -> Any:
    """transformers' model of this config.json with our weights."""
    transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    config = transformers.AutoConfig.for_model(**hf)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    shapes = {n: p.shape for n, p in theirs.named_parameters()}
    assert shapes == {n: p.shape for n, p in ours.named_parameters()}
    assert theirs.load_state_dict(ours.state_dict(), strict=False).unexpected_keys == []
    theirs.tie_weights()
    return theirs


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@families
def test_logits_are_those_of_transformers(name: str) -> None:
    ours = wide(config_of(name))
    theirs, ids = theirs_of(FAMILIES[name], ours), ids_of(ours.config)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.5, "small logits would be equal whatever the formula"
        torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)


@families
def test_what_is_written_is_the_same_model_in_transformers(name: str) -> None:
    ours = wide(config_of(name))
    theirs, ids = theirs_of(ours.config.to_hf(), ours), ids_of(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@families
def test_gradients_are_those_of_transformers(name: str) -> None:
    """Those of segments, one after another, as a step takes them."""
    ours = wide(config_of(name))
    theirs, ids = theirs_of(FAMILIES[name], ours), ids_of(ours.config)
    loss_of(theirs(ids).logits, ids).backward()
    batch = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
    x = None
    for segment in ours.segments():
        x = segment.call(segment.module, x, batch)
    assert isinstance(x, Tensor)
    (x / batch["targets"].numel()).backward()
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    for parameter, p in ours.named_parameters():
        g = expected[parameter]
        assert p.grad is not None and g is not None, parameter
        if parameter.endswith("k_proj.bias") and not ours.config.qk_norm:  # softmax takes away most of it
            assert (p.grad - g).norm() <= 1e-4 * g.norm() + 1e-6, parameter
        else:
            assert (p.grad - g).norm() <= 1e-4 * g.norm(), parameter


@families
def test_a_cache_gives_the_same_logits(name: str) -> None:
    model = wide(config_of(name))
    ids = ids_of(model.config)
    caches = model.caches(limit=TOKENS, batch=2)
    with torch.no_grad():
        parts = [model(ids[:, a:b], caches) for a, b in ((0, 7), (7, 8), (8, 30), (30, 31), (31, TOKENS))]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-4, rtol=1e-5)


@families
def test_config_there_and_back(name: str) -> None:
    config = config_of(name)
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@families
def test_config_as_transformers_writes_it(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    config = transformers.AutoConfig.for_model(**FAMILIES[name])
    for written in (config.to_dict(), config.to_diff_dict()):
        assert DecoderConfig.from_hf(json.loads(json.dumps(written))) == config_of(name)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_absent_keys_mean_what_they_mean_to_transformers(kind: str) -> None:
    """Many published files leave out what is usual in their family."""
    transformers = pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 5, "num_attention_heads": 32}
    written = transformers.AutoConfig.for_model(kind, **sizes).to_dict()
    assert DecoderConfig.from_hf({"model_type": kind, **sizes}) == DecoderConfig.from_hf(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"] * 3}, "config.json: layer_types: got"),
        ({"layer_types": ["linear_attention"] * 4}, "config.json: layer_types: got"),
        ({"layer_types": ["sliding_attention"] * 4}, "config.json: layer_types: got 'sliding_attention' where use_sl"),
        ({"no_rope_layers": [1, 0]}, "config.json: no_rope_layers: got 2 entries, expected one for each of 4 layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "config.json: partial_rotary_factor: got 0.5"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        DecoderConfig.from_hf(FAMILIES["smollm3"] | change)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "change", [{"qk_norm": True}, {"nope_layers": (1,)}, {"sliding_window": 4, "sliding_layers": (0,)}]
)
def test_a_config_that_its_family_cannot_say_is_not_written(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}: got .* of the family 'llama' has not"):
        replace(config_of("llama"), **change).to_hf()


def test_blocks_are_told_apart_where_they_differ() -> None:
    """One compiled graph for all layers with a rotary embedding, one for those without."""
    for name, count in (("smollm3", 2), ("qwen2, sliding", 2), ("llama", 1)):
        kinds, _ = templates.kinds(wide(config_of(name)).segments())
        assert len({kind for kind in kinds if kind.startswith("block")}) == count, name


def test_scaled_angles_by_their_formula() -> None:
    """llama3's: long waves by the factor, short ones as they were, and in between a straight line in the turns."""
    plain = Rotary(64, 2, 10000.0)
    scaled = Rotary(64, 2, 10000.0, Scaling("llama3", 8.0, 1.0, 4.0, 64))
    ratio = torch.atan2(scaled.sin[1], scaled.cos[1]) / torch.atan2(plain.sin[1], plain.cos[1])
    turns = 64 * 10000.0 ** (-torch.arange(32) / 32) / (2 * torch.pi)
    share = ((turns - 1) / 3).clamp(0, 1)
    assert 0 < share.count_nonzero() < 32 and ((share > 0) & (share < 1)).any()
    torch.testing.assert_close(ratio, share + (1 - share) / 8, atol=1e-4, rtol=1e-4)


YARNS = [
    {},
    {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 32768},  # as Qwen2.5's card has it
    {"truncate": False, "beta_slow": 0.5},
    {"attention_factor": 0.7},
    {"mscale": 1.0, "mscale_all_dim": 0.5},
    {"mscale": 1.0, "mscale_all_dim": 0.0},
    {"factor": 1.0},
]


@pytest.mark.parametrize("own", YARNS)
@pytest.mark.parametrize("theta", [100.0, 1e6])
def test_yarn_has_the_angles_of_transformers(own: dict[str, Any], theta: float) -> None:
    pytest.importorskip("transformers", reason="transformers (the extra hf) is not installed")
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf = {**FAMILIES["qwen2"], "hidden_size": 256, "rope_theta": theta, "rope_scaling": YARN | own}
    hf["max_position_embeddings"] = 4 * hf["rope_scaling"]["original_max_position_embeddings"]
    frequency, times = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.for_model(**hf), "cpu")
    scaling = DecoderConfig.from_hf(hf).rope_scaling
    assert scaling is not None and scaling.attention == pytest.approx(times, rel=1e-6)
    plain = theta ** (-torch.arange(32, dtype=torch.float32) / 32)
    torch.testing.assert_close(scaling.stretched(plain, theta), frequency, rtol=1e-5, atol=0)
    assert own == {"factor": 1.0} or not frequency.equal(plain)


def test_yarn_by_its_formula() -> None:
    """A pair that turns often keeps its angle, one that turns seldom has a quarter of it; both tables are larger."""
    plain, found = Rotary(64, 2, 100.0), Rotary(64, 2, 100.0, Yarn(4.0, 64, beta_fast=4.0))
    for table in ("cos", "sin"):
        assert getattr(found, table)[0, 0] == pytest.approx(getattr(plain, table)[0, 0] * (0.1 * math.log(4) + 1))
    ratio = torch.atan2(found.sin[1], found.cos[1]) / torch.atan2(plain.sin[1], plain.cos[1])
    turns = 64 * 100.0 ** (-torch.arange(32) / 32) / (2 * torch.pi)
    torch.testing.assert_close(ratio[turns > 5], torch.ones(int((turns > 5).sum())), atol=1e-4, rtol=0)
    torch.testing.assert_close(ratio[turns < 0.9], torch.full((int((turns < 0.9).sum()),), 0.25), atol=1e-4, rtol=0)
    assert ((ratio > 0.3) & (ratio < 0.95)).any() and (turns < 0.9).any()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"rope_type": "longrope"}, "rope_type: got 'longrope', expected one of default, linear, llama3, yarn"),
        ({"truncate": 1}, "rope_scaling: truncate: got 1, expected true or false"),
        ({"beta_fast": -1}, "rope_scaling: beta_fast: got -1, expected a number above 0"),
        ({"mrope_section": [1]}, "rope_scaling: mrope_section: got .*, and perhaps beta_fast"),
        ({"factor": None}, "rope_scaling: factor: got None; expected with rope_type 'yarn' exactly factor"),
    ],
)
def test_what_yarn_refuses(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(FAMILIES["qwen2"] | {"rope_scaling": YARN | own})


def test_biases_begin_at_zero() -> None:
    model = Decoder(config_of("qwen2"))
    biases = {n: p for n, p in model.named_parameters() if n.endswith(".bias")}
    assert len(biases) == 3 * model.config.num_hidden_layers and not any(p.any() for p in biases.values())


PUBLISHED = {  # the keys of config.json that published models have, and what they make of a layer
    "Llama 3.1 8B": (
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "rms_norm_eps": 1e-05,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {**LLAMA3, "rope_type": "llama3"},
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "eos_token_id": [128001, 128008, 128009],
            "torch_dtype": "bfloat16",
            "transformers_version": "4.42.3",
            "use_cache": True,
        },
        8_030_261_248,
    ),
    "Mistral 7B 0.3": (
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32768,
            "rms_norm_eps": 1e-05,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "hidden_act": "silu",
        },
        7_248_023_552,
    ),
    "Qwen2.5 0.5B": (
        {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "use_mrope": False,
            "use_sliding_window": False,
            "sliding_window": 32768,
            "max_window_layers": 24,
            "attention_dropout": 0.0,
        },
        494_032_768,
    ),
    "Qwen3 0.6B": (
        {
            "model_type": "qwen3",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
            "max_position_embeddings": 40960,
            "rope_theta": 1000000,
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
            "max_window_layers": 28,
            "attention_bias": False,
        },
        596_049_920,
    ),
    "SmolLM3 3B": (
        {
            "model_type": "smollm3",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "vocab_size": 128256,
            "rope_theta": 5000000.0,
            "max_position_embeddings": 65536,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "no_rope_layer_interval": 4,
            "layer_types": ["full_attention"] * 36,
            "pretraining_tp": 2,
            "use_sliding_window": False,
        },
        3_075_098_624,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_read(name: str) -> None:
    """Their numbers of parameters are those that their authors state."""
    written, parameters = PUBLISHED[name]
    config = DecoderConfig.from_hf(written)
    with torch.device("meta"):
        assert Decoder(replace(config, max_position_embeddings=8)).num_parameters() == parameters
    assert DecoderConfig.from_hf(config.to_hf()) == config


def refusal(config: dict[str, Any]) -> str:
    try:
        DecoderConfig.from_hf(config)
    except ValueError as error:
        return str(error)
    return ""


@families
def test_a_value_of_the_wrong_kind_is_a_line(name: str) -> None:
    """Nothing but ValueError is raised, whatever a key holds."""
    refused = 0
    for key in FAMILIES[name].keys() | config_of(name).to_hf().keys():
        for value in ("x", -1, 0, [1], {"a": 1}, {"rope_type": [1]}, 1e400):
            said = refusal(FAMILIES[name] | {key: value})
            assert "\n" not in said, (key, value)
            refused += said != ""
    assert refused > 70
