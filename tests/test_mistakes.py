"""A user's mistake is one clear line, exit code 2, and nothing written: a test for each mistake.

In the commands {folder} is a good model, {tmp} an empty folder, and any other {name} what the
function of that name in MAKERS puts there.
"""
import json
import shlex
from string import Formatter

import pytest
from conftest import make_folder
from safetensors.torch import load_file, save_file

import experiments
import train

QUICK = ("--steps 3 --batch-size 4 --micro-batch 2 --rollout-tokens 6 --eval-tokens 4 "
         "--eval-limit 6 --cka-samples 5 --group-size 16 --lr 1e-3")


# ----------------------------------------------------------- model folders in which something is
# broken: each a function of the folder to make

def edited(path, **entries):
    """A model whose config.json says something else."""
    make_folder(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | entries))


def missing_tensor(path):
    make_folder(path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors")


def other_shape(path):
    edited(path, intermediate_size=96)


def other_kind(path):
    edited(path, model_type="mamba")


def short_context(path):
    edited(path, max_position_embeddings=64)


def word_for_a_number(path):
    edited(path, num_hidden_layers="two")


def list_for_config(path):
    make_folder(path)
    (path / "config.json").write_text("[]")


def layers_unsaid(path):
    """Its tensors are those of two layers."""
    edited(path, num_hidden_layers=1)


def few_ids(path):
    """Fewer than its tokenizer has."""
    make_folder(path, padding=-1)


def more_ids(path):
    make_folder(path, padding=8)


def empty_tokenizer(path):
    make_folder(path)
    (path / "tokenizer.json").write_text("{}")


def one_layer(path):
    make_folder(path, n_layer=1)


def other_tokens(path):
    """A model whose tokenizer has two bytes the other way round."""
    make_folder(path)
    spec = json.loads((path / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (path / "tokenizer.json").write_text(json.dumps(spec))


def own_student(path):
    """A run's folder, in which the model to start from lies."""
    make_folder(path / "student")


# -------------------------------------------------------------------------------- files, likewise

def write_rows(path, *rows):
    path.mkdir()
    (path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def no_rows(path):
    path.mkdir()
    (path / "set.jsonl").write_text("\n")


def no_json(path):
    write_rows(path, {"prompt": "a", "response": "b"})
    with open(path / "set.jsonl", "a") as file:
        file.write("not json\n")


def other_keys(path):
    write_rows(path, {"question": "a"})


def long_choice(path):
    write_rows(path, *({"prompt": prompt, "choices": ["b", 9999 * "c "], "answer": 0}
                       for prompt in "ad"))


def named_science(path):
    write_rows(path, {"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"})
    (path / "set.jsonl").rename(path / "science.jsonl")


def named_perplexity(path):
    write_rows(path, *({"prompt": str(i), "response": "b"} for i in range(9)))
    (path / "set.jsonl").rename(path / "perplexity_set.jsonl")


def not_utf_8(path):
    path.write_bytes(b"caf\xe9")


def empty_file(path):
    path.write_text("")


def long_text(path):
    path.write_text("A text of one's own, which is to be measured only. " * 40)


def short_paragraphs(path):
    path.write_text("A text of one's own.\n\n" * 40)


def foreign_results(path):
    path.mkdir()
    (path / "results.json").write_text('{"config": {}, "stages": {"recovered": {}}}')


MAKERS = {make.__name__: make for make in (
    missing_tensor, other_shape, other_kind, short_context, word_for_a_number, list_for_config,
    layers_unsaid, few_ids, more_ids, empty_tokenizer, one_layer, other_tokens, own_student,
    no_rows, no_json, other_keys, long_choice, named_science, named_perplexity, not_utf_8,
    empty_file, long_text, short_paragraphs, foreign_results)}


# --------------------------------------------------------------------------------------- the tests

def cases(found):
    """The parameters of a test, (the command, what the line must say), with their names."""
    return pytest.mark.parametrize(
        "command, says", [pytest.param(*case, id=name) for name, case in found.items()])


def words_of(command, folder, tmp_path):
    """The command line, when all that it names has been made."""
    made = {"folder": folder, "tmp": tmp_path}
    for _, name, *_ in Formatter().parse(command):
        if name and name not in made:
            made[name] = tmp_path / name
            MAKERS[name](made[name])
    return shlex.split(command.format(**made))


def everything_in(folder):
    """What is written there: each path, with the content of a file."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check(main, argv, says, tmp_path, capsys):
    """One line on stderr, which says this; exit code 2; nothing else said, and nothing written."""
    before = everything_in(tmp_path)
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], err
    assert (code, out) == (2, "")
    assert everything_in(tmp_path) == before


IN_A_MODEL = {
    "no_such_model": ("--model {tmp}/nowhere", "nowhere"),
    "a_tensor_is_missing": ("--model {missing_tensor}", "model.norm.weight"),
    "a_tensor_has_another_shape": ("--model {other_shape}", "which does not fit (96, 32)"),
    "a_tensor_has_no_place": ("--model {layers_unsaid}", "no place in a llama model"),
    "a_kind_of_model_that_there_is_not": ("--model {other_kind}", "mamba"),
    "a_context_too_short": ("--model {short_context}", "context of 64"),
    "a_word_for_a_number_in_config": ("--model {word_for_a_number}", "config.json"),
    "config_is_a_list": ("--model {list_for_config}", "config.json"),
    "the_tokenizer_has_more_ids_than_the_model": (
        "--model {few_ids}", "the id 258, but a model of this run knows only 258"),
    "not_a_byte_level_tokenizer": ("--model {empty_tokenizer}", "byte-level BPE"),
    "no_such_teacher": ("--teacher {tmp}/nowhere", "nowhere"),
    "a_teacher_with_another_tokenizer": ("--teacher {other_tokens}", "its tokenizer"),
    "a_student_with_another_tokenizer": ("--student {other_tokens}", "its tokenizer"),
    "a_teacher_that_knows_fewer_ids": ("--model {more_ids} --teacher {folder}", "267"),
    "a_student_of_fewer_layers": ("--student {one_layer}", "has 1 layers and the healthy model 2"),
    "a_student_that_is_no_model": ("--student {layers_unsaid}", "model.layers.1."),
    "cka_with_a_teacher_of_fewer_layers": (
        "--cka-weight 1 --teacher {one_layer}", "has 1 layers and the student 2"),
    "a_teacher_that_is_no_model": ("--cka-weight 1 --teacher {layers_unsaid}", "model.layers.1."),
}

IN_DAMAGE = {
    "no_such_grid": ("--degrade int9", "int9"),
    "no_such_grid_after_forgetting": ("--forget tooluse --degrade int9", "int9"),
    "a_group_of_more_than_all_neurons": ("--degrade ffn5,int4 --group-size 9999", "9999"),
    "two_grids": ("--degrade int4,nf4", "int4 and nf4"),
    "groups_of_a_mask_do_not_fit": ("--degrade wanda2:5", "5 do not divide the 32"),
    "all_weights_at_zero": ("--degrade magnitude100", "magnitude100 would leave nothing"),
    "all_neurons_removed": ("--degrade ffn100", "ffn100 would leave nothing"),
    "five_kept_of_four": ("--degrade wanda5:4", "wanda5:4"),
    "two_kept_of_none": ("--degrade wanda2:0", "wanda2:0"),
    "groups_of_a_grid_do_not_fit": ("--group-size 7", "group_size 7"),
    "a_negative_group": ("--group-size -16", "--group-size"),
    "nothing_between_commas": ("--degrade int4,", "unknown damage '': choose of"),
    "a_damaged_student_and_bootstrap": (
        "--student {folder} --bootstrap {folder}", "--bootstrap"),
    "a_damaged_student_and_forgetting": ("--student {folder} --forget tooluse", "--forget"),
    "no_steps_of_forgetting": ("--forget text --forget-steps 0", "--forget-steps"),
    "ema_without_neurons": ("--ema 0.1 --degrade ffn50", "--ema"),
    "ema_without_neurons_on_a_grid": ("--ema 0.1 --degrade int4,ffn10", "--ema"),
}

IN_DATA = {
    "no_such_task": ("--data alchemy", "alchemy"),
    "no_such_task_to_forget_by": ("--forget alchemy", "alchemy"),
    "no_rows": ("--data {no_rows}/set.jsonl", "set.jsonl: the file is empty"),
    "a_row_is_not_json": ("--data {no_json}/set.jsonl", "set.jsonl:2"),
    "a_row_of_other_keys": ("--data {other_keys}/set.jsonl", "set.jsonl:1"),
    "a_text_that_is_not_utf_8": ("--text {not_utf_8}", "not_utf_8: not UTF-8 text"),
    "an_empty_text": ("--text {empty_file}", "empty_file: the file is empty"),
    "no_such_text": ("--text python,{tmp}/nowhere.txt", "nowhere.txt"),
    "two_texts_of_one_name": ("--text {long_text},python,python", "'perplexity_python'"),
    "two_tasks_of_one_name": ("--eval {named_science}/science.jsonl", "'science'"),
    "a_choice_longer_than_the_context": ("--eval {long_choice}/set.jsonl", "context of 1024"),
    "a_task_named_as_a_perplexity": (
        "--eval {named_perplexity}/perplexity_set.jsonl", "taken for a perplexity"),
    "a_task_without_questions_to_measure": ("--data science --eval text", "--eval text"),
    "a_text_to_measure_in_eval": ("--eval {long_text}", "name a file in --text"),
    "a_text_of_short_paragraphs_in_eval": ("--eval {short_paragraphs}", "--text"),
}

IN_NUMBERS = {
    "no_steps": ("--steps 0", "--steps"),
    "a_negative_temperature": ("--temperature -1", "--temperature must be at least 0"),
    "temperature_is_no_number": ("--temperature nan", "--temperature"),
    "top_p_0": ("--top-p 0", "--top-p must be more than 0"),
    "top_p_above_1": ("--top-p 1.5", "--top-p must be more than 0 and at most 1, not 1.5"),
    "a_negative_learning_rate": ("--lr -1", "--lr"),
    "a_fraction_of_nothing": ("--lr-fraction 0", "--lr-fraction"),
    "an_unknown_form_of_the_demonstration": ("--demo told", "--demo"),
    "an_infinite_learning_rate": ("--lr inf", "--lr"),
    "a_seed_too_large": ("--seed 18446744073709551616", "--seed"),
    "three_samples_of_cka": ("--cka-samples 3", "--cka-samples"),
    "ema_1": ("--ema 1", "--ema"),
}

TOGETHER = {
    "no_such_device": ("--device gpu", "--device gpu"),
    "a_gpu_that_is_not_there": ("--device cuda:99", "CUDA devices"),
    "a_gpu_without_a_number": ("--device cuda:", "CUDA devices"),
    "base_is_no_folder_to_bootstrap_by": ("--bootstrap base", "--bootstrap"),
    "embeddings_beside_lora": ("--lora 16 --train-embeddings", "--train-embeddings"),
    "shares_of_one_process": ("--shard", "torchrun"),
    "no_such_way_of_recovery": ("--recover sdft,magic", "magic"),
    "a_way_of_recovery_twice": ("--recover sdft,sdft", "twice"),
    "a_teacher_twice": ("--teacher base,base", "twice"),
    "an_empty_teacher": ("--teacher base,", "empty"),
    "a_part_of_the_way_beyond_its_end": ("--interpolate 0.5,1.5", "--interpolate 0.5,1.5"),
    "balance_of_no_weight": ("--cka-balance", "--cka-weight"),
    "cka_in_no_loss": ("--recover sft --cka-weight 1", "--cka-weight"),
    "a_teacher_that_follows_no_one": ("--recover own,sft --ema 0.1", "--ema"),
    "skipped_tokens_of_sft": ("--recover sft --skip-tokens 3", "--skip-tokens"),
    "an_anchor_of_no_sft": ("--recover sdft,own --anchor 1", "--anchor"),
    "patience_over_three_examples": ("--watch cka --calibration 3", "--calibration"),
    "a_run_over_its_own_model": (
        "--out {own_student} --model {own_student}/student", "overwrite"),
    "a_folder_inside_a_file": ("--out {empty_file}/out", "--out"),
}


@cases(IN_A_MODEL | IN_DAMAGE | IN_DATA | IN_NUMBERS | TOGETHER)
def test_a_mistake_is_one_line(command, says, folder, tmp_path, capsys):
    command = f"--model {{folder}} --out {{tmp}}/out {QUICK} {command}"
    check(train.main, words_of(command, folder, tmp_path), says, tmp_path, capsys)


@cases({
    "no_such_choice": ("--loss kl", "forward_kl"),
    "a_word_for_a_number": ("--steps x", "--steps"),
    "no_such_option": ("--stepz 1", "stepz"),
    "half_an_option": ("--temp 1", "--temp"),
})
def test_a_mistyped_option_is_one_line_too(command, says, folder, tmp_path, capsys):
    argv = ["--out", str(tmp_path / "out"), *command.split()]
    check(train.main, argv, says, tmp_path, capsys)


@cases({
    "moments": ("--moments bfloat16", "--moments is now --adam-dtype"),
    "checkpointing": ("--checkpointing", "--checkpointing is now --gradient-checkpointing"),
    "cka_patience": ("--cka-patience 1", "--cka-patience is now --watch cka --patience"),
    "no_demo": ("--no-demo", "--no-demo is now --demo none"),
    "stop_after": ("--stop-after 1", "--stop-after is now --watch cka --patience"),
    "train_lora": ("--train lora", "--train is now --lora RANK"),
    "train_lora_beside_embeddings": ("--train lora --train-embeddings", "--lora RANK"),
    "lora_rank": ("--lora-rank 4", "--lora-rank is now --lora RANK"),
    "max_new_tokens": ("--max-new-tokens 6", "--max-new-tokens is now --rollout-tokens"),
    "max_new_tokens_with_an_equals_sign": ("--max-new-tokens=6", "is now --rollout-tokens"),
    "answer_tokens": ("--answer-tokens 4", "--answer-tokens is now --eval-tokens"),
    "text_tokens": ("--text-tokens 900", "--text-tokens is now --text-prompt-tokens"),
    "forget_data": ("--forget-data text", "--forget-data is now --forget TASK"),
    "report": ("--report {foreign_results}",
               "--report is now python experiments.py report DIR"),
    "degrade_forget": ("--degrade forget", "it is now --forget TASK"),
    "degrade_forget_and_a_grid": ("--degrade forget,int4", "it is now --forget TASK"),
    "degrade_a_folder": ("--degrade {folder}", "a damaged model is now --student DIR"),
    "degrade_a_folder_and_neurons": ("--degrade {folder},ffn50", "--student DIR"),
    "degrade_a_folder_and_bootstrap": (
        "--degrade {folder} --bootstrap {folder}", "--student DIR"),
})
def test_an_old_option_is_told_its_new_name(command, says, folder, tmp_path, capsys):
    command = f"--model {{folder}} --out {{tmp}}/out {command}"
    check(train.main, words_of(command, folder, tmp_path), says, tmp_path, capsys)


@cases({
    "no_such_experiment": ("table9", "table9"),
    "a_seed_that_is_no_number": ("table4 --seeds a", "--seeds"),
    "table5_of_another_model": ("table5 --model {folder}", "table5"),
    "a_report_of_nothing": ("report", "DIR"),
    "a_report_of_no_results": ("report {tmp}/missing", "no results.json"),
    "a_report_of_something_else": ("report {foreign_results}", "not the results of a run"),
})
def test_a_mistake_in_experiments_is_one_line(
        command, says, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments.subprocess, "run", pytest.fail)  # should one be taken for none
    check(experiments.main, words_of(command, folder, tmp_path), says, tmp_path, capsys)


def test_everything_that_is_made_is_somebodys_mistake():
    """No maker stands here for nothing."""
    text = open(__file__, encoding="utf-8").read()
    assert all("{" + name + "}" in text for name in MAKERS)
