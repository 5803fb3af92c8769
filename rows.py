"""A user's files: rows of JSON, as the arguments of data.Example, and prose; checkers of answers.

`read_rows(path)` reads each row as one of FORMS. A row of no form, or whose values are not what its
form asks for, is a ValueError that says where and why. `read_prose(path)` gives the text of any
other file, but of none that looks like data. Nothing here knows of tasks or models.
"""
import json
import math
import re
from collections import Counter
from pathlib import Path

from files import printable

ROWS = ".jsonl", ".ndjson", ".json"  # files of rows: one a line, or an array
TABLE = 'convert it: pandas.{}.to_json("rows.jsonl", orient="records", lines=True)'
UNPACK = "unpack it first"
BINARY = "not text: save its text as UTF-8, or its rows as .jsonl"
CONVERT = {  # suffixes of data that is not read
    ".csv": TABLE.format("read_csv(…)"), ".tsv": TABLE.format(r'read_csv(…, sep="\t")'),
    ".xls": TABLE.format("read_excel(…)"), ".xlsx": TABLE.format("read_excel(…)"),
    ".parquet": TABLE.format("read_parquet(…)"), ".feather": TABLE.format("read_feather(…)"),
    ".arrow": 'convert it: datasets.Dataset.from_file(…).to_json("rows.jsonl")',
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst", ".tar", ".tgz", ".7z"), UNPACK),
    **dict.fromkeys((".pkl", ".pickle", ".npy", ".npz", ".pt", ".bin", ".safetensors", ".gguf",
                     ".sqlite", ".db", ".pdf", ".docx"), BINARY),
    **dict.fromkeys((".yaml", ".yml", ".xml", ".toml"), "data, not prose: save its rows as .jsonl")}
UTF_16 = "UTF-16, not UTF-8 text: save it as UTF-8"
MAGIC = {  # how such files begin, whatever their suffix
    b"PAR1": CONVERT[".parquet"], b"ARROW1": CONVERT[".arrow"], b"%PDF": BINARY,
    b"\x1f\x8b": UNPACK, b"PK\x03\x04": UNPACK, b"BZh": UNPACK, b"\xfd7zXZ": UNPACK,
    b"\x28\xb5\x2f\xfd": UNPACK, b"\xff\xfe": UTF_16, b"\xfe\xff": UTF_16,
    b"version https://git-lfs": "a pointer to the file, not the file: run git lfs pull"}


# ------------------------------------------------------------------------------------- the files

def is_rows(path):
    """Whether a file is read as rows, by its suffix."""
    return Path(path).suffix.lower() in ROWS


def is_data(path):
    """Whether a file is rows, or data that is not read, by its suffix."""
    return is_rows(path) or Path(path).suffix.lower() in CONVERT


def read_text(path):
    """The text of a UTF-8 file without its byte-order mark; ValueError if there is none."""
    raw = Path(path).read_bytes()
    for magic, advice in MAGIC.items():
        if raw.startswith(magic):
            raise ValueError(f"{path}: {advice}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: not UTF-8 text, in line {line}: save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}: not UTF-8 text, but a NUL character in line {line}")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_prose(path):
    """The text of a file that is read as prose; ValueError for one that looks like data."""
    suffix = Path(path).suffix.lower()
    if suffix in CONVERT:
        raise ValueError(f"{path}: {CONVERT[suffix]}")
    text = read_text(path)
    if suffix in ROWS or looks_like_rows(text):
        named = "" if suffix in ROWS else "; name it .jsonl or .json, and it is read as rows"
        raise ValueError(f"{path}: it looks like data, not like prose{named}")
    return text


def looks_like_rows(text):
    """Whether a text begins like an object of JSON, is JSON, or has a table's first line.

    >>> looks_like_rows(' [{"a": 1},'), looks_like_rows('["a"]'), looks_like_rows("[1] A note.")
    (True, True, False)
    """
    if re.match(r"""\s*\[?\s*\{\s*("[^"\n]*"|'[^'\n]*')\s*:""", text):
        return True
    words = [word.strip(" \"'") for word in re.split(r"[,;|\t]", text.strip().split("\n")[0])]
    if len(words) > 1 and KEYS.issuperset(words):
        return True
    return _is_json(text) or all(_is_json(line) for line in text.split("\n") if line.strip())


def _is_json(text):
    try:
        return text.lstrip()[:1] in ("[", "{") and bool(_parse(text))
    except ValueError:
        return False


