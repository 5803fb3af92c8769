"""data.py: the built-in tasks against their promises, files and their errors, and prompts."""
import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from test_tokenizer import ENGLISH, PRE_TOKENIZERS, SHARED, train, write

from data import (
    ELEMENTS,
    TASKS,
    Example,
    Task,
    asked,
    batches,
    contains,
    hold_out,
    load_task,
    load_tokenizer,
    questions,
    same_json,
    science,
    split_text,
    student_prompt,
    teacher_prompt,
    text_task,
    text_windows,
    tooluse,
)

# --------------------------------------------------------------------------------------------------
# Built-in tasks

def prompts(examples):
    return {e.prompt for e in examples}


def standard_error(n):
    return 100 * (0.25 / n) ** 0.5  # of a percentage, at worst


def test_the_118_elements():
    symbols, names = ELEMENTS[::2], ELEMENTS[1::2]
    assert len(symbols) == len(names) == len(set(symbols)) == len(set(names)) == 118
    assert all(re.fullmatch("[A-Z][a-z]?", s) for s in symbols)
    assert all(re.fullmatch("[A-Z][a-z]{2,}", n) for n in names)
    known = {1: "H Hydrogen", 6: "C Carbon", 11: "Na Sodium", 19: "K Potassium", 26: "Fe Iron",
             27: "Co Cobalt", 29: "Cu Copper", 43: "Tc Technetium", 47: "Ag Silver", 50: "Sn Tin",
             51: "Sb Antimony", 53: "I Iodine", 57: "La Lanthanum", 71: "Lu Lutetium",
             74: "W Tungsten", 79: "Au Gold", 80: "Hg Mercury", 82: "Pb Lead", 86: "Rn Radon",
             92: "U Uranium", 94: "Pu Plutonium", 103: "Lr Lawrencium", 112: "Cn Copernicium",
             118: "Og Oganesson"}
    assert {n: f"{symbols[n - 1]} {names[n - 1]}" for n in known} == known
    ends = [symbols.index(s) + 1 for s in "He Ne Ar Kr Xe Rn Og".split()]
    assert ends == [2, 10, 18, 36, 54, 86, 118], "the noble gases close the periods of the table"
    for group, step in (("Li Na K Rb Cs Fr", 1), ("Be Mg Ca Sr Ba Ra", 2), ("F Cl Br I At Ts", 7)):
        numbers = [symbols.index(s) + 1 for s in group.split()]
        if step < 3:
            assert numbers == [end + step for end in ends[:6]]
        else:
            assert numbers == [end - 1 for end in ends[1:]]


def test_science_splits_share_no_prompt_and_hold_out_what_they_say():
    task = science()
    phrasing, element = task.eval["phrasing"], task.eval["element"]
    assert (len(task.train), len(phrasing), len(element)) == (1176, 294, 300)
    assert all(len(split) >= 278 and standard_error(len(split)) < 3 for split in task.eval.values())
    everything = [*task.train, *phrasing, *element]
    assert len(prompts(everything)) == len(everything) == 118 * 15, "each prompt in one split, once"
    facts, further = {e.response for e in task.train}, {e.response for e in element}
    assert {e.response for e in phrasing} == facts, "`phrasing` asks the facts of train"
    assert len(facts) == 98 * 3 and len(further) == 20 * 3 and not facts & further
    words = {w for e in task.train for w in re.findall(r"\w+", e.prompt + " " + e.response)}
    held_out = {re.search(r"is (\w+)\.$", e.response)[1] for e in element
                if "with the chemical symbol" in e.response}
    assert len(held_out) == 20 and not held_out & words, "train names no element of `element`"
    assert {e.system for e in everything} == {task.train[0].system}

    any_name = rf"\b({'|'.join(ELEMENTS[1::2])})\b"

    def wordings(examples):  # the prompt without the element
        return {re.sub(any_name, "_", e.prompt, flags=re.I) for e in examples
                if "symbol" in e.response.split("is")[0] and "element" not in e.response}
    assert not wordings(task.train) & wordings(phrasing)
    assert wordings(phrasing) < wordings(element)


