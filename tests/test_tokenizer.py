"""tokenizer.py: ids, texts and chats equal Hugging Face's, and what would differ is refused."""
import json
import os
import random
import re
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenizer import QWEN2_PATTERN, bytes_to_unicode, load_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
CACHE = os.environ.get("SDFT_CACHE") or Path.home() / ".cache" / "sdft"
DEFAULT = Path(CACHE) / "SmolLM2-135M-Instruct"

# --------------------------------------------------------------------------------------------------
# Throwaway tokenizers, trained here, in the forms that real models ship

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ENGLISH = (
    "The quick brown fox doesn't jump over the lazy dog's back; they've said we'll see, I'm sure "
    "she'd agree. You're\nRIGHT. An element's symbol is one or two letters: hydrogen is H, helium "
    "is He. In 1869, 63 elements were known; 118 are now.\nWhat is the atomic number of gold? The "
    "atomic number of gold is 79. Answer the question in one short sentence, please.")
CODE = (
    "def forward(self, x, mask=None):\n    if mask is not None:\n        x = x * mask[:, None]  "
    "# [B, T, D]\n\treturn x\n\nfor (int i = 0; i < 128; ++i) { total += values[i] != 0 ? "
    '3.14159e-5 : -1; }\r\n#include <stdio.h>\n\n\n        "odd";\n')
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
PRIDE, THUMB = "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f44d\U0001f3fd"
WORLD = ("naïve café Ünïcödé Привет мир 你好,世界。今日は東京です 한국어 שלום مرحبا ١٢٣ "
         f"{FAMILY} {PRIDE} {THUMB} ½ Ⅷ x² e\u0301 Å")
CORPUS = [ENGLISH, CODE, WORLD] * 3


def digits_and_byte_level():
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False)])


def split_by(pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


PRE_TOKENIZERS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": digits_and_byte_level,
    "qwen2": lambda: split_by(QWEN2_PATTERN),
    "llama3": lambda: split_by(LLAMA3_PATTERN),
}