def _parse(text):
    """The value of a JSON text. An object with a key twice gets the key None as well."""
    def pairs(found):
        keys = Counter(key for key, _ in found)
        twice = [key for key in keys if keys[key] > 1]
        return dict(found) | ({None: twice[0]} if twice else {})
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_rows(path):
    """[the arguments of an Example, a dictionary], one for each row that differs in what is read.

    ValueError names file and line, or the element of an array.
    """
    found = {}
    for where, row in _located(path, read_text(path)):
        try:
            own, arguments = _read(row)
        except ValueError as error:
            raise ValueError(f"{where}: {printable(str(error))}") from None
        found.setdefault(json.dumps(own, sort_keys=True), arguments | {"where": where})
    return list(found.values())


def _located(path, text):
    """[(where, row)] of lines, an array, or an object with one list, such as {"data": […]}."""
    try:
        whole = _parse(text)
    except ValueError as error:
        whole, line = None, getattr(error, "lineno", 1)
        if text.lstrip().startswith("[") and not str(error).startswith("Extra data"):
            raise ValueError(f"{path}:{line}: not JSON: {_reason(error)}") from None
    if isinstance(whole, dict) and not {None, *KEYS} & whole.keys():
        lists = [key for key, value in whole.items() if isinstance(value, list)
                 and (not value or isinstance(value[0], dict) and KEYS & value[0].keys())]
        if len(lists) > 1:
            several = ", ".join(lists)
            raise ValueError(f"{path}: several lists, {several}: save each as a file of its own")
        whole = whole[lists[0]] if lists else whole
    if isinstance(whole, dict):  # one row, on lines of its own
        line = text[:text.index("{")].count("\n") + 1
        return [(f"{path}:{line}", whole)]
    if isinstance(whole, list):
        if not whole:
            raise ValueError(f"{path}: the file is empty: it has no rows")
        return [(f"{path}: element {n}", row) for n, row in enumerate(whole, 1)]
    return _lines(path, text)


def _lines(path, text):
    """[(where, value)] of a row a line, blank lines left out; only a newline ends a line."""
    found = []
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append((f"{path}:{n}", _parse(line)))
            except ValueError as error:
                raise ValueError(f"{path}:{n}: not a line of JSON: {_reason(error)}") from None
    return found


def _reason(error):
    """What json says, without its place, which is given as file and line."""
    return getattr(error, "msg", None) or str(error).split(";")[0]


# ------------------------------------------------------------------------------------ what is a row

SYNONYMS = {"question": "prompt", "completion": "response", "answerKey": "answer",
            "system_prompt": "system"}
UNREAD = ("context passage article story paragraph document documents table schema options history "
          "tools functions tool_calls chat_template_kwargs image images image_path audio video "
          "videos chosen rejected").split()  # they would change what is asked
NOTHING = None, "", [], {}


def _read(row):
    """(what is read of a row, under the names of FORMS; the arguments of its Example).

    Nulls and further keys (ids, sources) are left out. ValueError for the keys of no form, or of
    more than one, and for what is not JSON or not text, at any depth.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, not {_kind(row)}: {KNOWN}")
    _check_values(row)
    own = {key: row[key] for key in row if key in KEYS and row[key] is not None}
    if own.get("system_prompt") == "":
        del own["system_prompt"]
    if "prompt" in own and own["prompt"] == first_asked(own.get("messages")):
        del own["prompt"]  # it stands in "messages", too
    system = {"system", "system_prompt"}
    names = SYNONYMS | ({"answer": "response"} if own.keys() - system == QUESTION else {})
    renamed = {names.get(key, key): value for key, value in own.items()}
    if len(renamed) < len(own) or frozenset(renamed) not in READERS:
        found = ", ".join(key if row[key] is not None else f"{key} (null)" for key in row)
        raise ValueError(f"the keys {found or '(none)'} are not those of one form: {KNOWN}")
    for key in UNREAD:
        if not _says_nothing(key, row.get(key)):
            raise ValueError(f'"{key}" is not read: put what belongs to the question into the '
                             "prompt, and leave the key out")
    if row.get("label") is False:
        raise ValueError('"label" is false, so the answer is a bad one: leave such rows out')
    try:
        return renamed, READERS[frozenset(renamed)](renamed)
    except ValueError as error:
        said = str(error)
        for key in own.keys() & names.keys():  # name the key that stands in the file
            said = said.replace(f'"{names[key]}"', f'"{key}"')
        raise ValueError(said) from None


def first_asked(turns):
    """The first user's turn of a list of turns, or None."""
    of_user = [turn.get("content") for turn in turns if isinstance(turn, dict)
               and turn.get("role") == "user"] if isinstance(turns, list) else []
    return of_user[0] if of_user else None


