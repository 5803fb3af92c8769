"""instructions.py: each check by hand, what passes none, the order; nothing trains on it."""
import json
import os
import re

import pytest
from test_data import jsonl

import checkpoint
import data
import prepare
import train
from evaluate import Evaluation, answer_tokens, spread
from instructions import KINDS, NEW_WORDS, SAYS, Topic, checker, prompts

ALL = prompts()
NAMES = [kind.__name__ for kind in KINDS]
BARKS = "They bark at strangers near the garden gate."
LONG = " ".join(f"word{n}" for n in range(17))

CASES = {  # kind: (answers that pass, answers that do not), on the topic dogs with the number 2
    "bullets": (["- Loyal friends\n- Good noses", "\n - Loyal friends \n\n -Good noses\n"],
                ["- Loyal friends with noses", "- They bark\n- They run\n- They eat",
                 "* Loyal friends\n* Good noses", "Here they are:\n- Loyal friends\n- Good noses",
                 "1. Loyal friends\n2. Good noses", "- Loyal good friends\n-"]),
    "numbered": (["1. They bark.\n2. They run.", "1) They bark\n\n 2)They run"],
                 ["1. They bark and run.", "1. They bark.\n3. They run.", "1. They bark\n2.",
                  "Sure:\n1. They bark\n2. They run", "- They bark\n- They run",
                  "1. They bark\n2. They run\n3. They eat", "12. They bark\n2. They run"]),
    "at_most": (["Loyal friends who bark.", " ".join(["They bark and run"] * 3 + ["and so on"])],
                [" ".join(["They bark and run"] * 4), "Loyal", "Dogs: at most 15 words."]),
    "at_least": ([LONG + " end.", " - ".join([LONG, "well-known"])],
                 [LONG, LONG + " -", "They bark and run. " * 9]),
    "count": (["They bark loudly.", 'They bark, run and say "no!"'],
              ["They bark loudly. They run.", "They bark loudly", "Bark. Bark. Bark!"]),
    "capitals": ([BARKS.upper(), f'"{BARKS.upper()}"', BARKS.upper()[:-1]],
                 [BARKS, BARKS.lower(), BARKS.upper() + " OK", BARKS.upper().replace("THE ", ""),
                  BARKS.upper()[:-1] + "s"]),
    "include": (["The gate is near my forest.", "My gate leads there. Forest, here I come!"],
                ["The gates are near my forest.", "My gate is near here.", "Gate near my forest",
                 "My gate. Their forest. Another one."]),
    "avoid": (["A dog is loyal.", "They guard\nhouses."],
              ["Loyal animals with dogs' noses.", "Dogs are loyal animals.", "DOGS bark loudly.",
               "They bark. They run.", "They bark loudly"]),
    "no_comma": (["A dog is loyal and barks."],
                 ["A dog is loyal, and barks.", "A dog is loyal and barks",
                  "They bark. They run."]),
    "begin": (["To be honest, they bark a lot.", '"To be  honest I like their noses."'],
              ["They, to be honest, bark a lot.", "To be honest.", "To be fair, they bark a lot.",
               "To be honest, they bark. A lot.", "To be honest, they bark a lot"]),
    "end": (["They bark a lot. That is all I know.", "They bark a lot.\n\n'That is all I know.'"],
            ["That is all I know.", "They bark a lot. That is all.",
             "They bark. Loudly so. That is all I know.", "That is all I know. They bark a lot.",
             "They bark a lot, that is all I know.", "They bark a lot. That is all I know. Bye."]),
    "quoted": (['"They bark a lot."', "“They bark a lot!”", '" They bark a lot. "'],
               ["They bark a lot.", '"They bark a lot.', '"They bark" a "lot."',
                "'They bark a lot.'", 'They "bark" a lot.', '"They bark a lot."!',
                '"They bark a lot. They run."']),
    "as_json": (['{"topic": "dogs", "fact": "They bark a lot."}',
                 '```json\n{\n "fact": "They bark a lot.",\n "topic": "dogs"\n}\n```'],
                ['{"topic": "They bark a lot."}', '{"topic": "They bark a lot.", "fact": ""}',
                 '[{"topic": "They bark", "fact": "a lot"}]', '"They bark a lot."',
                 '{"topic": "They bark a lot.", "fact": 3}', '{"topic": "dogs", "fact": "dogs"}',
                 '{"topic": "dogs", "fact": "They bark a lot.", "more": "no"}',
                 '{"topic": "dogs", "fact": "They bark a lot', "[" * 100_000,
                 'Here it is: {"topic": "dogs", "fact": "They bark a lot."}']),
    "title": (["<<Barking>>", " << The Loyal\nFriends >> "],
              ["<Barking>", "Barking", "<<title>>", "<<>>", "<<Barking", "<<Barking>> by Ann",
               "<<Barking>> <<Loudly>>", "<<Dogs>>"]),
    "choose": (["useful", "Boring.", " **dangerous**\n"],
               ["useful boring", "loyal", "Dogs are useful.", "useful, boring or dangerous",
                "use"]),
    "postscript": (["They bark a lot.\n\nP.S. I do, too.",
                    "They bark! They run! P.S.: So do cats."],
                   ["They bark a lot. I do, too.", "P.S. They bark a lot.", "They bark a lot. P.S.",
                    "They bark a lot and a P.S. to all", "They bark a lot. PS I do, too."]),
    "question": (["Do you like them?", "Why, then, do they bark?\n"],
                 ["Do you like them", "Do you like them? Yes.", "They bark. Do you like them?", "?",
                  "Here is one: do you like them? And why?"]),
}


