"""The paper's experiments as command lines: made once, reported, kept."""
import json
import os
import signal
import time

import pytest
from test_tables import write

import damage
import experiments
import prepare
import train
from experiments import EXPERIMENTS, with_options
from model import GPTConfig


def test_report_prints_tables_and_draws(folder, tmp_path, capsys):
    quick = ["--model", str(folder), "--steps", "2", "--batch-size", "2", "--rollout-tokens", "4",
             "--eval-tokens", "3", "--eval-limit", "5", "--cka-samples", "4", "--group-size", "16"]
    nobody = "--degrade", "ffn10", "--recover", "none"
    for i, more in enumerate((["--recover", "sdft,sft"], ["--degrade", "nf4"], nobody)):
        assert train.main([*quick, *more, "--out", str(tmp_path / "runs" / str(i))]) == 0
    capsys.readouterr()
    runs, drawn = str(tmp_path / "runs"), str(tmp_path / "drawn")
    assert experiments.main(["report", runs, "--out", drawn]) == 0
    printed = capsys.readouterr().out
    assert "| science_phrasing % |" in printed and " sft` |" in printed and "CKA over" in printed
    assert (tmp_path / "drawn" / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize("argv, says", [
    (["report", "RUNS", "EMPTY"], "EMPTY: no results.json"),
    (["report", "FOREIGN"], "results.json: not the results of a run"),
    (["report", "UNTAUGHT"], "no run in it has a recovery"),
    (["report", "nowhere"], "no results.json"),
    (["report"], "DIR"),
    (["report", "RUNS", "--outt", "x"], "--outt"),
    (["table9"], "table9"),
    (["table2", "--seeds", "a"], "--seeds"), (["table2", "--jobs", "0"], "--jobs"),
    ([], "experiments"),
    (["table5", "--model", "x"], "its own small model"),
    (["table1", "--best"], "--best"), (["fair", "--best"], "0 of 56 are done")])
def test_a_mistake_is_one_clear_line_and_exit_code_2(argv, says, tmp_path, capsys):
    write(tmp_path / "RUNS" / "a", 0, 38.0)
    write(tmp_path / "UNTAUGHT" / "a", 0, 38.0)
    results = json.loads((tmp_path / "UNTAUGHT" / "a" / "results.json").read_text())
    del results["stages"]["recovered"]
    (tmp_path / "UNTAUGHT" / "a" / "results.json").write_text(json.dumps(results))
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FOREIGN").mkdir()
    foreign = {"config": {}, "stages": {"recovered": {}}}
    (tmp_path / "FOREIGN" / "results.json").write_text(json.dumps(foreign))
    argv = [str(tmp_path / word) if word.isupper() else word for word in argv]
    assert experiments.main(argv) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and says in error[0]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_command_line(name):
    for options in EXPERIMENTS[name]:
        config = train.parse([*options.split(), "--seed", "0"])
        train.check_bounds(config)
        prepare.default_damage_(config)
        prepare.check_options(config)
        damage.check_groups(GPTConfig(), config)  # of the default model
    assert len(experiments.SEEDS) >= 3 and (name != "sweep" or len(EXPERIMENTS[name]) >= 20)


def test_an_experiment_makes_its_runs_once_and_reports(tmp_path, monkeypatch, capsys):
    """train.py is stood in for by a program that writes results and a student."""
    called = []

    def call(command, **_):
        called.append(command[2:])
        out = experiments.Path(command[command.index("--out") + 1])
        seed = int(command[command.index("--seed") + 1])
        if "7" not in command:  # that one dies
            write(out, seed, 40.0 + seed, degrade=command[command.index("--degrade") + 1])
            (out / "student").mkdir()
        ended = "7" in command or "11" in command  # 11: by the guard, with all its results
        return experiments.subprocess.CompletedProcess(command, int(ended))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments.subprocess, "run", call)
    assert experiments.main(["table4", "--seeds", "0,1", "--steps", "9"]) == 0
    folder = tmp_path / "runs" / "table4--steps9"
    assert [words[-5:] for words in called] == [
        [str(seed), "--steps", "9", "--out", f"runs/table4--steps9/{n}-{seed}"]
        for seed in (0, 1) for n in (0, 1)]
    assert "| `--degrade ffn10` | task % |" in capsys.readouterr().out
    assert (folder / "report.png").exists() and not list(folder.rglob("student"))
    assert experiments.main(["table4", "--seeds", "0,1", "--steps", "9"]) == 0 and len(called) == 4
    assert experiments.main(["table4", "--seeds", "0", "--steps", "7"]) == 1
    assert "error: this run failed (exit code 1)" in capsys.readouterr().err
    assert experiments.main(["table4", "--seeds", "0", "--steps", "11"]) == 0


