"""A small set of instructions whose following a program can check, after the idea of IFEval
(2311.07911). Prompts, examples and checks are our own. It is measured, and never trained on.

A kind of instruction (`KINDS`) is a function: Topic -> (prompt, example answer, test). `prompts`
gives each kind with each topic. A test is strict in what was asked and lenient in white space
around the answer, its lines and its words; whether an answer is true or to the point is not tested.
One that is cut off at its longest is tested as it stands.

Nothing, dots or the prompt again pass no check: `prompts` asks of nearly every answer three words
that its prompt has not. Where something is to be avoided, whole sentences are asked for, which
babble is not.
"""
import json
import re
from typing import NamedTuple


class Topic(NamedTuple):
    """What an instruction is about, and a number for it."""

    name: str
    says: list   # three sentences on it
    number: int  # 2 or 3, in turn


SAYS = {  # topic -> three sentences on it; neither its name nor a comma is in them
    "dogs": "They bark at strangers near the garden gate. They love long walks in the forest. "
            "They sleep on a warm blanket.",
    "bicycles": "They carry people to work without any fuel. They need air in both tyres. "
                "They are cheap to repair.",
    "tea": "It is made from dried leaves and hot water. People drink it from a small cup. "
           "It tastes better with a little honey.",
    "rain": "It falls from dark clouds on cool days. It helps farmers to grow their wheat. "
            "It makes every street shine.",
    "bread": "It is baked from flour in a hot oven. People eat it with butter for breakfast. "
             "It turns hard after some days.",
    "libraries": "They lend books to everyone for free. Students read there in silence. "
                 "They open early and close late.",
    "gardens": "They are full of flowers in early summer. Children play there on the grass. "
               "They need water every evening.",
    "trains": "They bring many people across the country. They stop at every large station. "
              "They are faster than a bus.",
    "winter": "It brings snow and very short days. People wear thick coats and gloves. "
              "It ends when the first birds return."}
MORE = ("There is much more to say about this than fits into so few lines. Still I hope that it is "
        "a good beginning and that you will soon find out all the rest by yourself.")


# ------------------------------------------------------------------------ what an answer is made of

def words(text):
    """The words of a text, in small letters; what an apostrophe or a hyphen joins is one.

    >>> words('"It\\'s a well-known 3.", she said…')
    ["it's", 'a', 'well-known', '3', 'she', 'said']
    """
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.casefold())


def lines(text):
    """The lines in which something stands, without the white space around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def sentences(text):
    """How many sentences a text has: . ! or ? ends one, before white space or the text's end. 0
    where the last is not ended.

    >>> sentences("At 3.15 he came. Did he?"), sentences('"No!"'), sentences("He came. And")
    (2, 1, 0)
    """
    ends = re.findall(r"""[.!?]+["'”’)]*(\s+|\Z)""", text)
    return len(ends) if re.search(r"""[.!?]["'”’)]*\s*\Z""", text) else 0


# ------------------------------------------------- the kinds: Topic -> prompt, example answer, test

def bullets(t):
    return (f"Write exactly {t.number} bullet points about {t.name}. Begin each with a hyphen and "
            "write nothing else.",
            "\n".join(f"- {said}" for said in t.says[:t.number]),
            lambda a: len(lines(a)) == t.number
            and all(line[0] == "-" and words(line) for line in lines(a)))


def numbered(t):
    return (f"Write {t.number} facts about {t.name} as a numbered list. Write nothing else.",
            "\n".join(f"{n}. {said}" for n, said in enumerate(t.says[:t.number], 1)),
            lambda a: len(lines(a)) == t.number
            and all(re.match(rf"{n}[.)].*\w", line) for n, line in enumerate(lines(a), 1)))


def at_most(t):
    most = 10 * t.number - 5
    return (f"Describe {t.name} in at most {most} words.", t.says[0],
            lambda a: len(words(a)) <= most)


def at_least(t):
    """Two thirds of the words must differ, so that one and the same does not make up the length."""
    least = 9 * t.number
    return (f"Describe {t.name} in at least {least} words.", " ".join([*t.says, MORE]),
            lambda a: len(words(a)) >= least and len(set(words(a))) >= 6 * t.number)


def count(t):
    how_many = ["one sentence", "two sentences"][t.number - 2]
    return (f"Describe {t.name} in exactly {how_many}.", " ".join(t.says[:t.number - 1]),
            lambda a: sentences(a) == t.number - 1)


