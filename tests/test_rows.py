"""rows.py: every form that is read and what comes of it; whatever is none is refused with file and
line; files that are no rows; how answers are graded. All rows are invented."""
import json
import random
import re
import zipfile

import pytest
from test_data import jsonl

import data
import rows
import train
from data import Example, load_task

SYSTEM = {"role": "system", "content": "Be brief."}
USER, SAID = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}
AGAIN, LAST = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}


def only(tmp_path, *written):
    """The Examples of a file of these rows, all of it measured."""
    return load_task(jsonl(tmp_path / "rows.jsonl", *written), measured_only=True).eval["all"]


def parts(e):
    return {"prompt": e.prompt, "response": e.response, "system": e.system, "earlier": e.earlier}


# ------------------------------------------------------------------------------------------- forms

TALKS = {
    "messages": ({"messages": [USER, SAID]}, ("One?", "1", "", [])),
    "with a system": ({"messages": [SYSTEM, USER, SAID]}, ("One?", "1", "Be brief.", [])),
    "with earlier turns": ({"messages": [SYSTEM, USER, SAID, AGAIN, LAST], "id": 7},
                           ("Two?", "2", "Be brief.", [USER, SAID])),
    "parts of text": ({"messages": [{"role": "user", "content": [
        {"type": "text", "text": "On"}, {"type": "text", "text": "e?"}]}, SAID]},
        ("One?", "1", "", [])),
    "keys that are null": ({"messages": [{**USER, "name": None}, {**SAID, "tool_calls": []}],
                            "prompt": None, "tools": None}, ("One?", "1", "", [])),
    "prompt of turns": ({"prompt": [SYSTEM, USER], "response": "1"},
                        ("One?", "1", "Be brief.", [])),
    "completion of turns": ({"prompt": [USER, SAID, AGAIN], "completion": [LAST]},
                            ("Two?", "2", "", [USER, SAID])),
    "answer to turns": ({"prompt": [USER], "answer": "1"}, ("One?", "1", "", [])),
    "completion": ({"prompt": "One?", "completion": "1"}, ("One?", "1", "", [])),
    "question": ({"question": "One?", "answer": "1"}, ("One?", "1", "", [])),
    "question, response": ({"question": "One?", "response": "1"}, ("One?", "1", "", [])),
    "a system message": ({"prompt": "One?", "response": "1", "system": "Be brief."},
                         ("One?", "1", "Be brief.", [])),
    "an empty system": ({"prompt": "One?", "response": "1", "system": " "}, ("One?", "1", "", [])),
    "a system_prompt": ({"system_prompt": "Be brief.", "question": "One?", "answer": "1"},
                        ("One?", "1", "Be brief.", [])),
    "an empty system turn": ({"messages": [{**SYSTEM, "content": " "}, USER, SAID]},
                             ("One?", "1", "", [])),
    "the prompt once more": ({"prompt": "One?", "messages": [SYSTEM, USER, SAID]},
                             ("One?", "1", "Be brief.", [])),
    "switches of a template": ({"messages": [USER, SAID], "chat_template_kwargs": {
        "enable_thinking": True, "custom_instructions": ""}}, ("One?", "1", "", [])),
    "an empty system_prompt beside turns": ({"messages": [USER, SAID], "system_prompt": ""},
                                            ("One?", "1", "", [])),
    "an answer that is marked good": ({"prompt": "One?", "completion": "1", "label": True},
                                      ("One?", "1", "", [])),
    "instruction": ({"instruction": "Add.", "input": "1 + 0", "output": "1"},
                    ("Add.\n\n1 + 0", "1", "", [])),
    "instruction alone": ({"instruction": "Add.", "input": "", "output": "1"},
                          ("Add.", "1", "", [])),
    "instruction, output": ({"instruction": "Add.", "output": "1"}, ("Add.", "1", "", [])),
}


@pytest.mark.parametrize("form", TALKS)
def test_questions_with_demonstrations_are_read_in_every_form(form, tmp_path):
    row, (prompt, response, system, earlier) = TALKS[form]
    e, = only(tmp_path, row)
    assert parts(e) == {"prompt": prompt, "response": response, "system": system,
                        "earlier": earlier}
    assert e.check(response) and not e.check("another") and e.chat and not e.choices
    assert e.where == f"{tmp_path}/rows.jsonl:1"