def _says_nothing(key, value):
    """Whether a key that is not read is empty, or a template's switches alone."""
    if key == "chat_template_kwargs" and isinstance(value, dict):
        return all(x in NOTHING or isinstance(x, bool) for x in value.values())
    return value in NOTHING


def _check_values(value):
    """ValueError for a key that stands twice, a number that is none, or what is not text."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if None in value:
                raise ValueError(f'the key "{value[None]}" stands twice in one object')
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            values += value
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is not a number of JSON: write null or leave the key out")
        elif isinstance(value, str):
            strange = re.search("[\0\ud800-\udfff]", value)
            if strange:
                what = "a NUL character" if strange[0] == "\0" else "half of a surrogate pair"
                raise ValueError(f"{what}, {ascii(strange[0])[1:-1]}, is not text")


def _kind(value):
    """What a value of JSON is, in words.

    >>> _kind(True), _kind(1), _kind(None)
    ('true', 'a number', 'null')
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def _text(value, name, empty=False):
    """The value, if it is text, and, unless it may be empty, not blank."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {_kind(value)}")
    if not (empty or value.strip()):
        raise ValueError(f"{name} is empty")
    return value


# -------------------------------------------------------------------------------- turns of a chat

def _turns(value, name):
    """[{"role", "content"}, …] of a list of turns: one of the system at most, then user and
    assistant in turn. Parts of text are joined."""
    if not isinstance(value, list) or not value:
        what = "is empty" if value == [] else f"must be a list of turns, not {_kind(value)}"
        raise ValueError(f"{name} {what}")
    turns = [_turn(turn, f"turn {n} of {name}") for n, turn in enumerate(value, 1)]
    if turns[0]["role"] == "system" and not turns[0]["content"].strip() and turns[1:]:
        turns[0]["content"] = ""
    first = int(turns[0]["role"] == "system")
    for n, turn in enumerate(turns[first:]):
        due = ("user", "assistant")[n % 2]
        if turn["role"] != due:
            raise ValueError(f"turn {first + n + 1} of {name} must be the {due}'s, not the "
                             f"{turn['role']}'s: user and assistant alternate, after the system")
    return turns


def _turn(turn, name):
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise ValueError(f'{name} must be an object with "role" and "content"')
    further = [key for key in turn if key not in ("role", "content", "id")
               and turn[key] not in NOTHING]
    if further:
        raise ValueError(f'"{further[0]}" in {name} is not read: leave it out')
    if turn["role"] not in ("system", "user", "assistant"):
        raise ValueError(f"{name} has the role {json.dumps(turn['role'])}: known are system, user, "
                         "assistant")
    content = turn["content"]
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            raise ValueError(f"{name} has parts that are not text")
        content = "".join(_text(part.get("text"), f"a part of {name}", True) for part in content)
    empty = turn["role"] == "system"
    return {"role": turn["role"], "content": _text(content, f"the content of {name}", empty)}


def _asked(value, name="prompt", system=None):
    """{"prompt", "system", "earlier"} of a text, or of turns of which the last is the user's."""
    if not isinstance(value, list):
        return {"prompt": _text(value, f'"{name}"'), "system": _system(system)}
    if system:
        raise ValueError(f'"system" beside turns: make it the first turn of "{name}"')
    turns = _turns(value, f'"{name}"')
    if turns[-1]["role"] != "user":
        raise ValueError(f'the last turn of "{name}" must be the user\'s, which is to be answered')
    system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
    return {"prompt": turns[-1]["content"], "system": system, "earlier": turns[:-1]}


def _system(value):
    return "" if value is None else _text(value, '"system"', empty=True).strip() and value


def _answered(value, name="response"):
    """{"response", "check"} of a demonstration: text, or one turn of the assistant."""
    if isinstance(value, list):
        roles = [turn.get("role") if isinstance(turn, dict) else None for turn in value]
        if roles != ["assistant"]:
            raise ValueError(f'"{name}" must be text, or a list of one turn, the assistant\'s')
        value = _turn(value[0], f'"{name}"')["content"]
    return {"response": _text(value, f'"{name}"'), "check": same_answer(value)}


# ------------------------------------------------------------------------------------------ forms
# Each takes a row and gives the arguments of an Example.

def demonstrated(row):
    return _asked(row["prompt"], system=row.get("system")) | _answered(row["response"])


