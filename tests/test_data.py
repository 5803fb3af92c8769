"""data.py: the tokenizer against Hugging Face's, the built-in tasks against their promises, files and their errors."""
import json
import os
import random
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data import (
    ELEMENTS,
    Example,
    Task,
    batches,
    contains,
    load_task,
    load_tokenizer,
    same_json,
    science,
    split_text,
    student_prompt,
    teacher_prompt,
    text_windows,
    tooluse,
)
from tokenizer import QWEN2_PATTERN, bytes_to_unicode

SHARED = Path(__file__).resolve().parents[2] / "shared"
DEFAULT = Path(os.environ.get("SDFT_CACHE") or Path.home() / ".cache" / "sdft") / "SmolLM2-135M-Instruct"

# ---------------------------------------------------------------------------------------------------------------------
# Throwaway tokenizers, trained here, in the forms that real models ship

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ENGLISH = """The quick brown fox doesn't jump over the lazy dog's back; they've said we'll see, I'm sure she'd agree. You're
RIGHT. An element's symbol is one or two letters: hydrogen is H, helium is He. In 1869, 63 elements were known; 118 are now.
What is the atomic number of gold? The atomic number of gold is 79. Answer the question in one short sentence, please."""
CODE = """def forward(self, x, mask=None):\n    if mask is not None:\n        x = x * mask[:, None]  # [B, T, D]\n\treturn x\n
for (int i = 0; i < 128; ++i) { total += values[i] != 0 ? 3.14159e-5 : -1; }\r\n#include <stdio.h>\n\n\n        "odd";\n"""
FAMILY, PRIDE, THUMB = "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f44d\U0001f3fd"
WORLD = f"naïve café Ünïcödé Привет мир 你好,世界。今日は東京です 한국어 שלום مرحبا ١٢٣ {FAMILY} {PRIDE} {THUMB} ½ Ⅷ x² e\u0301 Å"
CORPUS = [ENGLISH, CODE, WORLD] * 3


def digits_and_byte_level():
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False)])


def split_by(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm2": digits_and_byte_level,
    "qwen2": lambda: split_by(QWEN2_PATTERN),
    "llama3": lambda: split_by(LLAMA3_PATTERN),
}


