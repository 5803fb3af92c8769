"""Text in, examples out: a tokenizer, the built-in tasks, and a user's own files.

An `Example` is what every task is made of: a prompt (a user's turn, or raw text to continue), an
expert demonstration of its answer, and how to check an answer. `load_task(name or path)` gives a
`Task` with disjoint train and eval examples. A fork adds a task to TASKS, a form of demonstration
to DEMOS, a form of row to ROWS. Nothing here knows of models.
"""
import functools
import itertools
import json
import pydoc_data.topics
import random
import re
import unicodedata
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken
from jinja2 import TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

# ---------------------------------------------------------------------------------- the tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# As GPT-2's, but a digit stands alone, and white space before a digit counts as at the end.
DIGITS = (r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
          r"|\s+(?![^\s\p{N}])|\s+")
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TRANSCRIPT = """{% for m in messages %}{% if m.role == "system" %}{{ m.content }}

{% elif m.role == "user" %}Question: {{ m.content }}
{% else %}Answer: {{ m.content }}

{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"""
TODAY = datetime(2024, 7, 26)  # a template's date: with the real one, tomorrow's numbers differ
EXTRA = "is not one that this file reads: --with formats asks the tokenizers library"


def bytes_to_unicode():
    """The printable characters that stand for the 256 bytes in a byte-level vocabulary, in order.

    >>> table = bytes_to_unicode()
    >>> table[ord("A")], table[0], table[1], table[ord(" ")] == chr(0x100 + 32)
    ('A', 'Ā', 'ā', True)
    """
    keep = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(256, 512))
    return [chr(b if b in keep else next(shifted)) for b in range(256)]


BYTE_OF = {character: byte for byte, character in enumerate(bytes_to_unicode())}


def to_bytes(token):
    """A token of a byte-level vocabulary as bytes; another one (an added token) as its UTF-8."""
    if all(c in BYTE_OF for c in token):
        return bytes(BYTE_OF[c] for c in token)
    return token.encode()


