"""extras/formats.py: tokenizers as transformers reads them, GGUF files as the models that they were
made of, names on the hub, and every form of row. All rows are invented."""
import argparse
import json
import pydoc_data.topics
import random
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from conftest import make_folder, tiny

import data
import model
import train
from data import bytes_to_unicode, load_task
from model import GPT, GPTConfig

formats = pytest.importorskip("extras.formats")


@pytest.fixture(autouse=True)
def cache(registries_stay_as_they_were, tmp_path, monkeypatch):
    """The extra is attached, and the cache is empty."""
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    formats.attach(train.PARTS)
    return tmp_path / "cache"


def load(folder):
    return train.PARTS["tokenizer"](folder)


def same_logits(ours, theirs, tolerance=1e-4):
    """Two models, each ours or transformers', compute the same."""
    ids = torch.randint(0, 260, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (getattr(y, "logits", y) for y in (ours(ids), theirs(ids)))
    assert (a - b).abs().max() < tolerance * b.abs().max()


# ------------------------------------------------------------------------------------- tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # it leaves white space and commas out
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
            "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% endif %}")
WORLD = ("naïve café Привет мир 你好,世界。今日は東京です 한국어 שלום مرحبا ١٢٣ ½ Ⅷ x² e\u0301 Å ﬁ "
         "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \ufeff\u200b \x00\x1f")
CODE = Path(argparse.__file__).read_text()
DOCUMENTS = list(pydoc_data.topics.topics.values())