def train(kind, all_bytes=True, size=900, special=SPECIAL):
    """Hugging Face's tokenizer of this kind, trained on CORPUS; all_bytes=False keeps only the bytes that the corpus has."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    tokenizer.normalizer = normalizers.NFC() if kind == "qwen2" else None
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE_TOKENIZERS[kind](), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if all_bytes else []
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write(tokenizer, folder, change=None, **config):
    """The folder with this tokenizer's tokenizer.json, `change`d, and Hugging Face's tokenizer of that very file."""
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
    *ENGLISH.split(" "), *CODE.split(" "), *WORLD.split(" "), *SPECIAL, *SPECIAL, "<|im_start", "im_end|>", "<|", "|",
    " ", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\xa0", "\u3000", "\u2028", "\x85", "\x0b", "\x0c", "\x1c", "\x1f",
    "\u180e", "\u200b", "\ufeff", "0", "7", "12", "345", "6789", "3.14", "1,000", "٣", "½", "Ⅷ", "²", "一",
    "'s", "'S", "'ll", "'LL", "'Ve", "'", "''", "’s", "'ſ", "\x00", "\x01", "\x04", "\x1b[0m", "\x7f", "\x80",
    FAMILY, PRIDE, "\u200d", "\ufe0f", "e\u0301", "a\u0323\u0302", "\u1100\u1161\u11a8", "Å", "ﬁ",
    "_", "__init__", "->", "!=", "...", "###", "\\n", "—", "\U000e0001", "\ud7ff"]


def texts(seed, count=150):
    """Hard texts: fragments at random, and random bytes read as UTF-8 with errors='replace'."""
    rng = random.Random(seed)
    yield from (ENGLISH, CODE, WORLD, "", " ", "\n", "a  1", "a   12  b", "  \n  3", "x\t\t4", "tab\t 5 ", "can't I'Ll'd've")
    for _ in range(count):
        yield "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 30)))
        yield rng.randbytes(rng.randint(1, 40)).decode("utf-8", errors="replace")
        yield "".join(chr(rng.randrange(rng.choice((0x80, 0x3000, 0xD800)))) for _ in range(12))


def assert_same_ids(theirs, ours, seed=0, count=150):
    for text in texts(seed, count):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

@pytest.mark.parametrize("seed", range(3))
def test_ids_equal_hugging_face(pair, seed):
    assert_same_ids(*pair, seed)


def test_special_tokens_in_the_text_become_their_ids(pair):
    theirs, ours = pair
    ids = ours.encode("<|im_start|>user\n<|im_end|><|endoftext|>")
    assert [i for i in ids if i in ours.added.values()] == [theirs.token_to_id(t) for t in (SPECIAL[1], SPECIAL[2], SPECIAL[0])]


def test_a_special_token_is_found_before_the_text_is_normalized(tmp_path):
    """NFC joins '>' and a following U+0338 into one character; the token before it is a token all the same."""
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
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "eos_token": SPECIAL[2]}))
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
            assert ours.decode(ours.encode(plain)) == plain or any(t in plain for t in SPECIAL), repr(text)
            assert ours.decode(ids, keep_special=True) == text, repr(text)


def add_tool_call(spec):
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": len(spec["model"]["vocab"]), "content": "<tool_call>",
                                 "special": False})


def test_decode_keeps_added_tokens_that_are_not_special(tmp_path):
    """As <tool_call> of Qwen2.5: one token, yet part of the answer."""
    theirs, text = write(train("qwen2"), tmp_path, add_tool_call), "<tool_call>{}<|im_end|>"
    ours = load_tokenizer(tmp_path)
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text).ids) == "<tool_call>{}"


def test_decode_of_half_a_character_is_a_replacement_character(pair):
    ids = pair[1].encode("𝄞")
    assert len(ids) > 1 and pair[1].decode(ids[:1]) == "\ufffd"


@pytest.mark.parametrize("config, eos", [
    ({"eos_token": "<|endoftext|>"}, "<|endoftext|>"), ({"eos_token": {"content": "<|im_end|>"}}, "<|im_end|>"),
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
    for file in cache.iterdir():  # the cache holds GPT-2's own two files, under the hashes of their addresses
        text = file.read_text(encoding="utf-8")
        (tmp_path / ("vocab.json" if text.startswith("{") else "merges.txt")).write_text(text, encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    assert ours.eos_id == 50256
    for text in texts(seed=0):
        assert ours.encode(text) == theirs.encode(text, allowed_special="all"), repr(text)


def test_default_models_tokenizer_equals_hugging_face():
    text = SHARED / "data" / "wikitext2_test.txt"
    if not (DEFAULT / "tokenizer.json").exists() or not text.exists():
        pytest.skip("no default model fetched, or no text")
    theirs, ours = Tokenizer.from_file(str(DEFAULT / "tokenizer.json")), load_tokenizer(DEFAULT)
    for line in text.read_text(encoding="utf-8")[:200_000].split("\n\n"):
        assert ours.encode(line) == theirs.encode(line, add_special_tokens=False).ids
    assert_same_ids(theirs, ours)
    assert ours.eos_id == 2


# The two chat templates, cut to what a conversation without tools uses.
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + "
    "'\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN2_TEMPLATE = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.<|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
PLAIN_TEMPLATE = (  # no default system message
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
USER = {"role": "user", "content": "What's {gold}? 79 <b>é</b>\n\n  Say \\n."}
SYSTEM = {"role": "system", "content": "Be brief, it's late."}
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, {"role": "assistant", "content": "Au"}, USER]]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["default-system", "own-system", "three-turns"])
@pytest.mark.parametrize("where", ["tokenizer_config.json", "a list in it", "chat_template.jinja"])
@pytest.mark.parametrize("kind, template", [("smollm2", SMOLLM2_TEMPLATE), ("qwen2", QWEN2_TEMPLATE), ("gpt2", PLAIN_TEMPLATE)])
def test_chat_equals_transformers(kind, template, where, messages, tmp_path):
    theirs = PreTrainedTokenizerFast(tokenizer_object=train(kind), eos_token="<|im_end|>", chat_template=template)
    theirs.save_pretrained(tmp_path)
    if where != "chat_template.jinja":  # as transformers 4 wrote it
        (tmp_path / "chat_template.jinja").unlink()
        several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
        config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {
            "chat_template": several if where == "a list in it" else template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ours.chat(messages) == expected
    default = {"smollm2": "named SmolLM", "qwen2": "You are Qwen"}.get(kind)
    if default:
        assert (default in ours.decode(expected)) == (messages[0]["role"] != "system")


def test_chat_without_chatml_is_a_plain_transcript(tmp_path):
    write(train("gpt2", special=["<|endoftext|>"]), tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.decode(ours.chat([USER])) == f"Question: {USER['content']}\nAnswer:"
    assert ours.decode(ours.chat([SYSTEM, USER])) == f"{SYSTEM['content']}\n\nQuestion: {USER['content']}\nAnswer:"
    assert ours.decode(ours.chat(CONVERSATIONS[2])).count("Answer: Au\n\nQuestion:") == 1
    assert ours.decode(ours.answer("Au")) == " Au" and ours.answer("Au")[-1] == ours.added["<|endoftext|>"]


def set_model(**changes):
    return lambda spec: spec["model"].update(changes)


def set_pre_tokenizer(value):
    return lambda spec: spec.update(pre_tokenizer=value)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
UNSUPPORTED = {
    "WordPiece": (set_model(type="WordPiece"), "byte-level BPE"),
    "byte_fallback": (set_model(byte_fallback=True), "byte-level BPE"),
    "Whitespace": (set_pre_tokenizer({"type": "Whitespace"}), "Whitespace"),
    "Digits in groups": (set_pre_tokenizer({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": False}, BYTE_LEVEL]}), "Digits"),
    "three steps": (set_pre_tokenizer({"type": "Sequence", "pretokenizers": [
        {"type": "Punctuation", "behavior": "Isolated"}, BYTE_LEVEL, BYTE_LEVEL]}), "Punctuation"),
    "no pre-tokenizer": (set_pre_tokenizer(None), "pre-tokenizer"),
    "a space put in front": (set_pre_tokenizer({**BYTE_LEVEL, "add_prefix_space": True}), "ByteLevel"),
    "no split at all": (set_pre_tokenizer({**BYTE_LEVEL, "use_regex": False}), "ByteLevel"),
    "a split at a string": (set_pre_tokenizer({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"String": " "}}, {**BYTE_LEVEL, "use_regex": False}]}), "Split"),
    "lower case": (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "Lowercase"),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_a_tokenizer_that_would_differ_is_refused_by_name(what, tmp_path):
    change, culprit = UNSUPPORTED[what]
    spec = json.loads(train("gpt2").to_str())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/tokenizer.json: .*{culprit}"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        load_tokenizer(tmp_path)
    for text, says in (("{", "not JSON"), ("[]", "not a JSON object")):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/tokenizer.json: {says}"):
            load_tokenizer(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Built-in tasks

def prompts(examples):
    return {e.prompt for e in examples}


def standard_error(n):
    return 100 * (0.25 / n) ** 0.5  # of a percentage, at worst


def test_the_118_elements():
    symbols, names = ELEMENTS[::2], ELEMENTS[1::2]
    assert len(symbols) == len(names) == len(set(symbols)) == len(set(names)) == 118
    assert all(re.fullmatch("[A-Z][a-z]?", s) for s in symbols) and all(re.fullmatch("[A-Z][a-z]{2,}", n) for n in names)
    known = {1: "H Hydrogen", 6: "C Carbon", 11: "Na Sodium", 19: "K Potassium", 26: "Fe Iron", 27: "Co Cobalt", 29: "Cu Copper",
             43: "Tc Technetium", 47: "Ag Silver", 50: "Sn Tin", 51: "Sb Antimony", 53: "I Iodine", 57: "La Lanthanum",
             71: "Lu Lutetium", 74: "W Tungsten", 79: "Au Gold", 80: "Hg Mercury", 82: "Pb Lead", 86: "Rn Radon", 92: "U Uranium",
             94: "Pu Plutonium", 103: "Lr Lawrencium", 112: "Cn Copernicium", 118: "Og Oganesson"}
    assert {n: f"{symbols[n - 1]} {names[n - 1]}" for n in known} == known
    ends = [symbols.index(s) + 1 for s in "He Ne Ar Kr Xe Rn Og".split()]
    assert ends == [2, 10, 18, 36, 54, 86, 118], "the noble gases close the periods of the table"
    for group, step in (("Li Na K Rb Cs Fr", 1), ("Be Mg Ca Sr Ba Ra", 2), ("F Cl Br I At Ts", 7)):
        numbers = [symbols.index(s) + 1 for s in group.split()]
        assert numbers == [end + step for end in ends[:6]] if step < 3 else numbers == [end - 1 for end in ends[1:]]


def test_science_splits_share_no_prompt_and_hold_out_what_they_say():
    task = science()
    phrasing, element = task.eval["phrasing"], task.eval["element"]
    assert (len(task.train), len(phrasing), len(element)) == (1176, 294, 300)
    assert all(len(split) >= 278 and standard_error(len(split)) < 3 for split in task.eval.values())
    everything = [*task.train, *phrasing, *element]
    assert len(prompts(everything)) == len(everything) == 118 * 15, "every prompt is asked once, in one split"
    facts = {e.response for e in task.train}
    assert {e.response for e in phrasing} == facts and len(facts) == 98 * 3, "`phrasing` asks the facts of train"
    assert not facts & {e.response for e in element} and len({e.response for e in element}) == 20 * 3
    words = {w for e in task.train for w in re.findall(r"\w+", e.prompt + " " + e.response)}
    held_out = {re.search(r"is (\w+)\.$", e.response)[1] for e in element if "with the chemical symbol" in e.response}
    assert len(held_out) == 20 and not held_out & words, "train names no element of `element`"
    assert {e.system for e in everything} == {task.train[0].system}

    def wordings(examples):  # the prompt without the element
        return {re.sub(rf"\b({'|'.join(ELEMENTS[1::2])})\b", "_", e.prompt, flags=re.I) for e in examples
                if "symbol" in e.response.split("is")[0] and "element" not in e.response}
    assert not wordings(task.train) & wordings(phrasing) and wordings(phrasing) < wordings(element)


@pytest.mark.parametrize("make", [science, tooluse])
def test_every_demonstration_passes_its_own_check_and_no_other_answer_does(make):
    task = make()
    for split in (task.train, *task.eval.values()):
        distinct = {e.response: e.check for e in split}
        assert all(e.check(e.response) and not e.check("") for e in split)
        for response, check in distinct.items():
            others = [r for r in distinct if r[:12] == response[:12]]  # of the same kind of fact, or all tool calls
            assert [r for r in others if check(r)] == [response]


def test_words_that_open_a_sentence_are_no_chemical_symbols():
    task = science()
    checks = {e.response: e.check for e in [*task.train, *task.eval["element"]] if "symbol of" in e.response}
    for answer in ("I cannot say.", "In chemistry it is Xx.", "As an AI, I do not know.", "No idea.", "At the moment, no.",
                   "He was a chemist.", "Be careful."):
        assert not [response for response, check in checks.items() if check(answer)], answer


def test_science_checkers_want_the_whole_word_and_the_symbols_case():
    split = {e.response: e.check for e in [*science().train, *science().eval["element"]]}
    cobalt, magnesium = split["The chemical symbol of cobalt is Co."], split["The atomic number of magnesium is 12."]
    gold = split["The element with the chemical symbol Au is gold."]
    assert cobalt("Co") and cobalt("It is 'Co'.") and not any(map(cobalt, ("CO", "co", "Cobalt", "Con", "C o", "")))
    assert magnesium("12") and magnesium("Mg has 12 protons") and not any(map(magnesium, ("112", "120", "1 2", "Mg12", "12th")))
    assert gold("Gold!") and gold("it is gold") and not any(map(gold, ("golden", "Au", "silver", "marigold")))
    assert contains("a.c")("x a.c y") and not contains("a.c")("abc"), "the key is text, not a pattern"


def test_tooluse_splits():
    task = tooluse()
    request = task.eval["request"]
    assert (len(task.train), len(request)) == (360, 300) and standard_error(300) < 3
    assert not prompts(task.train) & prompts(request)

    def asked(e):  # what is asked, without the schemas shown
        return e.prompt.split("Request: ")[1]
    assert not {asked(e) for e in task.train} & {asked(e) for e in request}
    assert len({asked(e) for e in request}) >= 278, "repeated requests would make the standard error larger than it is said to be"
    names = Counter(json.loads(e.response)["name"] for e in request)
    assert len(names) == 6 and set(names.values()) == {50}
    for e in [*task.train, *request]:
        call = json.loads(e.response)
        schemas = {tool["name"]: tool["arguments"] for tool in map(json.loads, e.prompt.split("\n\n")[0].split("\n")[1:])}
        assert len(schemas) == 3 and set(schemas[call["name"]]) == set(call["arguments"])
        for key, value in call["arguments"].items():
            assert str(value) in asked(e), "the request names every argument"
            assert schemas[call["name"]][key] == {int: "integer", str: "string"}[type(value)]


def test_tooluse_checker():
    call = {"name": "book_table", "arguments": {"city": "Oslo", "guests": 4}}
    check = same_json(call)
    assert check('Sure: {"arguments": {"guests": 4, "city": "Oslo"}, "name": "book_table"} Anything else?')
    wrong = ('{"name": "book_table", "arguments": {"city": "Oslo", "guests": 5}}',
             '{"name": "book_table", "arguments": {"city": "Oslo", "guests": "4"}}',
             '{"name": "book_table", "arguments": {"city": "Lima", "guests": 4}}',
             '{"name": "book_table", "arguments": {"city": "Oslo"}}',
             '{"name": "book_table", "arguments": {"city": "Oslo", "guests": 4, "day": "today"}}',
             '{"name": "get_weather", "arguments": {"city": "Oslo", "guests": 4}}',
             '{"name": "book_table", "arguments": {"city": "Oslo", "guests": 4}', "book_table(Oslo, 4)", "{}", "")
    assert not any(map(check, wrong))


def test_true_is_not_one_to_the_tooluse_checker():
    check = same_json({"name": "add_to_list", "arguments": {"item": "milk", "quantity": 1}})
    assert check('{"name": "add_to_list", "arguments": {"item": "milk", "quantity": 1}}')
    assert not check('{"name": "add_to_list", "arguments": {"item": "milk", "quantity": true}}')


def test_tasks_are_the_same_every_time():
    def content(task):
        return [[(e.prompt, e.response) for e in split] for split in (task.train, *task.eval.values())]
    assert content(science()) == content(science()) and content(tooluse()) == content(tooluse())


def test_load_task_by_name():
    assert load_task("science").name == "science" and load_task("tooluse").name == "tooluse"
    text = load_task("text")
    assert text.name == "text" and not text.eval and len(text.train) > 200
    assert all(len(e.prompt) >= 100 and e.response == "" and not e.chat for e in text.train)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def jsonl(path, *rows):
    """The path of a file of these rows: objects, or lines as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_supervised_jsonl(tmp_path):
    rows = [{"prompt": f"Question {i}?", "response": f" The  answer {i}. "} for i in range(20)]
    task = load_task(jsonl(tmp_path / "mine.jsonl", *rows[:9], "", "   ", *rows[9:]))
    assert task.name == "mine" and len(task.train) == 16 and len(task.eval["held_out"]) == 4
    whole = load_task(tmp_path / "mine.jsonl", measured_only=True)
    assert whole.train == [] and [e.prompt for e in whole.eval["all"]] == [row["prompt"] for row in rows]
    everything = [*task.train, *task.eval["held_out"]]
    assert {(e.prompt, e.response) for e in everything} == {(r["prompt"], r["response"]) for r in rows}
    assert [e.prompt for e in load_task(tmp_path / "mine.jsonl").train] == [e.prompt for e in task.train]
    e = next(e for e in everything if e.prompt == "Question 7?")
    assert e.check(e.response) and e.check("the answer 7") and not e.check("the answer 17") and not e.check("")