class Tokenizer:
    """A Hugging Face folder's tokenizer: text -> ids and back, and a chat -> a prompt's ids.

    added: {content: id} of the tokens that a text is searched for first. hidden: ids that decoding
    leaves out. prefix: ids that begin every text (Llama 3). eos_ids: ids that end an answer.
    """

    def __init__(self, folder, spec, encode_plain):
        """spec: tokenizer.json; encode_plain(text) -> ids, for a text without added tokens."""
        self.folder, self.encode_plain = folder, encode_plain
        config, vocab = read_json(folder / "tokenizer_config.json"), spec["model"]["vocab"]
        further = config.get("added_tokens_decoder") or {}
        tokens = {t["content"]: t for t in [*spec.get("added_tokens", []), *further.values()]}
        self.added, self.hidden = {}, set()
        self.bytes_of = {i: to_bytes(token) for token, i in vocab.items()}
        ids = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
        ids |= {t["content"]: int(i) for i, t in further.items()}
        for content, token in tokens.items():
            i = self.added[content] = ids[content]
            self.bytes_of[i] = content.encode()
            if token.get("special"):
                self.hidden.add(i)
        self.size = max(self.bytes_of) + 1
        longest = sorted(map(re.escape, self.added), key=len, reverse=True)
        self.search = re.compile(f"({'|'.join(longest)})" if longest else r"(?!)()")
        self.prefix = prefix_of(spec.get("post_processor"), self.added | vocab)
        self.named = {name: t.get("content") if isinstance(t, dict) else t
                      for name, t in (read_json(folder / "special_tokens_map.json") | config
                                      ).items() if name.endswith("_token") and t}
        usual = "<|im_end|>" if "<|im_end|>" in self.added else "<|endoftext|>"
        self.chat_template = template_of(folder, config)
        default = CHATML if "<|im_start|>" in self.added else TRANSCRIPT
        self.jinja = compiled(self.chat_template or default)
        ends = [(self.added | vocab).get(self.named.get("eos_token") or usual)]
        for name in ("config.json", "generation_config.json"):
            said = read_json(folder / name).get("eos_token_id")
            ends = [*ends[:1], *(said if isinstance(said, list) else [said])] if said is not None \
                else ends
        after = self.written([user("?"), {"role": "assistant", "content": "word"}])
        after = self.encode(after.rpartition("word")[2])
        if after and after[0] in self.hidden:  # what ends a turn in the chat ends an answer
            ends.append(after[0])
        self.eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
        if not self.eos_ids:
            raise ValueError(f"{folder}: no end-of-text token: name it in tokenizer_config.json")
        self.eos_id = self.eos_ids[0]

    def encode(self, text):
        """str -> list of ids; added tokens in the text become their ids."""
        return self._ids(text)

    def _ids(self, text):
        ids = []
        for part in self.search.split(text):
            ids += [self.added[part]] if part in self.added else self.encode_plain(part)
        return ids

    def encode_text(self, text):
        """The ids of a text that stands alone, with what the tokenizer puts before it."""
        return begun(self, self.encode(text))

    def decode(self, ids, keep_special=False):
        """ids -> str; special tokens are left out unless asked for, broken UTF-8 becomes U+FFFD."""
        kept = [i for i in ids if i in self.bytes_of and (keep_special or i not in self.hidden)]
        return b"".join(self.bytes_of[i] for i in kept).decode("utf-8", errors="replace")

    def written(self, messages, add_generation_prompt=False):
        """[{"role", "content"}, …] as the folder's chat template writes them.

        Without one: ChatML, if the vocabulary has its tokens, else `Question: … Answer:`. A
        template that refuses a system message gets it before the first question.
        """
        def render(messages):
            return self.jinja.render(messages=messages, tools=None, documents=None, **self.named,
                                     add_generation_prompt=add_generation_prompt)
        try:
            return render(messages)
        except Exception as error:  # it is a program, and can fail in every way
            if [m["role"] for m in messages[:2]] == ["system", "user"]:
                joined = "\n\n".join(m["content"] for m in messages[:2])
                return self.written([user(joined), *messages[2:]], add_generation_prompt)
            first_line = str(error).partition("\n")[0]
            raise ValueError(f"{self.folder}: its chat template fails: {first_line}") from None

    def chat(self, messages):
        """[{"role", "content"}, …] -> ids of the prompt for the assistant's next turn."""
        ids = self.encode(self.written(messages, True))
        return ids if self.chat_template else begun(self, ids)

    def answer(self, text):
        """The ids of an assistant's answer to a `chat` prompt, with exactly one end of turn.

        They are what the template writes after the prompt: it may strip the text, or put something
        before it (Qwen3: an empty thought). They end with the first of eos_ids that it writes, or,
        where it writes none, after the text, with eos_id.
        """
        prompt, turn = self.turn(text)
        ids = self.ids_after(prompt, turn)
        ends = [n for n, i in enumerate(ids) if i in self.eos_ids]
        if ends:
            return ids[:ends[0] + 1]
        said = text if text in turn else text.strip()
        until = turn.rfind(said) + len(said) if said in turn else len(turn)
        return [*self.ids_after(prompt, turn[:until]), self.eos_id]

    def turn(self, text):
        """(a prompt, what the template writes after it for this answer)."""
        prompt = self.written([user("?")], True)
        both = self.written([user("?"), {"role": "assistant", "content": text}])
        if both.startswith(prompt):
            return prompt, both[len(prompt):]
        at = both.rfind(text.strip())  # the prompt asks for a thought that a past turn lacks
        return prompt, both[at:] if at >= 0 else text

    def ids_after(self, prompt, text):
        """The ids of a text that follows a prompt whose ids are there already."""
        before, both = self.encode(prompt), self.encode(prompt + text)
        return both[len(before):] if both[:len(before)] == before else self.encode(text)

    def read(self, ids):
        """A model's answer as text, without its end, and without what the template puts before it.
        """
        text = self.decode(ids[:-1] if ids and ids[-1] in self.eos_ids else ids).strip()
        if "</think>" in self.chat_template:
            text = text.rpartition("</think>")[2]
        return text.removeprefix(self.opening).strip()

    @functools.cached_property
    def opening(self):
        """What the template puts between a prompt and the answer's first word, as text."""
        before, word, _ = self.turn("word")[1].partition("word")
        return self.decode(self.encode(before)).strip() if word else ""


class Generation(Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's words: here just the words."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def compiled(source):
    """A template's text as a sandboxed Jinja template, with what transformers lets it use."""
    def raise_exception(message):
        raise TemplateError(message)
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=[Generation, LoopControlExtension])
    jinja.filters["tojson"] = lambda x, ensure_ascii=False, **layout: json.dumps(
        x, ensure_ascii=ensure_ascii, **layout)
    jinja.globals |= {"raise_exception": raise_exception, "strftime_now": TODAY.strftime}
    return jinja.from_string(source)


def template_of(folder, config):
    """The text of a folder's chat template, "" if it has none; of several the default one."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    said = config.get("chat_template") or ""
    return said if isinstance(said, str) else {t["name"]: t["template"] for t in said}["default"]


def prefix_of(processor, ids):
    """The ids that a post-processor puts before a text; ValueError for others that it adds."""
    parts = (processor or {}).get("processors", [processor] if processor else [])
    prefix, pieces = [], []
    for part in (p for p in parts if p["type"] != "ByteLevel"):  # which moves offsets only
        pieces = part["single"] if part["type"] == "TemplateProcessing" else [{}]
    for piece in pieces:
        if "SpecialToken" in piece:
            prefix.append(ids[piece["SpecialToken"]["id"]])
    if pieces and "Sequence" not in pieces[-1]:
        raise ValueError(f"what its post-processor puts after a text {EXTRA}")
    return prefix


def load_tokenizer(folder):
    """The Tokenizer of a Hugging Face folder.

    FileNotFoundError without a tokenizer.json; ValueError, in one line, for one that is not
    byte-level BPE split as GPT-2, Llama 3, Qwen2 or SmolLM split a text.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer.json in {folder}: write one by save_pretrained")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        return Tokenizer(folder, spec, byte_level_bpe(spec))
    except TemplateError as error:
        raise ValueError(f"{folder}: its chat template fails: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not the file of a tokenizer ({error!r})") from None


