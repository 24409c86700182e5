"""The LLaMA: names and numbers are Hugging Face's, layers follow their formulas, the chain of segments is the model."""

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from models.layers import Attention, RMSNorm
from models.llama import PRESETS, Llama, LlamaConfig
from models.rope import Rotary

TINY = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
VARIANTS = {
    "untied": TINY,
    "tied": replace(TINY, tie_word_embeddings=True),
    "grouped": replace(TINY, num_key_value_heads=2, rope_theta=500.0, rms_norm_eps=1e-5),
    "one key head": replace(TINY, num_key_value_heads=1, tie_word_embeddings=True),
}
variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def batch(seed: int = 0, b: int = 2, t: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(TINY.vocab_size, (b, t + 1), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].clone()
    targets[0, 3:6] = -100
    return {"input_ids": ids[:, :-1].contiguous(), "targets": targets}


def wide(config: LlamaConfig, seed: int = 1) -> Llama:
    """A model whose weights are large enough for every part to show in the logits, norms included."""
    model = Llama(replace(config, initializer_range=0.2), seed)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0, 0.3, generator=generator)
    return model


@variants
def test_names_are_hugging_faces(config: LlamaConfig) -> None:
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
    expected = ["model.embed_tokens.weight"]
    expected += [f"model.layers.{i}.{part}.weight" for i in range(config.num_hidden_layers) for part in parts]
    expected += ["model.norm.weight"] + ([] if config.tie_word_embeddings else ["lm_head.weight"])
    model = Llama(config)
    assert [n for n, _ in model.named_parameters()] == list(model.state_dict()) == expected


def hugging_face(config: LlamaConfig) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf())).eval()


@variants
def test_hugging_face_parity(config: LlamaConfig) -> None:
    """Same names and shapes; same logits, at positions up to the last one."""
    config = replace(config, max_position_embeddings=300)
    theirs, ours = hugging_face(config), wide(config)
    shapes = {n: p.shape for n, p in ours.named_parameters()}
    assert {n: p.shape for n, p in theirs.named_parameters()} == shapes
    assert theirs.load_state_dict(ours.state_dict(), strict=False).unexpected_keys == []
    theirs.tie_weights()
    ids = torch.randint(config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@variants
def test_config_round_trip(config: LlamaConfig) -> None:
    hf = json.loads(json.dumps(config.to_hf()))
    assert hf["architectures"] == ["LlamaForCausalLM"] and hf["model_type"] == "llama"
    assert LlamaConfig.from_hf(hf) == replace(config, num_key_value_heads=config.key_value_heads)
    newer = {k: v for k, v in hf.items() if k != "rope_theta"}
    newer["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    assert LlamaConfig.from_hf(newer) == LlamaConfig.from_hf(hf)


@variants
def test_config_as_transformers_writes_it(config: LlamaConfig) -> None:
    written = hugging_face(config).config.to_dict()
    assert LlamaConfig.from_hf(written) == replace(config, num_key_value_heads=config.key_value_heads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 33}, "hidden_size: got 33, expected a multiple of 2 * num_attention_heads = 8"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3, expected a divisor of num_attention_heads = 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: got 0, expected a whole number"),
        ({"vocab_size": 0}, "vocab_size: got 0, expected a whole number"),
        ({"vocab_size": 2**31}, "vocab_size: got 2147483648, expected a whole number of at least 1, at most"),
        ({"max_position_embeddings": 2**25}, "max_position_embeddings: got 33554432, expected a whole number"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers: got 2.0, expected a whole number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: got '1e-6', expected a finite number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta: got inf, expected a finite number above 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: got 1, expected True or False"),
    ],
)
def test_config_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        replace(TINY, **change)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "config.json: model_type: got 'gpt2', expected one of llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "config.json: hidden_act: got 'gelu', expected 'silu'"),
        ({"attention_bias": 1}, "qkv_bias: got 1, expected True or False"),
        ({"head_dim": 15}, "head_dim: got 15, expected an even number"),
        ({"attention_dropout": 0.1}, "config.json: attention_dropout: got 0.1, expected 0.0"),
        ({"residual_multiplier": 0.5}, "config.json: residual_multiplier: got 0.5, which no llama here knows"),
        ({"quantization_config": {"bits": 4}}, "config.json: quantization_config: got {'bits': 4}, which no llama"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "config.json: rope_type: got 'dynamic', expected one of",
        ),
        ({"rope_scaling": {"type": "linear"}}, "config.json: rope_scaling: factor: got None; expected with"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "config.json: rope_scaling: factor: got '2', expected a"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "config.json: rope_scaling: beta: got 1;"),
    ],
)
def test_what_from_hf_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        LlamaConfig.from_hf(TINY.to_hf() | change)
    assert str(error.value).startswith(message)


