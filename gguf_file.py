"""A GGUF file, read as what its Hugging Face folder would be: a config.json, tensors, and
tokenizer files.

As in hf_config.py: a field that changes the arithmetic is done, or refused by name.
"""
import functools
import re
from collections import Counter
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

from files import existing, require
from hf_config import ARCHITECTURES, READ, config_of, sizes_of, tensor_name
from model import GPTConfig, rope_frequencies
from pieces import LLAMA3_PATTERN, QWEN2_PATTERN

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
    hf = {theirs: sizes[ours] for ours, theirs in sizes_of(arch).items()}
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