def read_json(path):
    """A JSON file's object, {} if it is not there."""
    try:
        said = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(said, dict):
        raise ValueError(f"{path}: not a JSON object")
    return said


def byte_level_bpe(spec):
    """encode_plain(text) -> ids by tiktoken, for what a tokenizer.json says.

    Merges are joined in their order (Sennrich et al., 1508.07909); tiktoken joins whatever two
    neighbours give the token of the lowest rank, which is the same in a vocabulary that was
    trained. Its ranks are the 256 bytes, then the merges; `ids` translates them.
    """
    steps, model = spec["pre_tokenizer"] or {}, spec["model"]
    steps = steps.get("pretokenizers", [steps])
    kinds, last, normalizer = [s.get("type") for s in steps], steps[-1], spec.get("normalizer")
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    pattern = None
    if last.get("use_regex", True):
        pattern = {("ByteLevel",): GPT2, ("Digits", "ByteLevel"): DIGITS}.get(tuple(kinds))
        pattern = pattern if kinds[0] != "Digits" or steps[0]["individual_digits"] else None
    elif kinds == ["Split", "ByteLevel"]:
        pattern = next((p for p in (QWEN2, LLAMA3)
                        if steps[0] == {**split, "pattern": {"Regex": p}}), None)
    flags = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout")
    tokens = spec.get("added_tokens", [])
    if not pattern or last.get("add_prefix_space", True) or any(model.get(f) for f in flags) \
            or normalizer not in (None, {"type": "NFC"}) \
            or (spec.get("decoder") or {}).get("type") != "ByteLevel" \
            or any(t.get("lstrip") or t.get("rstrip") or t.get("single_word")
                   or t.get("normalized") and normalizer for t in tokens):
        raise ValueError(f"its kind of tokenizer {EXTRA}")
    vocab, made, late = model["vocab"], dict.fromkeys(BYTE_OF), set()
    for merge in model["merges"]:  # Llama 3's list every split of a token: one has to make it
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left in made and right in made and left + right in vocab:
            made[left + right] = None
        else:
            late.add(left + right)
    if late - made.keys():
        raise ValueError(f"a merge whose parts come later or never, {EXTRA}")
    whole = {t for t in vocab if set(t) <= BYTE_OF.keys()} - made.keys()
    if model.get("ignore_merges") and whole - {t["content"] for t in tokens}:
        raise ValueError(f"a word that no merge makes {EXTRA}")
    ids, lacking = [vocab.get(t) for t in made], {b for c, b in BYTE_OF.items() if c not in vocab}
    if model.get("unk_token") in vocab and lacking:
        raise ValueError(f"its unk_token {EXTRA}")
    encoding = tiktoken.Encoding("folder", pat_str=pattern, special_tokens={}, mergeable_ranks={
        to_bytes(token): rank for rank, token in enumerate(made)})

    def encode_plain(text):
        text = unicodedata.normalize("NFC", text) if normalizer else text
        if lacking.isdisjoint(text.encode()):
            return [ids[rank] for rank in encoding.encode_ordinary(text)]
        pieces = [bytes(b for b in piece.encode() if b not in lacking)
                  for piece in regex.findall(pattern, text)]
        return [ids[rank] for piece in pieces if piece
                for rank in encoding._encode_single_piece(piece)]
    return encode_plain


# ------------------------------------------------------------------------------ examples, prompts

@dataclass
class Example:
    """One prompt with its expert demonstration and the way to check an answer."""

    prompt: str            # the user's turn; or raw text to continue, when chat is False
    response: str = ""     # the expert demonstration; empty for raw text
    check: object = None   # answer text -> bool
    system: str = ""       # system message, if any
    chat: bool = True
    choices: list = field(default_factory=list)  # multiple choice: (context, continuation) pairs
    answer: int = 0        # the right one of them
    earlier: list = field(default_factory=list)  # turns before the prompt, {"role", "content"}
    where: str = field(default="", compare=False, repr=False)  # FILE:LINE of a user's row


@dataclass
class Task:
    """Train examples to recover on, and named lists of eval examples that share none of them."""

    name: str
    train: list
    eval: dict


def student_prompt(tokenizer, example, text_tokens=32):
    """The bare prompt as ids; of raw text the first text_tokens, at most half of it."""
    return teacher_prompt(tokenizer, example, "none", text_tokens)


