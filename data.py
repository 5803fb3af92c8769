"""Text in, examples out: the built-in tasks, a user's rows (rows.py reads them), and plain text.

An `Example` is what every task is made of: a prompt (a user's turn, or raw text to continue), an
expert demonstration of its answer, and how to check an answer. `load_task(name or path)` gives a
`Task` with disjoint train and eval examples. A new task is a function without arguments that gives
a Task, and its entry in TASKS. Nothing here knows of models.
"""
import itertools
import json
import pydoc_data.topics
import random
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import instructions
from files import one_line
from rows import is_data, is_rows, read_prose, read_rows, same_answer, same_json
from tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer", "same_answer"]  # callers find them here too


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
    """ValueError for a special token's text (`Paris<|im_end|>`) in the words of a chat.

    In the prompt it would be a token, not its characters; a response would be learned with an end
    or a token within, and no answer, read without them, could equal it.
    """
    special = [t for t, i in tokenizer.added.items()
               if i in tokenizer.hidden or i in tokenizer.eos_ids]
    for e in (e for e in examples if e.chat):
        words = {"system message": e.system, "prompt": e.prompt, "response": e.response,
                 "earlier turns": " ".join(turn["content"] for turn in e.earlier)}
        for what, text in words.items():
            found = [token for token in special if token in text]
            if found:
                where = e.where or repr(e.prompt[:60])
                raise ValueError(f"{where}: the {what} contains {max(found, key=len)!r}, a special "
                                 "token of the model: take it out; the chat template puts in its "
                                 "own")


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


def verifiable_instructions():
    """Formats, lengths, words to use or to avoid, each checked by a program. Measured only."""
    rows = instructions.prompts()
    return Task("instructions", [], {"all": [Example(*row) for _, *row in rows]})


TASKS = {"science": science, "tooluse": tooluse, "text": python_text,
         "instructions": verifiable_instructions}


@one_line
def load_task(name, measured_only=False):
    """A Task by its name in TASKS, or from a file: rows (.jsonl, .json), or text to continue.

    A fifth of the questions of a file of rows is held out, or, measured_only, all of it.
    FileNotFoundError when there is no such task or file; ValueError, naming the line, for content
    that does not fit, and for what looks like data but is not rows.
    """
    if name in TASKS:
        task = TASKS[name]()
        if not (task.train or measured_only):
            raise ValueError(f"{name} is only measured: name it in --eval")
        return task
    path = Path(name)
    if path.is_dir():
        export = 'datasets.load_from_disk(…).to_json("rows.jsonl")'
        raise FileNotFoundError(f"{name} is a folder: name a file, or export it with {export}")
    if not path.is_file():
        known = ", ".join(TASKS)
        raise FileNotFoundError(f"no task or file {name!r}: name {known}, or a .jsonl or text file")
    if is_rows(path):
        return _rows_task(path, measured_only)
    return text_task(path.stem, read_prose(path))


def is_text(name):
    """Whether load_task would read this as text to continue, which has no questions."""
    return name == "text" or Path(name).is_file() and not is_data(name)


def _rows_task(path, measured_only):
    examples = [Example(**row) for row in read_rows(path)]
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