def test_a_json_response_is_compared_as_json(tmp_path):
    rows = [{"prompt": f"{i}", "response": json.dumps({"name": "f", "x": i})} for i in range(5)]
    task = load_task(jsonl(tmp_path / "calls.jsonl", *rows, {"prompt": "6", "response": "{a}"}))
    for e in [*task.train, *task.eval["held_out"]]:
        assert e.check(e.response)
        if e.prompt != "6":
            assert e.check(f'{{"x": {e.prompt}, "name": "f"}}') and not e.check(f'{{"name": "f", "x": {e.prompt}1}}')
        else:
            assert e.check("{A}.") and not e.check("{b}"), "braces that are not JSON are text"


def test_both_multiple_choice_forms(tmp_path):
    task = load_task(jsonl(tmp_path / "choice.jsonl", *[
        {"prompt": f"Sky {i}?", "choices": ["green", "blue", "a bit red"], "answer": 1} for i in range(5)], *[
        {"contexts": [f"{i} Ann", f"{i} Bob"], "continuation": " was late.", "answer": 1} for i in range(5)]))
    by_prompt = {e.prompt: e for e in [*task.train, *task.eval["held_out"]]}
    sky, bob = by_prompt["Sky 3?"], by_prompt["2 Bob"]
    assert sky.choices == [("Sky 3?", " green"), ("Sky 3?", " blue"), ("Sky 3?", " a bit red")]
    assert (sky.response, sky.answer) == ("blue", 1)
    assert bob.choices == [("2 Ann", " was late."), ("2 Bob", " was late.")] and (bob.response, bob.answer) == ("was late.", 1)