def test_from_hf_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match="got no hidden_size, num_attention_heads;"):
        LlamaConfig.from_hf({"vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1})


@pytest.mark.parametrize(
    ("name", "millions"),
    [("60m", 58.07), ("130m", 134.11), ("350m", 367.97), ("1b", 1339.08), ("7b", 6738.42), ("demo", 2.76)],
)
def test_preset_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = Llama(PRESETS[name])
    assert round(model.num_parameters() / 1e6, 2) == millions
    assert all(p.is_meta for p in model.parameters())


def test_init_is_a_function_of_the_seed() -> None:
    a, b, c = Llama(TINY, seed=1), Llama(TINY, seed=1), Llama(TINY, seed=2)
    c.init_weights(1)
    with torch.device("meta"):
        d = Llama(TINY)
    d.to_empty(device="cpu").init_weights(1)
    for other in (b, c, d):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), other.parameters(), strict=True))
    ids = batch()["input_ids"]
    assert torch.equal(a(ids), d(ids)), "the rotary tables must survive to_empty"
    assert not torch.equal(a.model.embed_tokens.weight, Llama(TINY, seed=2).model.embed_tokens.weight)
    std = torch.cat([p.flatten() for p in a.parameters() if p.ndim == 2]).std().item()
    assert abs(std - 0.02) < 0.0005
    assert all((p == 1).all() for p in a.parameters() if p.ndim == 1)