def test_a_seed_that_changes_nothing_is_skipped(monkeypatch):
    """Quantized and by magnitude, a model is the same at each seed; recovered, it never is."""
    made = []
    monkeypatch.setattr(experiments, "run", lambda options, *_, **__: made.append(options))
    monkeypatch.setattr(experiments, "report", lambda *_: None)
    assert experiments.main(["sweep", "default", "--seeds", "0,1"]) == 0
    again = [options for options in made if options.endswith("--seed 1")]
    drawn = [how for how in experiments.LEVELS if "ffn" in how or "wanda" in how]
    assert len(made) == len(EXPERIMENTS["sweep"]) + len(drawn) + 2 * len(EXPERIMENTS["default"])
    assert len(again) == len(drawn) + len(EXPERIMENTS["default"]) and len(drawn) == 12


def test_after_a_ctrl_c_what_has_begun_ends_and_nothing_begins(monkeypatch, capsys):
    """A run of train.py gets the Ctrl-C, too, and saves itself: it must not be killed."""
    began, ended, before = [], [], signal.signal(signal.SIGINT, signal.default_int_handler)

    def run(_, out, *__, jobs):
        began.append(out)
        time.sleep(0.3)
        if out == began[-1]:  # once
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        ended.append(out)
    monkeypatch.setattr(experiments, "run", run)
    try:
        assert experiments.main(["demos", "--jobs", "2"]) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(began) == 2 and sorted(began) == sorted(ended)
    assert capsys.readouterr().err == "error: interrupted; the same command goes on\n"


def test_runs_at_once_share_the_cores(tmp_path, monkeypatch):
    seen = []

    def call(*_, env, **__):
        seen.append(env and env["OMP_NUM_THREADS"])
        return experiments.subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(experiments.subprocess, "run", call)
    monkeypatch.setattr(experiments.os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS")
    for jobs in (1, 2, 8):
        experiments.run("", tmp_path / str(jobs), [], jobs=jobs)
    assert seen == [None, "3", "1"]


def test_a_larger_teacher_of_ones_own_teaches_in_every_second_run_of_table5():
    own = ["--model", "small", "--bootstrap", "large", "--steps", "9"]
    runs, further = experiments.runs_of("table5", own)
    assert runs == [
        "--degrade none --steps 50 --data science,text", "--bootstrap large --data science,text",
        "--degrade none --steps 50 --data tooluse,text", "--bootstrap large --data tooluse,text"]
    assert further == ["--model", "small", "--steps", "9"]
    assert experiments.runs_of("table5", []) == (EXPERIMENTS["table5"], [])


def test_what_an_experiment_and_its_caller_want_measured_is_measured():
    assert with_options(["--eval", "a", "--seed", "0"], ["--eval", "b,c", "--steps", "2"]) == [
        "--eval", "a,b,c", "--seed", "0", "--steps", "2"]
    assert with_options(["--seed", "0"], ["--eval", "b"]) == ["--seed", "0", "--eval", "b"]


def test_an_option_with_an_equals_sign_is_that_option():
    for argv in (["table2", "--seeds=1", "--eval=a=b.jsonl"],
                 ["--eval=a=b.jsonl", "--seeds=1", "table2"]):
        asked, further = experiments.parse_experiments(argv)
        assert asked.seeds == (1,) and further == ["--eval", "a=b.jsonl"]
    with pytest.raises(ValueError, match="table5 makes its own"):
        experiments.parse_experiments(["table5", "--model=DIR"])


def test_what_is_added_may_make_a_run_depend_on_its_seed():
    assert not experiments.depends_on_seed("--degrade nf4 --recover none", ["--steps", "9"])
    assert experiments.depends_on_seed("--degrade nf4 --recover none", ["--recover", "sdft"])