@pytest.mark.parametrize("make", [science, tooluse])
def test_every_demonstration_passes_its_own_check_and_no_other_answer_does(make):
    task = make()
    for split in (task.train, *task.eval.values()):
        distinct = {e.response: e.check for e in split}
        assert all(e.check(e.response) and not e.check("") for e in split)
        for response, check in distinct.items():
            # of the same kind of fact, or all tool calls
            others = [r for r in distinct if r[:12] == response[:12]]
            assert [r for r in others if check(r)] == [response]


def test_words_that_open_a_sentence_are_no_chemical_symbols():
    task = science()
    checks = {e.response: e.check for e in [*task.train, *task.eval["element"]]
              if "symbol of" in e.response}
    for answer in ("I cannot say.", "In chemistry it is Xx.", "As an AI, I do not know.",
                   "No idea.", "At the moment, no.", "He was a chemist.", "Be careful."):
        assert not [response for response, check in checks.items() if check(answer)], answer


def test_science_checkers_want_the_whole_word_and_the_symbols_case():
    split = {e.response: e.check for e in [*science().train, *science().eval["element"]]}
    cobalt = split["The chemical symbol of cobalt is Co."]
    assert cobalt("Co") and cobalt("It is 'Co'.")
    assert not any(map(cobalt, ("CO", "co", "Cobalt", "Con", "C o", "")))
    magnesium = split["The atomic number of magnesium is 12."]
    assert magnesium("12") and magnesium("Mg has 12 protons")
    assert not any(map(magnesium, ("112", "120", "1 2", "Mg12", "12th")))
    gold = split["The element with the chemical symbol Au is gold."]
    assert gold("Gold!") and gold("it is gold")
    assert not any(map(gold, ("golden", "Au", "silver", "marigold")))
    pattern = contains("a.c")
    assert pattern("x a.c y") and not pattern("abc"), "the key is text, not a pattern"


def test_tooluse_splits():
    task = tooluse()
    request = task.eval["request"]
    assert (len(task.train), len(request)) == (360, 300) and standard_error(300) < 3
    assert not prompts(task.train) & prompts(request)

    def asked(e):  # what is asked, without the schemas shown
        return e.prompt.split("Request: ")[1]
    assert not {asked(e) for e in task.train} & {asked(e) for e in request}
    assert len({asked(e) for e in request}) >= 278, "repeats would enlarge the standard error"
    names = Counter(json.loads(e.response)["name"] for e in request)
    assert len(names) == 6 and set(names.values()) == {50}
    for e in [*task.train, *request]:
        call = json.loads(e.response)
        tools = map(json.loads, e.prompt.split("\n\n")[0].split("\n")[1:])
        schemas = {tool["name"]: tool["arguments"] for tool in tools}
        assert len(schemas) == 3 and set(schemas[call["name"]]) == set(call["arguments"])
        for key, value in call["arguments"].items():
            assert str(value) in asked(e), "the request names every argument"
            assert schemas[call["name"]][key] == {int: "integer", str: "string"}[type(value)]


def test_tooluse_checker():
    call = {"name": "book_table", "arguments": {"city": "Oslo", "guests": 4}}
    check = same_json(call)
    right = '{"arguments": {"guests": 4, "city": "Oslo"}, "name": "book_table"}'
    assert check(f"Sure: {right} Anything else?")
    wrong = ('{"name": "book_table", "arguments": {"city": "Oslo", "guests": 5}}',
             '{"name": "book_table", "arguments": {"city": "Oslo", "guests": "4"}}',
             '{"name": "book_table", "arguments": {"city": "Lima", "guests": 4}}',
             '{"name": "book_table", "arguments": {"city": "Oslo"}}',
             '{"name": "book_table", "arguments": {"city": "Oslo", "guests": 4, "day": "today"}}',
             '{"name": "get_weather", "arguments": {"city": "Oslo", "guests": 4}}',
             '{"name": "book_table", "arguments": {"city": "Oslo", "guests": 4}',
             "book_table(Oslo, 4)", "{}", "")
    assert not any(map(check, wrong))


