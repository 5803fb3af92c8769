"""extras/formats.py: tokenizers, GGUF files, names on the hub, rows. All rows are invented."""
import argparse
import json
import pydoc_data.topics
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from conftest import GPT2, QWEN2, QWEN3, SMOLLM3, make_folder, tiny
from safetensors.torch import load_file

import data
import model
import train

formats = pytest.importorskip("extras.formats")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre


@pytest.fixture(autouse=True)
def cache(registries_stay_as_they_were, tmp_path, monkeypatch):
    """The extra is attached, and the cache is empty."""
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    formats.attach(train.PARTS)
    return tmp_path / "cache"


def read(path):
    return model.GPT.from_pretrained(model.resolve(path))


def of_transformers(folder, ours):
    """transformers' model in a folder, which computes what ours does."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, 260, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    return theirs


# ------------------------------------------------------------------------------------- tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # it leaves white space and commas out
TEMPLATE = "{{ bos_token }}" + data.CHATML
WORLD = ("naïve café Привет мир 你好,世界。今日は東京です 한국어 שלום مرحبا ١٢٣ ½ Ⅷ x² e\u0301 Å ﬁ "
         "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \ufeff\u200b \x00\x1f")
CODE, DOCUMENTS = Path(argparse.__file__).read_text(), [*pydoc_data.topics.topics.values()]
USER, SAID = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}
AGAIN, LAST = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}
SYSTEM, NOT_ONE = {"role": "system", "content": "Be brief."}, {"model": {}, "pre_tokenizer": {}}


def bloom():
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre.Sequence([pre.Split(Regex(BLOOM), "isolated"),
                                    pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder, alphabet = decoders.ByteLevel(), pre.ByteLevel.alphabet()
    return t, trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet, vocab_size=700)


def llama2():
    """BPE of characters with bytes to fall back on, a blank as ▁: what sentencepiece's becomes."""
    t = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                   decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokens = SPECIAL + [f"<0x{i:02X}>" for i in range(256)]
    return t, trainers.BpeTrainer(special_tokens=tokens, vocab_size=900, max_token_length=8)


def unigram():
    t = Tokenizer(models.Unigram())
    t.normalizer, t.pre_tokenizer = normalizers.NFKC(), pre.Metaspace()
    t.decoder = decoders.Metaspace()
    return t, trainers.UnigramTrainer(special_tokens=SPECIAL, vocab_size=600, unk_token="<unk>")


@pytest.fixture(scope="module", params=[bloom, llama2, unigram])
def pair(request, tmp_path_factory):
    """(transformers' tokenizer, the folder that it was saved into)."""
    folder, (t, trainer) = tmp_path_factory.mktemp("tokenizer"), request.param()
    t.train_from_iterator([*DOCUMENTS[:9], CODE[:9000], WORLD * 2], trainer)
    t.enable_truncation(9)  # transformers, too, cuts no text unless asked to
    t.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=t, bos_token="<s>", eos_token="<|im_end|>", chat_template=TEMPLATE)
    theirs.save_pretrained(folder)
    return theirs, folder


def test_ids_texts_and_chats_are_transformers_where_the_core_refuses(pair):
    """On 100,000 tokens of documentation, code, emoji, Chinese and chats."""
    (theirs, folder), draw, n = pair, random.Random(0), 0
    with pytest.raises(ValueError, match="--with formats"):
        data.load_tokenizer(folder)
    ours, words = train.PARTS["tokenizer"](folder), [*WORLD.split(" "), *SPECIAL, *" \n\t", "\r\n"]
    texts = ["".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(300)]
    for text in [*draw.choices(DOCUMENTS, k=50), CODE, "", " ", "a<|im_end|> b", *texts]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text[:200]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text[:200]
        assert ours.decode(ids, keep_special=True) == theirs.decode(ids), text[:200]
        n += len(ids)
    assert n > 100_000 and ours.prefix == [1] and ours.size == len(theirs)
    for chat in ([USER], [SYSTEM, USER], [USER, SAID, AGAIN]):
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ours.chat(chat) == ids
    answer = ours.answer("It is Au.")
    assert answer[-1] == ours.eos_id == theirs.eos_token_id and answer.count(ours.eos_id) == 1
    assert ours.read(answer) == theirs.decode(answer, skip_special_tokens=True).strip()


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
FOLDERS = [  # what the files say besides tokenizer.json
    {"bos_token": "[X]", "pad_token": {"__type": "AddedToken", "content": "b", **FLAGS}},
    {"additional_special_tokens": ["<x>", "c"], "image_token": "<img>", "add_bos_token": True},
    {"extra_special_tokens": {"audio": "<audio>"}, "mask_token": None},
    {"added_tokens_decoder": {"5": {"content": "[Y]", **FLAGS, "special": True},
                              "6": {"content": "[Z]", **FLAGS, "lstrip": True}}}]


