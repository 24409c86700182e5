"""What config.json means, for each family of decoders: keys into fields of `DecoderConfig`, and back.

A key that is absent has the value that transformers gives it. A key that would change the model and that nothing here
knows is refused by its name; those in `HARMLESS` change nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .rope import Scaling, Yarn

Keys = Mapping[str, Any]

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
USUAL: dict[str, Any] = {  # and what transformers takes where config.json says nothing
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "head_dim": None,
}
FIXED: dict[str, Any] = {  # there is no other here
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
}
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
_SWITCHES = """
    model_type architectures auto_map transformers_version transformers.js_config _name_or_path name_or_path
    _commit_hash _attn_implementation _attn_implementation_autoset _experts_implementation attn_implementation
    torch_dtype dtype use_cache output_attentions output_hidden_states return_dict use_return_dict torchscript
    use_bfloat16 bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    max_window_layers pretraining_tp is_llama_config is_decoder chunk_size_feed_forward gradient_checkpointing
    id2label label2id num_labels problem_type finetuning_task task_specific_params tokenizer_class prefix
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens tf_legacy_loss
    unsloth_version unsloth_fixed model_name
"""
HARMLESS = frozenset(_SWITCHES.split())


class Family(NamedTuple):
    """A model_type: its class in transformers, the keys that it has beside the usual ones or with other defaults, and
    what they mean."""

    architecture: str
    defaults: Keys
    fields: Callable[[Keys], dict[str, Any]]
    keys: Callable[[Keys], dict[str, Any]]


def _llama(c: Keys) -> dict[str, Any]:
    return {"qkv_bias": c["attention_bias"], "output_bias": c["attention_bias"], "mlp_bias": c["mlp_bias"]}


def _llama_keys(f: Keys) -> dict[str, Any]:
    return {"attention_bias": f["qkv_bias"], "mlp_bias": f["mlp_bias"]}


def _mistral(c: Keys) -> dict[str, Any]:
    window = c["sliding_window"]
    return {"sliding_window": window, "sliding_layers": () if window is None else _all(c)}


def _mistral_keys(f: Keys) -> dict[str, Any]:
    return {"sliding_window": f["sliding_window"]}


def _qwen2(c: Keys) -> dict[str, Any]:
    first = c["max_window_layers"]
    return {"qkv_bias": True, **_sliding(c, [i for i in _all(c) if i >= first])}


def _qwen2_keys(f: Keys) -> dict[str, Any]:
    return _sliding_keys(f)


def _qwen3(c: Keys) -> dict[str, Any]:
    bias = c["attention_bias"]
    return {**_qwen2(c), "qkv_bias": bias, "output_bias": bias, "qk_norm": True}


def _qwen3_keys(f: Keys) -> dict[str, Any]:
    return {"attention_bias": f["qkv_bias"], **_sliding_keys(f)}


def _smollm3(c: Keys) -> dict[str, Any]:
    rope, every = c["no_rope_layers"], c["no_rope_layer_interval"]  # 1: the layer has a rotary embedding
    if rope is None:
        rope = [int((i + 1) % every != 0) for i in _all(c)]
    if len(rope) < len(_all(c)):
        raise ValueError(
            f"config.json: no_rope_layers: got {len(rope)} entries, expected one for each of {len(_all(c))} layers"
        )
    without = tuple(i for i in _all(c) if not rope[i])
    return {**_llama(c), "nope_layers": without, **_sliding(c, without)}


def _smollm3_keys(f: Keys) -> dict[str, Any]:
    rope = [int(i not in f["nope_layers"]) for i in range(f["num_hidden_layers"])]
    return {**_llama_keys(f), "no_rope_layers": rope, "no_rope_layer_interval": 4, **_sliding_keys(f)}


def _all(c: Keys) -> tuple[int, ...]:
    return tuple(range(c["num_hidden_layers"]))


def _sliding(c: Keys, usual: Sequence[int]) -> dict[str, Any]:
    """Window and its layers, which are `usual` where layer_types does not list them."""
    window = c["sliding_window"] if c["use_sliding_window"] else None
    kinds = c["layer_types"]
    if kinds is None:
        layers = () if window is None else tuple(usual)
    else:
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
        if len(kinds) != c["num_hidden_layers"] or set(kinds) - {"sliding_attention", "full_attention"}:
            raise ValueError(
                f"config.json: layer_types: got {kinds}, expected 'full_attention' or 'sliding_attention' for each of "
                f"{c['num_hidden_layers']} layers"
            )
        if layers and window is None:
            raise ValueError(
                "config.json: layer_types: got 'sliding_attention' where use_sliding_window and sliding_window give no "
                "window; set both, or make every layer 'full_attention'"
            )
    return {"sliding_window": window if layers else None, "sliding_layers": layers}


def _sliding_keys(f: Keys) -> dict[str, Any]:
    kinds = ["sliding_attention" if i in f["sliding_layers"] else "full_attention" for i in _all(f)]
    windowed = f["sliding_window"] is not None
    return {"use_sliding_window": windowed, "sliding_window": f["sliding_window"], "layer_types": kinds}


BIASES = {"attention_bias": False, "mlp_bias": False}
WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", BIASES, _llama, _llama_keys),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        _mistral,
        _mistral_keys,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768, **WINDOW},
        _qwen2,
        _qwen2_keys,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            **WINDOW,
        },
        _qwen3,
        _qwen3_keys,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "rope_theta": 2000000.0,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            **BIASES,
            **WINDOW,
            "sliding_window": None,
        },
        _smollm3,
        _smollm3_keys,
    ),
}


def read(config: Keys) -> dict[str, Any]:
    """The fields of `DecoderConfig` that a config.json gives. Raises ValueError, naming the key."""
    kind = config.get("model_type") or "llama"
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ValueError(
            f"config.json: model_type: got {kind!r}, expected one of {', '.join(FAMILIES)}; there is no other"
        )
    if missing := [name for name in SIZES if config.get(name) is None]:
        raise ValueError(f"config.json: got no {', '.join(missing)}; expected all sizes of the model, add them")
    keys = {**USUAL, **family.defaults}
    for name, value in config.items():
        if name in FIXED:
            if value is not None and value != FIXED[name]:
                raise ValueError(f"config.json: {name}: got {value!r}, expected {FIXED[name]!r}; there is no other")
        elif name in keys or name in SIZES:
            keys[name] = value
        elif name not in ROPE and name not in HARMLESS and value is not None:
            raise ValueError(
                f"config.json: {name}: got {value!r}, which no {kind} here knows and which may change the model; "
                "remove the key if it does not"
            )
    theta, scaling = _rope(config, keys["rope_theta"])
    if keys["num_key_value_heads"] is None or keys["num_key_value_heads"] == 0:
        keys["num_key_value_heads"] = keys["num_attention_heads"]
    usual = {name: keys[name] for name in (*SIZES, *USUAL)}
    try:
        own = family.fields(keys)
    except (TypeError, LookupError, ArithmeticError) as error:  # such as a text where a list is expected
        said = {name: keys[name] for name in ("num_hidden_layers", *family.defaults) if keys[name] is not None}
        raise ValueError(f"config.json: got {said}, of which one is of the wrong kind ({error}); correct it") from None
    return {**usual, "family": kind, **own, "rope_theta": theta, "rope_scaling": scaling}


def write(fields: Keys) -> dict[str, Any]:
    """The config.json of a model with these fields of `DecoderConfig`, all of them settled."""
    kind = fields["family"]
    if kind not in FAMILIES:
        raise ValueError(f"family: got {kind!r}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    written = {
        "architectures": [family.architecture],
        "model_type": kind,
        "hidden_act": "silu",
        **family.keys(fields),
        **{name: fields[name] for name in (*SIZES, *USUAL)},
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    scaling: Scaling | Yarn | None = fields["rope_scaling"]
    if scaling is not None:
        names = ("rope_type", *SCALED[scaling.rope_type], *OPTIONAL.get(scaling.rope_type, ()))
        found = {name: getattr(scaling, name) for name in names}
        written["rope_scaling"] = {name: value for name, value in found.items() if value is not None}
    return written


SCALED = {  # what each rope_type has, and what it may have
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")}


def _rope(config: Keys, usual: float) -> tuple[float, Scaling | Yarn | None]:
    """Theta and scaling, as transformers 5 (rope_parameters) or 4 (rope_theta, rope_scaling) write them."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"config.json: rope_scaling: got {given!r}, expected an object")
    rope = {name: value for name, value in given.items() if value is not None}
    theta = rope.pop("rope_theta", config.get("rope_theta") or usual)
    kind = rope.pop("rope_type", rope.get("type", "default"))
    rope.pop("type", None)
    if not isinstance(kind, str) or kind not in ("default", *SCALED):
        raise ValueError(
            f"config.json: rope_type: got {kind!r}, expected one of default, {', '.join(SCALED)}; there is no other"
        )
    if (turned := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor: got {turned!r}, expected 1.0; there is no other")
    names, more = SCALED.get(kind, ()), OPTIONAL.get(kind, ())
    before = "original_max_position_embeddings"
    if before not in names:
        rope.pop(before, None)  # a note of transformers 5
    elif before not in rope and config.get(before):
        rope[before] = config[before]
    if odd := sorted((set(names) - set(rope)) | (set(rope) - {*names, *more})):
        raise ValueError(
            f"config.json: rope_scaling: {odd[0]}: got {rope.get(odd[0])!r}; expected with rope_type {kind!r} "
            f"{'exactly ' + ', '.join(names) if names else 'nothing else'}"
            f"{', and perhaps ' + ', '.join(more) if more else ''}"
        )
    for name in more:
        if name != "truncate" and rope.get(name) == 0:  # which transformers takes for absent
            del rope[name]
    for name, value in rope.items():
        whole = (bool,) if name == "truncate" else (int, float)
        if type(value) not in whole or (name != "truncate" and not value > 0):
            wanted = "true or false" if name == "truncate" else "a number above 0"
            raise ValueError(f"config.json: rope_scaling: {name}: got {value!r}, expected {wanted}")
    return theta, None if kind == "default" else Yarn(**rope) if kind == "yarn" else Scaling(kind, **rope)