def test_true_is_not_one_to_the_tooluse_checker():
    check = same_json({"name": "add_to_list", "arguments": {"item": "milk", "quantity": 1}})
    assert check('{"name": "add_to_list", "arguments": {"item": "milk", "quantity": 1}}')
    assert not check('{"name": "add_to_list", "arguments": {"item": "milk", "quantity": true}}')


def test_tasks_are_the_same_every_time():
    def content(task):
        splits = [task.train, *task.eval.values()]
        return [[(e.prompt, e.response) for e in split] for split in splits]
    assert content(science()) == content(science()) and content(tooluse()) == content(tooluse())


def test_a_task_of_ones_own_is_one_entry(monkeypatch):
    monkeypatch.setitem(TASKS, "mine", lambda: task_of("mine", 3))
    assert load_task("mine") == task_of("mine", 3)
    with pytest.raises(FileNotFoundError, match="text, instructions, mine, or a .jsonl"):
        load_task("another")


def test_load_task_by_name():
    assert load_task("science").name == "science" and load_task("tooluse").name == "tooluse"
    text = load_task("text")
    assert text.name == "text" and not text.eval and len(text.train) > 200
    assert all(len(e.prompt) >= 100 and e.response == "" and not e.chat for e in text.train)


# --------------------------------------------------------------------------------------------------
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
    assert whole.train == []
    assert [e.prompt for e in whole.eval["all"]] == [row["prompt"] for row in rows]
    everything = [*task.train, *task.eval["held_out"]]
    assert {(e.prompt, e.response) for e in everything} == {
        (r["prompt"], r["response"]) for r in rows}
    again = load_task(tmp_path / "mine.jsonl")
    assert [e.prompt for e in again.train] == [e.prompt for e in task.train]
    e = next(e for e in everything if e.prompt == "Question 7?")
    assert e.check(e.response) and e.check("the answer 7")
    assert not e.check("the answer 17") and not e.check("")


def test_a_json_response_is_compared_as_json(tmp_path):
    rows = [{"prompt": f"{i}", "response": json.dumps({"name": "f", "x": i})} for i in range(5)]
    task = load_task(jsonl(tmp_path / "calls.jsonl", *rows, {"prompt": "6", "response": "{a}"}))
    for e in [*task.train, *task.eval["held_out"]]:
        assert e.check(e.response)
        if e.prompt != "6":
            assert e.check(f'{{"x": {e.prompt}, "name": "f"}}')
            assert not e.check(f'{{"name": "f", "x": {e.prompt}1}}')
        else:
            assert e.check("{A}.") and not e.check("{b}"), "braces that are not JSON are text"


def test_both_multiple_choice_forms(tmp_path):
    colours = [{"prompt": f"Sky {i}?", "choices": ["green", "blue", "a bit red"], "answer": 1}
               for i in range(5)]
    people = [{"contexts": [f"{i} Ann", f"{i} Bob"], "continuation": " was late.", "answer": 1}
              for i in range(5)]
    task = load_task(jsonl(tmp_path / "choice.jsonl", *colours, *people))
    by_prompt = {e.prompt: e for e in [*task.train, *task.eval["held_out"]]}
    sky, bob = by_prompt["Sky 3?"], by_prompt["2 Bob"]
    assert sky.choices == [("Sky 3?", " green"), ("Sky 3?", " blue"), ("Sky 3?", " a bit red")]
    assert (sky.response, sky.answer) == ("blue", 1)
    assert bob.choices == [("2 Ann", " was late."), ("2 Bob", " was late.")]
    assert (bob.response, bob.answer) == ("was late.", 1)


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
    "prompt not text": {"prompt": 5, "response": "b"},
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
    """JSON strings may hold U+2028, U+0085 and the like; str.splitlines would cut there."""
    odd = [{"prompt": f"a{c}b", "response": "c"} for c in "\u2028\u2029\x85"]
    task = load_task(jsonl(tmp_path / "odd.jsonl", *odd, GOOD))
    found = prompts([*task.train, *task.eval["held_out"]])
    assert found == {row["prompt"] for row in [*odd, GOOD]}