@pytest.mark.parametrize("file", sorted(SHARED.glob("data/*.jsonl")), ids=lambda path: path.stem)
def test_real_jsonl_files_load_and_split_without_a_leak(file):
    task = load_task(str(file))

    def contents(examples):
        return {(e.prompt, e.response, *e.choices) for e in examples}
    train, held_out = contents(task.train), contents(task.eval["held_out"])
    rows = {line for line in file.read_text(encoding="utf-8").split("\n") if line}
    assert len(train | held_out) == len(rows) and len(train) > 3.9 * len(held_out)
    assert all(e.check(e.response) for e in task.train if e.check)
    assert not train & held_out, f"{len(train & held_out)} held-out rows are trained on"


GOOD = {"prompt": "a", "response": "b"}
BAD_ROWS = {
    "not JSON": "prompt: a",
    "no response": {"prompt": "a", "answer": "b"},
    "no prompt": {"response": "a"},
    "a list": [1, 2],
    "a string": '"response"',
    "a number": "3",
    "response not text": {"prompt": "a", "response": 5},
    "prompt not text": {"prompt": [{"role": "user", "content": "a"}], "response": "b"},
    "answer too large": {"prompt": "a", "choices": ["b", "c"], "answer": 2},
    "answer negative": {"prompt": "a", "choices": ["b", "c"], "answer": -1},
    "answer a letter": {"prompt": "a", "choices": ["b", "c"], "answer": "A"},
    "choice not text": {"prompt": "a", "choices": [1, 2], "answer": 0},
    "context not text": {"contexts": [1, "b"], "continuation": "c", "answer": 1},
    "continuation not text": {"contexts": ["a", "b"], "continuation": 1, "answer": 0},
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(what, tmp_path):
    path = jsonl(tmp_path / "bad.jsonl", GOOD, "", BAD_ROWS[what], GOOD)
    with pytest.raises(ValueError, match=rf"^{re.escape(path)}:3: [^\n]+$"):
        load_task(path)


def test_bad_files_are_named(tmp_path):
    for name in ("empty.jsonl", "empty.txt"):
        (tmp_path / name).write_text(" \n\n")
        with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))}: .*empty"):
            load_task(str(tmp_path / name))
        (tmp_path / name).write_bytes(b'{"prompt": "caf\xe9"}')
        with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))}: .*UTF-8"):
            load_task(str(tmp_path / name))
    for name in ("sience", str(tmp_path / "none.jsonl"), str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=re.escape(name)):
            load_task(name)


