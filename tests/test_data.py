"""data.py: ids and chats are those of transformers, what would differ is refused; tasks keep their
promises, files of rows and texts are read or refused with file and line. All rows are invented."""
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import tokenizers
from conftest import make_folder
from tokenizers import Regex, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

import data
import model
from data import Example, load_task, load_tokenizer, science, tooluse

# ------------------------------------------------------- tokenizers, trained here as real ones were

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>",
           "<|start_header_id|>", "<|end_header_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
WORLD = ("naïve café Ünïcödé Привет мир 你好,世界。今日は東京です 한국어 שלום مرحبا ١٢٣ नमस्ते "
         f"{FAMILY} \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd ½ Ⅷ x² e\u0301 Å\n")
DOCUMENTATION = data.split_text()[0][:200_000]
CODE = "".join(path.read_text() for path in sorted(Path(data.__file__).parent.glob("*.py")))
CORPUS = [DOCUMENTATION[:20_000], CODE[:20_000], WORLD * 9]
FRAGMENTS = [
    *DOCUMENTATION[:900].split(" "), *CODE[:900].split(" "), *WORLD.split(" "), *SPECIAL, "<|",
    "<|im_start", "im_end|>", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n ", "\xa0",
    "\u3000", "\u2028", "\x85", "\x1c", "\u180e", "\ufeff", "7", "12", "345", "6789", "1,000",
    "٣", "½", "²", "一", "'s", "'S", "'ll", "'Ve", "'", "’s", "'ſ", "\x00", "\x04", "\x7f",
    "\u200d", "e\u0301", "\u1100\u1161\u11a8", "Å", "ﬁ", "_", "->", "...", "\U000e0001", "\ud7ff"]


def split_by(pattern):
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre.Sequence([pre.Split(Regex(pattern), "isolated"), byte_level])


PRE_TOKENIZERS = {
    "gpt2": pre.ByteLevel(add_prefix_space=False), "qwen2": split_by(QWEN2_PATTERN),
    "llama3": split_by(LLAMA3_PATTERN),
    "smollm": pre.Sequence([pre.Digits(individual_digits=True),
                            pre.ByteLevel(add_prefix_space=False)])}
TRAINED = {}


def trained(kind, all_bytes=True, special=SPECIAL):
    """tokenizers' tokenizer of this kind; all_bytes=False has only the bytes of its corpus."""
    key = kind, all_bytes, len(special)
    if key not in TRAINED:
        bpe = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
        bpe.normalizer = normalizers.NFC() if kind == "qwen2" else None
        bpe.pre_tokenizer, bpe.decoder = PRE_TOKENIZERS[kind], decoders.ByteLevel()
        bpe.train_from_iterator(CORPUS if all_bytes else ["A few words, 12."], trainers.BpeTrainer(
            vocab_size=1000, special_tokens=special, show_progress=False,
            initial_alphabet=pre.ByteLevel.alphabet() if all_bytes else []))
        if kind == "llama3":
            bos = "<|begin_of_text|>"
            bpe.post_processor = processors.Sequence([
                processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
                    f"{bos} $A", f"{bos} $A {bos} $B", [(bos, bpe.token_to_id(bos))])])
        TRAINED[key] = bpe
    return TRAINED[key]


def saved(folder, bpe, **config):
    """(transformers' tokenizer of the folder that it wrote, ours)."""
    PreTrainedTokenizerFast(tokenizer_object=bpe, **config).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder), load_tokenizer(folder)


def default_model():
    """(transformers' tokenizer, ours) of the default model."""
    try:
        folder = model.default_model()
    except OSError as error:
        if os.environ.get("SDFT_REQUIRE_MODEL"):
            raise
        pytest.skip(str(error))
    return PreTrainedTokenizerFast.from_pretrained(folder), load_tokenizer(folder)


@pytest.fixture(scope="module", params=[*PRE_TOKENIZERS, "the default model's"])
def pair(request, tmp_path_factory):
    """(transformers' tokenizer, ours) of one folder."""
    if request.param in PRE_TOKENIZERS:
        return saved(tmp_path_factory.mktemp(request.param), trained(request.param),
                     eos_token="<|im_end|>")
    return default_model()


