"""The Hugging Face layout of a model folder: what its config.json says in the words of `model.GPTConfig`, and tensors' names."""
import json

from safetensors import SafetensorError, safe_open


def require(ok, message):
    if not ok:
        raise ValueError(message)


def fields_of(hf):
    """A config.json dict -> the fields of GPTConfig. ValueError on an architecture that `model` does not implement."""
    kind = hf.get("model_type")
    if kind == "gpt2":
        d, heads = hf["n_embd"], hf["n_head"]
        require(hf.get("activation_function", "gelu_new") == "gelu_new", "activation_function must be gelu_new")
        return dict(model_type=kind, vocab_size=hf["vocab_size"], n_layer=hf["n_layer"], d_model=d, n_head=heads,
                    n_kv_head=heads, head_dim=d // heads, d_ff=hf.get("n_inner") or 4 * d, context_length=hf["n_positions"],
                    norm_eps=hf["layer_norm_epsilon"], rope_theta=0.0, qkv_bias=True, out_bias=True, mlp_bias=True,
                    tie_embeddings=hf.get("tie_word_embeddings", True), hf=hf)
    require(kind in ("llama", "qwen2"), f"model_type {kind!r} is not one of gpt2, llama, qwen2")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5 or 4
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    require(rope_type == "default", f"RoPE scaling {rope_type!r} is not implemented")
    require(hf.get("hidden_act", "silu") == "silu", "hidden_act must be silu")
    require(not hf.get("use_sliding_window"), "sliding-window attention is not implemented")
    d, heads, bias = hf["hidden_size"], hf["num_attention_heads"], hf.get("attention_bias", False)
    return dict(model_type=kind, vocab_size=hf["vocab_size"], n_layer=hf["num_hidden_layers"], d_model=d, n_head=heads,
                n_kv_head=hf.get("num_key_value_heads") or heads, head_dim=hf.get("head_dim") or d // heads,
                d_ff=hf["intermediate_size"], context_length=hf["max_position_embeddings"], norm_eps=hf["rms_norm_eps"],
                rope_theta=rope.get("rope_theta") or hf.get("rope_theta", 1e4), qkv_bias=kind == "qwen2" or bias,
                out_bias=kind == "llama" and bias, mlp_bias=hf.get("mlp_bias", False),
                tie_embeddings=hf.get("tie_word_embeddings", False), hf=hf)


def config_json(c):
    """A GPTConfig -> the config.json dict that `fields_of` and transformers read."""
    if c.model_type == "gpt2":
        ours = dict(architectures=["GPT2LMHeadModel"], n_embd=c.d_model, n_head=c.n_head, n_layer=c.n_layer,
                    n_inner=c.d_ff, n_positions=c.context_length, layer_norm_epsilon=c.norm_eps)
    else:
        name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[c.model_type]
        ours = dict(architectures=[name], hidden_size=c.d_model, num_attention_heads=c.n_head, num_hidden_layers=c.n_layer,
                    num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, intermediate_size=c.d_ff,
                    max_position_embeddings=c.context_length, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
                    hidden_act="silu")
        if c.model_type == "llama":
            ours.update(attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias)
    return {**c.hf, "model_type": c.model_type, "vocab_size": c.vocab_size, "tie_word_embeddings": c.tie_embeddings, **ours}


GPT2_NAMES = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f", "layers": "h", "input_layernorm": "ln_1",
              "post_attention_layernorm": "ln_2", "self_attn": "attn", "o_proj": "c_proj", "q_proj": "c_attn",
              "k_proj": "c_attn", "v_proj": "c_attn", "up_proj": "c_fc", "down_proj": "c_proj"}


def tensor_name(config, name):
    """Our parameter name -> (its name in a checkpoint, which third of a fused QKV it is or None, stored transposed?)."""
    if name.startswith("lm_head"):
        return name, None, False
    if config.model_type != "gpt2":
        return "model." + name, None, False
    steps = name.split(".")
    part = "qkv".index(steps[-2][0]) if steps[-2] in ("q_proj", "k_proj", "v_proj") else None
    linear = steps[-2].endswith("_proj") and steps[-1] == "weight"
    return "transformer." + ".".join(GPT2_NAMES.get(s, s) for s in steps), part, linear


def existing(path):
    """The path itself. FileNotFoundError, in one line, if it is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: is it a Hugging Face model folder?")
    return path


def read_tensors(folder):
    """All tensors of a folder: from model.safetensors, else from the shards its index names, else from every *.safetensors."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if index.exists() and not single.exists():
        try:
            files = [existing(folder / name) for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{index}: not an index of safetensors files ({error})") from None
    require(files, f"{folder}: no *.safetensors file in it")
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                tensors.update((key, f.get_tensor(key)) for key in f.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
    if "wte.weight" in tensors:  # GPT-2 as first published, without the prefix
        tensors = {"transformer." + key: w for key, w in tensors.items()}
    return tensors