def test_a_byte_order_mark_is_not_part_of_a_file(tmp_path):
    """Some editors on Windows put one first."""
    path = Path(jsonl(tmp_path / "bom.jsonl", GOOD, {**GOOD, "prompt": "another"}))
    without = load_task(str(path))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert prompts(load_task(str(path)).train) == prompts(without.train)


def test_one_row_is_too_few_to_train_on(tmp_path):
    """It cannot be both trained on and held out: an error, not a task whose batches never come."""
    path = jsonl(tmp_path / "one.jsonl", GOOD)
    with pytest.raises(ValueError, match=re.escape(path)):
        load_task(path)


def test_a_row_that_is_there_twice_is_not_in_both_splits(tmp_path):
    rows = [{"prompt": f"{i}", "response": "x"} for i in range(10)]
    task = load_task(jsonl(tmp_path / "twice.jsonl", *rows, *rows))
    assert not prompts(task.train) & prompts(task.eval["held_out"])


def test_the_split_of_a_file_is_the_same_as_ever(tmp_path):
    """Results that are kept stand on it."""
    rows = [{"prompt": f"Question {i}?", "response": f"The answer {i}."} for i in range(20)]
    task = load_task(jsonl(tmp_path / "mine.jsonl", *rows))
    numbers = [[int(re.search(r"\d+", e.prompt)[0]) for e in split]
               for split in (task.eval["held_out"], task.train)]
    assert numbers == [[10, 18, 16, 14], [0, 17, 11, 2, 3, 9, 5, 7, 4, 19, 6, 15, 8, 1, 13, 12]]


SAME = {  # rows that ask one question, whatever else they say
    "an id of their own": [{"prompt": "Q?", "response": "a", "id": n} for n in range(9)],
    "another response": [{"prompt": "Q?", "response": f"a{n}"} for n in range(9)],
    "case and white space": [{"prompt": p, "response": p} for p in
                             ("why  Q?", "Why Q?", "WHY\nq?", " why q? ", "why\u00a0Q?")],
    "another system": [{"prompt": "Q?", "response": "a", "system": f"s{n}"} for n in range(9)],
    "composed or not": [{"prompt": p, "response": "a"} for p in ("Caf\u00e9?", "Cafe\u0301?")],
    "another form": [{"prompt": "Q?", "response": "a"}, {"question": "q?", "answer": "b"},
                     {"instruction": "Q?", "input": "", "output": "c"},
                     {"messages": [{"role": "system", "content": "s"},
                                   {"role": "user", "content": "Q?"},
                                   {"role": "assistant", "content": "d"}]}],
    "a conversation that goes on": [
        {"messages": [{"role": ("user", "assistant")[n % 2], "content": f"{n}"}
                      for n in range(length)]} for length in (2, 4, 6)],
    "shuffled choices": [{"prompt": "Q?", "choices": choices, "answer": 0}
                         for choices in (["a", "b"], ["b", "a"], ["c", "b"])],
    "shuffled sentences": [{"prompt": "", "choices": choices, "answer": 0}
                           for choices in (["a b", "b"], ["b", "a b"], ["A  b", "b"])],
    "shuffled contexts": [{"contexts": contexts, "continuation": "c", "answer": n}
                          for n, contexts in enumerate((["a", "b"], ["b", "a"]))],
}