def byte_level(tokens, pre_tokenizer):
    """A byte-level BPE with this pre-tokenizer."""
    t = tokens.Tokenizer(tokens.models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizer, tokens.decoders.ByteLevel()
    return t, tokens.trainers.BpeTrainer(
        special_tokens=SPECIAL, vocab_size=700, show_progress=False,
        initial_alphabet=tokens.pre_tokenizers.ByteLevel.alphabet())


def bloom(tokens):
    pre = tokens.pre_tokenizers
    return byte_level(tokens, pre.Sequence([
        pre.Split(tokens.Regex(BLOOM), "isolated"),
        pre.ByteLevel(add_prefix_space=False, use_regex=False)]))


def several_splits(tokens):
    """As DeepSeek's: digits in threes, then Chinese, then the rest."""
    pre = tokens.pre_tokenizers
    return byte_level(tokens, pre.Sequence([
        pre.Split(tokens.Regex(r"\p{N}{1,3}"), "isolated"),
        pre.Split(tokens.Regex("[一-龥]+"), "isolated"),
        pre.ByteLevel(add_prefix_space=False)]))


def prefix_space(tokens):
    return byte_level(tokens, tokens.pre_tokenizers.ByteLevel(add_prefix_space=True))


def llama2(tokens):
    """BPE on characters with bytes to fall back on, a blank as ▁: what sentencepiece's becomes."""
    t = tokens.Tokenizer(tokens.models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    names, decoders = tokens.normalizers, tokens.decoders
    t.normalizer = names.Sequence([names.Prepend("▁"), names.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                   decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    return t, tokens.trainers.BpeTrainer(special_tokens=SPECIAL + alphabet, vocab_size=900,
                                         max_token_length=8, show_progress=False)


def unigram(tokens):
    """Unigram with Metaspace, as T5's."""
    t = tokens.Tokenizer(tokens.models.Unigram())
    t.normalizer = tokens.normalizers.NFKC()
    t.pre_tokenizer, t.decoder = tokens.pre_tokenizers.Metaspace(), tokens.decoders.Metaspace()
    return t, tokens.trainers.UnigramTrainer(special_tokens=SPECIAL, vocab_size=600,
                                             unk_token="<unk>", show_progress=False)


def wordpiece(tokens):
    t = tokens.Tokenizer(tokens.models.WordPiece(unk_token="<unk>"))
    t.pre_tokenizer = tokens.pre_tokenizers.BertPreTokenizer()
    t.decoder = tokens.decoders.WordPiece()
    return t, tokens.trainers.WordPieceTrainer(special_tokens=SPECIAL, vocab_size=900,
                                               show_progress=False)


@pytest.fixture(scope="module", params=[bloom, several_splits, prefix_space, llama2, unigram,
                                        wordpiece])
def pair(request, tmp_path_factory):
    """(transformers' tokenizer, the folder that it was saved into)."""
    tokens, transformers = map(pytest.importorskip, ("tokenizers", "transformers"))
    folder, (t, trainer) = tmp_path_factory.mktemp("tokenizer"), request.param(tokens)
    t.train_from_iterator([*DOCUMENTS[:9], CODE[:9000], WORLD * 2], trainer)
    t.post_processor = tokens.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>",
        chat_template=TEMPLATE)
    theirs.save_pretrained(folder)
    return theirs, folder


def test_ids_and_texts_are_transformers_where_the_core_refuses(pair):
    """On 100,000 tokens of documentation, code, emoji, Chinese and chats."""
    (theirs, folder), draw, n = pair, random.Random(0), 0
    with pytest.raises(ValueError, match="--with formats"):
        data.load_tokenizer(folder)
    ours, words = load(folder), [*WORLD.split(" "), *SPECIAL, " ", "  ", "\n", "\r\n", "\t", "a"]
    texts = [*(draw.choice(DOCUMENTS) for _ in range(30)), CODE, "", " ", "a<|im_end|> b"]
    texts += ["".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(300)]
    texts += [theirs.apply_chat_template([{"role": "user", "content": w}], tokenize=False)
              for w in words]
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text[:200]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text[:200]
        assert ours.decode(ids, keep_special=True) == theirs.decode(ids), text[:200]
        n += len(ids)
    assert n > 100_000
    assert ours.encode_text("One.") == theirs.encode("One.")
    assert ours.prefix == [1] and ours.size == len(theirs)


def test_a_chat_and_its_answer_are_transformers(pair):
    theirs, folder = pair
    ours, question = load(folder), {"role": "user", "content": "What's {gold}? 79"}
    for messages in ([question], [{"role": "system", "content": "Be brief."}, question]):
        assert ours.chat(messages) == theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False)
    answer = ours.answer("It is Au.")
    assert answer[-1] == ours.eos_id == theirs.eos_token_id and answer.count(ours.eos_id) == 1
    assert ours.read(answer) == theirs.decode(answer, skip_special_tokens=True).strip()


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
FOLDERS = {  # what the files say besides tokenizer.json
    "named": {"bos_token": "[X]", "pad_token": {"__type": "AddedToken", "content": "b", **FLAGS}},
    "listed": {"additional_special_tokens": ["<x>", "c"], "image_token": "<img>"},
    "in a table": {"extra_special_tokens": {"audio": "<audio>"}},
    "by id": {"added_tokens_decoder": {"900": {"content": "[Y]", **FLAGS, "special": True},
                                       "901": {"content": "[Z]", **FLAGS, "lstrip": True}},
              "bos_token": "[Y]"}}


@pytest.mark.parametrize("what", FOLDERS)
@pytest.mark.parametrize("older", [False, True])
def test_tokens_that_the_other_files_name_are_added_as_transformers_adds_them(what, older, tmp_path):
    tokens, transformers = map(pytest.importorskip, ("tokenizers", "transformers"))
    t, trainer = wordpiece(tokens)
    t.train_from_iterator(DOCUMENTS[:3], trainer)
    t.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", **FOLDERS[what]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if older:
        (tmp_path / "special_tokens_map.json").write_text('{"mask_token": "[M]"}')
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours, text = load(tmp_path), "[X]abc [Y] [Z]<x>[M] <img>d<audio> </s>"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text),
                                                           skip_special_tokens=True)


