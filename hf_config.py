"""config.json and the names of tensors, as Hugging Face has them and as `model` has them.

The rule: what changes the arithmetic is done, or refused by name; so is what nobody here knows.
Only what is listed as changing nothing is passed over.
"""
import json
import math

from files import require
from model import ACTIVATIONS, GPTConfig

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM"}
SIZES = {  # of GPTConfig, and of a config.json: counts that it must have
    "gpt2": dict(vocab_size="vocab_size", n_layer="n_layer", d_model="n_embd", n_head="n_head",
                 context_length="n_positions"),
    "other": dict(vocab_size="vocab_size", n_layer="num_hidden_layers", d_model="hidden_size",
                  n_head="num_attention_heads", d_ff="intermediate_size",
                  context_length="max_position_embeddings")}
READ = {  # further keys that are read
    "gpt2": {"n_inner", "layer_norm_epsilon", "activation_function"},
    "other": {"num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "rope_theta",
              "rope_scaling", "rope_parameters", "layer_types"},
    "llama": {"attention_bias", "mlp_bias"}, "qwen3": {"attention_bias"},
    "smollm3": {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"}}
ABSENT = {  # what transformers takes where a key is missing
    "llama": {}, "mistral": {"num_key_value_heads": 8}, "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True}}
ONLY = {  # keys that change the arithmetic, and the one value that is implemented
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False, "add_cross_attention": False, "is_encoder_decoder": False,
    "use_sliding_window": False, "use_mrope": False, "pretraining_tp": 1,
    "rope_interleaved": False, "partial_rotary_factor": 1.0, "attention_bias": False,
    "mlp_bias": False, "is_causal": True, "pruned_heads": {}}
SLIDING = {"sliding_window", "max_window_layers"}  # they say nothing without use_sliding_window
INERT_IN = {"qwen2": SLIDING, "qwen3": SLIDING, "smollm3": SLIDING | {"pretraining_tp"}}
INERT = set("""
    model_type architectures _name_or_path name_or_path transformers_version auto_map _commit_hash
    torch_dtype dtype use_cache tie_word_embeddings is_llama_config unsloth_version unsloth_fixed
    transformers.js_config _attn_implementation attn_implementation _attn_implementation_autoset
    use_flash_attn use_flash_attention_2 torchscript use_bfloat16 tf_legacy_loss return_dict
    output_hidden_states output_attentions return_dict_in_generate output_scores is_decoder
    tie_encoder_decoder chunk_size_feed_forward gradient_checkpointing _flash_attn_2_enabled
    tokenizer_model_max_length tokenizer_padding_side model_max_length _num_labels output_past
    predict_special_tokens n_special finetuning_task task_specific_params problem_type
    id2label label2id num_labels tokenizer_class prefix n_ctx initializer_range
    resid_pdrop embd_pdrop attn_pdrop attention_dropout hidden_dropout dropout
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split())


def config_of(hf):
    """A config.json dict -> GPTConfig.

    ValueError, naming the key, for an architecture that `model` lacks, for a key that changes the
    arithmetic in a way that it lacks, and for one that is not known.
    """
    kind = hf.get("model_type")
    require(str(kind) in ARCHITECTURES,
            f"model_type {kind!r} is not one of {', '.join(ARCHITECTURES)}")
    check_quantization(hf)
    _check_keys(hf, kind)
    sizes = {ours: _count(hf, theirs) for ours, theirs in sizes_of(kind).items()}
    require(sizes["n_layer"] <= 10_000,
            f"{sizes['n_layer']} layers (num_hidden_layers, n_layer) are too many")
    d, heads = sizes["d_model"], sizes["n_head"]
    free = kind not in ("gpt2", "llama") and hf.get("head_dim")  # as in transformers
    require(free or d % heads == 0, f"{d} dimensions (hidden_size, n_embd) are not a multiple of "
                                    f"{heads} heads (num_attention_heads, n_head)")
    found = _gpt2(hf, d, heads) if kind == "gpt2" else _llama(hf, kind, sizes)
    require(str(found["activation"]) in ACTIVATIONS,
            f"hidden_act or activation_function {found['activation']!r} is not one of "
            f"{', '.join(ACTIVATIONS)}")
    tied = _flag(hf, "tie_word_embeddings", kind in ("gpt2", "smollm3"))
    return GPTConfig(model_type=kind, hf=hf, tie_embeddings=tied, **sizes | found)


def sizes_of(kind):
    """{name in GPTConfig: key of a config.json of this model_type} of what is counted."""
    return SIZES["gpt2" if kind == "gpt2" else "other"]


def check_quantization(hf):
    """ValueError for a config.json that says that the weights are quantized."""
    for key in ("quantization_config", "compression_config", "quantization"):
        said = hf.get(key)
        if said:
            said = said if isinstance(said, dict) else {"quant_method": str(said)}
            method = said.get("quant_method") or said.get("quant_type") or "no method named"
            bits = [f"{said[name]} bits" for name in ("bits", "w_bit") if name in said]
            bits += [name for name in ("load_in_4bit", "load_in_8bit") if said.get(name)]
            raise ValueError(quantized(f"{key}: {', '.join([str(method), *bits])}"))


def quantized(how=""):
    """What is said of weights that are quantized."""
    return (f"the checkpoint is quantized ({how}), which is not read: dequantize it and save that "
            "as safetensors, or pass a GGUF file of the model")


def _check_keys(hf, kind):
    """ValueError for a key that is not read, not inert, and not at its one value."""
    read = READ["gpt2" if kind == "gpt2" else "other"] | READ.get(kind, set())
    known = INERT | read | set(sizes_of(kind).values())
    known |= INERT_IN.get(kind, set())
    only = ONLY | {"attention_bias": True} if kind == "qwen2" else ONLY  # theirs is always there
    for key, value in hf.items():
        if value is None and key not in known:  # switched off
            continue
        if key in only and key not in known:
            require(value == only[key], f"{key} {value!r} is not implemented for {kind}: it must "
                                        f"be {json.dumps(only[key])}")
        elif key not in known and not key.endswith("_token_id"):
            raise ValueError(f"the key {key!r} ({value!r}) is not known for {kind}, and might "
                             "change what the model computes")
    window = hf.get("sliding_window", 4096) if kind == "mistral" else None  # transformers' default
    require(window is None, f"sliding_window must be null for mistral, not {window!r}: attention "
                            "over a window is not implemented")


def _gpt2(hf, d, heads):
    inner = hf.get("n_inner")
    return dict(
        n_kv_head=heads, head_dim=d // heads, rope_theta=0.0,
        d_ff=4 * d if inner is None else _count(hf, "n_inner"),
        norm_eps=_number(hf, "layer_norm_epsilon", 1e-5), qkv_bias=True, out_bias=True,
        mlp_bias=True, activation=hf.get("activation_function", "gelu_new"))


def _llama(hf, kind, sizes):
    d, heads, layers = sizes["d_model"], sizes["n_head"], sizes["n_layer"]
    hf = ABSENT[kind] | hf
    groups = heads if hf.get("num_key_value_heads") is None else _count(hf, "num_key_value_heads")
    width = d // heads if hf.get("head_dim") is None else _count(hf, "head_dim")
    require(heads % groups == 0, f"num_attention_heads {heads} is not a multiple of "
                                 f"num_key_value_heads {groups}")
    require(width % 2 == 0, f"head_dim {width} must be even: RoPE turns pairs")
    types = hf.get("layer_types")
    whole = isinstance(types, list) and types.count("full_attention") == len(types) == layers
    require(types is None or whole,
            f"layer_types must be full_attention for each of {layers} layers, not {types!r}")
    biased = _flag(hf, "attention_bias", False)
    theta, scaling = _rope(hf, sizes["context_length"], width)
    return dict(
        n_kv_head=groups, head_dim=width, norm_eps=_number(hf, "rms_norm_eps", 1e-6),
        rope_theta=theta, rope_scaling=scaling, no_rope=_no_rope(hf, kind, layers),
        qkv_bias=kind == "qwen2" or biased, out_bias=kind != "qwen2" and biased,
        mlp_bias=_flag(hf, "mlp_bias", False), activation=hf.get("hidden_act", "silu"))


ROPE = {  # the types that are implemented, and what each needs
    "default": set(), "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"short_factor", "long_factor", "attention_factor"}}


def _rope(hf, context, width):
    """(theta, GPTConfig.rope_scaling), in the form of transformers 4 or 5."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    require(isinstance(rope, dict), f"rope_scaling must be an object, not {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(str(kind) in ROPE, f"rope_type {kind!r} of rope_scaling (RoPE) is not one of "
                               f"{', '.join(ROPE)}")
    theta = _number(rope if rope.get("rope_theta") is not None else hf, "rope_theta", 1e4)
    scaling = {key: value for key, value in rope.items()
               if key not in ("type", "rope_type", "rope_theta") and value is not None}
    require(scaling.pop("partial_rotary_factor", 1.0) == 1.0, "partial_rotary_factor must be 1.0")
    for key in sorted(set(scaling) ^ ROPE[kind]):
        optional = {"llama3": ["original_max_position_embeddings"],
                    "longrope": ["original_max_position_embeddings", "factor"]}.get(kind, [])
        require(key in ROPE[kind] | set(optional), f"rope_scaling {kind} (RoPE) has no {key}")
        require(key in scaling, f"rope_scaling {kind} (RoPE) needs {key}")
    if kind == "default":
        return theta, {}
    if kind == "longrope":
        return theta, _one_factor_a_pair(scaling, width)
    numbers = {key: _number(scaling, key, None) for key in scaling if key in ROPE[kind]}
    if kind == "llama3":
        numbers["original_max_position_embeddings"] = _number(
            scaling, "original_max_position_embeddings", context)
        require(numbers["high_freq_factor"] > numbers["low_freq_factor"],
                "high_freq_factor must be greater than low_freq_factor")
    return theta, {"rope_type": kind, **numbers}


def _one_factor_a_pair(scaling, width):
    """longrope where it is the same at every length: each frequency is divided by a number."""
    short = scaling["short_factor"]
    same = short == scaling["long_factor"] and scaling["attention_factor"] == 1
    require(same, "rope_scaling longrope is implemented only where long_factor is short_factor and "
                  "attention_factor is 1")
    require(isinstance(short, list) and len(short) == width // 2
            and all(isinstance(x, int | float) and x > 0 for x in short),
            f"short_factor of rope_scaling must be {width // 2} positive numbers")
    return {"rope_type": "longrope", **scaling}


def _no_rope(hf, kind, layers):
    """The layers without RoPE: of SmolLM3 those at 0 in no_rope_layers, else every fourth."""
    if kind != "smollm3":
        return ()
    with_rope = hf.get("no_rope_layers")
    if with_rope is None:
        step = _count({"no_rope_layer_interval": 4} | hf, "no_rope_layer_interval")
        with_rope = [int((i + 1) % step != 0) for i in range(layers)]
    require(isinstance(with_rope, list) and len(with_rope) >= layers
            and all(x in (0, 1) for x in with_rope),
            f"no_rope_layers must be 0 or 1 for each of {layers} layers, not {with_rope!r}")
    return tuple(i for i in range(layers) if not with_rope[i])


def _count(hf, key):
    """hf[key], a positive integer of 31 bits."""
    require(key in hf, f"no entry {key!r}")
    value = hf[key]
    require(isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2 ** 31,
            f"{key} must be a positive integer (of at most 31 bits), not {value!r}")
    return value


def _number(hf, key, default):
    """hf[key], or the default, a positive number."""
    value = hf.get(key, default)
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    require(ok and 0 < value < math.inf, f"{key} must be a positive number, not {value!r}")
    return value


def _flag(hf, key, default):
    value = hf.get(key, default)
    require(isinstance(value, bool), f"{key} must be true or false, not {value!r}")
    return value


def config_json(c):
    """A GPTConfig -> the config.json dict that `config_of` and transformers read, 4 and 5."""
    kind = c.model_type
    ours = {theirs: getattr(c, name) for name, theirs in sizes_of(kind).items()}
    if kind == "gpt2":
        ours |= dict(n_inner=c.d_ff, layer_norm_epsilon=c.norm_eps,
                     activation_function=c.activation)
    else:
        ours |= dict(num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
                     rope_theta=c.rope_theta, rope_scaling=c.rope_scaling or None,
                     hidden_act=c.activation)
    if "attention_bias" in READ.get(kind, ()):
        ours |= dict(attention_bias=c.qkv_bias)
    if "mlp_bias" in READ.get(kind, ()):
        ours |= dict(mlp_bias=c.mlp_bias)
    if kind == "smollm3":  # transformers' own padding id may lie beyond the vocabulary
        ours |= dict(no_rope_layers=[int(i not in c.no_rope) for i in range(c.n_layer)],
                     pad_token_id=c.hf.get("pad_token_id"))
    if kind == "mistral":
        ours |= dict(sliding_window=None)
    kept = {key: value for key, value in c.hf.items() if key != "rope_parameters"}
    return {**kept, "model_type": kind, "architectures": [ARCHITECTURES[kind]],
            "tie_word_embeddings": c.tie_embeddings, **ours}


GPT2_NAMES = {
    "embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f", "layers": "h",
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn": "attn",
    "q_proj": "c_attn", "k_proj": "c_attn", "v_proj": "c_attn", "o_proj": "c_proj",
    "up_proj": "c_fc", "down_proj": "c_proj"}


def tensor_name(config, name):
    """Our parameter name -> (its name in a checkpoint, which third of a fused QKV it is or None,
    whether it is stored transposed)."""
    if name.startswith("lm_head"):
        return name, None, False
    if config.model_type != "gpt2":
        return "model." + name, None, False
    *_, owner, kind = name.split(".")
    part = "qkv".index(owner[0]) if owner in ("q_proj", "k_proj", "v_proj") else None
    transposed = owner.endswith("_proj") and kind == "weight"
    theirs = [GPT2_NAMES.get(step, step) for step in name.split(".")]
    return "transformer." + ".".join(theirs), part, transposed