def train(kind, all_bytes=True, size=900, special=SPECIAL):
    """Hugging Face's tokenizer of this kind, trained on CORPUS.

    all_bytes=False keeps only the bytes that the corpus has.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    tokenizer.normalizer = normalizers.NFC() if kind == "qwen2" else None
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZERS[kind](), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if all_bytes else []
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special,
                                  initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write(tokenizer, folder, change=None, **config):
    """Hugging Face's tokenizer of the tokenizer.json, `change`d, that is written to the folder."""
    spec = json.loads(tokenizer.to_str())
    if change:
        change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def pair(request, tmp_path_factory):
    """(Hugging Face's tokenizer, ours of the same folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    return write(train(request.param), folder), load_tokenizer(folder)


FRAGMENTS = [
    *ENGLISH.split(" "), *CODE.split(" "), *WORLD.split(" "), *SPECIAL, *SPECIAL,
    "<|im_start", "im_end|>", "<|", "|",
    " ", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\xa0", "\u3000", "\u2028", "\x85",
    "\x0b", "\x0c", "\x1c", "\x1f", "\u180e", "\u200b", "\ufeff",
    "0", "7", "12", "345", "6789", "3.14", "1,000", "٣", "½", "Ⅷ", "²", "一",
    "'s", "'S", "'ll", "'LL", "'Ve", "'", "''", "’s", "'ſ", "\x00", "\x01", "\x04", "\x1b[0m",
    "\x7f", "\x80", FAMILY, PRIDE, "\u200d", "\ufe0f", "e\u0301",
    "a\u0323\u0302", "\u1100\u1161\u11a8", "Å", "ﬁ",
    "_", "__init__", "->", "!=", "...", "###", "\\n", "—", "\U000e0001", "\ud7ff"]


def texts(seed, count=150):
    """Hard texts: fragments at random, and random bytes read as UTF-8 with errors='replace'."""
    rng = random.Random(seed)
    yield from (ENGLISH, CODE, WORLD, "", " ", "\n", "a  1", "a   12  b", "  \n  3", "x\t\t4",
                "tab\t 5 ", "can't I'Ll'd've")
    for _ in range(count):
        yield "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 30)))
        yield rng.randbytes(rng.randint(1, 40)).decode("utf-8", errors="replace")
        yield "".join(chr(rng.randrange(rng.choice((0x80, 0x3000, 0xD800)))) for _ in range(12))


def assert_same_ids(theirs, ours, seed=0, count=150):
    for text in texts(seed, count):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


# --------------------------------------------------------------------------------------------------
# Ids and texts

@pytest.mark.parametrize("seed", range(3))
def test_ids_equal_hugging_face(pair, seed):
    assert_same_ids(*pair, seed)


def test_special_tokens_in_the_text_become_their_ids(pair):
    theirs, ours = pair
    ids = ours.encode("<|im_start|>user\n<|im_end|><|endoftext|>")
    expected = [theirs.token_to_id(t) for t in (SPECIAL[1], SPECIAL[2], SPECIAL[0])]
    assert [i for i in ids if i in ours.added.values()] == expected


def test_a_special_token_is_found_before_the_text_is_normalized(tmp_path):
    """NFC joins '>' and a following U+0338 into one character; the token is one all the same."""
    theirs, text = write(train("qwen2"), tmp_path), "a<|im_end|>\u0338b"
    assert load_tokenizer(tmp_path).encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_a_vocabulary_that_lacks_bytes_drops_them_as_hugging_face_does(kind, tmp_path):
    theirs = write(train(kind, all_bytes=False), tmp_path)
    lacking = [c for c in bytes_to_unicode() if theirs.token_to_id(c) is None]
    assert len(lacking) > 30 and "|" in lacking
    assert_same_ids(theirs, load_tokenizer(tmp_path))


def shuffle_ids(spec):
    """New ids for every token, so that they no longer follow the merges."""
    vocab, added = spec["model"]["vocab"], spec["added_tokens"]
    ids = list(vocab.values())
    random.Random(0).shuffle(ids)
    spec["model"]["vocab"] = dict(zip(vocab, ids))
    for token in added:
        token["id"] = spec["model"]["vocab"][token["content"]]
    added.sort(key=lambda token: token["id"])


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_ids_need_not_follow_the_merges(kind, tmp_path):
    assert_same_ids(write(train(kind), tmp_path, shuffle_ids), load_tokenizer(tmp_path))


def old_merges(spec):
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]


def test_merges_written_as_strings_are_the_same(tmp_path):
    assert_same_ids(write(train("gpt2"), tmp_path, old_merges), load_tokenizer(tmp_path), count=30)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_vocab_json_with_merges_txt_is_the_same(kind, tmp_path):
    theirs = train(kind)
    theirs.model.save(str(tmp_path))
    added = {str(theirs.token_to_id(t)): {"content": t, "special": True} for t in SPECIAL}
    config = {"added_tokens_decoder": added, "eos_token": SPECIAL[2]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    ours = load_tokenizer(tmp_path)
    assert_same_ids(theirs, ours)
    assert ours.eos_id == theirs.token_to_id("<|im_end|>")


def test_decode_inverts_encode_and_drops_special_tokens(pair):
    theirs, ours = pair
    for text in texts(seed=7):
        plain = re.sub("|".join(map(re.escape, SPECIAL)), "", text)
        ids = ours.encode(text)
        expected = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == expected, repr(text)
        if theirs.normalizer is None:
            again = ours.decode(ours.encode(plain))
            assert again == plain or any(t in plain for t in SPECIAL), repr(text)
            assert ours.decode(ids, keep_special=True) == text, repr(text)


def add_tool_call(spec):
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": len(spec["model"]["vocab"]),
                                 "content": "<tool_call>", "special": False})


def test_decode_keeps_added_tokens_that_are_not_special(tmp_path):
    """As <tool_call> of Qwen2.5: one token, yet part of the answer."""
    theirs, text = write(train("qwen2"), tmp_path, add_tool_call), "<tool_call>{}<|im_end|>"
    ours = load_tokenizer(tmp_path)
    assert ours.encode(text) == theirs.encode(text).ids
    expected = theirs.decode(theirs.encode(text).ids)
    assert ours.decode(ours.encode(text)) == expected == "<tool_call>{}"


def test_decode_of_half_a_character_is_a_replacement_character(pair):
    ids = pair[1].encode("𝄞")
    assert len(ids) > 1 and pair[1].decode(ids[:1]) == "\ufffd"


@pytest.mark.parametrize("config, eos", [
    ({"eos_token": "<|endoftext|>"}, "<|endoftext|>"),
    ({"eos_token": {"content": "<|im_end|>"}}, "<|im_end|>"),
    ({}, "<|im_end|>")])
def test_eos_id(config, eos, tmp_path):
    theirs = write(train("gpt2"), tmp_path, **config)
    ours = load_tokenizer(tmp_path)
    assert ours.eos_id == theirs.token_to_id(eos)
    assert ours.answer("gold") == [*theirs.encode("gold").ids, ours.eos_id]


def test_real_gpt2_ids_equal_tiktoken(tmp_path, monkeypatch):
    cache = SHARED / "tiktoken_cache"
    if not cache.exists():
        pytest.skip("no tiktoken cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    theirs = tiktoken.get_encoding("gpt2")
    for file in cache.iterdir():  # GPT-2's own two files, under the hashes of their addresses
        text = file.read_text(encoding="utf-8")
        name = "vocab.json" if text.startswith("{") else "merges.txt"
        (tmp_path / name).write_text(text, encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    assert ours.eos_id == 50256
    for text in texts(seed=0):
        assert ours.encode(text) == theirs.encode(text, allowed_special="all"), repr(text)


def test_default_models_tokenizer_equals_hugging_face():
    text = SHARED / "data" / "wikitext2_test.txt"
    if not (DEFAULT / "tokenizer.json").exists() or not text.exists():
        pytest.skip("no default model fetched, or no text")
    theirs = Tokenizer.from_file(str(DEFAULT / "tokenizer.json"))
    ours = load_tokenizer(DEFAULT)
    for line in text.read_text(encoding="utf-8")[:200_000].split("\n\n"):
        assert ours.encode(line) == theirs.encode(line, add_special_tokens=False).ids
    assert_same_ids(theirs, ours)
    assert ours.eos_id == 2


# The two chat templates, cut to what a conversation without tools uses.
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN2_TEMPLATE = (r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions """
                  r"""to assist with the user query.<|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. """
                  r"""You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) """
                  r"""or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""")
