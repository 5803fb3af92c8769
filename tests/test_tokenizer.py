"""tokenizer.py: ids, texts and chats equal Hugging Face's, and what would differ is refused."""
import json
import os
import random
import re
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from conftest import numbered
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

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
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def set_model(**changes):
    return lambda spec: spec["model"].update(changes)


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": steps}


def split(pattern, behavior="Isolated"):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def put(**parts):
    return lambda spec: spec.update(parts)


def pre_tokenize(*steps):
    return put(pre_tokenizer=sequence(*steps) if len(steps) > 1 else steps[0])


def add(content):
    token = {"id": 999, "content": content, **FLAGS, "normalized": True}
    return lambda spec: spec.update(added_tokens=[*spec["added_tokens"], token],
                                    normalizer={"type": "Lowercase"})


def template(*letters):
    pieces = [{"Sequence": {"id": letter, "type_id": 0}} for letter in letters]
    return {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {}}


BERT = {"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}
UNSUPPORTED = {
    "WordPiece": (set_model(type="WordPiece"), "byte-level BPE"),
    "dropout": (set_model(dropout=0.1), "dropout"),
    "unk_token": (lambda spec: (spec["model"]["vocab"].pop("A"), set_model(unk_token="<?>")(spec)),
                  "'A'|unk_token '<\\?>'"),
    "a merge of unknown tokens": (set_model(merges=["a ☃"]), "'☃' is not in the vocab"),
    "a merge of three": (set_model(merges=[["a", "b"], "a b c"]), "merge 1 .*'a b c'"),
    "one id twice": (lambda spec: spec["model"]["vocab"].update(zebra=5), "same id"),
    "Whitespace": (pre_tokenize({"type": "Whitespace"}), "Whitespace"),
    "Metaspace": (pre_tokenize(METASPACE, BYTE_LEVEL), "Metaspace"),
    "no pre-tokenizer": (pre_tokenize(None), "pre-tokenizer"),
    "a behavior": (pre_tokenize(split("a", "Doubled"), BYTE_LEVEL), "Doubled"),
    "another normalizer": (put(normalizer={"type": "Nmt"}), "Nmt"),
    "another decoder": (put(decoder={"type": "WordPiece", "prefix": "#", "cleanup": True}),
                        "decoder WordPiece"),
    "another post-processor": (put(post_processor={"type": "Odd"}), "post-processor Odd"),
    "two post-processors": (put(post_processor={"type": "Sequence", "processors": [
        template("A"), BERT]}), "TemplateProcessing \\+ BertProcessing"),
    "a text twice": (put(post_processor=template("A", "A")), "not just once"),
    "two added tokens that become one": (
        lambda spec: (add("[X]")(spec), add("[x]")(spec)), re.escape("'[x]'")),
} | {pattern: (pre_tokenize(split(pattern), NO_SPLIT), re.escape(repr(pattern))) for pattern in (
    r"\bfoo", r"(a)\1", r"(?<n>a)", r"(?x: a)", r"[[:alpha:]]", r"[]a]", "a{2}+", "a{2}?",
    "(?i:ss)", r"(?i:\p{Lu})", r"(?i:[a-c])", "(?i:é)", r"\p{Word}", r"\X", "(?m:.)", "[a--b]",
    r"[^\s\S]", "(?<=a+)b", "[&&a]", r"\xE9", "(?~a)", "(*FAIL)", "b(?i)a",
    "(?#c)", r"[\w-z]", "a+*", "(", ")", r"\p{Nonsense}")}


TRAINED = train("gpt2").to_str()


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_a_tokenizer_that_would_differ_is_refused_by_name(what, tmp_path):
    change, culprit = UNSUPPORTED[what]
    spec = json.loads(TRAINED)
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


# --------------------------------------------------------------------------------------------------
# What real files did: each kind with its smallest case

BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"


def byte_vocab(*more):
    return {token: i for i, token in enumerate([*bytes_to_unicode(), *more])}


def small(folder, model=None, config=None, files=None, added_tokens=(), **parts):
    """(Hugging Face's tokenizer, ours) of a folder with single bytes and what the arguments say."""
    model = {"type": "BPE", "vocab": byte_vocab(), "merges": [], **(model or {})}
    end = {"content": "<|endoftext|>", **FLAGS, "special": True}
    added = numbered([*added_tokens, end], model["vocab"])
    spec = {"version": "1.0", "added_tokens": added, "normalizer": None, "model": model,
            "pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "post_processor": None, **parts}
    files = {"tokenizer.json": spec, **({"tokenizer_config.json": config} if config else {}),
             **(files or {})}
    write_all(folder, files)
    return Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder)


def write_all(folder, files):
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")


def test_what_a_splits_pattern_does_not_match_is_kept(tmp_path):
    """BLOOM's leaves out points, commas and white space."""
    theirs, ours = small(tmp_path, pre_tokenizer=sequence(split(BLOOM), NO_SPLIT))
    assert ours.decode(ours.encode("x = 1.5")) == "x = 1.5"
    for text in texts(seed=1):
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


@pytest.mark.parametrize("whole_first", [False, True])
def test_a_token_that_no_merge_makes_is_taken_whole_or_never(whole_first, tmp_path):
    vocab = byte_vocab("he", "hello", "ell")
    model = {"vocab": vocab, "merges": ["h e"], "ignore_merges": whole_first}
    theirs, ours = small(tmp_path, model)
    whole = [vocab["hello"]] if whole_first else [vocab["he"], *map(vocab.get, "llo")]
    assert ours.encode("hello") == theirs.encode("hello").ids == whole
    assert ours.encode("hellos") == theirs.encode("hellos").ids == [
        vocab["he"], *map(vocab.get, "llos")]


def test_merges_in_an_order_of_their_own_are_done_in_that_order(tmp_path):
    """tiktoken, which knows ranks of tokens only, would join l + ow; no merge does."""
    vocab = byte_vocab("lo", "low", "ow")
    theirs, ours = small(tmp_path, {"vocab": vocab, "merges": ["o w", "lo w", "l o"]})
    for text in ("low", "lo", "slow low", "oow"):
        assert ours.encode(text) == theirs.encode(text).ids, text
    assert ours.encode("low") == [vocab["l"], vocab["ow"]]


@pytest.mark.parametrize("flags", [
    {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True},
    {"lstrip": True, "rstrip": True, "normalized": True, "single_word": True, "special": True}],
    ids=" ".join)
def test_an_added_tokens_flags_are_obeyed(flags, tmp_path):
    added = [{"content": content, **FLAGS, **flags} for content in ("[X]", "[X]Y")]
    theirs, ours = small(tmp_path, added_tokens=added, normalizer={"type": "Lowercase"})
    for text in ("a [X] b", "a[X]b", "[x]", "  [X]\n\n[X]", "[X]Yz", "a [x]y b", "\x1f [X] \x85c"):
        assert ours.encode(text) == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text).ids), text