def instructed(row):
    """Alpaca's: the input stands under the instruction."""
    row = {"input": "", **row}
    given = _text(row["input"], '"input"', empty=True)
    asked = _asked(_text(row["instruction"], '"instruction"'), system=row.get("system"))
    asked["prompt"] += f"\n\n{given}" if given.strip() else ""
    return asked | _answered(_text(row["output"], '"output"'))


def conversation(row):
    """The last turn, the assistant's, is the demonstration; what stands before it is the prompt."""
    turns = _turns(row["messages"], '"messages"')
    if turns[-1]["role"] != "assistant":
        raise ValueError('the last turn of "messages" must be the assistant\'s, the demonstration')
    return _asked(turns[:-1], "messages") | _answered(turns[-1]["content"])


def answered(row):
    """Turns with their answer; or an eval row of the paper's Science, whose answer is a letter."""
    if not isinstance(row["prompt"], list):
        raise ValueError('"answer" beside a "prompt" that is text: call a demonstration '
                         '"response"; to choose, give "choices", too')
    asked = _asked(row["prompt"])
    letter = isinstance(row["answer"], str) and re.fullmatch("[A-Z]", row["answer"].strip())
    if letter and asked["system"] and not asked["earlier"]:
        return asked | {"check": same_letter(letter[0])}
    return asked | _answered(row["answer"], "answer")


def choosing(row):
    """Several continuations of one prompt; with labels, as in ARC's own rows, the answer is one."""
    prompt, choices, labels = _text(row["prompt"], '"prompt"', empty=True), row["choices"], None
    if isinstance(choices, dict):
        if choices.keys() != {"text", "label"}:
            raise ValueError('"choices" must be a list of texts, or {"text": […], "label": […]}')
        labels, choices = _several(choices["label"], "label"), choices["text"]
    texts = _several(choices, "choices")
    if labels and len(labels) != len(texts):
        raise ValueError(f"{len(texts)} choices have {len(labels)} labels")
    answer = _index(row["answer"], len(texts), labels)
    return {"prompt": prompt, "response": texts[answer], "answer": answer,
            "choices": [(prompt, f" {text}") for text in texts]}


def completing(row):
    """One continuation of several contexts."""
    continuation = _text(row["continuation"], '"continuation"').strip()
    contexts = row["contexts"]
    _several(contexts, "contexts")
    answer = _index(row["answer"], len(contexts))
    return {"prompt": contexts[answer], "response": continuation, "answer": answer,
            "choices": [(context, f" {continuation}") for context in contexts]}


def _several(values, name):
    """Two texts or more, none blank, none twice, without the blanks around them."""
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f'"{name}" must be a list of two texts or more')
    texts = [_text(value, f'number {n} of "{name}"').strip() for n, value in enumerate(values)]
    twice = [text for text, n in Counter(texts).items() if n > 1]
    if twice:
        raise ValueError(f'"{name}" has {json.dumps(twice[0][:60], ensure_ascii=False)} twice')
    return texts


def _index(answer, n, labels=None):
    """The place of the right choice, from 0, by its index, or by its label where there are any."""
    if isinstance(answer, str) and labels:
        if answer.strip() not in labels:
            raise ValueError(f'no choice has the label "{answer[:60]}": there are '
                             f'{", ".join(labels)}')
        return labels.index(answer.strip())
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise ValueError(f'"answer" must be the index of a choice, a whole number, not '
                         f"{json.dumps(answer)[:60]}")
    if labels and str(answer) in labels and labels.index(str(answer)) != answer:
        raise ValueError(f'"answer" {answer} is an index and another choice\'s label: write the '
                         "label as text")
    if not 0 <= answer < n:
        raise ValueError(f'"answer" is {answer}, and the choices are 0 to {n - 1}')
    return answer


def science(row):
    """The train rows of the paper's Science: reasoning, then <answer>B</answer>."""
    demonstration = _text(row["output_text"], '"output_text"')
    letter = last_answer(demonstration)
    if not letter:
        raise ValueError('"output_text" has no <answer>…</answer>')
    return _asked(row["messages"], "messages") | {
        "response": demonstration, "check": same_letter(letter)}