PLAIN_TEMPLATE = (  # no default system message
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
USER = {"role": "user", "content": "What's {gold}? 79 <b>é</b>\n\n  Say \\n."}
SYSTEM = {"role": "system", "content": "Be brief, it's late."}
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, {"role": "assistant", "content": "Au"}, USER]]


@pytest.mark.parametrize("messages", CONVERSATIONS,
                         ids=["default-system", "own-system", "three-turns"])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "a list in it", "chat_template.jinja"])
@pytest.mark.parametrize("kind, template", [
    ("smollm2", SMOLLM2_TEMPLATE), ("qwen2", QWEN2_TEMPLATE), ("gpt2", PLAIN_TEMPLATE)])
def test_chat_equals_transformers(kind, template, where, messages, tmp_path):
    theirs = PreTrainedTokenizerFast(tokenizer_object=train(kind), eos_token="<|im_end|>",
                                     chat_template=template)
    theirs.save_pretrained(tmp_path)
    if where != "chat_template.jinja":  # as transformers 4 wrote it
        (tmp_path / "chat_template.jinja").unlink()
        several = [{"name": "tool_use", "template": "no"},
                   {"name": "default", "template": template}]
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["chat_template"] = several if where == "a list in it" else template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True,
                                          return_dict=False)
    assert ours.chat(messages) == expected
    default = {"smollm2": "named SmolLM", "qwen2": "You are Qwen"}.get(kind)
    if default:
        assert (default in ours.decode(expected)) == (messages[0]["role"] != "system")


def test_chat_without_chatml_is_a_plain_transcript(tmp_path):
    write(train("gpt2", special=["<|endoftext|>"]), tmp_path)
    ours = load_tokenizer(tmp_path)
    question = f"Question: {USER['content']}\nAnswer:"
    assert ours.decode(ours.chat([USER])) == question
    assert ours.decode(ours.chat([SYSTEM, USER])) == f"{SYSTEM['content']}\n\n{question}"
    assert ours.decode(ours.chat(CONVERSATIONS[2])).count("Answer: Au\n\nQuestion:") == 1
    assert ours.decode(ours.answer("Au")) == " Au"
    assert ours.answer("Au")[-1] == ours.added["<|endoftext|>"]


BYTE_LEVEL = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NO_SPLIT = {**BYTE_LEVEL, "use_regex": False}
BY_STRING = {"type": "Split", "pattern": {"String": " "}}
GROUPS = {"type": "Digits", "individual_digits": False}
PUNCTUATION = {"type": "Punctuation", "behavior": "Isolated"}


def set_model(**changes):
    return lambda spec: spec["model"].update(changes)


def pre_tokenize(*steps):
    value = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
    return lambda spec: spec.update(pre_tokenizer=value)


UNSUPPORTED = {
    "WordPiece": (set_model(type="WordPiece"), "byte-level BPE"),
    "Whitespace": (pre_tokenize({"type": "Whitespace"}), "Whitespace"),
    "no pre-tokenizer": (pre_tokenize(None), "pre-tokenizer"),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_a_tokenizer_that_would_differ_is_refused_by_name(what, tmp_path):
    change, culprit = UNSUPPORTED[what]
    spec = json.loads(train("gpt2").to_str())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    named = f"^{re.escape(str(tmp_path))}/tokenizer.json: .*{culprit}"
    with pytest.raises(ValueError, match=named):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load_tokenizer(tmp_path)
    for text, says in (("{", "not JSON"), ("[]", "not a JSON object")):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/tokenizer.json: {says}"):
            load_tokenizer(tmp_path)