def test_an_added_tokens_id_is_the_vocabularys_or_the_next_one_as_in_tokenizers(tmp_path):
    added = [{"content": content, **FLAGS} for content in ("[X]", "a", "[Y]")]
    theirs, ours = small(tmp_path, added_tokens=added)
    assert ours.encode("[Y]a[X]b") == theirs.encode("[Y]a[X]b").ids == [
        257, byte_vocab()["a"], 256, byte_vocab()["b"]]


def test_an_added_token_that_says_another_id_than_it_gets_is_refused(tmp_path):
    """As of a Qwen2.5 that was converted with its vocabulary's unused entries: tokenizers gives its
    chat's tokens the ids of untrained embeddings, and says so on stderr alone."""
    small(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["vocab"]["[PAD300]"] = 300
    write_all(tmp_path, {"tokenizer.json": spec})
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode("<|endoftext|>").ids == [257]
    says = r"'<\|endoftext\|>' says that its id is 256, and gets 257, in tokenizers, too"
    with pytest.raises(ValueError, match=says):
        load_tokenizer(tmp_path)


def test_what_a_post_processor_adds_is_prefix_and_suffix(tmp_path):
    """As Llama 3's begin-of-text, which `encode` leaves to the caller."""
    a, x = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [x, x, a, x], "pair": [a, a],
                "special_tokens": {"x": {"id": "x", "ids": [5, 6], "tokens": ["x", "y"]}}}
    around = {"type": "Sequence", "processors": [BYTE_LEVEL, template]}
    theirs, ours = small(tmp_path, post_processor=around)
    assert (ours.prefix, ours.suffix) == ([5, 6, 5, 6], [5, 6])
    for text in ("", "a", "a <|endoftext|>"):
        assert ours.encode_text(text) == theirs.encode(text).ids
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["RobertaProcessing", "BertProcessing"])
def test_bert_and_roberta_put_one_token_before_and_one_after(kind, tmp_path):
    around = {"type": kind, "sep": ["</s>", 3], "cls": ["<s>", 4]}
    around |= {"trim_offsets": True, "add_prefix_space": False} if kind[0] == "R" else {}
    theirs, ours = small(tmp_path, post_processor=around)
    assert ours.encode_text("ab") == theirs.encode("ab").ids
    assert (ours.prefix, ours.suffix) == ([4], [3])


def test_truncation_and_padding_have_no_effect_as_in_transformers(tmp_path):
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
           "pad_type_id": 0, "pad_token": "!"}
    _, ours = small(tmp_path, truncation=cut, padding=pad)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("a", "abcdefgh"):
        assert ours.encode_text(text) == theirs(text)["input_ids"]