@pytest.mark.parametrize("config", FOLDERS)
def test_tokens_of_the_other_files_are_added_as_transformers_does(config, pair, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((pair[1] / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text('{"mask_token": "[M]"}')
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>"}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours, text = train.PARTS["tokenizer"](tmp_path), "[X]abc [Y] [Z]<x>[M] <img>d<audio> </s>"
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_a_tokenizer_that_cannot_be_read_is_one_line(pair, tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_bytes((pair[1] / "tokenizer.json").read_bytes())
    for name, x in (("chat_template.jinja", "{% if\n"), ("tokenizer.json", json.dumps(NOT_ONE))):
        (tmp_path / name).write_text(x)
        with pytest.raises(ValueError, match=f"^{tmp_path}/tokenizer.json: [^\n]*$"):
            train.PARTS["tokenizer"](tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=f"^{pair[1]}[^\n]*pip install tokenizers"):
        train.PARTS["tokenizer"](pair[1])


# ------------------------------------------------------------------------------------- GGUF files

KINDS = {  # what else a model of each architecture has
    "llama": {}, "biases": dict(qkv_bias=True, out_bias=True, mlp_bias=True), "qwen2": QWEN2,
    "qwen3": QWEN3 | dict(norm_eps=1e-6), "smollm3": SMOLLM3 | dict(n_layer=5, no_rope=(3,)),
    "gpt2": GPT2 | dict(rope_theta=0.0)}
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "12 3"]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *data.bytes_to_unicode(),
          *(merge.replace(" ", "") for merge in MERGES)]
SPARE = [f"[PAD{i}]" for i in range(300 - len(TOKENS))]
TEXTS = ("<|im_start|>user\nHe said: 1234 of the  théâtre,\n then<|im_end|>", "日本語 😀",
         "We're 12 of\n\n the 1234567 e\u0301 [PAD299]", " the\tthe  \n 12")


def small(kind="llama", **changes):
    return tiny(**{"vocab_size": 300, "context_length": 1024} | KINDS[kind] | changes)


def write_gguf(path, gpt, quantized="F32", tensors=None, tokenizer=None, **changes):
    """A GGUF file of a model. tensors (some with their type) and fields are added or changed."""
    c, folder = gpt.config, path.with_suffix(".hf")
    rms, llama = "" if c.model_type == "gpt2" else "rms_", c.model_type in ("llama", "smollm3")
    said = {"block_count": c.n_layer, "context_length": c.context_length,
            "embedding_length": c.d_model, "feed_forward_length": c.d_ff,
            "attention.head_count": c.n_head, "attention.head_count_kv": c.n_kv_head,
            f"attention.layer_norm_{rms}epsilon": c.norm_eps, **({} if not rms else {
                "rope.freq_base": c.rope_theta, "rope.dimension_count": c.head_dim,
                "attention.key_length": c.head_dim, "attention.value_length": c.head_dim})}
    said = {key if key.startswith(("general.", "split.")) else f"{c.model_type}.{key}": value
            for key, value in (said | changes).items()}
    tokens = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS + SPARE, "merges": MERGES,
              "token_type": [3] * 3 + [1] * (len(TOKENS) - 3) + [5] * len(SPARE),
              "bos_token_id": 1, "eos_token_id": 2} | (tokenizer or {})
    writer = gguf.GGUFWriter(path, c.model_type)
    for key, value in (said | {f"tokenizer.ggml.{key}": x for key, x in tokens.items()}).items():
        if value is not None:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.add_chat_template(TEMPLATE)
    gpt.save_pretrained(folder)
    names, stored = gguf.get_tensor_name_map(gguf.MODEL_ARCH[c.model_type.upper()], c.n_layer), {}
    for key, w in load_file(folder / "model.safetensors").items():  # as llama.cpp's converter does
        w = w.T if re.search(r"c_(attn|proj|fc)\.weight", key) else w
        if llama and re.search("[qk]_proj", key):  # [heads, halves, K/2, …]
            w = w.view(-1, 2, c.head_dim // 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)
        stored[names.get_name(key, (".weight", ".bias"))] = w.contiguous().numpy()
    for name, w in (stored | (tensors or {})).items():
        w, kind = w if isinstance(w, tuple) else (w, quantized if w.ndim == 2 else "F32")
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(w, kind), raw_dtype=kind)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_is_the_model_that_it_was_made_of(kind, tmp_path, cache):
    gpt, path = small(kind), tmp_path / "small.gguf"
    folder = model.resolve(write_gguf(path, gpt))
    ours = model.GPT.from_pretrained(folder)
    assert replace(ours.config, hf={}) == replace(gpt.config, hf={})
    for name, p in gpt.named_parameters():
        assert torch.equal(ours.get_parameter(name), p), name
    theirs, before = of_transformers(folder, gpt), folder.stat().st_ctime_ns
    if kind in ("llama", "qwen2", "qwen3"):  # transformers has code of its own for q and k
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
        for name, w in load_gguf_checkpoint(str(path), True, theirs)["tensors"].items():
            assert torch.equal(theirs.get_parameter(name), w), name
    assert model.resolve(path) == folder and folder.stat().st_ctime_ns == before
    assert [*cache.iterdir()] == [folder] and re.fullmatch("gguf-[0-9a-f]{16}", folder.name)


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "MXFP4"])
def test_quantized_tensors_are_what_gguf_dequantizes(kind, tmp_path):
    gpt, kind = small(), gguf.GGMLQuantizationType[kind]
    ours = read(write_gguf(tmp_path / "small.gguf", gpt, quantized=kind.name))
    for name, p in gpt.state_dict().items():
        if p.ndim == 2:  # a head's rows are only in another order there
            p = torch.from_numpy(gguf.dequantize(gguf.quantize(p.numpy(), kind), kind))
        assert torch.equal(ours.get_parameter(name), p), name