def hard_texts(seed, count=100):
    """Fragments at random, random characters, and random bytes read as UTF-8."""
    rng = random.Random(seed)
    yield from ("", " ", "a   12  b", "  \n  3", "can't I'Ll'd've", "a<|im_end|>\u0338b")
    for _ in range(count):
        yield "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 30)))
        yield rng.randbytes(rng.randint(1, 40)).decode("utf-8", errors="replace")
        yield "".join(chr(rng.randrange(rng.choice((0x80, 0x3000, 0xD800)))) for _ in range(12))


def test_ids_and_texts_equal_transformers_on_100_000_tokens(pair):
    theirs, ours = pair
    tokens, long = 0, [DOCUMENTATION, CODE, WORLD * 50]
    for text in [*long, *hard_texts(0)]:
        ids = theirs.encode(text)
        twice = ids[:2] == 2 * ours.prefix and ours.prefix  # which stands once here
        assert ours.encode_text(text) == ids[bool(twice):], repr(text[:200])
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        for special in (True, False):
            assert ours.decode(ids, special) == theirs.decode(
                ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        tokens += len(ids)
    assert ours.decode(ours.encode("𝄞")[:1]) == "\ufffd"
    assert tokens > 100_000 and ours.size == max(theirs.get_vocab().values()) + 1


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
@pytest.mark.parametrize("how", ["bytes that lack", "shuffled ids", "every split"])
def test_other_vocabularies_are_read_as_transformers_reads_them(kind, how, tmp_path):
    spec = json.loads(trained(kind, all_bytes=how != "bytes that lack").to_str())
    if how == "shuffled ids":
        vocab = spec["model"]["vocab"]
        ids = random.Random(0).sample(range(len(vocab)), len(vocab))
        spec["model"]["vocab"] = vocab = dict(zip(vocab, ids))
        spec["added_tokens"] = sorted(({**t, "id": vocab[t["content"]]}
                                       for t in spec["added_tokens"]), key=lambda t: t["id"])
        spec["post_processor"] = None
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    if how == "every split":  # as transformers converts Llama 3's: token by token, in order
        vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
        spec["model"]["merges"] = [
            [word[:i], word[i:]] for word in dict.fromkeys(map("".join, merges))
            for i in range(1, len(word)) if {word[:i], word[i:]} <= vocab.keys()]
        assert len(spec["model"]["merges"]) > len(merges)
    spec["added_tokens"].append({**spec["added_tokens"][0], "content": "<tool_call>",
                                 "id": len(spec["model"]["vocab"]), "special": False})
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    (tmp_path / "tokenizer.json").write_text(theirs.to_str())
    ours = load_tokenizer(tmp_path)
    for text in [DOCUMENTATION[:2000], "<tool_call>{}<|im_end|>", *hard_texts(1, 30)]:
        ids = theirs.encode(text).ids
        assert ours.encode_text(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids)


def changed(model=(), token=(), **parts):
    """A change of a tokenizer.json: of its parts, its model, and its last added token."""
    def change(spec):
        spec.update(parts)
        spec["model"].update(model)
        spec["added_tokens"][-1].update(token)
    return change


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
NOT_BYTES = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
A, END = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "a", "type_id": 0}}
ELSEWHERE = [  # what the core does not read
    changed(pre_tokenizer=None, normalizer={"type": "Prepend", "prepend": "▁"}),
    changed(pre_tokenizer=NOT_BYTES), changed(pre_tokenizer={"type": "BertPreTokenizer"}),
    changed(pre_tokenizer=json.loads(trained("qwen2").to_str().replace(
        r"\\p{N}|", r"\\p{N}{1,2}|"))["pre_tokenizer"]),
    changed(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}),
    changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": False}, BYTE_LEVEL]}),
    changed(normalizer={"type": "NFKC"}), changed(decoder={"type": "ByteFallback"}),
    changed({"dropout": 0.1}), changed({"end_of_word_suffix": "</w>"}),
    changed({"byte_fallback": True}), changed(token={"lstrip": True}),
    changed(token={"single_word": True}),
    changed(post_processor={"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 0]}),
    changed(post_processor={
        "type": "TemplateProcessing", "single": [A, END], "pair": [A, A],
        "special_tokens": {"a": {"id": "a", "ids": [5], "tokens": ["a"]}}}),
    lambda spec: spec["model"]["merges"].reverse(),
    lambda spec: (changed({"ignore_merges": True})(spec), spec["model"]["vocab"].update(zebra=9))]


@pytest.mark.parametrize("change", ELSEWHERE, ids=range(len(ELSEWHERE)))
def test_a_tokenizer_that_would_differ_is_refused_in_a_line_that_names_the_extra(change, tmp_path):
    spec = json.loads(trained("gpt2").to_str())
    change(spec)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=f"^{tmp_path}/token[^\n]*--with formats[^\n]*$"):
        load_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------- chats

