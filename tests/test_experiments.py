"""Many runs as tables: means and errors by hand, names, correlations whose answer is known; and the
paper's experiments as command lines."""
import dataclasses
import json
import math

import numpy as np
import pytest

import damage
import experiments
import prepare
import train
from cka import KINDS
from evaluate import to_json
from experiments import EXPERIMENTS, with_options
from model import GPTConfig

DEFAULTS = dataclasses.asdict(train.Config())


def write(folder, seed, recovered, degraded=20.0, last=0.9, file="results.json", **options):
    """A made-up run's results.json."""
    def kinds(value):
        return {kind: [1.0, value] for kind in KINDS}
    stages = {"healthy": {"task": 50.0, "perplexity": 10.0},
              "degraded": {"task": degraded, "perplexity": 20.0},
              "recovered": {"task": recovered, "perplexity": 12.0}}
    fraction = (recovered - degraded) / (50 - degraded)
    likeness = {"degraded": kinds(last), "recovered": kinds(last / 2)}
    results = {"config": DEFAULTS | {"degrade": "int4", "seed": seed} | options,
               "environment": {"damage": {"n": last}}, "stages": stages,
               "recovered_fraction": {"task": fraction, "perplexity": None},
               "cka": {"tokens": likeness, "samples": likeness}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(results))