def other_rows(rows):
    """Nine rows of other questions that may share a file with these."""
    if "response" in rows[0] or "messages" in rows[0]:
        return [{"prompt": f"Other {n}?", "response": "a"} for n in range(9)]
    return [{"prompt": f"Other {n}?", "choices": ["a", "b"], "answer": 1} for n in range(9)]


@pytest.mark.parametrize("what", SAME)
def test_one_question_is_never_on_both_sides_of_a_split(what, tmp_path):
    rows = SAME[what]
    for others in range(1, 9):  # they lie now on the one side, now on the other
        path = jsonl(tmp_path / "same.jsonl", *rows, *other_rows(rows)[:others])
        task = load_task(path)
        lines = [{int(e.where.rsplit(":")[-1]) for e in split}
                 for split in (task.train, task.eval["held_out"])]
        same = set(range(1, len(rows) + 1))
        assert all(lines) and 1 == sum(bool(same & side) for side in lines)
        left, held_out = hold_out(task, 4)
        if len(task.train) >= 8 and left.train != task.train:
            assert not {asked(e) for e in left.train} & {asked(e) for e in held_out}
    with pytest.raises(ValueError, match="same.jsonl: one question cannot be both"):
        load_task(jsonl(tmp_path / "same.jsonl", *rows))


def test_other_questions_are_not_taken_for_the_same(tmp_path):
    def conversation(first):
        return {"messages": [{"role": "user", "content": first},
                             {"role": "assistant", "content": "Yes."},
                             {"role": "user", "content": "Go on."},
                             {"role": "assistant", "content": "b"}]}
    rows = [conversation("a"), conversation("b"), {"prompt": "Go on.", "response": "b"}]
    examples = load_task(jsonl(tmp_path / "a.jsonl", *rows), measured_only=True).eval["all"]
    assert len(set(questions(examples))) == 3
    twins = [{"contexts": ["a", "b"], "continuation": c, "answer": 0} for c in "cd"]
    sentences = [{"prompt": "", "choices": ["a", c], "answer": 0} for c in "cd"]
    examples = load_task(jsonl(tmp_path / "a.jsonl", *twins, *sentences), True).eval["all"]
    assert len(set(questions(examples))) == 4


def test_a_row_of_the_same_content_counts_once(tmp_path):
    rows = [{"prompt": f"Q{n % 10}?", "response": "a", "id": n, "source": None} for n in range(100)]
    task = load_task(jsonl(tmp_path / "a.jsonl", *rows))
    assert (len(task.train), len(task.eval["held_out"])) == (8, 2)
    assert len(load_task(tmp_path / "a.jsonl", True).eval["all"]) == 10
    assert load_task(tmp_path / "a.jsonl", True).eval["all"][3].where.endswith("a.jsonl:4")


def test_text_file_task(tmp_path):
    """Whole paragraphs are joined to 400 characters; a last piece may have 160."""
    long = "A paragraph with enough words to begin from. " * 5
    text = f"Title\n\n{long}\n \n{long.upper()}\nsame paragraph\n\n\n{long}\n\nshort"
    (tmp_path / "notes.txt").write_text(text, encoding="utf-8")
    task = load_task(str(tmp_path / "notes.txt"))
    assert task.name == "notes" and task.eval == {}
    first = f"Title\n\n{long.strip()}\n\n{long.upper()}\nsame paragraph"
    assert [e.prompt for e in task.train] == [first, f"{long.strip()}\n\nshort"]
    assert not any(e.chat or e.response for e in task.train)
    (tmp_path / "notes.txt").write_text("Too short.\n\n" * 12)
    with pytest.raises(ValueError, match="notes.*160"):
        load_task(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize("blank", ["\n", " ", ""])
def test_a_text_without_empty_lines_is_cut_into_pieces(blank):
    """One document a line, one line, or not even a blank: nothing is lost, and no piece is huge."""
    text = blank.join("abcdefgh " * 9 + str(n) for n in range(1000))
    pieces = [e.prompt for e in text_task("text", text).train]
    assert len(pieces) >= 15 and max(map(len, pieces)) <= 4000 and min(map(len, pieces)) >= 160
    assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)
    if blank == "\n":
        assert all(re.match("abcdefgh ", piece) for piece in pieces)