# ------------------------------------------------------------------------------------ the checks

def test_each_kind_has_its_cases():
    assert set(CASES) == set(NAMES) and set(NEW_WORDS) < set(NAMES)
    assert all(len(right) and len(wrong) > 2 for right, wrong in CASES.values())


@pytest.mark.parametrize("kind", NAMES)
def test_a_check_takes_what_does_what_was_asked_and_nothing_else(kind):
    (name, prompt, _, check), = [row for row in ALL[:len(KINDS)] if row[0] == kind]
    assert "dogs" in prompt or "bark" in prompt, "the first topic's"
    right, wrong = CASES[kind]
    assert [a for a in right if not check(a)] == []
    assert [a for a in wrong if check(a)] == []


@pytest.mark.parametrize("kind,right,wrong", [
    ("bullets", "- bark\n- run\n- eat", "- bark\n- run and eat"),
    ("numbered", "1. bark\n2. run\n3. eat", "1. bark\n2. run and eat"),
    ("at_most", "well " * 22 + "they bark, run", "well " * 23 + "they bark, run"),
    ("at_least", LONG + " a b c d e f g h i j", LONG + " a b c d e f g h i"),
    ("count", "They bark loudly. They run.", "They bark loudly.")])
def test_the_number_that_is_asked_for_is_the_one_that_is_checked(kind, right, wrong):
    topic = Topic("dogs", SAYS["dogs"].split(". "), 3)
    prompt, _, test = KINDS[NAMES.index(kind)](topic)
    check = checker(prompt, test, 3)
    assert check(right) and not check(wrong)


@pytest.mark.parametrize("kind", NAMES)
def test_nothing_dots_and_the_prompt_again_pass_no_check(kind):
    for name, prompt, _, check in ALL:
        if name == kind:
            last = re.split(r"(?<=[.:]) ", prompt)[-1]
            for answer in ("", " \n", "…", "...", ".", "?", "-", "1.", '""', "{}", "<<>>", "***",
                           prompt, prompt.lower(), prompt.upper(), f'"{prompt}"', f"<<{prompt}>>",
                           prompt + "?", prompt + "\n" + prompt, last, f"- {prompt}\n- {prompt}",
                           f"1. {prompt}\n2. {prompt}", "the the the the.", "\0", "é " * 40):
                assert not check(answer), (prompt, answer)


def test_every_example_answer_passes_its_own_check_whatever_the_white_space():
    for _, prompt, example, check in ALL:
        assert check(example), (prompt, example)
        for spaced in (f"\n\n  {example} \n", example.replace(" ", "  "),
                       example.replace("\n", " \r\n \r\n ")):
            assert check(spaced), (prompt, spaced)