LOOP = "{% for message in messages %}"
QWEN3 = (
    "{%- set ns = namespace(last=0) %}" + LOOP + "{% if message.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}" + LOOP + r"""
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role in ["user", "system"] %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- endif %}
        {{- content.lstrip('\n') + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}""")
LLAMA3 = (r"""{{- bos_token }}
{%- set system_message = "" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message, messages = messages[0]['content']|trim, messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{- "Environment: ipython\n" }}{%- endif %}
{{- "Today Date: " + strftime_now("%d %b %Y") + "\n\n" + system_message + "<|eot_id|>" }}
""" + LOOP + r"""{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""")
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + LOOP +
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    r"{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    r"{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}")
TRANSCRIPT = LOOP + (
    "{% generation %}{{ message | tojson }}{% endgeneration %}{% if message.role == 'tool' %}"
    "{% continue %}{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}")
TEMPLATES = {  # name -> (kind of tokenizer, template, bos, eos)
    "ChatML": ("gpt2", data.CHATML, None, "<|im_end|>"),
    "Qwen3": ("qwen2", QWEN3, None, "<|im_end|>"),
    "Llama 3": ("llama3", LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "Gemma": ("llama3", GEMMA, "<bos>", "<end_of_turn>"),
    "no end of turn": ("qwen2", TRANSCRIPT, None, "<|endoftext|>")}
WORDS = ["What's {gold}?", "{{ 7 * 7 }} {% if x %}", r"a\nb \\boxed{1}", "def f(x):\n\treturn 1",
         "你好,世界。", f"{FAMILY} ½", "two  blanks  ", '<b>é</b> & "it"', "x", "Au"]
SYSTEM = {"role": "system", "content": "Be {brief}, it's late."}


def say(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def written(theirs, messages, prompt=True):
    """The ids of transformers' apply_chat_template, on the day that it is here."""
    with mock.patch("transformers.utils.chat_template_utils.datetime") as clock:
        clock.now.return_value = data.TODAY
        return theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True,
                                          return_dict=False)


def with_template(folder, kind, template, bos, eos):
    return saved(folder, trained(kind), bos_token=bos, eos_token=eos, chat_template=template)


@pytest.fixture(scope="module", params=[*TEMPLATES, ""])
def chats(request, tmp_path_factory):
    """(transformers' tokenizer, ours) of a folder with that template; "" is the default model's."""
    folder = tmp_path_factory.mktemp("chat")
    return with_template(folder, *TEMPLATES[request.param]) if request.param else default_model()


def test_a_chat_is_what_transformers_writes(chats):
    """A system message that a template refuses stands before the first question."""
    theirs, ours = chats
    rng = random.Random(0)
    for turns in (1, 1, 1, 3, 3, 5):
        first, *rest = words = rng.choices(WORDS, k=turns)
        assert ours.chat(say(*words)) == written(theirs, say(*words))
        right = [SYSTEM, *say(*words)]
        if theirs.chat_template == GEMMA:
            right = say(f"{SYSTEM['content']}\n\n{first}", *rest)
        assert ours.chat([SYSTEM, *say(*words)]) == written(theirs, right)


def test_a_chat_with_its_answer_is_the_conversation_up_to_its_one_end(chats):
    theirs, ours = chats
    for words in WORDS:
        answer = ours.answer(words)
        assert [i for i in answer if i in ours.eos_ids] == answer[-1:], "exactly one end"
        if theirs.chat_template != TRANSCRIPT:
            both = written(theirs, say("What is it?", words), False)
            ids = ours.chat(say("What is it?")) + answer
            assert ids == both[:len(ids)] and len(both) - len(ids) <= 1  # a line feed
            assert ours.read(answer) == words.strip()


def test_a_thought_is_not_the_answer_and_an_empty_one_is_learned(tmp_path):
    ours = with_template(tmp_path, *TEMPLATES["Qwen3"])[1]
    assert ours.decode(ours.answer("Au")) == "<think>\n\n</think>\n\nAu"
    assert ours.read(ours.encode("<think>\nGold? Au.\n</think>\n\nAu<|im_end|>")) == "Au"
    assert ours.read(ours.encode("<think>\nGold? It is")) == "<think>\nGold? It is"
    check = data.same_answer(thought := "<think>\nGold.\n</think>\n\nAu")
    assert check(ours.read(ours.answer(thought))) and check(ours.read(ours.answer("Au")))


@pytest.mark.parametrize("where", ["chat_template.jinja", "config", "list"])
@pytest.mark.parametrize("template", [data.CHATML, None], ids=["ChatML", "none"])
def test_what_ends_a_turn_in_the_chat_ends_an_answer(where, template, tmp_path):
    """A base model's end of text is another; the template stands in one of three places."""
    theirs, ours = with_template(tmp_path, "qwen2", template, None, "<|endoftext|>")
    if template and where != "chat_template.jinja":
        (tmp_path / "chat_template.jinja").unlink()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["chat_template"] = template if where == "config" else [
            {"name": "tools", "template": "no"}, {"name": "default", "template": template}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        ours = load_tokenizer(tmp_path)
    theirs.chat_template = data.CHATML
    assert ours.chat(say("Au?")) == written(theirs, say("Au?"))
    assert ours.eos_ids == (ours.added["<|endoftext|>"], ours.added["<|im_end|>"])
    assert ours.answer("Au") == ours.encode("Au<|im_end|>")


@pytest.mark.parametrize("generation, config, right", [
    (None, None, (2,)), ([2, 0], None, (2, 0)), ([7, 0], 5, (2, 7, 0)), (0, [2, 5], (2, 0)),
    (None, 5, (2, 5)), (None, [5, 6], (2, 5, 6)), ([], 5, (2,)), (2, None, (2,))])
def test_an_answer_ends_where_generation_and_tokenizer_say(generation, config, right, tmp_path):
    """generation_config.json's ends stand before config.json's, as in transformers."""
    make_folder(tmp_path)
    for name, ends in (("generation_config.json", generation), ("config.json", config)):
        if ends is not None:
            (tmp_path / name).write_text(json.dumps({"eos_token_id": ends}))
    ours = load_tokenizer(tmp_path)
    assert (ours.eos_ids, ours.eos_id, ours.answer("a")[-1]) == (right, 2, 2)


def test_without_chatml_a_chat_is_a_plain_transcript_after_the_prefix(tmp_path):
    special = ["<|endoftext|>", "<|begin_of_text|>"]
    ours = saved(tmp_path, trained("llama3", special=special), eos_token="<|endoftext|>")[1]
    bos = ours.added["<|begin_of_text|>"]
    assert ours.chat(say("a?")) == [bos, *ours.encode("Question: a?\nAnswer:")]
    assert ours.decode(ours.chat([SYSTEM, *say("a?", "b", "c?")])) == (
        f"{SYSTEM['content']}\n\nQuestion: a?\nAnswer: b\n\nQuestion: c?\nAnswer:")
    assert ours.answer("Au") == ours.encode(" Au<|endoftext|>")
    ids = ours.encode((text := Example(DOCUMENTATION[:900], chat=False)).prompt)
    assert data.student_prompt(ours, text, 5) == [bos, *ids[:5]]
    assert data.expert_answer(ours, text, 5, 3) == ids[5:8]
    again = Example("<|begin_of_text|>" + text.prompt, chat=False)
    assert data.student_prompt(ours, again, 5) == [bos, *ids[:4]], "the prefix stands once"


FAILING = ["{{ raise_exception('Only\nstories') }}", "{% for m in messages %}{{ m.content }",
           "{{ messages[0].tools[0].name }}", "{{ ''.__class__.__mro__ }}",
           "{{ messages.append(1) }}", "{{ raise_exception.__globals__['json'] }}"]


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_is_one_line_that_names_the_folder(template, folder, tmp_path):
    model.copy_tokenizer(folder, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"^{tmp_path}[^\n]*template[^\n]*$"):
        load_tokenizer(tmp_path).chat(say("x"))


# ------------------------------------------------------------------------------------------- tasks

def prompts(examples):
    return {e.prompt for e in examples}


def test_science_splits_share_no_prompt_and_hold_out_what_they_say():
    ends = [data.ELEMENTS.index(s) // 2 + 1 for s in "He Ne Ar Kr Xe Rn Og".split()]
    assert ends == [2, 10, 18, 36, 54, 86, 118], "the noble gases close the periods of the table"
    task = science()
    phrasing, element = task.eval["phrasing"], task.eval["element"]
    assert (len(task.train), len(phrasing), len(element)) == (1176, 294, 300)
    assert len(prompts([*task.train, *phrasing, *element])) == 118 * 15, "none stands twice"
    facts, asked, further = ({e.response for e in part} for part in (task.train, phrasing, element))
    assert asked == facts and len(facts) == 98 * 3 and len(further) == 20 * 3
    assert not facts & further
    known = {w for e in task.train for w in re.findall(r"\w+", f"{e.prompt} {e.response}")}
    held_out = {re.search(r"is (\w+)\.$", e.response)[1] for e in element
                if "with the chemical symbol" in e.response}
    assert len(held_out) == 20 and not held_out & known, "train names no element of `element`"


def test_tooluse_splits_share_no_request_and_show_the_right_schema():
    task = tooluse()
    request = task.eval["request"]
    assert (len(task.train), len(request)) == (360, 300)
    sides = [{e.prompt.split("Request: ")[1] for e in side} for side in (task.train, request)]
    assert not sides[0] & sides[1] and len(sides[1]) >= 278
    names = Counter(json.loads(e.response)["name"] for e in request)
    assert len(names) == 6 and set(names.values()) == {50}
    for e in [*task.train, *request]:
        call, tools = json.loads(e.response), e.prompt.split("\n\n")[0].split("\n")[1:]
        schema, = (x["arguments"] for x in map(json.loads, tools) if x["name"] == call["name"])
        assert len(tools) == 3 and schema == {
            key: {int: "integer", str: "string"}[type(x)] for key, x in call["arguments"].items()}
        assert all(str(x) in e.prompt for x in call["arguments"].values())


@pytest.mark.parametrize("make", [science, tooluse])
def test_every_demonstration_passes_its_own_check_and_no_other_answer_does(make):
    task = make()
    assert prompts(task.train) == prompts(make().train), "a task is the same every time"
    for split in (task.train, *task.eval.values()):
        distinct = {e.response: e.check for e in split}
        assert all(e.check(e.response) and not e.check("") for e in split)
        for response, check in distinct.items():
            others = [r for r in distinct if r[:12] == response[:12]]  # the same kind of fact
            assert [r for r in others if check(r)] == [response]
            assert not any(map(check, ["I cannot.", "As an AI, no.", "At last.", "He. In short."]))


def test_calls_are_compared_as_json_and_answers_as_text():
    check = data.same_json({"name": "f", "arguments": {"city": "Oslo", "guests": 1}})
    assert check('So: {"arguments": {"guests": 1.0, "city": "Oslo"}, "name": "f"} Else?')
    for arguments in ('{"city": "Oslo", "guests": 2}', '{"city": "Oslo", "guests": "1"}',
                      '{"city": "Oslo"}', '{"city": "Oslo", "guests": true}',
                      '{"city": "Oslo", "guests": 1, "day": "today"}'):
        assert not check(f'{{"name": "f", "arguments": {arguments}}}')
    assert not any(map(check, ["f(Oslo, 1)", "{}", "", '{"a": ' + "[" * 100_000]))
    for expected, right, wrong in (('{"a": [1]}', '</think> {"a": [1.0]}', '{"a": [2]}'),
                                   ("{a}", "{A}.", "{b}"), ("...", " ... ", "")):
        assert data.same_answer(expected)(right) and not data.same_answer(expected)(wrong)


def test_a_task_is_found_by_name_and_one_of_ones_own_is_one_entry():
    text = load_task("text")
    assert not text.eval and len(text.train) > 200 and not any(e.chat for e in text.train)
    data.TASKS["mine"] = lambda: text
    assert load_task("mine") is text
    with pytest.raises(FileNotFoundError, match="science, tooluse, text, mine"):
        load_task("sience")


def test_the_teacher_alone_sees_the_demonstration(chats):
    ours, student, teacher = chats[1], data.student_prompt, data.teacher_prompt
    for e in (science().train[5], tooluse().train[5]):
        prompts = student(ours, e), teacher(ours, e), teacher(ours, e, "quote")
        shown = [ours.decode(ids, keep_special=True).replace('\\"', '"') for ids in prompts]
        assert [text.count(e.response) for text in shown] == [0, 1, 1]
        request = e.prompt.split("\n")[-1]
        assert all(request in text and e.system in text for text in shown)
        assert teacher(ours, e, demo="none") == student(ours, e)
        assert shown[0][-9:] == shown[1][-9:] == shown[2][-9:], "each asks for an answer"
    text, alone = Example(DOCUMENTATION[:900], chat=False), Example("Who?")
    for e in (text, alone):
        assert teacher(ours, e) == student(ours, e)
    assert student(ours, text, 20) == ours.encode_text(text.prompt)[:20 + len(ours.prefix)]
    assert student(ours, alone) == ours.chat(say("Who?"))


def test_an_earlier_conversation_stands_before_the_question_and_the_demonstration():
    chat = mock.Mock(chat=lambda messages: messages)
    e = Example("Two?", "2", system=SYSTEM["content"], earlier=say("One?", "1"))
    before = [SYSTEM, *say("One?", "1")]
    assert data.student_prompt(chat, e) == [*before, *say("Two?")]
    assert data.teacher_prompt(chat, e) == [*before, *say("Two?", "2", "Two?")]
    assert data.teacher_prompt(chat, e, "quote")[:3] == before


@pytest.mark.parametrize("sizes", [(10,), (10, 25), (4, 9, 30)])
def test_batches_share_evenly_use_every_example_before_any_again_and_are_the_seeds(sizes):
    tasks = [data.Task(name, [Example(f"{name}{i}") for i in range(size)], {})
             for name, size in zip("abc", sizes)]
    found = data.batches(tasks, 40, 3, seed=0)
    assert [len(batch) for batch in found] == [3] * 40 and data.batches(tasks, 0, 4, 0) == []
    assert found == data.batches(tasks, 40, 3, seed=0) != data.batches(tasks, 40, 3, seed=1)
    for task in tasks:
        drawn = [e.prompt for batch in found for e in batch if e.prompt[0] == task.name]
        assert len(drawn) == 120 // len(sizes)
        epochs = [drawn[i:i + len(task.train)] for i in range(0, len(drawn), len(task.train))]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs) and epochs[0] != epochs[1]


def test_hold_out_and_drop_measured_take_whatever_asks_the_same():
    def task(name, number, **side):
        examples = [Example(f"{i % 20}?", "a", where=f"{name}:{i}") for i in range(number)]
        return data.Task(name, examples, {}) if not side else data.Task(name, [], {"all": examples})
    left, held_out = data.hold_out(task("t", 40), 4)
    asked = prompts(held_out)
    assert len(held_out) == 4 and not prompts(left.train) & asked
    assert len(left.train) == 40 - 2 * len(asked), "each question is there twice"
    mine, theirs = task("mine", 9), task("theirs", 4, measured=True)
    assert data.drop_measured_([mine], [theirs]) == {"mine": 4}
    assert prompts(mine.train) == {f"{i}?" for i in range(4, 9)}
    assert data.drop_measured_([mine, science()], [theirs, tooluse()]) == {}
    with pytest.raises(ValueError, match="nothing is left to train on"):
        data.drop_measured_([mine], [task("theirs", 9, measured=True)])


def test_windows_are_evenly_spread_and_the_halves_of_the_text_share_no_paragraph():
    letters = mock.Mock(encode=lambda text: [*map(ord, text)])
    text = "".join(map(chr, range(1000)))
    for windows, step in ((7, 150), (50, 100)):
        found = data.text_windows(letters, text, windows, 100)
        assert found == [list(range(i, i + 100)) for i in range(0, 1000, step)]
    assert [w[0] for w in data.text_windows(letters, text[:61])] == [0, 15, 30, 46]
    with pytest.raises(ValueError, match="too short"):
        data.text_windows(letters, text[:31])
    train, held_out = ({p.strip() for p in re.split(r"\n\s*\n", half) if len(p.strip()) >= 100}
                       for half in data.split_text())
    assert len(train) > 500 and len(held_out) > 200 and not train & held_out


CHOICE = {"prompt": "a", "choices": ["b", "c"], "answer": 0}


def jsonl(path, *rows):
    """The path of a file of these rows: objects, or lines as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_rows_of_three_forms_are_read_and_a_fifth_of_the_questions_is_held_out(tmp_path):
    rows = [{"prompt": f"Question {i}?", "response": f"The answer {i}."} for i in range(20)]
    task = load_task(jsonl(tmp_path / "mine.jsonl", *rows[:9], "", *rows[9:], *rows))
    numbers = [[int(re.search(r"\d+", e.prompt)[0]) for e in split]
               for split in (task.eval["held_out"], task.train)]
    assert numbers == [[10, 18, 16, 14], [0, 17, 11, 2, 3, 9, 5, 7, 4, 19, 6, 15, 8, 1, 13, 12]]
    whole = load_task(tmp_path / "mine.jsonl", measured_only=True)
    assert whole.train == [] and len(whole.eval["all"]) == 20
    assert whole.eval["all"][9].where.endswith("mine.jsonl:11")
    assert all(e.check(e.response) and not e.check("another") for e in task.train)
    talk = [{"role": "system", "content": "Hi."}, *say("One?", "1", "Two?", '{"a": 2}')]
    path = jsonl(tmp_path / "talk.jsonl", {"messages": talk, "id": 7},
                 {"prompt": "A\u2028?", "response": "b", "system": "Be brief."})
    e, f = load_task(path, True).eval["all"]
    assert (e.prompt, e.response, e.system, e.earlier) == ("Two?", '{"a": 2}', "Hi.", talk[1:3])
    assert e.check('{"a": 2.0}') and (f.system, f.prompt) == ("Be brief.", "A\u2028?")
    path = jsonl(tmp_path / "choice.jsonl", CHOICE, {**CHOICE, "prompt": "", "answer": 1})
    e, f = load_task(path, True).eval["all"]
    assert (e.choices, e.answer, e.response) == ([("a", " b"), ("a", " c")], 0, "b")
    assert (f.choices, f.answer, f.response) == ([("", " b"), ("", " c")], 1, "c")


BAD_ROWS = [
    "prompt: a", "[1, 2]", '"response"', "3", "null", "{}", {"prompt": "a"}, {"response": "a"},
    '{"prompt": "\\ud83d", "response": "b"}', {"prompt": "a", "response": 5},
    {"prompt": 5, "response": "b"}, {"prompt": "a", "response": " "}, {"messages": say("a")},
    {"prompt": "a", "response": None}, {"messages": say("a", "b", "c")}, {"messages": []},
    {"messages": [{"role": "tool", "content": "a"}, *say("a", "b")]}, {"messages": "a"},
    {"messages": say("a", "")}, {"messages": [{"role": "user"}, *say("a", "b")[1:]]},
    {**CHOICE, "answer": 2}, {**CHOICE, "answer": -1}, {**CHOICE, "answer": "A"},
    {**CHOICE, "answer": True}, {**CHOICE, "choices": [1, 2]}, {**CHOICE, "choices": ["b", "b"]},
    {**CHOICE, "choices": ["b"]}, {**CHOICE, "choices": 7}]


@pytest.mark.parametrize("row", BAD_ROWS, ids=str)
def test_a_bad_row_is_named_by_file_and_line(row, tmp_path):
    path = jsonl(tmp_path / "bad.jsonl", CHOICE, "", row, CHOICE)
    with pytest.raises(ValueError, match=rf"^{path}:3: [^\n]+$"):
        load_task(path)


PROSE = "A paragraph of prose, which is long enough to be gone on with. " * 9
ROWS = [{"prompt": f"Q{i}?", "response": "A."} for i in range(10)]
NO_TEXT = {
    "a.csv": b"prompt,response\na,b\n" * 40, "a.parquet": b"PAR1" + bytes(99),
    "a.json": json.dumps(ROWS).encode(), "a.txt": json.dumps(ROWS).encode(),
    "python.txt": str(ROWS).encode(), "pretty": json.dumps(ROWS, indent=1).encode(),
    "lines.txt": "\n".join(map(json.dumps, ROWS)).encode(), "b.txt": PROSE.encode() + b"\0",
    "utf16.txt": PROSE.encode("utf-16"), "latin.txt": b"a\nc\xe9" + PROSE.encode(),
    "latin.jsonl": b'{"prompt": "caf\xe9"}', "empty.jsonl": b" \n\n", "empty.txt": b"\n",
    "lfs.txt": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_or_looks_like_data_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(NO_TEXT[name])
    for read in (load_task, data.read_text):
        with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}[^\n]+$"):
            read(str(tmp_path / name))


def test_a_text_is_cut_into_pieces_of_whole_paragraphs(tmp_path):
    long, path = "A paragraph with enough words to begin from. " * 5, tmp_path / "notes.txt"
    for start in ("", "[1] A note.\n\n", "{braces} are ", '"Quoted," he said. ', "\ufeff"):
        path.write_text(start + PROSE, encoding="utf-8")
        assert load_task(path).train == [Example((start + PROSE).strip("\ufeff "), chat=False)]
    path.write_text(f"Title\n\n{long}\n \n{long.upper()}\r\nsame\n\n\n{long}\n\nshort")
    assert [e.prompt for e in load_task(path).train] == [
        f"Title\n\n{long.strip()}\n\n{long.upper()}\nsame", f"{long.strip()}\n\nshort"]
    for blank in ("\n", " ", ""):  # one line, or not even a blank: nothing is lost
        path.write_text(text := blank.join("abcdefgh " * 9 + str(n) for n in range(1000)))
        pieces = [e.prompt for e in load_task(path).train]
        assert max(map(len, pieces)) <= 4000 and min(map(len, pieces)) >= 160
        assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)


SAME = [  # rows that ask one question, whatever else they say
    [{"prompt": "Q?", "response": f"a{n}", "system": f"s{n}", "id": n} for n in range(9)],
    [{"prompt": p, "response": p} for p in ("why  Q?", "WHY\nq?", " why q? ", "why\u00a0Q?")],
    [{"prompt": p, "response": "a"} for p in ("Caf\u00e9?", "Cafe\u0301?")],
    [{"prompt": "Q?", "response": "a"}, {"messages": [SYSTEM, *say("q?", "d")]}],
    [{"messages": say(*"012345"[:length])} for length in (2, 4, 6)],
    [{**CHOICE, "choices": choices} for choices in (["a", "b"], ["b", "a"], ["c", "b"])],
    [{**CHOICE, "prompt": "", "choices": c} for c in (["a b", "b"], ["b", "a b"], ["A  b", "b"])]]


@pytest.mark.parametrize("rows", SAME, ids=range(len(SAME)))
def test_one_question_is_never_on_both_sides_of_a_split(rows, tmp_path):
    form = CHOICE if "choices" in rows[0] else {"response": "a"}
    for others in range(1, 9):  # they lie now on the one side, now on the other
        other = [{**form, "prompt": f"Other {n}?"} for n in range(others)]
        task = load_task(jsonl(tmp_path / "same.jsonl", *rows, *other))
        sides = [{int(e.where.rsplit(":")[-1]) for e in split}
                 for split in (task.train, task.eval["held_out"])]
        assert all(sides) and sum(bool({*range(1, len(rows) + 1)} & side) for side in sides) == 1
        assert len({*data.questions([*task.train, *task.eval["held_out"]])}) == others + 1
    with pytest.raises(ValueError, match="same.jsonl: one question cannot be both"):
        load_task(jsonl(tmp_path / "same.jsonl", *rows))
    rows = [{"messages": say(first, "Yes.", "Go on.", "b")} for first in "ab"]  # others
    path = jsonl(tmp_path / "a.jsonl", *rows, {"prompt": "Go on.", "response": "b"})
    assert len({*data.questions(data.read_rows(path))}) == 3