def test_a_tokenizer_that_cannot_be_read_is_one_line(pair, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text((pair[1] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert load(tmp_path).eos_id == 2
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ValueError, match=f"^{tmp_path}[^\n]*pip install tokenizers"):
            load(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"normalizer": {"type": "Odd"}}))
    with pytest.raises(ValueError, match=f"^{tmp_path}/tokenizer.json: [^\n]*$"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------- GGUF files

SMALL = dict(vocab_size=300, context_length=1024)
KINDS = {  # what else a model of each architecture has
    "llama": {}, "llama-biases": dict(qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen2": dict(model_type="qwen2", qkv_bias=True, tie_embeddings=False),
    "qwen3": dict(model_type="qwen3", head_dim=12, norm_eps=1e-6),
    "smollm3": dict(model_type="smollm3", n_layer=5, no_rope=(3,)),
    "gpt2": dict(model_type="gpt2", n_kv_head=4, rope_theta=0.0, qkv_bias=True, out_bias=True,
                 mlp_bias=True)}
IN_GGUF = {  # our names: llama.cpp's
    "embed_tokens": "token_embd", "embed_positions": "position_embd", "norm": "output_norm",
    "lm_head": "output", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
ENDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "12 3"]
TEXT = "<|im_start|>user\nHe said: 1234 of the  théâtre,\n then<|im_end|>"


def small(kind="llama", **changes):
    return tiny(**SMALL | KINDS[kind] | changes)


def as_llama_cpp_stores(gpt):
    """{llama.cpp's name: array} of a model, as its converter writes them."""
    stored, c = {}, gpt.config
    for name, w in gpt.named_parameters():
        if c.model_type in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
            heads = w.view(-1, 2, c.head_dim // 2, *w.shape[1:])  # [heads, halves, K/2, …]
            w = heads.transpose(1, 2).reshape(w.shape)
        owner, kind = name.rsplit(".", 1)
        _, i, owner = owner.split(".", 2) if owner.startswith("layers.") else ("", "", owner)
        stored[f"blk.{i}." * bool(i) + f"{IN_GGUF[owner]}.{kind}"] = w.detach().numpy()
    for i, kind in ((i, kind) for i in range(c.n_layer) for kind in ("weight", "bias")):
        if c.model_type == "gpt2":
            qkv = [stored.pop(f"blk.{i}.attn_{one}.{kind}") for one in "qkv"]
            stored[f"blk.{i}.attn_qkv.{kind}"] = numpy.concatenate(qkv)
    return stored


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


def write_gguf(path, gpt, quantized="F32", tensors=None, tokenizer=None, **fields):
    """A GGUF file of a small model, its matrices of type `quantized`; tensors, tokenizer, fields:
    what is added or changed; None takes it away."""
    gguf = pytest.importorskip("gguf")
    f32, q8, arch = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0, \
        gpt.config.model_type
    tokens = [*ENDS, *bytes_to_unicode(), *(merge.replace(" ", "") for merge in MERGES)]
    spare = [f"[PAD{i}]" for i in range(300 - len(tokens))]
    said = {"model": "gpt2", "pre": "smollm", "tokens": tokens + spare, "merges": MERGES,
            "token_type": [3] * 3 + [1] * (len(tokens) - 3) + [5] * len(spare),
            "bos_token_id": 1, "eos_token_id": 2} | (tokenizer or {})
    said = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    said |= {key if key.startswith(("general.", "split.")) else f"{arch}.{key}": value
             for key, value in (fields_of(gpt.config) | fields).items()}
    writer = gguf.GGUFWriter(path, arch)
    add = {bool: writer.add_bool, str: writer.add_string, list: writer.add_array,
           float: writer.add_float32, int: writer.add_uint32}
    for key, value in said.items():
        if value is not None:
            add[type(value)](key, value)
    writer.add_chat_template(TEMPLATE)
    for name, w in (as_llama_cpp_stores(gpt) | (tensors or {})).items():
        kind = gguf.GGMLQuantizationType[quantized] if w.ndim == 2 else f32
        done = w.dtype == numpy.uint8
        writer.add_tensor(name, w if done else gguf.quantize(w, kind),
                          raw_dtype=q8 if done else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_is_the_model_that_it_was_made_of(kind, tmp_path, cache):
    gpt = small(kind)
    folder = model.resolve(write_gguf(tmp_path / "small.gguf", gpt))
    assert folder.parent == cache and re.fullmatch("gguf-[0-9a-f]{16}", folder.name)
    ours = GPT.from_pretrained(folder)
    assert replace(ours.config, hf={}) == replace(gpt.config, hf={})
    weights = dict(ours.named_parameters())
    assert weights.keys() == dict(gpt.named_parameters()).keys()
    assert all(torch.equal(weights[name], p) for name, p in gpt.named_parameters())
    transformers = pytest.importorskip("transformers")
    same_logits(gpt, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert model.resolve(tmp_path / "small.gguf") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_is_read_as_transformers_reads_it(kind, tmp_path):
    """It has code of its own for q and k, whose rows llama.cpp interleaves for Llama alone."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    path = write_gguf(tmp_path / "small.gguf", small(kind))
    folder = model.resolve(path)
    config = transformers.AutoConfig.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=theirs)
    theirs.load_state_dict(read["tensors"], strict=kind == "qwen2")
    same_logits(GPT.from_pretrained(folder), theirs)


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_quantized_tensors_are_what_gguf_dequantizes(kind, tmp_path):
    gguf, gpt = pytest.importorskip("gguf"), small()
    ours = GPT.from_pretrained(model.resolve(write_gguf(tmp_path / "a.gguf", gpt, quantized=kind)))
    kind = gguf.GGMLQuantizationType[kind]
    for name, p in gpt.named_parameters():
        w = p.detach()
        if w.ndim == 2:  # a head's rows are only in another order there
            w = torch.from_numpy(gguf.dequantize(gguf.quantize(w.numpy(), kind), kind))
        assert torch.equal(ours.get_parameter(name), w), name


def test_two_quantizations_of_one_matrix_are_the_finer_of_them(tmp_path):
    gguf, gpt = pytest.importorskip("gguf"), small()
    table = gpt.embed_tokens.weight.detach().numpy()
    coarse = gguf.quantize(table, gguf.GGMLQuantizationType.Q8_0)
    for finer, other in (("output", "token_embd"), ("token_embd", "output")):
        ours = GPT.from_pretrained(model.resolve(write_gguf(
            tmp_path / f"{finer}.gguf", gpt, tensors={
                f"{finer}.weight": table, f"{other}.weight": coarse})))
        assert ours.config.tie_embeddings
        assert torch.equal(ours.embed_tokens.weight, gpt.embed_tokens.weight)
    another = numpy.ascontiguousarray(table[::-1])
    ours = GPT.from_pretrained(model.resolve(write_gguf(
        tmp_path / "two.gguf", gpt, tensors={"output.weight": another})))
    assert torch.equal(ours.lm_head.weight, torch.from_numpy(another))


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


def test_rope_scaling_of_a_gguf_file(tmp_path):
    """llama.cpp keeps what each of Llama 3's frequencies is divided by."""
    gpt = small(rope_scaling=LLAMA3, rope_theta=5e5, head_dim=32)
    plain, scaled = (model.rope_frequencies(replace(gpt.config, rope_scaling=x))
                     for x in ({}, LLAMA3))
    divisors = (plain / scaled).numpy()
    ours = GPT.from_pretrained(model.resolve(write_gguf(
        tmp_path / "three.gguf", gpt, tensors={"rope_freqs.weight": divisors})))
    assert ours.config.rope_scaling == LLAMA3
    same_logits(ours, gpt)
    with pytest.raises(ValueError, match="Llama 3.1"):
        model.resolve(write_gguf(tmp_path / "other.gguf", gpt, tensors={
            "rope_freqs.weight": divisors + 1}))
    for kind, scaling in (("linear", {"rope_type": "linear", "factor": 4.0}), ("none", {})):
        ours = GPT.from_pretrained(model.resolve(write_gguf(tmp_path / "l.gguf", small(), **{
            "rope.scaling.type": kind, "rope.scaling.factor": 4.0})))
        assert ours.config.rope_scaling == scaling


BIG = numpy.zeros((32, 32), numpy.float32)
REFUSED = {  # what a GGUF file may say that is not implemented: what the message names
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
    "no eps": ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_epsilon"),
    "heads of each layer": ({"attention.head_count_kv": [2, 1]}, "Error"),
    "zero heads": ({"attention.head_count": 0}, "zero"),
    "another architecture": ({"general.architecture": "gemma3"}, "'gemma3'"),
    "adapter": ({"general.type": "adapter"}, "adapter"), "part": ({"split.count": 3}, "part"),
    "unknown tensor": (dict(tensors={"blk.0.attn_sinks.weight": BIG}), "attn_sinks"),
    "too many layers": ({"block_count": 3}, "layers.2"), "too few": ({"block_count": 1}, "layers.1"),
    "rows": (dict(tensors={"blk.0.attn_q.weight": numpy.zeros((40, 32), numpy.float32)}), "q_proj"),
    "no end": (dict(tokenizer={"eos_token_id": None}), "eos_token_id"),
    "SentencePiece": (dict(tokenizer={"model": "llama"}), "ggml.model"),
    "pre-tokenizer": (dict(tokenizer={"pre": "dbrx"}), "dbrx"),
    "adds an end": (dict(tokenizer={"add_eos_token": True}), "add_eos_token"),
    "no merges": (dict(tokenizer={"merges": None}), "merges")}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_gguf_file_has_and_the_model_lacks_is_refused_by_name(what, tmp_path, cache):
    changes, culprit = REFUSED[what]
    path = write_gguf(tmp_path / "small.gguf", small(), **changes)
    with pytest.raises(ValueError, match=f"^{path}: [^\n]*{culprit}[^\n]*$"):
        model.resolve(path)
    assert not [*cache.iterdir()]


def test_a_damaged_gguf_file_is_one_line(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", small()).read_bytes()
    cuts = [whole[:n] for n in (0, 3, 20, 200, 2000, 8000, len(whole) - 100_000, len(whole) - 3)]
    for n, part in enumerate([*cuts, b"GGML" + whole[4:], b"version https://git-lfs.github.com"]):
        path = tmp_path / f"{n}.gguf"
        path.write_bytes(part)
        with pytest.raises(ValueError, match=f"^{path}: [^\n]*$"):
            model.resolve(path)
    with pytest.raises(FileNotFoundError):
        model.resolve(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_the_tokenizer_of_a_gguf_file_is_what_transformers_makes_of_its_files(pre, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = model.resolve(write_gguf(tmp_path / "small.gguf", small(), tokenizer={
        "pre": pre, "add_bos_token": False, "eot_token_id": 0}))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), data.load_tokenizer(folder)
    texts = "We're 12 of\n\n the 1234567 e\u0301 [PAD299]", " the\tthe  \n 12", "日本語 😀"
    for text in (TEXT, *texts):
        assert ours.encode(text) == theirs.encode(text), text
    assert (ours.eos_ids, ours.chat_template) == ((2, 0), TEMPLATE)


@pytest.mark.parametrize("pre, said, begins", [
    ("llama-bpe", None, True), ("llama-bpe", False, False), ("smollm", None, False),
    ("gpt-2", True, True)])
def test_a_gguf_file_says_whether_texts_begin_with_the_bos(pre, said, begins, tmp_path):
    """Where it does not, Llama 3's do, and no others, as in llama.cpp."""
    folder = model.resolve(write_gguf(tmp_path / "small.gguf", small(), tokenizer={
        "pre": pre, "add_bos_token": said}))
    assert data.load_tokenizer(folder).prefix == [1] * begins
    transformers = pytest.importorskip("transformers")
    ids = transformers.AutoTokenizer.from_pretrained(folder).encode("the the")
    assert (ids[0] == 1) == begins and ids.count(1) == begins


def test_a_run_on_a_gguf_file_leaves_an_ordinary_folder(tmp_path):
    path = write_gguf(tmp_path / "small.gguf", small("qwen3"))
    argv = (f"--model {path} --out {tmp_path}/out --steps 1 --batch-size 2 --rollout-tokens 4 "
            "--eval-tokens 3 --eval-limit 4 --cka-samples 4 --group-size 16 --teacher-check 0")
    assert train.main(argv.split()) == 0
    student = tmp_path / "out" / "student"
    assert json.loads((student.parent / "results.json").read_text())["config"]["model"] == str(path)
    transformers = pytest.importorskip("transformers")
    same_logits(GPT.from_pretrained(student),
                transformers.AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32))
    theirs = transformers.AutoTokenizer.from_pretrained(student)
    assert theirs.encode(TEXT) == data.load_tokenizer(student).encode(TEXT)


# ------------------------------------------------------------------------------- names on the hub

def test_a_name_is_looked_for_in_the_local_cache_then_fetched(tmp_path, monkeypatch):
    asked, there = [], make_folder(tmp_path / "snapshot")
    half = tmp_path / "half"  # a configuration without weights
    half.mkdir()

    def snapshot_download(repo, local_files_only, **options):
        asked.append((repo, options["revision"], local_files_only))
        assert "config.json" in options["allow_patterns"] and "*.bin" not in str(options)
        if repo == "org/none" or repo == "org/new" and local_files_only:
            raise RuntimeError("no network\nat all")
        return str(half if repo == "org/half" and local_files_only else there)
    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    for name, found in {
            "org/known": [("org/known", None, True)],
            "org/new@v1": [("org/new", "v1", True), ("org/new", "v1", False)],
            "org/half": [("org/half", None, True), ("org/half", None, False)]}.items():
        asked.clear()
        assert model.resolve(name) == there and asked == found
    message = r"^there is no folder org/none@v2[^\n]*\(no network\)[^\n]*hf download org/none --rev"
    with pytest.raises(FileNotFoundError, match=message):
        model.resolve("org/none@v2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        model.resolve("org/known")
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "org" / "known")
    assert str(model.resolve("org/known")) == "org/known"  # a folder wins
    for name in ("nowhere", "/no/such", "a/b/c", "../no", "org/x y"):
        with pytest.raises(FileNotFoundError, match="^[^\n]*$"):
            model.resolve(name)


# ------------------------------------------------------------------------------------------- rows

SYSTEM = {"role": "system", "content": "Be brief."}
USER, SAID = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}
AGAIN, LAST = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(tmp_path, *rows):
    """The Examples of a file of these rows, all of it measured."""
    return load_task(jsonl(tmp_path / "rows.jsonl", *rows), measured_only=True).eval["all"]


TALKS = [  # a row; its prompt, response, system message and earlier turns
    ({"messages": [SYSTEM, USER, SAID, AGAIN, LAST]}, "Two?", "2", "Be brief.", [USER, SAID]),
    ({"prompt": "One?", "messages": [USER, SAID]}, "One?", "1"),
    ({"prompt": "One?", "response": "1", "system": "Be brief."}, "One?", "1", "Be brief."),
    ({"prompt": [SYSTEM, USER], "response": "1"}, "One?", "1", "Be brief."),
    ({"prompt": [USER, SAID, AGAIN], "completion": [LAST]}, "Two?", "2", "", [USER, SAID]),
    ({"prompt": [USER], "answer": "1"}, "One?", "1"),
    ({"prompt": "One?", "completion": "1", "label": True, "id": 7}, "One?", "1"),
    ({"question": "One?", "answer": "1", "context": ""}, "One?", "1"),
    ({"question": "One?", "response": "1"}, "One?", "1"),
    ({"system_prompt": "Be brief.", "question": "One?", "answer": "1"}, "One?", "1", "Be brief."),
    ({"instruction": "Add.", "input": "1 + 0", "output": "1"}, "Add.\n\n1 + 0", "1"),
    ({"instruction": "Add.", "input": "", "output": "1"}, "Add.", "1"),
    ({"instruction": "Add.", "output": "1"}, "Add.", "1")]


@pytest.mark.parametrize("row, prompt, response, system, earlier",
                         [(*talk, "", [])[:5] if len(talk) < 4 else (*talk, [])[:5]
                          for talk in TALKS], ids=lambda x: "")
def test_questions_with_demonstrations_are_read_in_every_form(row, prompt, response, system,
                                                              earlier, tmp_path):
    e, = only(tmp_path, row)
    assert (e.prompt, e.response, e.system, e.earlier) == (prompt, response, system, earlier)
    assert e.check(response) and not e.check("another") and e.chat and not e.choices
    assert e.where == f"{tmp_path}/rows.jsonl:1"
    again, other = {**row, "id": 8}, {**row, "prompt": "Another?", "question": "Another?"}
    assert len(only(tmp_path, row, again)) == 1 and "messages" in row or len(
        only(tmp_path, row, {**other, "instruction": "Another."})) == 2


ARC = {"text": ["red", "blue", "green"], "label": ["A", "B", "C"]}
ONE = {**ARC, "label": ["1", "2", "3"]}


@pytest.mark.parametrize("row, right", [
    ({"question": "Sky?", "choices": ARC, "answerKey": "B", "id": "Mercury_7"}, 1),
    ({"prompt": "Sky?", "choices": ARC, "answer": "C"}, 2),
    ({"question": "Sky?", "choices": ONE, "answerKey": "1"}, 0),
    ({"question": "Sky?", "choices": ARC, "answer": 1}, 1),
    ({"question": "Sky?", "choices": ARC["text"], "answer": 2}, 2),
    ({"prompt": "Sky?", "choices": [" red", "blue ", "green"], "answer": 0}, 0)])
def test_choices_are_texts_or_arcs_own(row, right, tmp_path):
    e, = only(tmp_path, row)
    assert e.choices == [("Sky?", " red"), ("Sky?", " blue"), ("Sky?", " green")]
    assert (e.prompt, e.answer, e.response) == ("Sky?", right, ARC["text"][right])


def test_one_continuation_of_two_contexts(tmp_path):
    e, = only(tmp_path, {"contexts": ["It is", "It was"], "continuation": " so.", "answer": 1})
    assert e.choices == [("It is", " so."), ("It was", " so.")]
    assert (e.prompt, e.answer, e.response) == ("It was", 1, "so.")


CONTEXTS = {"contexts": ["a", "b"], "continuation": "c", "answer": 0}
TOOLS = {"prompt": "Documentation. Question: what is the weather in Oslo?", "golden_answer": [
            {"Action": "getPlace", "Action_Input": '{"name": "Oslo"}'},
            {"Action": "getWeather", "Action_Input": '{"day": 1}'}],
         "golden_response": [
             'Thought: first the place.\nAction: getPlace\nAction Input: {"name": "Oslo"}',
             'Thought: then\nAction: getWeather\nAction Input: {"day": 1}']}


@pytest.mark.parametrize("row", [
    {"question": "a", "answer": 5}, {"instruction": "", "output": "b"}, {"prompt": "a"},
    {"question": "a", "answer": "b", "context": "c"}, {"prompt": [USER, SAID], "response": "b"},
    {"question": "a", "options": ["b", "c"], "answer": "B"}, {"prompt": [], "response": "b"},
    {"prompt": "a", "completion": "b", "label": False}, {"query": "a", "target": "b"},
    {"prompt": [USER], "completion": [LAST, LAST]}, {"prompt": [USER], "completion": [AGAIN]},
    {"question": "a", "choices": ARC, "answerKey": "E"}, {**CONTEXTS, "answer": True},
    {"question": "a", "choices": ONE, "answer": 1}, {**CONTEXTS, "contexts": ["a", "a"]},
    {"question": "a", "choices": {**ARC, "label": ["A", "B", "A"]}, "answerKey": "A"},
    {"question": "a", "choices": {**ARC, "label": ["A", "B"]}, "answerKey": "A"},
    {"question": "a", "choices": {"label": ["A", "B"]}, "answerKey": "A"},
    {"messages": [USER], "output_text": "B"}, {"messages": [USER, SAID], "output_text": "B"},
    {**CONTEXTS, "answer": 2}, {**CONTEXTS, "continuation": " "}, {**TOOLS, "golden_answer": "f"},
    {**TOOLS, "golden_answer": [{"Action": "f"}]}, {**TOOLS, "golden_response": [5]}], ids=str)
def test_a_row_of_no_form_is_refused_by_file_and_line(row, tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}/rows.jsonl:2: [^\n]*$"):
        only(tmp_path, {"question": "a", "answer": "b"}, row)


GOOD = [{"question": f"Question {i}?", "answer": "The same."} for i in range(10)]


@pytest.mark.parametrize("name, text", [
    ("a.json", json.dumps(GOOD)), ("a.json", json.dumps(GOOD, indent=2)),
    ("a.json", "\n".join(map(json.dumps, GOOD))), ("a.json", json.dumps({"data": GOOD, "v": 1})),
    ("a.ndjson", "\n".join(map(json.dumps, GOOD))), ("a.JSON", "\ufeff" + json.dumps(GOOD))])
def test_rows_are_lines_or_an_array(name, text, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    content = [[(e.prompt, e.response) for e in [*task.train, *task.eval["held_out"]]]
               for task in map(load_task, (tmp_path / name, jsonl(tmp_path / "l.jsonl", *GOOD)))]
    assert content[0] == content[1] and len(content[0]) == 10


@pytest.mark.parametrize("text, says", [
    (json.dumps([*GOOD, {"prompt": "a", "response": 5}]), ": element 11: "), ("[]", ""),
    (json.dumps({"data": [*GOOD, 3]}), ": element 11: "), ('[\n{"prompt": "a",\n}]', "line 3"),
    (json.dumps({"train": GOOD, "test": GOOD}), "test, train"), ("{\n", ":1: not a line of JSON"),
    ('[{"prompt": ' + "[" * 100_000, "not JSON")])
def test_an_array_is_refused_with_its_element(text, says, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{tmp_path}/a.json[^\n]*{says}[^\n]*$"):
        load_task(tmp_path / "a.json")


def test_tools_are_graded_by_their_calls(tmp_path):
    e, bare = only(tmp_path, TOOLS, {key: TOOLS[key] for key in ("prompt", "golden_answer")})
    assert (e.prompt, e.response) == (TOOLS["prompt"], "\n".join(TOOLS["golden_response"]))
    assert e.check(e.response) and bare.check(e.response) and bare.response == ""
    assert e.check('Action: getWeather \r\nAction Input:{"day": 1}\n\nAction:getPlace\n'
                   'Action Input: {"name":  "Oslo"} and so on'), "in any order"
    assert e.check('Action: getPlace\nAction Input: {"day": 1, "name": "Oslo"}\n'
                   "Action: getWeather\nAction Input: {broken"), "inputs are merged if they parse"
    wrong = [
        "", TOOLS["golden_response"][0], e.response + "\nAction: getPlace",
        e.response.replace("getPlace", "getPlaces"), e.response.replace("Oslo", "Bergen"),
        e.response.replace("1}", '"1"}'), e.response.replace("Action:", "action:"),
        e.response.replace("getPlace", "getWeather"), e.response + '\nAction Input: {"more": 1}',
        "Action: f\nAction Input: " + '{"a": ' + "[" * 100_000]
    assert not any(map(e.check, wrong))
    e, = only(tmp_path, {**TOOLS, "golden_answer": [
        {"Action": "list", "Action_Input": x} for x in ("", "no JSON")]})
    assert e.check("Action: list\nAction: list") and not e.check("Action: list")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: no demonstration"):
        load_task(jsonl(tmp_path / "rows.jsonl", {**TOOLS, "golden_response": []}))


OUTPUT = "<reasoning>A? <answer>A</answer> No.</reasoning>\n<answer> B </answer>"


def test_science_is_graded_by_the_last_answer(tmp_path):
    shown, measured, other = only(
        tmp_path, {"messages": [SYSTEM, USER], "output_text": OUTPUT},
        {"prompt": [SYSTEM, USER], "answer": "B"}, {"prompt": [SYSTEM, USER], "answer": "Bees"})
    for e, response in ((shown, OUTPUT), (measured, ""), (other, "Bees")):
        assert (e.prompt, e.response, e.system) == ("One?", response, "Be brief.")
    assert other.check("bees.")
    for e in (shown, measured):
        assert e.check(OUTPUT) and e.check("<answer>A</answer><answer>\nB\n</answer> or A")
        wrong = ["B", "", "<answer>B", "<answer>b</answer>", "<answer>B.</answer>",
                 "<answer>B</answer><answer>C</answer>", "<answer>A, B</answer>", "B</answer>"]
        assert not any(map(e.check, wrong))