def teacher_prompt(tokenizer, example, demo="turn", text_tokens=32):
    """What the teacher sees (§3), as ids: the prompt with its demonstration, if there is one, in
    one of the forms of DEMOS."""
    if not example.chat:
        return begun(tokenizer, _cut(tokenizer.encode(example.prompt), text_tokens)[0])
    system = [{"role": "system", "content": example.system}] if example.system else []
    form = DEMOS[demo] if example.response else bare
    return tokenizer.chat([*system, *example.earlier, *form(example)])


def user(content):
    return {"role": "user", "content": content}


def turn(e):
    """The demonstration as an earlier turn: question, answer, the same question again."""
    return [user(e.prompt), {"role": "assistant", "content": e.response}, user(e.prompt)]


def quote(e):
    """The demonstration quoted after the question."""
    return [user(f"{e.prompt}\n\nAn expert answered this as follows:\n{e.response}\n\n"
                 "Now give your own answer.")]


def bare(e):
    """The question alone, as the student sees it."""
    return [user(e.prompt)]


DEMOS = {"turn": turn, "quote": quote, "none": bare}  # --demo -> messages, without the system's


def expert_answer(tokenizer, example, text_tokens=32, longest=None):
    """The demonstration as ids, end of turn included; of raw text, `longest` after its prompt."""
    if example.chat:
        return tokenizer.answer(example.response)
    return _cut(tokenizer.encode(example.prompt), text_tokens)[1][:longest]


def begun(tokenizer, ids):
    """A text's ids after what the tokenizer puts before every text (Llama 3: BOS), once."""
    prefix = list(tokenizer.prefix)
    return ids if prefix and ids[:len(prefix)] == prefix else [*prefix, *ids]


def check_special_tokens(tokenizer, examples):
    """ValueError for a special token's text (`Paris<|im_end|>`) in the words of a chat."""
    special = [t for t, i in tokenizer.added.items()
               if i in tokenizer.hidden or i in tokenizer.eos_ids]
    for e in (e for e in examples if e.chat):
        text = " ".join([e.system, e.prompt, e.response, *(t["content"] for t in e.earlier)])
        for token in special:
            if token in text:
                raise ValueError(f"{e.where or repr(e.prompt[:60])} contains {token!r}, a special "
                                 "token of the model: the chat template puts in its own")