def capitals(t):
    return (f"Write this in capital letters: {t.says[0]}", t.says[0].upper(),
            lambda a: words(a) == words(t.says[0]) and a == a.upper())


def include(t):
    first, second = (words(said)[-1] for said in t.says[:2])
    return (f"Write one or two sentences about {t.name} with the words '{first}' and '{second}'.",
            " ".join(t.says[:2]),
            lambda a: {first, second} <= set(words(a)) and sentences(a) in (1, 2))


def avoid(t):
    return (f"Describe {t.name} in one sentence without the word '{t.name}'.", t.says[0],
            lambda a: t.name not in words(a) and sentences(a) == 1)


def no_comma(t):
    return (f"Describe {t.name} in one sentence without any commas.", t.says[0],
            lambda a: "," not in a and sentences(a) == 1)


def begin(t):
    return (f"Write one sentence about {t.name} that begins with the words 'To be honest'.",
            f"To be honest, I often think of {t.name}.",
            lambda a: words(a)[:3] == ["to", "be", "honest"] and sentences(a) == 1)


def end(t):
    return (f"Write one sentence about {t.name}. Then end your answer with the sentence 'That is "
            "all I know.'", f"{t.says[0]} That is all I know.",
            lambda a: words(a)[-5:] == words("That is all I know.") and sentences(a) == 2)


def quoted(t):
    return (f"Write one sentence about {t.name} and put your whole answer in double quotes.",
            f'"{t.says[0]}"',
            lambda a: bool(re.fullmatch(r'["“][^"“”]+["”]', a)) and sentences(a[1:-1]) == 1)


def as_json(t):
    """A fence around the object, ```json, is allowed."""
    def test(a):
        try:
            found = json.loads(re.sub(r"\A```(json)?|```\Z", "", a))
        except (ValueError, RecursionError):
            return False
        return (isinstance(found, dict) and set(found) == {"topic", "fact"}
                and all(isinstance(value, str) and words(value) for value in found.values()))
    return (f'State one fact about {t.name} as a JSON object with the keys "topic" and "fact". '
            "Write nothing else.", json.dumps({"topic": t.name, "fact": t.says[0]}), test)


def title(t):
    return (f"Invent the title of a book about {t.name}. Write only the title, in double angle "
            "brackets, like <<title>>.", f"<<All My {t.name.title()}>>",
            lambda a: bool(re.fullmatch(r"<<[^<>]+>>", a)))


def choose(t):
    return (f"Choose one word that fits {t.name}: useful, boring or dangerous. Answer with that "
            "word only.", "Useful", lambda a: words(a) in (["useful"], ["boring"], ["dangerous"]))


def postscript(t):
    """How many sentences come before it is not tested: one is asked for so that it fits."""
    def test(a):
        before, mark, after = a.partition("P.S.")
        return mark != "" and sentences(before) > 0 and len(words(after)) > 1
    return (f"Write one sentence about {t.name}. Then add a postscript that begins with P.S.",
            f"{t.says[0]}\n\nP.S. {t.says[1]}", test)


def question(t):
    return (f"Ask me a question about {t.name}. Write only the question.",
            f"Do you often think of {t.name}?", lambda a: a[-1] == "?" and sentences(a) == 1)


KINDS = [bullets, numbered, at_most, at_least, count, capitals, include, avoid, no_comma, begin,
         end, quoted, as_json, title, choose, postscript, question]
NEW_WORDS = {"capitals": 0, "choose": 0, "title": 1, "question": 2}  # that an answer needs; else 3


def prompts():
    """[(kind, prompt, example answer, check: answer -> bool)] of each kind with each topic, in an
    order in which any 45 or more, evenly spread, have all kinds among them."""
    found = []
    for n, (name, says) in enumerate(SAYS.items()):
        topic = Topic(name, re.split(r"(?<=\.) ", says), 2 + n % 2)
        for place in range(len(KINDS)):
            kind = KINDS[(place + 13 * n + 3 * n * n) % len(KINDS)]
            prompt, example, test = kind(topic)
            check = checker(prompt, test, NEW_WORDS.get(kind.__name__, 3))
            found.append((kind.__name__, prompt, example, check))
    return found


def checker(prompt, test, new):
    """A check: whether an answer passes the test and has so many words that its prompt has not."""
    def check(answer):
        answer = answer.strip()
        own = set(words(answer)) - set(words(prompt))
        return answer != "" and len(own) >= new and test(answer)
    return check