def test_an_example_answer_of_another_kind_passes_no_check_of_a_form():
    """Lengths and words to avoid may be right by chance; a form is not."""
    by_chance = {"at_most", "at_least", "count", "include", "avoid", "no_comma"}
    for n in range(0, len(ALL), len(KINDS)):
        block = ALL[n:n + len(KINDS)]
        for name, prompt, _, check in block:
            passed = [other for other, _, example, _ in block if other != name and check(example)]
            assert name in by_chance or passed == [], prompt


# --------------------------------------------------------------------------------------- the task

def test_the_set_is_each_kind_with_each_topic_once_and_always_the_same():
    assert len(ALL) == len(KINDS) * len(SAYS) == 153 == len({prompt for _, prompt, _, _ in ALL})
    assert all(sorted(name for name, *_ in ALL[n:n + 17]) == sorted(NAMES)
               for n in range(0, 153, 17))
    assert [row[:3] for row in prompts()] == [row[:3] for row in ALL]
    for topic, says in SAYS.items():
        assert topic not in says.lower() and "," not in says and says.count(". ") == 2


def test_evenly_spread_examples_have_all_kinds_among_them():
    found = {n: len({name for name, *_ in spread(ALL, n)}) for n in range(15, 154)}
    assert {n for n in found if n >= 45 and found[n] < 17} == set()
    assert min(found.values()) >= 8 and found[30] == found[60] == found[100] == 17


def test_the_task_is_measured_whole_and_by_its_examples_length():
    task = data.load_task("instructions", measured_only=True)
    assert (task.name, task.train, list(task.eval)) == ("instructions", [], ["all"])
    assert [(e.prompt, e.response) for e in task.eval["all"]] == [
        (prompt, example) for _, prompt, example, _ in ALL]
    assert all(e.check(e.response) and e.chat and not e.system for e in task.eval["all"])


def test_64_tokens_are_enough_for_each_example_answer_of_the_default_model():
    try:
        tokenizer = data.load_tokenizer(checkpoint.default_model())
    except OSError as error:
        if os.environ.get("SDFT_REQUIRE_MODEL"):
            raise
        pytest.skip(str(error))
    examples = data.load_task("instructions", measured_only=True).eval["all"]
    data.check_special_tokens(tokenizer, examples)
    assert answer_tokens(Evaluation(tokenizer, {}, {}, {}, 0, None, None), examples) == 64


QUICK = ("--degrade none --recover none --eval-tokens 4 --eval-limit 20 --cka-samples 5 "
         "--batch-size 4 --data science").split()


def test_a_run_measures_it_at_each_stage(folder, tmp_path):
    argv = ["--model", folder, "--out", tmp_path / "out", *QUICK, "--eval", "instructions"]
    assert train.main(list(map(str, argv))) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["environment"]["eval_examples"]["instructions_all"] == 20
    for stage in ("healthy", "degraded", "recovered"):
        assert found["stages"][stage]["instructions_all"] == 0, "a random model follows none"


@pytest.mark.parametrize("option", ["--data instructions", "--data text,instructions",
                                    "--forget instructions", "--data instructions --eval "
                                    "instructions"])
def test_who_would_train_on_it_is_told_in_one_line(option, folder, tmp_path, capsys):
    argv = ["--model", str(folder), "--out", str(tmp_path / "out"), *QUICK, *option.split()]
    assert train.main(argv) == 2
    said = capsys.readouterr().err
    assert said == "error: instructions is only measured: name it in --eval\n"
    assert not (tmp_path / "out").exists()


def test_a_file_that_asks_the_same_is_not_trained_on_where_it_is_measured(tmp_path):
    rows = [{"prompt": f" {prompt.upper()}", "response": "a"} for _, prompt, _, _ in ALL[:40]]
    own = [{"prompt": f"Question {n}?", "response": "a"} for n in range(10)]
    task = data.load_task(jsonl(tmp_path / "mine.jsonl", *rows, *own))
    prepare.drop_measured_([task], [data.load_task("instructions", measured_only=True)])
    assert 0 < len(task.train) <= 10 and all("Question" in e.prompt for e in task.train)