def test_an_earlier_conversation_is_seen_by_student_and_teacher(tmp_path):
    """Before the question, and before the demonstration, which is an earlier turn, too."""
    class Chat:
        def chat(self, messages):
            return messages
    e, = only(tmp_path, {"messages": [SYSTEM, USER, SAID, AGAIN, LAST]})
    before = [SYSTEM, USER, SAID]
    assert data.student_prompt(Chat(), e) == [*before, AGAIN]
    assert data.teacher_prompt(Chat(), e) == [*before, AGAIN, LAST, AGAIN]
    quoted = data.teacher_prompt(Chat(), e, "quote")
    assert quoted[:3] == before and len(quoted) == 4 and "Two?" in quoted[3]["content"]


ARC = {"text": ["red", "blue", "green"], "label": ["A", "B", "C"]}
ONE = {**ARC, "label": ["1", "2", "3"]}


@pytest.mark.parametrize("row, right", [
    ({"question": "Sky?", "choices": ARC, "answerKey": "B", "id": "Mercury_7"}, 1),
    ({"prompt": "Sky?", "choices": ARC, "answer": "C"}, 2),
    ({"question": "Sky?", "choices": ONE, "answerKey": "1"}, 0),
    ({"question": "Sky?", "choices": ARC, "answer": 1}, 1),
    ({"question": "Sky?", "choices": ARC["text"], "answer": 2}, 2),
    ({"prompt": "Sky?", "choices": [" red", "blue ", "green"], "answer": 0}, 0),
])
def test_choices_are_texts_or_arcs_own(row, right, tmp_path):
    e, = only(tmp_path, row)
    assert e.choices == [("Sky?", " red"), ("Sky?", " blue"), ("Sky?", " green")]
    assert (e.prompt, e.answer, e.response) == ("Sky?", right, ARC["text"][right])


# -------------------------------------------------------------------------------- rows of no form

DEEP = '{"prompt": "a", "response": "b", "id": ' + "[" * 100_000 + "]" * 100_000 + "}"
CHOICE = {"prompt": "a", "choices": ["b", "c"], "answer": 0}
CONTEXTS = {"contexts": ["a", "b"], "continuation": "c", "answer": 0}


def turns(*found, **further):
    return {"messages": list(found), **further}