def test_only_newlines_end_a_jsonl_line(tmp_path):
    """JSON strings may hold U+2028, U+0085 and the like as they are; str.splitlines would cut there."""
    odd = [{"prompt": f"a{c}b", "response": "c"} for c in "\u2028\u2029\x85"]
    task = load_task(jsonl(tmp_path / "odd.jsonl", *odd, GOOD))
    assert prompts([*task.train, *task.eval["held_out"]]) == prompts([Example(row["prompt"]) for row in [*odd, GOOD]])


def test_a_byte_order_mark_is_not_part_of_a_file(tmp_path):
    """Some editors on Windows put one first."""
    path = Path(jsonl(tmp_path / "bom.jsonl", GOOD, {**GOOD, "prompt": "another"}))
    without = load_task(str(path))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert prompts(load_task(str(path)).train) == prompts(without.train)


def test_one_row_is_too_few_to_train_on(tmp_path):
    """It cannot be both trained on and held out: an error, rather than a task whose batches never come."""
    path = jsonl(tmp_path / "one.jsonl", GOOD)
    with pytest.raises(ValueError, match=re.escape(path)):
        load_task(path)


def test_a_row_that_is_there_twice_is_not_in_both_splits(tmp_path):
    rows = [{"prompt": f"{i}", "response": "x"} for i in range(10)]
    task = load_task(jsonl(tmp_path / "twice.jsonl", *rows, *rows))
    assert not prompts(task.train) & prompts(task.eval["held_out"])