def test_two_quantizations_of_one_matrix_are_the_finer_of_them(tmp_path):
    gpt, path = small(), tmp_path / "small.gguf"
    w = gpt.embed_tokens.weight.detach()
    for finer, other in (("output", "token_embd"), ("token_embd", "output")):
        ours = read(write_gguf(path, gpt, tensors={
            f"{finer}.weight": (w.numpy(), "F32"), f"{other}.weight": (w.numpy(), "Q8_0")}))
        assert ours.config.tie_embeddings and torch.equal(ours.embed_tokens.weight, w)
    ours = read(write_gguf(path, gpt, tensors={"output.weight": w.flip(0).numpy()}))
    assert torch.equal(ours.lm_head.weight, w.flip(0))


def test_rope_scaling_of_a_gguf_file(tmp_path):
    """llama.cpp keeps what each of Llama 3's frequencies is divided by."""
    path, llama3 = tmp_path / "small.gguf", dict(
        rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192)
    gpt = small(rope_scaling=llama3, rope_theta=5e5, head_dim=32)
    plain = model.rope_frequencies(replace(gpt.config, rope_scaling={}))
    divisors = (plain / model.rope_frequencies(gpt.config)).numpy()
    ours = read(write_gguf(path, gpt, tensors={"rope_freqs.weight": divisors}))
    assert ours.config.rope_scaling == llama3
    with pytest.raises(ValueError, match="Llama 3.1"):
        read(write_gguf(path, gpt, tensors={"rope_freqs.weight": divisors + 1}))
    for kind, scaling in (("linear", {"rope_type": "linear", "factor": 4.0}), ("none", {})):
        path = write_gguf(path, small(), **{"rope.scaling.type": kind, "rope.scaling.factor": 4.0})
        assert read(path).config.rope_scaling == scaling