REFUSED = {  # what is wrong: the row, and what is said
    # text must be text
    "a number": ({"prompt": "a", "response": 5}, '"response" must be text, not a number'),
    "true": ({"prompt": True, "response": "b"}, '"prompt" must be text, not true'),
    "null": ({"prompt": "a", "response": None}, "response (null)"),
    "an object": ({"prompt": "a", "response": {"b": 1}}, '"response" must be text, not an object'),
    "a list": ({"prompt": "a", "response": ["b"]}, '"response" must be text'),
    "an empty prompt": ({"prompt": "", "response": "b"}, '"prompt" is empty'),
    "a blank response": ({"prompt": "a", "response": " \n"}, '"response" is empty'),
    "a number for a completion": (
        {"prompt": "a", "completion": 5}, '"completion" must be text, not a number'),
    "a number for an answer": (
        {"question": "a", "answer": 5}, '"answer" must be text, not a number'),
    "a number for a question": (
        {"question": 5, "choices": ["a", "b"], "answer": 0}, '"question" must be text'),
    "a system of numbers": ({"prompt": "a", "response": "b", "system": 1}, '"system" must be text'),
    "an empty instruction": ({"instruction": "", "output": "b"}, '"instruction" is empty'),
    "an input of numbers": ({"instruction": "a", "input": 1, "output": "b"}, '"input"'),
    # JSON must be JSON
    "half a surrogate pair": ('{"prompt": "\\ud83d", "response": "b"}', "half of a surrogate"),
    "half of one in a turn": (
        '{"messages": [{"role": "user", "content": "\\udc00"}]}', "half of a surrogate"),
    "half of one in a key": ('{"prompt": "a", "response": "b", "\\ud83d": 1}', "surrogate"),
    "a NUL": ('{"prompt": "a\\u0000", "response": "b"}', "NUL"),
    "NaN": ('{"prompt": "a", "response": "b", "score": NaN}', "nan"),
    "-Infinity, deep": ('{"prompt": "a", "response": "b", "x": [{"y": -Infinity}]}', "-inf"),
    "a number out of range": ('{"prompt": "a", "response": "b", "x": 1e999}', "inf"),
    "a key twice": ('{"prompt": "a", "response": "b", "prompt": "c"}', '"prompt" stands twice'),
    "a key twice, deep": ('{"prompt": "a", "response": "b", "x": [{"y": 1, "y": 1}]}', '"y"'),
    "a number of 5000 digits": ('{"prompt": "a", "response": "b", "x": %s}' % ("1" * 5000), "JSON"),
    "nested too deeply": (DEEP, "not a line of JSON"),
    "a key of half a pair twice": ('{"\\ud83d": 1, "\\ud83d": 2}', "\\ud83d"),
    "a key of two lines twice": ('{"a\\nb": 1, "a\\nb": 2}', "stands twice"),
    "an unknown key of two lines": ({"a\nb\u2028c": "d"}, r"a\nb\u2028c are not"),
    "half a line": ('{"prompt": "a", "respon', "not a line of JSON"),
    "two on a line": ('{"prompt": "a", "response": "b"} {}', "not a line of JSON"),
    "a list for a row": ([{"prompt": "a", "response": "b"}], "must be an object, not a list"),
    "null for a row": ("null", "must be an object, not null"),
    # one form
    "no keys": ({}, "(none)"),
    "unknown keys": ({"query": "a", "target": "b"}, "query, target"),
    "text": ({"text": "a"}, "text"),
    "a prompt alone": ({"prompt": "a"}, 'prompt are not'),
    "two forms": ({"prompt": "a", "response": "b", "messages": [USER, SAID]}, "messages"),
    "choices and a response": ({**CHOICE, "response": "b"}, "response"),
    "two prompts": ({"prompt": "a", "question": "b", "response": "c"}, "question"),
    "two demonstrations": ({"prompt": "a", "completion": "b", "response": "c"}, "completion"),
    "an answer, to choose or to say": ({"prompt": "a", "answer": "b"}, 'demonstration "response"'),
    "a passage": ({"question": "a", "answer": "b", "context": "c"}, '"context" is not read'),
    "tools": ({"messages": [USER, SAID], "tools": [{"name": "f"}]}, '"tools" is not read'),
    "a history": ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, '"history"'),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen"),
    "a system beside choices": ({**CHOICE, "system": "b"}, "system"),
    "a system beside turns": ({"prompt": [USER], "response": "1", "system": "b"}, '"system"'),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "a"}]}, "keys conversations"),
    "options": ({"question": "a", "options": ["b", "c"], "answer": "B"}, '"options" is not read'),
    "an article": ({"article": "a", "question": "b", "answer": "c"}, '"article" is not read'),
    "options of switches": ({"prompt": "a", "response": "b", "options": {"A": True}}, '"options"'),
    "instructions to a template": ({"messages": [USER, SAID], "chat_template_kwargs": {
        "custom_instructions": "b"}}, '"chat_template_kwargs" is not read'),
    "an answer that is marked bad": ({"prompt": "a", "completion": "b", "label": False}, '"label"'),
    "another prompt beside turns": ({"prompt": "a", "messages": [USER, SAID]}, "not those of one"),
    # turns
    "no turns": (turns(), '"messages" is empty'),
    "text for turns": ({"messages": "a"}, '"messages" must be a list of turns, not text'),
    "the user's last": (turns(USER, SAID, AGAIN), "must be the assistant's"),
    "no user": (turns(SAID), "must be the user's"),
    "no question": (turns(SYSTEM, SAID), "must be the user's"),
    "the system's alone": (turns(SYSTEM), "must be the assistant's"),
    "the system's last": (turns(USER, SAID, SYSTEM), "must be the user's, not the system's"),
    "two systems": (turns(SYSTEM, SYSTEM, USER, SAID), "must be the user's"),
    "two users": (turns(USER, AGAIN, SAID), "turn 2 of"),
    "two assistants": (turns(USER, SAID, LAST), "turn 3 of"),
    "another role": (turns(USER, {"role": "tool", "content": "a"}, SAID), 'the role "tool"'),
    "another role's name": (turns({"role": "human", "content": "a"}, SAID), 'the role "human"'),
    "a role of numbers": (turns({"role": 1, "content": "a"}, SAID), "the role 1"),
    "no role": (turns({"content": "a"}, SAID), '"role" and "content"'),
    "a turn of text": (turns("a", SAID), 'turn 1 of "messages" must be an object'),
    "an empty turn": (turns({"role": "user", "content": ""}, SAID), "turn 1"),
    "an empty demonstration": (turns(USER, {"role": "assistant", "content": "  "}), "turn 2"),
    "no content": (turns(USER, {"role": "assistant", "content": None}), "not null"),
    "an image": (turns({"role": "user", "content": [{"type": "image_url"}]}, SAID), "not text"),
    "no parts": (turns({"role": "user", "content": []}, SAID), "is empty"),
    "a call of a tool": (turns(USER, {**SAID, "tool_calls": [{"id": 1}]}), '"tool_calls"'),
    "a turn without weight": (turns(USER, {**SAID, "weight": 0}), '"weight"'),
    "a prompt that ends in an answer": ({"prompt": [USER, SAID], "response": "b"}, "the user's"),
    "an empty list for a prompt": ({"prompt": [], "response": "b"}, '"prompt" is empty'),
    "two turns for an answer": ({"prompt": [USER], "completion": [LAST, LAST]}, "of one turn"),
    "the user's answer": ({"prompt": [USER], "completion": [AGAIN]}, "the assistant's"),
    # choices
    "true for 1": ({**CHOICE, "answer": True}, "not true"),
    "false for 0": ({**CONTEXTS, "answer": False}, "not false"),
    "1.0 for 1": ({**CHOICE, "answer": 1.0}, "whole number, not 1.0"),
    "an index as text": ({**CHOICE, "answer": "1"}, 'not "1"'),
    "an index out of range": ({**CHOICE, "answer": 2}, "the choices are 0 to 1"),
    "a negative index": ({**CONTEXTS, "answer": -1}, "the choices are 0 to 1"),
    "a list for an index": ({**CHOICE, "answer": [0]}, "not [0]"),
    "no answer": ({**CHOICE, "answer": None}, "answer (null)"),
    "a choice twice": ({**CHOICE, "choices": ["b", "b "]}, '"b" twice'),
    "an empty choice": ({**CHOICE, "choices": ["b", ""]}, 'number 1 of "choices" is empty'),
    "a number for a choice": ({**CHOICE, "choices": ["b", 5]}, "must be text, not a number"),
    "one choice": ({**CHOICE, "choices": ["b"]}, "two texts or more"),
    "no choices": ({**CHOICE, "choices": []}, "two texts or more"),
    "text for choices": ({**CHOICE, "choices": "bc"}, "two texts or more"),
    "turns to choose after": ({**CHOICE, "prompt": [USER]}, '"prompt" must be text, not a list'),
    "a context twice": ({**CONTEXTS, "contexts": ["a", "a"]}, '"a" twice'),
    "an empty continuation": ({**CONTEXTS, "continuation": " "}, '"continuation" is empty'),
    "a label that is none": ({"question": "a", "choices": ARC, "answerKey": "E"}, "A, B, C"),
    "a small letter": ({"question": "a", "choices": ARC, "answerKey": "a"}, '"a"'),
    "an empty label": ({"question": "a", "choices": ARC, "answerKey": ""}, "A, B, C"),
    "a number that could be a label": ({"question": "a", "choices": ONE, "answer": 1}, "label"),
    "a label twice": (
        {"question": "a", "choices": {**ARC, "label": ["A", "B", "A"]}, "answerKey": "A"}, "twice"),
    "a label too few": (
        {"question": "a", "choices": {**ARC, "label": ["A", "B"]}, "answerKey": "A"}, "2 labels"),
    "labels without texts": (
        {"question": "a", "choices": {"label": ["A", "B"]}, "answerKey": "A"}, '"text"'),
    # the paper's
    "no answer tag": ({"messages": [SYSTEM, USER], "output_text": "B"}, "<answer>"),
    "a number for output": ({"messages": [SYSTEM, USER], "output_text": 2}, '"output_text"'),
    "no golden answer": ({"prompt": "a", "golden_answer": []}, '"golden_answer"'),
    "text for calls": ({"prompt": "a", "golden_answer": "find"}, '"golden_answer"'),
    "a call without input": ({"prompt": "a", "golden_answer": [{"Action": "f"}]}, "Action_Input"),
    "an object for input": (
        {"prompt": "a", "golden_answer": [{"Action": "f", "Action_Input": {}}]}, "not an object"),
    "text for golden_response": (
        {"prompt": "a", "golden_answer": [{"Action": "f", "Action_Input": "{}"}],
         "golden_response": "b"}, '"golden_response"'),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_none_of_the_forms_is_refused_with_file_and_line(what, tmp_path):
    """Whether the file is split or measured as a whole."""
    row, says = REFUSED[what]
    path = jsonl(tmp_path / "bad.jsonl", {"prompt": "x", "response": "y"}, "", row)
    for measured_only in (False, True):
        with pytest.raises(ValueError) as refused:
            load_task(path, measured_only)
        said = str(refused.value)
        assert said.startswith(f"{path}:3: ") and says in said and "\n" not in said, said