def test_text_file_task(tmp_path):
    long = "A paragraph with enough words to begin from. " * 5
    (tmp_path / "notes.txt").write_text(f"Title\n\n{long}\n \n{long.upper()}\nsame paragraph\n\n\nshort", encoding="utf-8")
    task = load_task(str(tmp_path / "notes.txt"))
    assert task.name == "notes" and task.eval == {}
    assert [e.prompt for e in task.train] == [long.strip(), long.upper() + "\nsame paragraph"]
    assert not any(e.chat or e.response for e in task.train)
    (tmp_path / "notes.txt").write_text("Too short.\n\n" * 100)
    with pytest.raises(ValueError, match="notes.*160"):
        load_task(str(tmp_path / "notes.txt"))


def test_split_text_has_no_paragraph_in_both_halves():
    train_text, held_out = split_text()
    assert len(train_text) > 200_000 and len(held_out) > 80_000

    def paragraphs(text):
        return {p.strip() for p in re.split(r"\n\s*\n", text) if len(p.strip()) >= 100}
    both = paragraphs(train_text) & paragraphs(held_out)
    assert not both, f"{len(both)} paragraphs of {len(paragraphs(held_out))} held-out ones are trained on"


class Letters:
    """A tokenizer for counting: one id a character."""

    def encode(self, text):
        return [ord(c) for c in text]