BIG = torch.zeros(40, 32).numpy()
REFUSED = {  # what the message names: what a GGUF file may say that is not implemented
    "yarn": {"rope.scaling.type": "yarn"}, "some.new_field": {"some.new_field": 1},
    "expert_count": {"expert_count": 8}, "sliding_window": {"attention.sliding_window": 64},
    "value_length": {"attention.value_length": 4}, "block_count": {"block_count": None},
    "norm_epsilon": {"attention.layer_norm_rms_epsilon": None}, "part": {"split.count": 3},
    "'gemma3'": {"general.architecture": "gemma3"}, "adapter": {"general.type": "adapter"},
    "layers.2": {"block_count": 3}, "layers.1": {"block_count": 1},
    "layers.0.attn_sinks": {"tensors": {"blk.0.attn_sinks.weight": BIG}},
    "eos_token_id": {"tokenizer": {"eos_token_id": None}}, "dbrx": {"tokenizer": {"pre": "dbrx"}},
    "ggml.model": {"tokenizer": {"model": "llama"}}, "merges": {"tokenizer": {"merges": None}},
    "add_eos_token": {"tokenizer": {"add_eos_token": True}}}


@pytest.mark.parametrize("culprit", REFUSED)
def test_what_the_model_lacks_is_refused_by_name(culprit, tmp_path, cache):
    path = write_gguf(tmp_path / "small.gguf", small(), **REFUSED[culprit])
    with pytest.raises(ValueError, match=f"^{path}: [^\n]*{culprit}[^\n]*$"):
        model.resolve(path)
    assert not [*cache.iterdir()]


def test_a_damaged_gguf_file_is_one_line(tmp_path):
    whole = (path := write_gguf(tmp_path / "small.gguf", small())).read_bytes()
    cuts = [whole[:n] for n in (0, 3, 20, 200, 2000, 8000, len(whole) - 100_000, len(whole) - 3)]
    for part in [*cuts, b"GGML" + whole[4:], b"version https://git-lfs.github.com"]:
        path.write_bytes(part)
        with pytest.raises(ValueError, match=f"^{path}: [^\n]*$"):
            model.resolve(path)


@pytest.mark.parametrize("pre, says, begins", [
    ("gpt-2", True, True), ("smollm", None, False), ("qwen2", False, False),
    ("llama-bpe", None, True), ("llama-bpe", False, False)])
def test_a_gguf_files_tokenizer_is_what_transformers_makes_of_it(pre, says, begins, tmp_path):
    """Where the file does not say so, Llama 3's texts begin with the BOS, as in llama.cpp."""
    said = {"pre": pre, "add_bos_token": says, "eot_token_id": 0}
    folder = model.resolve(write_gguf(tmp_path / "small.gguf", small(), tokenizer=said))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), data.load_tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert theirs.encode(text) == [1] * begins + ours.encode(text)
    assert (ours.eos_ids, ours.hidden, ours.prefix) == ((2, 0), {0, 1, 2}, [1] * begins)
    assert (ours.encode("e\u0301") == ours.encode("é")) == (pre == "qwen2")
    assert len(ours.encode("12")) == (1 if pre in ("gpt-2", "llama-bpe") else 2)


def test_a_run_on_a_gguf_file_leaves_an_ordinary_folder(tmp_path):
    path, out = write_gguf(tmp_path / "small.gguf", small("qwen3")), tmp_path / "out"
    argv = (f"--model {path} --out {out} --steps 1 --batch-size 2 --rollout-tokens 4 "
            "--eval-tokens 3 --eval-limit 4 --cka-samples 4 --group-size 16 --teacher-check 0")
    assert train.main(argv.split()) == 0
    assert json.loads((out / "results.json").read_text())["config"]["model"] == str(path)
    of_transformers(out / "student", model.GPT.from_pretrained(out / "student"))
    data.load_tokenizer(out / "student")


# ------------------------------------------------------------------------------- names on the hub

def test_a_name_is_looked_for_in_the_local_cache_then_fetched(tmp_path, monkeypatch):
    asked, there = [], make_folder(tmp_path / "snapshot")
    (tmp_path / "half").mkdir()  # a configuration without weights may lie in the cache

    def get(repo, local_files_only, revision, allow_patterns, ignore_patterns):
        asked.append((repo, revision, local_files_only))
        assert "config.json" in allow_patterns and "*.bin" not in allow_patterns
        if repo == "org/none" or repo == "org/new" and local_files_only:
            raise RuntimeError("no network\nat all")
        return str(tmp_path / "half" if repo == "org/half" and local_files_only else there)
    monkeypatch.setitem(sys.modules, "huggingface_hub", argparse.Namespace(snapshot_download=get))
    assert {model.resolve(name) for name in ("org/known", "org/new@v1", "org/half")} == {there}
    assert asked == [("org/known", None, True), ("org/new", "v1", True), ("org/new", "v1", False),
                     ("org/half", None, True), ("org/half", None, False)]
    with pytest.raises(FileNotFoundError, match=r"^[^\n]*\(no network\)[^\n]*download org/none "):
        model.resolve("org/none@v2")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("org/known", "nowhere", "nowhere.gguf", "/no/such", "a/b/c", "../no", "org/x y"):
        pytest.raises(FileNotFoundError, model.resolve, name).match("^[^\n]*$")