def test_a_single_row_is_refused_with_its_line(tmp_path):
    for text in ('{"prompt": "a"}', json.dumps(REFUSED["ShareGPT"][0]), '{\n"prompt":\n"a"}',
                 '{"data": [], "data": []}'):
        (tmp_path / "a.json").write_text("\n\n" + text + "\n")
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/a.json:3: the key")):
            load_task(tmp_path / "a.json", measured_only=True)


def random_value(draw, depth=0):
    """Something that may stand in a row, right or wrong."""
    texts = ["a", "b", "", " ", "A", "B", "1", "system", "user", "assistant", "x\u2028y", "\n"]
    simple = [*texts, None, True, False, 0, 1, 2, -1, 1.5, SYSTEM, USER, SAID, ARC]
    if depth > 2 or draw.random() < 0.6:
        return draw.choice(simple)
    if draw.random() < 0.6:
        return [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    keys = draw.sample(["role", "content", "text", "label", "type", "Action", "Action_Input"], 2)
    return {key: random_value(draw, depth + 1) for key in keys}


def test_a_random_row_is_read_as_text_or_refused_in_one_line(tmp_path):
    draw, read = random.Random(0), 0
    for _ in range(1000):
        keys = draw.choice(list(rows.FORMS)).split() + draw.choices(["system", "id", "x"], k=1)
        row = {key: random_value(draw) if draw.random() < 0.6 else "a" for key in keys}
        path = jsonl(tmp_path / "a.jsonl", row, row)
        try:
            e, = load_task(path, measured_only=True).eval["all"]
        except ValueError as error:
            assert str(error).startswith(f"{path}:1: ") and len(str(error).splitlines()) == 1
            continue
        read += 1
        said = [e.prompt, e.response, e.system, *(t for pair in e.choices for t in pair),
                *(turn[key] for turn in e.earlier for key in ("role", "content"))]
        assert all(isinstance(text, str) for text in said)
        assert e.choices or e.prompt.strip() and isinstance(e.check(e.response), bool)
    assert read > 30


def test_multiple_choice_and_questions_do_not_share_a_file(tmp_path):
    with pytest.raises(ValueError, match="cannot share a file"):
        only(tmp_path, CHOICE, {"prompt": "x", "response": "y"})


# ------------------------------------------------------------------------------------------- files

GOOD = [{"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(10)]


def content(task):
    return [(e.prompt, e.response) for e in [*task.train, *task.eval["held_out"]]]


@pytest.mark.parametrize("name, text", [
    ("a.json", json.dumps(GOOD)), ("a.json", json.dumps(GOOD, indent=2)),
    ("a.json", "\n".join(map(json.dumps, GOOD))), ("a.json", json.dumps({"data": GOOD, "v": 1})),
    ("a.jsonl", json.dumps(GOOD)), ("a.ndjson", "\n".join(map(json.dumps, GOOD))),
    ("a.JSONL", "\r\n".join(map(json.dumps, GOOD))), ("a.json", "\ufeff" + json.dumps(GOOD)),
    ("a.jsonl", "\r".join(map(json.dumps, GOOD)))])
def test_rows_are_lines_or_an_array(name, text, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    lines = load_task(jsonl(tmp_path / "lines.jsonl", *GOOD))
    assert content(load_task(tmp_path / name)) == content(lines)


@pytest.mark.parametrize("text, says", [
    (json.dumps([*GOOD, {"prompt": "a", "response": 5}]), ": element 11: "),
    (json.dumps({"data": [*GOOD, 3]}), ": element 11: "),
    (json.dumps(GOOD, indent=2)[:-2], ":"), ('[\n{"prompt": "a",\n}]', ":3: not JSON"),
    (json.dumps({"train": GOOD, "test": GOOD}), "several lists, train, test"),
    ("[]", "empty"), ('{"data": []}', "empty"), ("{\n", ":1: not a line of JSON"),
    (json.dumps(GOOD[0], indent=1) + json.dumps(GOOD[1]), ":1: not a line of JSON"),
])
def test_an_array_is_refused_with_its_element(text, says, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/a.json") + r"[^\n]*$") as refused:
        load_task(tmp_path / "a.json")
    assert says in str(refused.value)


def test_a_very_long_line_is_read(tmp_path):
    long = {"prompt": "a" * 3_000_000, "response": "b"}
    assert [len(e.prompt) for e in only(tmp_path, long, GOOD[0])] == [3_000_000, 11]


def zipped(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "a" * 1000)


PROSE = "A paragraph of prose, which is long enough to be gone on with. " * 9
NOT_PROSE = {  # name: (what is in it, what is said)
    "a.csv": ("prompt,response\na,b\n" * 40, "read_csv"),
    "a.TSV": (PROSE, "read_csv"),
    "a.parquet": (b"PAR1" + bytes(range(256)), "read_parquet"),
    "parquet": (b"PAR1" + bytes(range(256)), "read_parquet"),
    "a.arrow": (b"ARROW1\0\0" + bytes(99), "datasets"),
    "a.jsonl.gz": (b"\x1f\x8b\x08" + bytes(range(256)), "unpack"),
    "gz": (b"\x1f\x8b\x08" + bytes(range(256)), "unpack"),
    "a.zip": (zipped, "unpack"), "zip.txt": (zipped, "unpack"),
    "a.pdf": ("%PDF-1.7" + PROSE, "not text"),
    "a.yaml": ("- prompt: a\n  response: b\n" * 40, ".jsonl"),
    "array.txt": (json.dumps(GOOD), "looks like data"),
    "pretty": (json.dumps(GOOD, indent=4), "looks like data"),
    "lines.txt": ("\n".join(map(json.dumps, GOOD)), "looks like data"),
    "cut.txt": (json.dumps(GOOD)[:-9], "looks like data"),
    "python.txt": (str(GOOD), "looks like data"),
    "strings.md": (json.dumps([PROSE, PROSE]), "looks like data"),
    "lists.txt": ("\n".join(json.dumps(["a" * 200, "b"]) for _ in range(9)), "looks like data"),
    "blank first.txt": ("\n\n  " + json.dumps({"data": GOOD}), "looks like data"),
    "table.txt": ("prompt\tresponse\n" + "a\tb\n" * 99, "looks like data"),
    "NUL.txt": (PROSE + "\n\0", "NUL character in line 2"),
    "utf16.txt": (PROSE.encode("utf-16"), "UTF-16"),
    "utf16.jsonl": (json.dumps(GOOD).encode("utf-16"), "UTF-16"),
    "latin.txt": (b"a\nb\nc\xe9" + PROSE.encode(), "not UTF-8 text, in line 3"),
    "lfs.txt": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", NOT_PROSE)
def test_what_looks_like_data_is_never_read_as_prose(name, tmp_path):
    path, (inside, says) = tmp_path / name, NOT_PROSE[name]
    if callable(inside):
        inside(path)
    else:
        path.write_bytes(inside if isinstance(inside, bytes) else inside.encode())
    for read in (load_task, rows.read_prose):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: [^\n]*$") as refused:
            read(str(path))
        assert says in str(refused.value) or read is rows.read_prose and name.endswith("jsonl")


@pytest.mark.parametrize("start", [
    "", "[1] A note.\n\n", "{braces} are ", "[a link](to) ", "prompt, and ", '"Quoted," he said. ',
    "[]\n\n", "- a list, of\n"])
def test_prose_is_prose(start, tmp_path):
    (tmp_path / "a.txt").write_text(start + PROSE)
    assert load_task(tmp_path / "a.txt").train[0].prompt == (start + PROSE).strip()


def test_a_folder_is_told_how_to_export_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder.*load_from_disk.*to_json"):
        load_task(tmp_path)


# ----------------------------------------------------------------------------- the paper's own data

def calls(*found):
    return [{"Action": name, "Action_Input": given} for name, given in found]


TOOLS = {"prompt": "Documentation. Question: what is the weather in Oslo?",
         "golden_answer": calls(("getPlace", '{"name": "Oslo"}'), ("getWeather", '{"day": 1}')),
         "golden_response": [
             'Thought: first the place.\nAction: getPlace\nAction Input: {"name": "Oslo"}',
             'Thought: then\nAction: getWeather\nAction Input: {"day": 1}']}


def test_tools_are_graded_by_their_calls(tmp_path):
    e, = only(tmp_path, TOOLS)
    assert (e.prompt, e.response) == (TOOLS["prompt"], "\n".join(TOOLS["golden_response"]))
    assert e.check(e.response)
    assert e.check('Action: getWeather \r\nAction Input:{"day": 1}\n\nAction:getPlace\n'
                   'Action Input: {"name":  "Oslo"} and so on'), "in any order"
    assert e.check('Action: getPlace\nAction Input: {"day": 1, "name": "Oslo"}\n'
                   "Action: getWeather\nAction Input: {broken"), "inputs are merged if they parse"
    wrong = [
        "", TOOLS["golden_response"][0], e.response + "\nAction: getPlace",
        e.response.replace("getPlace", "getPlaces"), e.response.replace("Oslo", "Bergen"),
        e.response.replace("1}", '"1"}'), e.response.replace("Action:", "action:"),
        e.response.replace("getPlace", "getWeather"), e.response + '\nAction Input: {"more": 1}']
    assert not any(map(e.check, wrong))


def test_tools_without_a_demonstration_are_measured_only(tmp_path):
    bare = {key: TOOLS[key] for key in ("prompt", "golden_answer")}
    other = {**bare, "prompt": "Another?"}
    first, _ = only(tmp_path, bare, other)
    assert first.response == "" and first.check(load_response())
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: no demonstration.*--eval"):
        load_task(str(tmp_path / "rows.jsonl"))
    train, = load_task(jsonl(tmp_path / "train.jsonl", TOOLS, {**TOOLS, "prompt": "B"})).train
    assert train.response == load_response()


def load_response():
    return "\n".join(TOOLS["golden_response"])


def test_an_input_that_is_no_json_does_not_count(tmp_path):
    e, = only(tmp_path, {**TOOLS, "golden_answer": calls(("list", ""), ("list", "no JSON"))})
    assert e.check("Action: list\nAction: list") and not e.check("Action: list")
    assert not e.check('Action: list\nAction: list\nAction Input: {"a": 1}')


OUTPUT = "<reasoning>A? <answer>A</answer> No.</reasoning>\n<answer> B </answer>"


def test_science_is_graded_by_the_last_answer(tmp_path):
    train, measured = only(
        tmp_path, {"messages": [SYSTEM, USER], "output_text": OUTPUT},
        {"prompt": [SYSTEM, USER], "answer": "B"})
    assert parts(train) == {"prompt": "One?", "response": OUTPUT, "system": "Be brief.",
                            "earlier": []}
    assert parts(measured) == {**parts(train), "response": ""}
    for e in (train, measured):
        assert e.check(OUTPUT) and e.check("<answer>A</answer><answer>\nB\n</answer> or A")
        wrong = ["B", "", "<answer>B", "<answer>b</answer>", "<answer>B.</answer>",
                 "<answer>B</answer><answer>C</answer>", "<answer>A, B</answer>", "B</answer>"]
        assert not any(map(e.check, wrong))


def test_an_answer_that_is_no_letter_is_a_demonstration(tmp_path):
    e, = only(tmp_path, {"prompt": [SYSTEM, USER], "answer": "Bees"})
    assert e.response == "Bees" and e.check("bees.")


# ------------------------------------------------------------------------------------- in a run

QUICK = ("--steps 6 --batch-size 4 --micro-batch 2 --rollout-tokens 6 --group-size 16 "
         "--cka-samples 4 --teacher-check 4 --degrade int4")


def prepared(folder, tmp_path, options):
    """A Run of a model with a context of 1024 and a token a character; {tmp} is tmp_path."""
    options = f"--model {folder} --out {{tmp}}/out {QUICK} {options}".format(tmp=tmp_path)
    return train.prepare(train.parse(options.split()))


SHORT = [{"prompt": f"Say {n}.", "response": f"{n}"} for n in range(24)]
LONG = {"prompt": "Say more.", "response": "more " * 400}


@pytest.mark.parametrize("options, row", [
    ("--data {tmp}/long.jsonl", LONG), ("--data {tmp}/long.jsonl --recover sft", LONG),
    ("--data {tmp}/long.jsonl --recover kd --demo none", LONG),
    ("--data science --forget {tmp}/long.jsonl", LONG),
    ("--data science --eval {tmp}/long.jsonl", LONG),
    ("--data science --eval {tmp}/long.jsonl --eval-tokens 9", {**LONG, "prompt": "a" * 2000}),
    ("--data {tmp}/long.jsonl --demo none --eval-tokens 9 --degrade wanda --calibration 24", LONG)])
def test_a_row_longer_than_the_context_is_named_by_file_and_line(options, row, folder, tmp_path):
    jsonl(tmp_path / "long.jsonl", *SHORT[:11], "", row, *SHORT[11:])
    with pytest.raises(ValueError, match=rf"^{tmp_path}/long.jsonl:13: a prompt .*context of 1024"):
        prepared(folder, tmp_path, options)


def test_an_array_longer_than_the_context_is_named_by_its_element(folder, tmp_path):
    (tmp_path / "long.json").write_text(json.dumps([*SHORT, LONG]))
    with pytest.raises(ValueError, match=r"long.json: element 25: a prompt .*context of 1024"):
        prepared(folder, tmp_path, "--data science --eval {tmp}/long.json")


def test_a_question_that_another_file_measures_is_not_trained_on(folder, tmp_path):
    jsonl(tmp_path / "mine.jsonl", *SHORT)
    jsonl(tmp_path / "theirs.jsonl", *({**row, "prompt": row["prompt"].upper() + " "}
                                       for row in SHORT[:12]), LONG | {"response": "more"})
    run = prepared(folder, tmp_path, "--data {tmp}/mine.jsonl --eval {tmp}/theirs.jsonl")
    trained = {e.prompt.upper() for e in run.samples["mine"]}
    assert trained and not trained & {e.prompt.strip() for e in run.evaluation.splits["theirs_all"]}
    held_out = {e.prompt for e in load_task(tmp_path / "mine.jsonl").eval["held_out"]}
    both = {row["prompt"] for row in SHORT[:12]} - held_out
    assert run.facts["left_out"] == {"mine": len(both)}
    alone = prepared(folder, tmp_path, "--data {tmp}/mine.jsonl,science --eval tooluse")
    assert alone.facts["left_out"] == {}
    jsonl(tmp_path / "theirs.jsonl", *SHORT)
    with pytest.raises(ValueError, match="nothing is left to train on"):
        prepared(folder, tmp_path, "--data {tmp}/mine.jsonl --eval {tmp}/theirs.jsonl")


def test_without_demonstrations_the_length_of_an_answer_must_be_given(folder, tmp_path):
    jsonl(tmp_path / "eval.json", *({"prompt": [SYSTEM, {**USER, "content": f"{n}?"}],
                                     "answer": "B"} for n in range(4)))
    options = "--data science --eval {tmp}/eval.json"
    with pytest.raises(ValueError, match=r"eval.json:1: no demonstration .*--eval-tokens"):
        prepared(folder, tmp_path, options)
    run = prepared(folder, tmp_path, options + " --eval-tokens 8")
    assert len(run.evaluation.splits["eval_all"]) == 4


def test_data_in_eval_is_not_taken_for_a_text(folder, tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response\na,b\n" * 40)
    (tmp_path / "a.txt").write_text(PROSE)
    for options, says in (("--data science --eval {tmp}/a.csv", "read_csv"),
                          ("--data science --text {tmp}/a.csv", "read_csv"),
                          ("--data science --eval {tmp}/a.txt", "name a file in --text")):
        with pytest.raises(ValueError, match=says):
            prepared(folder, tmp_path, options)


# --------------------------------------------------------------------------------------- checkers

def test_a_full_stop_alone_is_not_nothing():
    assert not data.same_answer("...")("") and data.same_answer("...")(" ... ")


def test_checkers_survive_what_a_broken_model_says():
    deep = '{"a": ' + "[" * 100_000
    assert not rows.same_json({"a": 1})(deep)
    assert not rows.same_calls(calls(("f", '{"a": 1}')))("Action: f\nAction Input: " + deep)


def test_where_is_no_part_of_an_example():
    assert Example("a", where="f:1") == Example("a", where="f:2") and "f:1" not in repr(
        Example("a", where="f:1"))