def test_tables_are_means_and_standard_errors_over_the_seeds_of_one_name(tmp_path):
    for seed, recovered in enumerate((38.0, 44.0, 41.0)):  # mean 41, deviation 3, error 1.73
        write(tmp_path / f"int4-{seed}", seed, recovered)
    write(tmp_path / "kd", 0, 35.0, recover="kd", demo="none")
    runs = experiments.read_runs([tmp_path])
    table = experiments.performance_table(runs).splitlines()
    assert ("| `--degrade int4` | task % |  | 50.0 | 20.0 | 41.0 ± 1.7 | 38.0, 44.0, 41.0 | "
            "0.70 ± 0.06 |") in table
    assert ("| `--degrade int4` | perplexity |  | 10.00 | 20.00 | 12.00 | 12.00, 12.00, 12.00 | "
            "not damaged |") in table
    assert any(line.startswith("| `--degrade int4 --recover kd --demo none` | task % |")
               for line in table)
    runs[0][2]["recovered_fraction"]["task"] = None
    assert "| not damaged in 1 of 3 |" in experiments.performance_table(runs)
    assert ("| `--degrade int4` | samples | linear, debiased | 0.900 | 0.450 | 0.950 | 0.725 |"
            in experiments.cka_table(runs))
    experiments.draw_runs(runs, tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_a_broken_model_is_no_recovery(tmp_path):
    write(tmp_path / "a", 0, 38.0)
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    results["stages"]["recovered"]["task"] = math.inf
    results["stages"]["degraded"]["perplexity"] = math.inf
    results["cka"]["samples"]["recovered"]["linear"] = [math.nan] * 2
    (tmp_path / "a" / "results.json").write_text(to_json(results))
    tables = experiments.tables(experiments.read_runs([tmp_path]))
    assert "| `--degrade int4` | task % |  | 50.0 | 20.0 | nan | nan | nan |" in tables
    assert "| `--degrade int4` | perplexity |  | 10.00 | nan | 12.00 | 12.00 | nan |" in tables
    assert "| `--degrade int4` | samples | linear | 0.900 | nan | 0.950 | nan |" in tables


@pytest.mark.parametrize("options, name", [
    ({"degrade": "none"}, "--degrade none"),
    ({"degrade": "none", "forget": "tooluse"}, "--forget tooluse"),
    ({"degrade": "int4", "forget": "tooluse"}, "--degrade int4 --forget tooluse"),
    ({"degrade": "none", "student": "/some/where/a/b"}, "--student a/b"),
    ({"degrade": "nf4", "seed": 3, "plain": True, "lora": 16}, "--degrade nf4 --lora 16"),
    ({"degrade": "nf4", "text": "python,a.txt", "eval": "b.jsonl"}, "--degrade nf4"),
    ({"degrade": "nf4", "text": "a.txt,python"}, "--degrade nf4 --text a.txt")])
def test_a_name_is_what_is_not_default_and_the_damage(options, name):
    config = DEFAULTS | options
    assert set(experiments.name_of(config).split()) == set(name.split())  # in whatever order


def test_results_that_are_kept_are_read_under_their_own_names(tmp_path):
    write(tmp_path / "table2", 0, 38.0, file="0-0.json")
    write(tmp_path / "table2", 1, 44.0, file="0-1.json")
    (tmp_path / "table2" / "config.json").write_text("{}")
    assert "38.0, 44.0" in experiments.performance_table(experiments.read_runs([tmp_path]))


def test_correlations_by_hand(tmp_path):
    """Ranks 1, 2, 3.5, 3.5, 5; a monotone curve has Spearman's r of 1 and a smaller Pearson's."""
    pearson, spearman, interval = experiments.pearson, experiments.spearman, experiments.interval
    x = np.array([1.0, 2, 3, 3, 9])
    assert experiments.ranks(x).tolist() == [1, 2, 3.5, 3.5, 5]
    y = np.array([2.0, 1, 4, 3, 5])
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert spearman(x, x ** 3) == pytest.approx(1)
    assert spearman(x, y) == pytest.approx(
        np.corrcoef([1, 2, 3.5, 3.5, 5], [2, 1, 4, 3, 5])[0, 1])
    assert pearson(x, x ** 3) < 0.999
    assert math.isnan(pearson(x, np.ones(5)))
    assert interval(x, 2 * x, list("abcde"), pearson) == "1.00 [1.00, 1.00]"
    assert interval(x, 2 * x, list("abcda"), pearson) == "1.00"  # 4 damages
    noise = np.random.default_rng(1).normal(size=(2, 8))
    copies = np.repeat(noise, 4, axis=1)
    narrow = interval(*copies, [str(i) for i in range(32)], pearson)
    clustered = interval(*copies, [str(i // 4) for i in range(32)], pearson)
    alone = interval(*noise, [str(i) for i in range(8)], pearson)
    assert clustered == alone != narrow  # copies tell nothing new
    for i in range(6):  # accuracy rises with CKA, on a line
        write(tmp_path / str(i), 0, 30.0, degraded=20.0 + i, last=0.5 + i / 20,
              degrade=f"int{2 + i}", recover="none")
    table = experiments.correlation_table(experiments.read_runs([tmp_path]))
    wanted = "| degraded | samples | linear, debiased | last | task |"
    row = next(line for line in table.splitlines() if line.startswith(wanted))
    assert row == f"{wanted} 6 | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |"
    assert "recovered" not in table  # nobody recovered


def test_a_damaged_model_counts_once_and_every_recovery(tmp_path):
    for seed in range(3):
        write(tmp_path / str(seed), seed, 40.0 + seed)
    runs = experiments.read_runs([tmp_path])
    assert [stage for stage, *_ in experiments.points(runs)].count("degraded") == 1
    assert len(experiments.points(runs, ("recovered",))) == 3


def test_what_was_forgotten_is_the_damage_of_a_point(tmp_path):
    write(tmp_path / "a", 0, 40.0, degrade="none", forget="tooluse")
    write(tmp_path / "b", 0, 40.0, degrade="none", forget="science", degraded=21.0)
    damages = [damage for *_, damage in experiments.points(experiments.read_runs([tmp_path]))]
    assert sorted(set(damages)) == ["forget science", "forget tooluse"]


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
    (["table2", "--seeds", "a"], "--seeds"),
    ([], "experiments"),
    (["table5", "--model", "x"], "its own small model")])
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


def test_what_an_experiment_and_its_caller_want_measured_is_measured():
    assert with_options(["--eval", "a", "--seed", "0"], ["--eval", "b,c", "--steps", "2"]) == [
        "--eval", "a,b,c", "--seed", "0", "--steps", "2"]
    assert with_options(["--seed", "0"], ["--eval", "b"]) == ["--seed", "0", "--eval", "b"]