# ------------------------------------------------------------------------------------------- rows

ARC, ONE = ({"text": ["red", "blue", "green"], "label": [*labels]} for labels in ("ABC", "123"))
BOTH = {"contexts": ["It is", "It was"], "continuation": " so.", "answer": 1}
OUTPUT = "<reasoning>A? <answer>A</answer> No.</reasoning>\n<answer> B </answer>"
SCIENCE = [{"messages": [SYSTEM, USER], "output_text": OUTPUT},
           {"prompt": [SYSTEM, USER], "answer": "B"}]
STEPS = ['Thought: first the place.\nAction: getPlace\nAction Input: {"name": "Oslo"}',
         'Thought: then\nAction: getWeather\nAction Input: {"day": 1}']
TOOLS = {"prompt": "What is the weather in Oslo?", "golden_response": STEPS, "golden_answer": [
    {"Action": "getPlace", "Action_Input": '{"name": "Oslo"}'},
    {"Action": "getWeather", "Action_Input": '{"day": 1}'}]}
BRIEF, SKY = {"system": "Be brief."}, [("Sky?", " red"), ("Sky?", " blue"), ("Sky?", " green")]
LATER = {"prompt": "Two?", "response": "2", "earlier": [USER, SAID]}
RED, BLUE, GREEN = ({"prompt": "Sky?", "choices": SKY, "response": color, "answer": i}
                    for i, color in enumerate(ARC["text"]))
FORMS = [  # a row, and what its Example has that is not prompt "One?" and response "1"
    ({"messages": [USER, SAID]}, {}), ({"prompt": [USER], "answer": "B"}, {"response": "B"}),
    ({"prompt": [USER, SAID, AGAIN], "completion": [LAST]}, LATER),
    ({"prompt": "One?", "completion": "1", "label": True, "id": 7}, {}),
    ({"question": "One?", "answer": "1", "context": ""}, {}),
    ({"prompt": [SYSTEM, USER], "response": "1"}, BRIEF),
    ({"question": "One?", "response": "1", "system_prompt": "Be brief."}, BRIEF),
    ({"instruction": "One", "input": "a?", "output": "1"}, {"prompt": "One\n\na?"}),
    ({"instruction": "One?", "input": "", "output": "1"}, {}),
    ({"question": "Sky?", "choices": ARC, "answerKey": "B", "id": "Mercury_7"}, BLUE),
    ({"prompt": "Sky?", "choices": ARC, "answer": "C"}, GREEN),
    ({"question": "Sky?", "choices": ONE, "answerKey": "1"}, RED),
    ({"question": "Sky?", "choices": ARC, "answer": 1}, BLUE),
    ({"prompt": "Sky?", "choices": [" red", "blue ", "green"], "answer": 0}, RED),
    (BOTH, {"prompt": "It was", "response": "so.", "answer": 1,
            "choices": [("It is", " so."), ("It was", " so.")]}),
    (SCIENCE[0], BRIEF | {"response": OUTPUT}), (SCIENCE[1], BRIEF | {"response": ""}),
    ({"prompt": [SYSTEM, USER], "answer": "Bees"}, BRIEF | {"response": "Bees"})]


def only(tmp_path, *rows):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.load_task(tmp_path / "rows.jsonl", measured_only=True).eval["all"]


def test_rows_are_read_in_every_form(tmp_path):
    for row, expected in FORMS:
        e, = only(tmp_path, row)
        expected = data.Example("One?", "1", e.check).__dict__ | expected
        assert e.__dict__ == expected | {"where": f"{tmp_path}/rows.jsonl:1"}, row
        assert e.choices or not e.response or e.check(e.response) and not e.check("another")
        for wrong in ("B", "<answer>B", "<answer>b</answer>", "<answer>B.</answer>", "B</answer>",
                      "<answer>B</answer><answer>C</answer>", "<answer>A, B</answer>"):
            assert row not in SCIENCE or e.check(OUTPUT) and not e.check(wrong)
    same = {"question": "One?", "answer": "1"}
    assert len(only(tmp_path, same, {**same, "id": 8}, {**same, "question": "Two?"})) == 2