def tools(row):
    """The rows of the paper's Tools: golden_answer is what counts, golden_response is shown."""
    calls, texts = row["golden_answer"], row.get("golden_response", [])
    if not isinstance(calls, list) or not calls:
        raise ValueError('"golden_answer" must be a list of calls, one or more')
    for call in calls:
        if not isinstance(call, dict) or not {"Action", "Action_Input"} <= call.keys():
            raise ValueError('a call of "golden_answer" must have "Action" and "Action_Input"')
        _text(call["Action"], '"Action"')
        _text(call["Action_Input"], '"Action_Input"', empty=True)
    if not isinstance(texts, list):
        raise ValueError('"golden_response" must be a list of texts')
    texts = [_text(text, 'a text of "golden_response"') for text in texts]
    return _asked(row["prompt"]) | {"response": "\n".join(texts), "check": same_calls(calls)}


FORMS = {  # the keys of a row -> how it is read
    "prompt response": demonstrated, "messages": conversation, "prompt choices answer": choosing,
    "contexts continuation answer": completing, "prompt answer": answered,
    "instruction output": instructed, "instruction input output": instructed,
    "messages output_text": science, "prompt golden_answer": tools,
    "prompt golden_answer golden_response": tools}
READERS = {frozenset([*form.split(), *system]): read for form, read in FORMS.items()
           for system in ([], ["system"]) if not system or read in (demonstrated, instructed)}
QUESTION = {"question", "answer"}  # both texts
KEYS = {*SYNONYMS, *frozenset().union(*READERS)}
KNOWN = "known are " + ", ".join(
    "{" + ", ".join(f'"{key}"' for key in form.split()) + "}" for form in FORMS)


# ----------------------------------------------------------------------------------- how to grade

def same_json(expected):
    """A checker: the first JSON object in the answer is this one, keys in any order.

    >>> check = same_json({"a": 1, "b": 2})
    >>> check('Sure: {"b": 2, "a": 1}.'), check('{"a": true, "b": 2}')
    (True, False)
    """
    wanted = json.dumps(expected, sort_keys=True)

    def check(answer):
        try:
            found, _ = json.JSONDecoder().raw_decode(answer, answer.index("{"))
        except (ValueError, RecursionError):  # no brace, or no JSON after it
            return False
        return json.dumps(found, sort_keys=True) == wanted  # as text, where 1 is not true
    return check


def same_answer(expected):
    """A checker: equal as JSON if a JSON object is expected, else up to case, spaces, a full stop.

    A thought before either, up to </think>, does not count.

    >>> check = same_answer("Blue whale")
    >>> check(" blue  WHALE. "), check("a blue whale"), check("<think>Eh</think>blue whale")
    (True, False, True)
    >>> same_answer('{"a": 1}')('<think>{"b": 2}?</think>{"a": 1}')
    True
    """
    expected = expected.rpartition("</think>")[2]
    if expected.lstrip().startswith("{"):
        try:
            check = same_json(json.loads(expected))
            return lambda answer: check(answer.rpartition("</think>")[2])
        except (ValueError, RecursionError):
            pass
    return lambda answer: _normal(answer.rpartition("</think>")[2]) == _normal(expected)


def _normal(text):
    text = " ".join(text.split()).lower()
    return text.rstrip(".") or text


def last_answer(text):
    """What stands in the last <answer>…</answer>, without the blanks around it; None without one.

    >>> last_answer("<answer>A</answer>, no: <answer> B </answer>")
    'B'
    """
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return found[-1].strip() if found else None


def same_letter(letter):
    """A checker: the last <answer>…</answer> is this letter (the paper's Science)."""
    return lambda answer: last_answer(answer) == letter


def same_calls(calls):
    """A checker: the same tools are called, in any order, and their inputs, merged into one object,
    are equal; an input that is no JSON object does not count (the paper's Tools).

    >>> check = same_calls([{"Action": "find", "Action_Input": '{"city": "Oslo"}'}])
    >>> check('Action: find\\nAction Input: {"city": "Oslo"}'), check("Action: find")
    (True, False)
    """
    names = Counter(call["Action"].strip() for call in calls)
    merged = _merged(call["Action_Input"].strip() for call in calls)

    def check(answer):
        found = re.findall(r"\bAction:[ \t]*(.*?)[ \t\r]*(?=$|Action Input:)", answer, re.MULTILINE)
        inputs = [part.lstrip() for part in answer.split("Action Input:")[1:]]
        return Counter(found) == names and _merged(inputs) == merged
    return check


def _merged(inputs):
    """One object of the JSON objects that these texts begin with."""
    merged = {}
    for text in inputs:
        try:
            merged |= json.JSONDecoder().raw_decode(text)[0] if text.startswith("{") else {}
        except (ValueError, RecursionError):
            pass
    return merged