THOUSAND = "".join(map(chr, range(1000)))


def test_text_windows_are_evenly_spread_and_do_not_overlap():
    windows = text_windows(Letters(), THOUSAND, windows=7, length=100)
    assert windows == [list(range(start, start + 100)) for start in range(0, 1000, 150)]
    assert text_windows(Letters(), THOUSAND, windows=50, length=100) == [list(range(s, s + 100)) for s in range(0, 1000, 100)]


def test_text_windows_of_a_short_text():
    assert text_windows(Letters(), THOUSAND[:61]) == [list(range(start, start + 15)) for start in (0, 15, 30, 46)]
    for short in ("", "a", THOUSAND[:31]):
        with pytest.raises(ValueError, match="too short"):
            text_windows(Letters(), short)


def test_a_single_text_window():
    assert text_windows(Letters(), THOUSAND, windows=1, length=100) == [list(range(100))]


# ---------------------------------------------------------------------------------------------------------------------
# Batches and prompts

def task_of(name, size):
    return Task(name, [Example(f"{name}{i}") for i in range(size)], {})


def test_batches_are_decided_by_the_seed():
    tasks = [task_of("a", 10), task_of("b", 25)]

    def order(seed):
        return [[e.prompt for e in batch] for batch in batches(tasks, 8, 4, seed)]
    assert order(1) == order(1) != order(2)
    assert [len(batch) for batch in order(1)] == [4] * 8
    assert batches(tasks, 0, 4, 0) == []