def test_half_a_surrogate_pair_is_named(tmp_path):
    _, ours = small(tmp_path)
    for text in ("\ud83d", "so good \ude00!", "a<|endoftext|>\ud83d"):
        with pytest.raises(ValueError, match=r"half a surrogate pair, '\\ud.{3}'") as caught:
            ours.encode(text)
        assert type(caught.value) is ValueError and str(caught.value).isprintable()


BROKEN = {
    "no behavior": pre_tokenize({"type": "Split", "pattern": {"String": " "}}, BYTE_LEVEL),
    "a list of tokens": set_model(vocab=["a", "b"]), "no list of merges": set_model(merges=7),
    "an added token without content": put(added_tokens=[{"id": 3}]),
    "a text for a step": put(normalizer="NFC"), "a list of steps": put(pre_tokenizer=[BYTE_LEVEL]),
    "a text for a model": put(model="BPE"), "a text for an id": set_model(vocab={"a": "b"})}


@pytest.mark.parametrize("what", BROKEN)
def test_a_tokenizer_json_of_another_form_is_refused_in_one_line(what, tmp_path):
    spec = json.loads(TRAINED)
    BROKEN[what](spec)
    write_all(tmp_path, {"tokenizer.json": spec})
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/tokenizer.json: .+") as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


# The special tokens of the other files, as transformers adds them

ADDED = {"8": {"content": "a", **FLAGS}, "300": {"content": "[Y]", **FLAGS, "special": True}}
CONFIGS = {
    "named": {"bos_token": "<s>", "pad_token": {"__type": "AddedToken", "content": "b", **FLAGS}},
    "listed": {"additional_special_tokens": ["<x>", "c"], "image_token": "<img>"},
    "in a table": {"extra_special_tokens": {"audio": "<audio>"}},
    "by id": {"added_tokens_decoder": ADDED, "bos_token": "[Y]"},
    "told to add": {"bos_token": "<s>", "add_bos_token": True, "add_eos_token": True}}
LISTED = {"added_tokens.json": {"[Y]": 257, "[Z]": 258}, "special_tokens_map.json": {
    "bos_token": "[Z]", "pad_token": {"content": "<pad>", **FLAGS}}}
MARKED = "<s>abc [Y]<pad><x> [Z]<img>d<audio> <|endoftext|>"


@pytest.mark.parametrize("what", CONFIGS)
@pytest.mark.parametrize("files", [{}, LISTED], ids=["", "older files"])
def test_special_tokens_of_the_config_are_added_as_transformers_adds_them(what, files, tmp_path):
    config = {"eos_token": "<|endoftext|>", **CONFIGS[what]}
    _, ours = small(tmp_path, config=config, files=files)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.encode_text(MARKED) == theirs(MARKED)["input_ids"]
    assert ours.decode(ours.encode(MARKED)) == theirs.decode(theirs.encode(MARKED),
                                                             skip_special_tokens=True)


@pytest.mark.parametrize("what", CONFIGS)
@pytest.mark.parametrize("files", [{}, LISTED], ids=["", "older files"])
@pytest.mark.parametrize("kind, theirs", [("gpt2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)])
def test_so_they_are_with_vocab_json_and_merges_txt(kind, theirs, what, files, tmp_path):
    """Here, where there is no post-processor, add_bos_token and add_eos_token count."""
    vocab = byte_vocab("<|endoftext|>", "ab")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    config = {"eos_token": "<|endoftext|>", **CONFIGS[what]}
    write_all(tmp_path, {"vocab.json": vocab, "config.json": {"model_type": kind},
                         "tokenizer_config.json": config, **files})
    theirs, ours = theirs.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert ours.encode_text(MARKED) == theirs(MARKED)["input_ids"]
    assert bool(ours.prefix) == bool(ours.suffix) == (what == "told to add")


def test_vocab_json_of_a_tokenizer_that_is_not_known_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps(byte_vocab("<|endoftext|>")))
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizerFast"}')
    with pytest.raises(ValueError, match="RobertaTokenizer .*tokenizer.json"):
        load_tokenizer(tmp_path)


def test_ordinary_folders_ask_tiktoken_once_for_a_long_text(pair, monkeypatch):
    calls, whole = [], tiktoken.Encoding.encode_ordinary
    monkeypatch.setattr(tiktoken.Encoding, "encode_ordinary",
                        lambda self, text: calls.append(text) or whole(self, text))
    text = (ENGLISH + CODE + WORLD) * 200
    assert pair[1].encode(text) == pair[0].encode(text).ids
    assert calls == [unicodedata.normalize("NFC", text) if pair[0].normalizer else text]