def _cut(ids, n):
    """(prompt, what follows) of a text's ids: n of them are the prompt, at most half."""
    n = min(n, len(ids) // 2)
    return ids[:n], ids[n:]


ELEMENTS = """
H Hydrogen He Helium Li Lithium Be Beryllium B Boron C Carbon N Nitrogen O Oxygen F Fluorine Ne Neon
Na Sodium Mg Magnesium Al Aluminum Si Silicon P Phosphorus S Sulfur Cl Chlorine Ar Argon K Potassium
Ca Calcium Sc Scandium Ti Titanium V Vanadium Cr Chromium Mn Manganese Fe Iron Co Cobalt Ni Nickel
Cu Copper Zn Zinc Ga Gallium Ge Germanium As Arsenic Se Selenium Br Bromine Kr Krypton Rb Rubidium
Sr Strontium Y Yttrium Zr Zirconium Nb Niobium Mo Molybdenum Tc Technetium Ru Ruthenium Rh Rhodium
Pd Palladium Ag Silver Cd Cadmium In Indium Sn Tin Sb Antimony Te Tellurium I Iodine Xe Xenon
Cs Cesium Ba Barium La Lanthanum Ce Cerium Pr Praseodymium Nd Neodymium Pm Promethium Sm Samarium
Eu Europium Gd Gadolinium Tb Terbium Dy Dysprosium Ho Holmium Er Erbium Tm Thulium Yb Ytterbium
Lu Lutetium Hf Hafnium Ta Tantalum W Tungsten Re Rhenium Os Osmium Ir Iridium Pt Platinum Au Gold
Hg Mercury Tl Thallium Pb Lead Bi Bismuth Po Polonium At Astatine Rn Radon Fr Francium Ra Radium
Ac Actinium Th Thorium Pa Protactinium U Uranium Np Neptunium Pu Plutonium Am Americium Cm Curium
Bk Berkelium Cf Californium Es Einsteinium Fm Fermium Md Mendelevium No Nobelium Lr Lawrencium
Rf Rutherfordium Db Dubnium Sg Seaborgium Bh Bohrium Hs Hassium Mt Meitnerium Ds Darmstadtium
Rg Roentgenium Cn Copernicium Nh Nihonium Fl Flerovium Mc Moscovium Lv Livermorium Ts Tennessine
Og Oganesson""".split()

# fact -> (demonstration, what an answer must contain, phrasings); the first phrasing is held out.
FACTS = {
    "symbol": ("The chemical symbol of {name} is {symbol}.", "{symbol}", (
        "What is the chemical symbol of {name}?",
        "Which symbol stands for {name} in the periodic table?",
        "How do chemists abbreviate {name}?", "Give the chemical symbol for the element {name}.",
        "Tell me the symbol of {name}.")),
    "number": ("The atomic number of {name} is {number}.", "{number}", (
        "What is the atomic number of {name}?", "How many protons does an atom of {name} have?",
        "Which atomic number does {name} have in the periodic table?",
        "Give the atomic number of the element {name}.", "Tell me the atomic number of {name}.")),
    "name": ("The element with the chemical symbol {symbol} is {name}.", "{name}", (
        "Which element has the chemical symbol {symbol}?",
        "What element does the symbol {symbol} stand for?",
        "Name the chemical element written as {symbol}.",
        "What is the name of the element with symbol {symbol}?",
        "In chemistry, what does {symbol} stand for?")),
}


def science():
    """Facts of the 118 elements in several phrasings (stands in for the paper's Science task).

    Eval splits: `phrasing`, the facts of train in a phrasing never trained on (n = 294, standard
    error under 3 points); `element`, 20 elements never trained on in every phrasing (n = 300).
    """
    held_out = set(random.Random(0).sample(range(1, 119), 20))
    system = "Answer the chemistry question in one short sentence."
    train, phrasing, element = [], [], []
    for number in range(1, 119):
        symbol, name = ELEMENTS[2 * number - 2:2 * number]
        fact = {"symbol": symbol, "name": name.lower(), "number": number}
        for kind, (demonstration, key, questions) in FACTS.items():
            checker = contains_symbol if kind == "symbol" else contains
            check, demonstration = checker(key.format(**fact)), demonstration.format(**fact)
            for i, question in enumerate(questions):
                example = Example(question.format(**fact), demonstration, check, system)
                if number in held_out:
                    element.append(example)
                elif i == 0:
                    phrasing.append(example)
                else:
                    train.append(example)
    return Task("science", train, {"phrasing": phrasing, "element": element})


def contains(key):
    """A checker: the key stands in the answer as a word of its own, in whatever case; a number, not
    as a part of another.

    >>> check = contains("gold")
    >>> check("It is Gold."), check("It is golden.")
    (True, False)
    >>> [contains("12")(answer) for answer in ("It is 12.", "8,12,20", "12.01", "12,000")]
    [True, True, False, False]
    """
    before, after = (r"(?<!\d\.)", r"(?!\.\d)(?!,\d{3}(?!\d))") if key.isdigit() else ("", "")
    word = re.compile(rf"(?<!\w){before}{re.escape(key)}(?!\w){after}", re.IGNORECASE)
    return lambda answer: word.search(answer) is not None


def contains_symbol(symbol):
    """A checker: the symbol stands in the answer, in its case, and does not merely open a sentence.

    >>> check = contains_symbol("I")
    >>> check("It is I."), check("I is the symbol"), check("I cannot say."), check("IODINE")
    (True, True, False, False)
    """
    pronoun = "(?!['’ ][a-z])" if symbol == "I" else ""
    inside = rf"(?<!\w)(?<!\A)(?<![.!?]\s){symbol}(?!\w){pronoun}"
    opening = rf"\A\W*{symbol}(\W*\Z| is the | stands for )"
    word = re.compile(f"{inside}|{opening}")
    return lambda answer: word.search(answer) is not None


CITIES = "Paris Tokyo Cairo Lima Oslo Sydney Mumbai Toronto Nairobi Berlin Madrid Seoul".split()
PEOPLE = "Alice Bruno Chen Dana Emeka Fatima George Hana Ivan Julia Kofi Lena".split()
THINGS = "milk bread coffee rice apples batteries soap paper candles honey tea salt".split()
DAYS = ["today", "tomorrow", "Saturday", "Sunday"]
TEXTS = ["I am late", "call me back", "happy birthday", "dinner is ready"]
FROM, TO = ["USD", "EUR", "JPY"], ["GBP", "CHF", "INR"]
# name -> (arguments with their possible values, requests); the last request is held out
TOOLS: dict[str, tuple[dict, tuple]] = {
    "get_weather": ({"city": CITIES, "day": DAYS}, (
        "What will the weather be like in {city} {day}?", "Check the {day} forecast for {city}.",
        "Do I need an umbrella in {city} {day}?")),
    "set_timer": ({"minutes": list(range(3, 60, 4)), "label": THINGS}, (
        "Set a {minutes} minute timer for the {label}.",
        "Remind me about the {label} in {minutes} minutes.",
        "Start a timer called {label} for {minutes} minutes.")),
    "send_message": ({"to": PEOPLE, "text": TEXTS}, (
        "Tell {to}: {text}.", "Send {to} the message '{text}'.", "Text {to} to say '{text}'.")),
    "add_to_list": ({"item": THINGS, "quantity": list(range(1, 13))}, (
        "Put {quantity} {item} on my shopping list.",
        "Add {item} to the list, quantity {quantity}.",
        "We need {quantity} {item}, note that down.")),
    "convert_currency": ({"amount": list(range(15, 300, 19)), "source": FROM, "target": TO}, (
        "How much is {amount} {source} in {target}?", "Convert {amount} {source} to {target}.",
        "Exchange {amount} {source} for {target}, please.")),
    "book_table": ({"city": CITIES, "guests": list(range(2, 9))}, (
        "Book a table for {guests} in {city}.",
        "I want to eat out in {city} with {guests} people in total.",
        "Reserve a restaurant in {city} for a party of {guests}.")),
}


def tooluse():
    """A request and three tool schemas -> one JSON call (stands in for the paper's Tooluse task).

    360 train examples; the eval split `request` (n = 300) asks in wordings never trained on; 126
    of its calls are trained on in other words, of the tools with fewer than 110 combinations.
    """
    system = "Answer with one JSON tool call: an object with a name and arguments."
    rng, train, evaluate = random.Random(1), [], []
    for name, (arguments, requests) in TOOLS.items():
        combinations = list(itertools.product(*arguments.values()))
        rng.shuffle(combinations)
        for n, values in enumerate((combinations * 4)[:110]):  # 60 to train on, 50 held out
            chosen = dict(zip(arguments, values))
            call = {"name": name, "arguments": chosen}
            request = requests[n % (len(requests) - 1)] if n < 60 else requests[-1]
            request = request.format(**chosen)
            shown = sorted([name, *rng.sample(sorted(set(TOOLS) - {name}), 2)])
            prompt = "\n".join(["Tools:", *map(_schema, shown), "", f"Request: {request}"])
            example = Example(prompt, json.dumps(call), same_json(call), system)
            (train if n < 60 else evaluate).append(example)
    return Task("tooluse", train, {"request": evaluate})


def _schema(tool):
    arguments = {}
    for key, values in TOOLS[tool][0].items():
        arguments[key] = "integer" if isinstance(values[0], int) else "string"
    return json.dumps({"name": tool, "arguments": arguments})


def python_text():
    """Paragraphs of Python's documentation to continue."""
    return text_task("text", split_text()[0])


TASKS = {"science": science, "tooluse": tooluse, "text": python_text}


def load_task(name, measured_only=False):
    """A Task by its name in TASKS, or from a file: rows (.jsonl), or text to continue.

    A fifth of the questions in a file of rows is held out, or, measured_only, all of them.
    ValueError names file and line for content that does not fit.
    """
    if name in TASKS:
        return TASKS[name]()
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no task or file {name!r}: name {', '.join(TASKS)}, or a .jsonl "
                                "or text file")
    if path.suffix.lower() not in READERS:
        if measured_only:
            raise ValueError(f"--eval {name}: a text has no questions; name it in --text")
        return text_task(path.stem, read_text(path))
    examples = read_rows(path)
    if len({bool(e.choices) for e in examples}) == 2:
        raise ValueError(f"{path}: multiple choice and other rows cannot share a file")
    if measured_only:
        return Task(path.stem, [], {"all": examples})
    for e in examples:
        if not e.response:
            raise ValueError(f"{e.where}: no demonstration to train on: name the file in --eval")
    groups = {}  # what asks the same stands on one side
    for key, e in zip(questions(examples), examples):
        groups.setdefault(key, []).append(e)
    if len(groups) < 2:
        raise ValueError(f"{path}: one question cannot be both trained on and held out")
    sides = list(groups.values())
    random.Random(0).shuffle(sides)
    cut = max(1, len(sides) // 5)
    held_out, train = (list(itertools.chain(*part)) for part in (sides[:cut], sides[cut:]))
    return Task(path.stem, train, {"held_out": held_out})


def read_text(path):
    """The text of a UTF-8 file; ValueError, in one line, for what is not prose."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    raw = path.read_bytes()
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull`")
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text: save it as UTF-8") from None
    if "\0" in text or not text.strip():
        raise ValueError(f"{path}: the file is empty, or has a NUL character: it is no text")
    data = path.suffix.lower() not in READERS and (
        path.suffix.lower() in TABLES or re.match(r"""\s*\[?\s*\{\s*["'][^\n]*["']\s*:""", text))
    if data:
        raise ValueError(f"{path}: this looks like data, not like prose: save its rows as .jsonl, "
                         f"one a line ({KNOWN})")
    return text


def read_lines(path):
    """[(FILE:LINE, row)] of a .jsonl file."""
    found = []
    for n, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                found.append((f"{path}:{n}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{n}: not a line of JSON ({error})") from None
    return found


def read_rows(path):
    """[Example] for each row that differs; ValueError names file and line."""
    found = {}
    for where, row in READERS[Path(path).suffix.lower()](path):
        try:
            keys = {key for key in row if row[key] is not None} if isinstance(row, dict) else set()
            read = next((read for form, read in ROWS.items() if set(form.split()) <= keys), None)
            if not read:
                raise ValueError(f"the keys {', '.join(sorted(keys)) or '(none)'} are of no form "
                                 f"that is known: {KNOWN}; --with formats reads more")
            arguments = read(row)
            shown = json.dumps({key: row[key] for key in sorted(keys & KEYS)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: {error}") from None
        found.setdefault(shown, Example(**arguments, where=where))
    return list(found.values())


def words(value, name):
    """The value, if it is text that is not blank and that has no half of a surrogate pair."""
    if not isinstance(value, str) or not value.strip() or re.search("[\0\ud800-\udfff]", value):
        raise ValueError(f'"{name}" must be text, and not empty: {json.dumps(value)[:60]}')
    return value


def demonstrated(row):
    """{"prompt", "response"}, and "system" if there is one."""
    answer = words(row["response"], "response")
    return {"prompt": words(row["prompt"], "prompt"), "response": answer,
            "check": same_answer(answer), "system": row.get("system") or ""}


def conversation(row):
    """{"messages"}: the last turn, the assistant's, is the demonstration."""
    turns = [{"role": t["role"], "content": words(t["content"], "content")}
             for t in row["messages"]]
    system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
    if len(turns) < 2 or [t["role"] for t in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("turns of user and assistant must alternate, after at most one of the "
                         "system, and end with the assistant's")
    answer = turns[-1]["content"]
    return {"prompt": turns[-2]["content"], "response": answer, "check": same_answer(answer),
            "system": system, "earlier": turns[:-2]}


def choosing(row):
    """{"prompt", "choices", "answer"}: the right choice by its index, from 0."""
    choices = [" " + words(choice, "choices") for choice in row["choices"]]
    if type(row["answer"]) is not int or not 0 <= row["answer"] < len(choices):
        raise ValueError(f'"answer" {row["answer"]!r} must be the index of a choice, from 0 to '
                         f"{len(choices) - 1}")
    if len({*choices}) < max(2, len(choices)):
        raise ValueError('"choices" must be two or more, none twice')
    return {"prompt": row["prompt"], "answer": row["answer"],
            "response": row["choices"][row["answer"]].strip(),
            "choices": [(row["prompt"], choice) for choice in choices]}


# A form of row, by the keys that it must have -> a function of a row that gives an Example's
# arguments; the first that fits is taken. A suffix -> a function of a file that gives its rows.
ROWS = {"prompt choices answer": choosing, "prompt response": demonstrated,
        "messages": conversation}
READERS = {".jsonl": read_lines}
KNOWN = '{"prompt", "response"}, {"messages"} or {"prompt", "choices", "answer"}'
TABLES = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".yaml", ".xml", ".gz", ".zip")
KEYS = {"prompt", "response", "system", "messages", "choices", "answer"}


# ----------------------------------------------------------------------------------- how to grade

def same_json(expected):
    """A checker: the first JSON value of its kind in the answer is this one, keys in any order.

    >>> check = same_json({"a": 1, "b": 2})
    >>> check('Sure: {"b": 2.0, "a": 1}.'), check('{"a": true, "b": 2}')
    (True, False)
    """
    opening = "[" if isinstance(expected, list) else "{"

    def plain(x):
        """x so that equal values are equal: true is not 1, and 5.0 is 5."""
        if isinstance(x, dict):
            return {key: plain(y) for key, y in x.items()}
        return [plain(y) for y in x] if isinstance(x, list) else (isinstance(x, bool), x)

    def check(answer):
        try:
            found, _ = json.JSONDecoder().raw_decode(answer, answer.index(opening))
        except (ValueError, RecursionError):  # no brace, or no JSON after it
            return False
        return plain(found) == plain(expected)
    return check


def same_answer(expected):
    """A checker: equal as JSON if JSON is expected, else up to case, spaces, a full stop.

    A thought before either, up to </think>, does not count.

    >>> check = same_answer("Blue whale")
    >>> check(" blue  WHALE. "), check("a blue whale"), check("<think>Eh</think>blue whale")
    (True, False, True)
    """
    def normal(text):
        text = unicodedata.normalize("NFC", " ".join(text.split())).casefold()
        return text.rstrip(".") or text

    expected = expected.rpartition("</think>")[2].strip()
    if expected[:1] in ("{", "["):
        try:
            check = same_json(json.loads(expected))
            return lambda answer: check(answer.rpartition("</think>")[2])
        except (ValueError, RecursionError):
            pass
    return lambda answer: normal(answer.rpartition("</think>")[2]) == normal(expected)


# -------------------------------------------------------------------------- splits, texts, batches

def asked(e):
    """What an example asks, but for case and white space: the turns before an answer, whatever the
    system says. Multiple choice: the prompt, whatever the choices; without one, the choices.

    >>> asked(Example("What  is Tin?")) == asked(Example("what is tin?", "A metal.", system="Hi."))
    True
    """
    def plain(text):
        return " ".join(unicodedata.normalize("NFC", text).split()).casefold()
    contexts = {context for context, _ in e.choices}
    if e.choices and contexts != {e.prompt} or contexts == {""}:
        return (*sorted((plain(context), plain(text)) for context, text in e.choices),)
    return (*(plain(turn["content"]) for turn in e.earlier), plain(e.prompt))


def questions(examples):
    """What each example asks, a list: equal for those that must stand on one side of a split.

    A conversation that goes on from another's question, and shows its answer, asks the same.
    """
    keys = [asked(e) for e in examples]
    known = set(keys)
    return [next(key[:n] for n in range(1, len(key) + 1) if key[:n] in known) for key in keys]


def text_task(name, text):
    """A text in pieces of whole paragraphs, of 400 characters or more, as prompts to continue; the
    last piece may be shorter, but of 160. Of 10,000 characters without an empty line a piece ends
    at a blank, at a line's end if it can."""
    pieces, piece = [], ""
    for paragraph in itertools.chain(*map(_cut_at_blanks, _paragraphs(text))):
        piece = f"{piece}\n\n{paragraph.strip()}".strip()
        if len(piece) >= 400:
            pieces.append(piece)
            piece = ""
    pieces += [piece] if len(piece) >= 160 else []
    if not pieces:
        raise ValueError(f"the text of {name!r} has no 160 characters to begin from and continue")
    return Task(name, [Example(p, chat=False) for p in pieces], {})


def split_text():
    """(train, held-out) English text that every CPython carries: its language reference, by topic.

    It is `pydoc_data.topics` and differs a little between Python versions, so the hash of what was
    measured is reported beside each perplexity.
    """
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    held_out = {p.strip() for topic in topics[::4] for p in _paragraphs(topic)}
    train = []
    for i, topic in enumerate(topics):
        if i % 4:  # some topics quote others
            train += [p for p in _paragraphs(topic) if p.strip() not in held_out]
    return "\n\n".join(train), "\n\n".join(topics[::4])


def _paragraphs(text):
    return re.split(r"\n\s*\n", text)


def _cut_at_blanks(paragraph):
    """A paragraph as it is, or what is too long for one in parts of 400 to 4,000 characters."""
    if len(paragraph) <= 10_000:
        return [paragraph]
    return re.findall(r"(?s:.{400,4000}?(?=\n|\Z)|.{400,4000}?(?=\s)|.{1,4000})", paragraph)


def text_windows(tokenizer, text, windows=16, length=256):
    """Evenly spread windows of ids that do not overlap: at least 4, shorter ones if need be.

    ValueError for a text of under 32 tokens.

    >>> from types import SimpleNamespace
    >>> letters = SimpleNamespace(encode=str)  # a token a letter; 32 / 4 = 8 are the longest window
    >>> text_windows(letters, "abcdefghijklmnopqrstuvwxyz012345", windows=3)  # from 0, 24/2, 24
    ['abcdefgh', 'mnopqrst', 'yz012345']
    """
    ids = tokenizer.encode(text)
    if len(ids) < 32:
        short = f"a text of {len(ids)} tokens is too short to measure a perplexity on"
        raise ValueError(f"{short}: give 32 or more")
    length = min(length, len(ids) // 4)
    windows = min(windows, len(ids) // length)
    starts = [i * (len(ids) - length) // max(1, windows - 1) for i in range(windows)]
    return [ids[s:s + length] for s in starts]


def batches(tasks, steps, batch_size, seed):
    """`steps` lists of batch_size examples: the tasks in turn, each shuffled, over and over."""
    rng = random.Random(seed)
    streams = [_stream(task.train, random.Random(rng.random())) for task in tasks]
    order = [next(streams[i % len(streams)]) for i in range(steps * batch_size)]
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def hold_out(task, n):
    """(the task without them, n of its train examples that are never trained on, evenly spread).

    At most an eighth of its examples are taken, with whatever asks the same. Of fewer than eight,
    or where nothing would be left, they stand on both sides.

    >>> task, held_out = hold_out(Task("letters", [Example(c) for c in "abcdefghijklmnoa"], {}), 2)
    >>> "".join(e.prompt for e in task.train), [e.prompt for e in held_out]
    ('bcdefghjklmno', ['a', 'i'])
    """
    size = len(task.train)
    n = max(1, min(n, size // 8))
    places = [i * size // n for i in range(n)]
    held_out = [task.train[i] for i in places]
    keys = questions(task.train)
    known = {keys[i] for i in places}
    left = [e for key, e in zip(keys, task.train) if key not in known]
    return Task(task.name, left if left and size >= 8 else task.train, task.eval), held_out


def _stream(examples, rng):
    while True:
        yield from rng.sample(examples, len(examples))


def drop_measured_(tasks, further):
    """Take from each task, in place, the training examples that another file asks as a question of
    its own: public train and test files share a few. Returns {task: how many}."""
    dropped = {}
    for task in tasks:
        others = [t for t in [*tasks, *further] if t.name != task.name]
        measured = {asked(e): e.where for t in others for part in t.eval.values() for e in part}
        left = [e for e in task.train if not (
            e.chat and asked(e) in measured and (e.where or measured[asked(e)]))]
        if not left:
            raise ValueError(f"{task.name}: each of its questions is measured by another file, "
                             "too: nothing is left to train on")
        if len(left) < len(task.train):
            dropped[task.name] = len(task.train) - len(left)
        task.train = left
    return dropped