def test_init_leaves_the_callers_draws_alone_after_construction() -> None:
    model, state = Llama(TINY), torch.get_rng_state()
    model.init_weights(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_counts_once() -> None:
    assert Llama(TINY).num_parameters() - Llama(VARIANTS["tied"]).num_parameters() == 61 * 32


def test_rms_norm_formula() -> None:
    norm, x = RMSNorm(32, eps=1e-6), torch.randn(2, 5, 32) * 3
    torch.nn.init.normal_(norm.weight)
    x64, w64 = x.numpy().astype(np.float64), norm.weight.detach().numpy().astype(np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * w64
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_rms_norm_is_float32_inside() -> None:
    norm, x = RMSNorm(64, eps=1e-6).bfloat16(), (torch.randn(4, 64) * 300).bfloat16()
    expected = (x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()).bfloat16()
    assert norm(x).dtype == torch.bfloat16 and torch.equal(norm(x), expected)


@pytest.mark.parametrize("start", [0, 7])
def test_rotary_formula(start: int) -> None:
    """Element pair (i, i + D/2) at position t, as a complex number, turns by t * theta^(-2i/D)."""
    d, theta = 8, 10000.0
    x = torch.randn(2, 3, 5, d)
    x64 = x.numpy().astype(np.float64)
    angle = np.outer(np.arange(start, start + 5), theta ** (-2.0 * np.arange(d // 2) / d))
    turned = (x64[..., : d // 2] + 1j * x64[..., d // 2 :]) * np.exp(1j * angle)
    got = Rotary(d, 16, theta)(x, start).numpy()
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), rtol=1e-5, atol=1e-6)


def test_rotary_tables_stay_float32_and_are_not_saved() -> None:
    rotary = Rotary(8, 16, 10000.0)
    before = rotary.cos.clone()
    rotary.bfloat16()
    assert rotary.cos.dtype == rotary.sin.dtype == torch.float32 and torch.equal(rotary.cos, before)
    assert rotary.cos.shape == (16, 4) and not rotary.state_dict()
    assert rotary(torch.randn(1, 1, 4, 8).bfloat16()).dtype == torch.bfloat16


def test_too_long_a_sequence_is_an_error() -> None:
    model = Llama(replace(TINY, max_position_embeddings=8))
    with pytest.raises(ValueError, match="got 9 tokens, expected at most max_position_embeddings = 8"):
        model(batch()["input_ids"])


def test_grouped_attention_equals_repeated_heads() -> None:
    grouped, full = (Attention(32, 4, k, Rotary(8, 16, 100.0)) for k in (2, 4))
    weights = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(weights)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(grouped(x), full(x), atol=1e-6, rtol=1e-5)


@variants
def test_causal(config: LlamaConfig) -> None:
    model, ids = wide(config), batch()["input_ids"]
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % config.vocab_size
    a, b = model(ids), model(other)
    assert torch.equal(a[:, :5], b[:, :5])
    assert (a[:, 5:] - b[:, 5:]).abs().amax((0, 2)).min() > 1e-4


@variants
def test_cache_gives_the_same_logits(config: LlamaConfig) -> None:
    model, ids = wide(config), batch()["input_ids"]
    caches = model.caches(limit=9, batch=2)
    with torch.no_grad():
        parts = [model(ids[:, a:b], caches) for a, b in ((0, 4), (4, 5), (5, 8), (8, 9))]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-5, rtol=1e-5)


def reference_loss(model: Llama, data: dict[str, Tensor], reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(data["input_ids"]).flatten(0, 1), data["targets"].flatten(), reduction=reduction)


@variants
@pytest.mark.parametrize("chunk", [1, 4, 18, 1000])
def test_chunked_loss(config: LlamaConfig, chunk: int) -> None:
    model, data = wide(config), batch()
    torch.testing.assert_close(model.loss(**data, chunk=chunk), reference_loss(model, data), atol=1e-6, rtol=1e-6)


def test_evaluation_never_holds_all_logits() -> None:
    class Widest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == TINY.vocab_size:
                self.rows = max(self.rows, out.shape[0])
            return out

    model, data = Llama(TINY), batch(b=4, t=20)
    with torch.no_grad(), Widest() as widest:
        model.loss(**data, chunk=40)
    assert widest.rows == 40  # of 80 tokens; the transposed matrix itself has 32 rows


def run_chain(model: Llama, data: dict[str, Tensor]) -> Tensor:
    """As the engine runs it: one template a kind, every parameter passed in by name."""
    params, templates, x = dict(model.named_parameters()), {}, None
    for segment in model.segments():
        template = templates.setdefault(segment.kind, segment)
        assert template.call is segment.call

        class Call(torch.nn.Module):
            def __init__(self, segment: Any = template) -> None:
                super().__init__()
                self.module, self.call = copy.deepcopy(segment.module), segment.call

            def forward(self, x: Tensor | None) -> Tensor:
                return self.call(self.module, x, data)

        call = Call()
        given = {f"module.{inner}": params[full] for inner, full in segment.names.items()}
        assert set(given) == {n for n, _ in call.named_parameters()}
        x = functional_call(call, given, (x,))
    assert x is not None
    return x


@variants
def test_segments_are_the_model(config: LlamaConfig) -> None:
    model, data = wide(config), batch()
    segments = model.segments()
    assert [s.kind for s in segments] == ["embed", *["block"] * 3, "head"]
    assert [s.tokens for s in segments] == [False] * 4 + [True]
    assert {full for s in segments for full in s.names.values()} == {n for n, _ in model.named_parameters()}
    loss, expected = run_chain(model, data), reference_loss(model, data, "sum")
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    grads = [torch.autograd.grad(v, list(model.parameters())) for v in (loss, expected)]
    for (name, _), a, b in zip(model.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@variants
def test_head_takes_slices_of_tokens(config: LlamaConfig) -> None:
    head, data = wide(config).segments()[-1], batch()
    x = torch.randn(2, 9, config.hidden_size)
    whole = head.call(head.module, x, data)
    slices = zip(x.flatten(0, 1).split(5), data["targets"].flatten().split(5), strict=True)
    parts = [head.call(head.module, h, {"targets": t}) for h, t in slices]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, atol=1e-5, rtol=1e-6)


def test_segments_do_not_register_in_the_model() -> None:
    model = Llama(VARIANTS["tied"])
    names = list(model.state_dict())
    model.segments()
    assert list(model.state_dict()) == names


@pytest.mark.compiles
def test_blocks_share_one_graph() -> None:
    """fullgraph: no graph break; one frame for all blocks and steps. The template is a copy on purpose (see below)."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = Llama(VARIANTS["grouped"])
    blocks = [s for s in model.segments() if s.kind == "block"]
    template, params = copy.deepcopy(blocks[0].module), dict(model.named_parameters())

    @torch.compile(backend=counter, fullgraph=True)
    def forward(given: dict[str, Tensor], x: Tensor) -> Tensor:
        # called on blocks[0].module itself this would compile twice: whether a given parameter *is* the template's
        # own one is guarded on, and that is so for the first block only
        return functional_call(template, given, (x,))

    for seed in range(2):
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(seed))
        for segment in blocks:
            given = {inner: params[full] for inner, full in segment.names.items()}
            got = forward(given, x)
            torch.testing.assert_close(got, segment.module(x), atol=1e-6, rtol=1e-6)
            x = got.detach()
    assert counter.frame_count == 1


@pytest.mark.compiles
def test_whole_model_is_one_graph() -> None:
    model, data = Llama(TINY), batch()
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**data), model.loss(**data), atol=1e-6, rtol=1e-6)


def test_bfloat16_follows_float32() -> None:
    model, ids = wide(TINY), batch()["input_ids"]
    expected = model(ids)
    got = model.bfloat16()(ids)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.03 * expected.norm()