@pytest.mark.parametrize("row", [
    {"question": "a", "answer": 5}, {"instruction": "", "output": "b"}, {"prompt": "a"},
    {"question": "a", "answer": "b", "context": "c"}, {"prompt": [USER, SAID], "response": "b"},
    {"question": "a", "options": ["b", "c"], "answer": "B"}, {"prompt": [], "response": "b"},
    {"prompt": "a", "completion": "b", "label": False}, {"prompt": [USER], "completion": [AGAIN]},
    {"question": "a", "choices": ARC, "answerKey": "E"}, {**BOTH, "answer": True},
    {"question": "a", "choices": ONE, "answer": 1}, {**BOTH, "contexts": ["a", "a"]},
    {"question": "a", "choices": {**ARC, "label": ["A", "B"]}, "answerKey": "A"},
    {"messages": [USER], "output_text": "B"}, {"messages": [USER, SAID], "output_text": OUTPUT},
    {**BOTH, "continuation": " "}, {**TOOLS, "golden_answer": []}, {**TOOLS, "golden_answer": "f"},
    {**TOOLS, "golden_answer": [{"Action": "f"}]}, {**TOOLS, "golden_response": [5]}], ids=str)
def test_a_row_of_no_form_is_refused_by_file_and_line(row, tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}/rows.jsonl:2: [^\n]*$"):
        only(tmp_path, {"question": "a", "answer": "b"}, row)


GOOD = [{"question": f"Question {i}?", "answer": "The same."} for i in range(10)]


@pytest.mark.parametrize("text", [json.dumps(GOOD, indent=2), "\n".join(map(json.dumps, GOOD)),
                                  json.dumps({"data": GOOD, "v": 1}), "\ufeff" + json.dumps(GOOD)])
def test_rows_are_lines_or_an_array(text, tmp_path):
    (tmp_path / "a.JSON").write_text(text)
    examples = data.load_task(tmp_path / "a.JSON", measured_only=True).eval["all"]
    assert [e.prompt for e in examples] == [row["question"] for row in GOOD]


@pytest.mark.parametrize("text, says", [
    (json.dumps({"data": [*GOOD, 3]}), ": element 11: "), ("[]", "a.json"),
    ('[\n{"prompt": "a",\n}]', "line 3"), ("{\n", ":1: not a line of JSON"),
    (json.dumps({"train": GOOD, "test": GOOD}), "test, train"), ("[" * 100_000, "not JSON")])
def test_an_array_is_refused_with_its_element(text, says, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{tmp_path}/[^\n]*{says}[^\n]*$"):
        data.load_task(tmp_path / "a.json")


def test_tools_are_graded_by_their_calls(tmp_path):
    e, bare = only(tmp_path, TOOLS, {key: TOOLS[key] for key in ("prompt", "golden_answer")})
    assert (e.prompt, e.response, bare.response) == (TOOLS["prompt"], "\n".join(STEPS), "")
    for right in (e.response, "\n".join(STEPS[::-1]) + " and so on",
                  'Action: getPlace\nAction Input: {"day": 1, "name": "Oslo"}\n'
                  "Action:getWeather \r\nAction Input: {broken"):  # inputs are merged if they parse
        assert e.check(right) and bare.check(right)
    for wrong in ("", STEPS[0], e.response + "\nAction: getPlace", e.response.replace("1}", '"1"}'),
                  e.response.replace("getPlace", "getPlaces"), e.response.replace("Oslo", "Bergen"),
                  e.response.replace("Action:", "action:"), 'Action Input: {"a":' + "[" * 99_999,
                  e.response.replace("getPlace", "getWeather"),
                  e.response + '\nAction Input: {"more": 1}'):
        assert not e.check(wrong)
    same = [{"Action": "list", "Action_Input": x} for x in ("", "no JSON")]
    e, = only(tmp_path, {**TOOLS, "golden_answer": same})
    assert e.check("Action: list\nAction: list") and not e.check("Action: list")