def test_split_text_has_no_paragraph_in_both_halves():
    train_text, held_out = split_text()
    assert len(train_text) > 200_000 and len(held_out) > 80_000

    def paragraphs(text):
        return {p.strip() for p in re.split(r"\n\s*\n", text) if len(p.strip()) >= 100}
    both = paragraphs(train_text) & paragraphs(held_out)
    assert not both, f"{len(both)} of {len(paragraphs(held_out))} held-out ones are trained on"


class Letters:
    """A tokenizer for counting: one id a character."""

    def encode(self, text):
        return [ord(c) for c in text]


THOUSAND = "".join(map(chr, range(1000)))


def test_text_windows_are_evenly_spread_and_do_not_overlap():
    windows = text_windows(Letters(), THOUSAND, windows=7, length=100)
    assert windows == [list(range(start, start + 100)) for start in range(0, 1000, 150)]
    windows = text_windows(Letters(), THOUSAND, windows=50, length=100)
    assert windows == [list(range(start, start + 100)) for start in range(0, 1000, 100)]


def test_text_windows_of_a_short_text():
    windows = text_windows(Letters(), THOUSAND[:61])
    assert windows == [list(range(start, start + 15)) for start in (0, 15, 30, 46)]
    for short in ("", "a", THOUSAND[:31]):
        with pytest.raises(ValueError, match="too short"):
            text_windows(Letters(), short)


def test_a_single_text_window():
    assert text_windows(Letters(), THOUSAND, windows=1, length=100) == [list(range(100))]


# --------------------------------------------------------------------------------------------------
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
            assert len(set(part)) == len(part)
            assert len(part) < len(task.train) or set(part) == prompts(task.train)
    first = list(islice((p for p in drawn if p[0] == "a"), 2 * sizes[0]))
    assert first[:sizes[0]] != first[sizes[0]:], "a new order each time round"


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def ours(request, tmp_path_factory):
    """Our tokenizer of a throwaway folder, of each kind."""
    folder = tmp_path_factory.mktemp(request.param)
    write(train(request.param), folder)
    return load_tokenizer(folder)


def test_the_teacher_alone_sees_the_demonstration(ours):
    for e in (science().train[5], tooluse().train[5]):
        student = ours.decode(student_prompt(ours, e), keep_special=True)
        teacher = ours.decode(teacher_prompt(ours, e), keep_special=True)
        assert e.prompt in student and e.system in student and e.response not in student
        assert e.prompt in teacher and e.system in teacher and teacher.count(e.response) == 1
        assert teacher_prompt(ours, e, demo="none") == student_prompt(ours, e)
        assert student.endswith("<|im_start|>assistant\n")
        assert teacher.endswith("<|im_start|>assistant\n")
    braces = Example("Fill {prompt}", "with {response} and {x}")
    shown = ours.decode(teacher_prompt(ours, braces))
    assert braces.prompt in shown and braces.response in shown


def test_a_prompt_without_demonstration_is_the_same_for_both(ours):
    text, bare = Example(ENGLISH, chat=False), Example("Who?")
    for e in (text, bare):
        assert teacher_prompt(ours, e) == student_prompt(ours, e)
    cut = ours.encode(ENGLISH)[:20]
    assert student_prompt(ours, text, 20) == teacher_prompt(ours, text, text_tokens=20) == cut
    assert student_prompt(ours, bare) == ours.chat([{"role": "user", "content": "Who?"}])