@pytest.mark.parametrize("sizes", [(10,), (10, 25), (4, 9, 30)])
def test_batches_share_evenly_and_use_every_example_before_any_again(sizes):
    tasks = [task_of(name, size) for name, size in zip("abc", sizes)]
    drawn = [e.prompt for batch in batches(tasks, 40, 3, seed=0) for e in batch]
    for task in tasks:
        own = [p for p in drawn if p[0] == task.name]
        assert len(own) == 120 // len(sizes)
        for epoch in range(0, len(own), len(task.train)):
            part = own[epoch:epoch + len(task.train)]
            assert len(set(part)) == len(part) and (len(part) < len(task.train) or set(part) == prompts(task.train))
    first = list(islice((p for p in drawn if p[0] == "a"), 2 * sizes[0]))
    assert first[:sizes[0]] != first[sizes[0]:], "a new order each time round"


def test_the_teacher_alone_sees_the_demonstration(pair):
    ours = pair[1]
    for e in (science().train[5], tooluse().train[5]):
        student, teacher = (ours.decode(f(ours, e), keep_special=True) for f in (student_prompt, teacher_prompt))
        assert e.prompt in student and e.system in student and e.response not in student
        assert e.prompt in teacher and e.system in teacher and teacher.count(e.response) == 1
        assert teacher_prompt(ours, e, demo=False) == student_prompt(ours, e)
        assert student.endswith("<|im_start|>assistant\n") and teacher.endswith("<|im_start|>assistant\n")
    braces = Example("Fill {prompt}", "with {response} and {x}")
    shown = ours.decode(teacher_prompt(ours, braces))
    assert braces.prompt in shown and braces.response in shown


def test_a_prompt_without_demonstration_is_the_same_for_both(pair):
    ours = pair[1]
    text, bare = Example(ENGLISH, chat=False), Example("Who?")
    for e in (text, bare):
        assert teacher_prompt(ours, e) == student_prompt(ours, e)
    assert student_prompt(ours, text, 20) == teacher_prompt(ours, text, text_tokens=20) == ours.encode(ENGLISH)[:20]
    assert student_prompt(ours, bare) == ours.chat([{"role": "user", "content": "Who?"}])
