"""Many runs as tables: means and errors by hand, names, correlations on data whose answer is known."""
import dataclasses
import json
import math

import numpy as np
import pytest
from experiments import EXPERIMENTS, with_options

import report
import train
from cka import KINDS
from model import GPTConfig

DEFAULTS = dataclasses.asdict(train.Config())


def write(folder, seed, recovered, degraded=20.0, last=0.9, **options):
    """A made-up run's results.json."""
    def kinds(value):
        return {kind: [1.0, value] for kind in KINDS}
    stages = {"healthy": {"task": 50.0, "perplexity": 10.0}, "degraded": {"task": degraded, "perplexity": 20.0},
              "recovered": {"task": recovered, "perplexity": 12.0}}
    results = {"config": DEFAULTS | {"seed": seed} | options, "environment": {"damage": {"n": last}}, "stages": stages,
               "recovered_fraction": {"task": (recovered - degraded) / (50 - degraded), "perplexity": None},
               "cka": {level: {"degraded": kinds(last), "recovered": kinds(last / 2)} for level in ("tokens", "samples")}}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))


def test_tables_are_means_and_standard_errors_over_the_seeds_of_one_name(tmp_path):
    for seed, recovered in enumerate((38.0, 44.0, 41.0)):  # mean 41, standard deviation 3, standard error 1.73
        write(tmp_path / f"int4-{seed}", seed, recovered)
    write(tmp_path / "kd", 0, 35.0, recover="kd", demo=False)
    runs = report.read_runs([tmp_path], DEFAULTS)
    table = report.performance_table(runs).splitlines()
    assert "| `--degrade int4` | task % |  | 50.0 | 20.0 | 41.0 ± 1.7 | 38.0, 44.0, 41.0 | 0.70 ± 0.06 |" in table
    assert "| `--degrade int4` | perplexity |  | 10.00 | 20.00 | 12.00 | 12.00, 12.00, 12.00 | not damaged |" in table
    assert any(line.startswith("| `--degrade int4 --recover kd --no-demo` | task % |") for line in table)
    runs[0][2]["recovered_fraction"]["task"] = None
    assert "| not damaged in 1 of 3 |" in report.performance_table(runs)
    assert "| `--degrade int4` | samples | linear, debiased | 0.900 | 0.450 | 0.950 | 0.725 |" in report.cka_table(runs)
    report.draw_runs(runs, tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_a_broken_model_is_valid_json_and_no_recovery(tmp_path):
    """JSON has no word for inf and nan: strict readers refuse what Python would write."""
    text = report.to_json({"a": [math.inf, (1.5, -math.inf)], "b": {"c": math.nan, "d": None, "e": "nan"}})
    assert json.loads(text) == {"a": [None, [1.5, None]], "b": {"c": None, "d": None, "e": "nan"}}
    write(tmp_path / "a", 0, 38.0)
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    results["stages"]["recovered"]["task"] = results["stages"]["degraded"]["perplexity"] = math.inf
    results["cka"]["samples"]["recovered"]["linear"] = [math.nan] * 2
    (tmp_path / "a" / "results.json").write_text(report.to_json(results))
    runs = report.read_runs([tmp_path], DEFAULTS)
    assert "| `--degrade int4` | task % |  | 50.0 | 20.0 | nan | nan | nan |" in report.tables(runs)
    assert "| `--degrade int4` | perplexity |  | 10.00 | nan | 12.00 | 12.00 | nan |" in report.tables(runs)
    assert "| `--degrade int4` | samples | linear | 0.900 | nan | 0.950 | nan |" in report.tables(runs)


def test_correlations_by_hand(tmp_path):
    """Ranks 1, 2, 3.5, 3.5, 5; a monotone curve has Spearman's r of 1 and a smaller Pearson's."""
    x = np.array([1.0, 2, 3, 3, 9])
    assert report._ranks(x).tolist() == [1, 2, 3.5, 3.5, 5]
    y = np.array([2.0, 1, 4, 3, 5])
    assert report.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert report.spearman(x, x ** 3) == pytest.approx(1)
    assert report.spearman(x, y) == pytest.approx(np.corrcoef([1, 2, 3.5, 3.5, 5], [2, 1, 4, 3, 5])[0, 1])
    assert report.pearson(x, x ** 3) < 0.999
    assert math.isnan(report.pearson(x, np.ones(5)))
    assert report.interval(x, 2 * x, list("abcde"), report.pearson) == "1.00 [1.00, 1.00]"
    assert report.interval(x, 2 * x, list("abcda"), report.pearson) == "1.00"  # 4 damages
    noise = np.random.default_rng(1).normal(size=(2, 8))
    narrow = report.interval(*np.repeat(noise, 4, axis=1), [str(i) for i in range(32)], report.pearson)
    clustered = report.interval(*np.repeat(noise, 4, axis=1), [str(i // 4) for i in range(32)], report.pearson)
    assert clustered == report.interval(*noise, [str(i) for i in range(8)], report.pearson) != narrow  # copies tell nothing new
    for i in range(6):  # accuracy rises with CKA, on a line
        write(tmp_path / str(i), 0, 30.0, degraded=20.0 + i, last=0.5 + i / 20, degrade=f"int{2 + i}", recover="none")
    table = report.correlation_table(report.read_runs([tmp_path], DEFAULTS))
    row = next(line for line in table.splitlines() if line.startswith("| degraded | samples | linear, debiased | last | task |"))
    assert row == "| degraded | samples | linear, debiased | last | task | 6 | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |"
    assert "recovered" not in table  # nobody recovered


def test_a_damaged_model_counts_once_and_every_recovery(tmp_path):
    for seed in range(3):
        write(tmp_path / str(seed), seed, 40.0 + seed)
    runs = report.read_runs([tmp_path], DEFAULTS)
    assert [stage for stage, *_ in report.points(runs)].count("degraded") == 1
    assert len(report.points(runs, ("recovered",))) == 3


def test_report_prints_tables_and_draws(folder, tmp_path, capsys):
    quick = ["--model", str(folder), "--steps", "2", "--batch-size", "2", "--max-new-tokens", "4", "--answer-tokens", "3",
             "--eval-limit", "5", "--cka-samples", "4", "--group-size", "16"]
    for i, more in enumerate((["--recover", "sdft,sft"], ["--degrade", "nf4"], ["--degrade", "ffn", "--recover", "none"])):
        assert train.main([*quick, *more, "--out", str(tmp_path / "runs" / str(i))]) == 0
    capsys.readouterr()
    assert train.main(["--report", str(tmp_path / "runs"), "--out", str(tmp_path / "drawn")]) == 0
    printed = capsys.readouterr().out
    assert "| science_phrasing % |" in printed and " sft` |" in printed and "CKA over" in printed
    assert (tmp_path / "drawn" / "report.png").stat().st_size > 10_000
    assert train.main(["--report", str(tmp_path / "runs"), str(tmp_path / "drawn")]) == 2  # nothing in the second
    assert "drawn: no results.json" in capsys.readouterr().err
    (tmp_path / "runs" / "0" / "results.json").write_text("{}")
    assert train.main(["--report", str(tmp_path / "runs")]) == 2
    assert "not the results of a run" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_a_command_line(name):
    runs, seeds = EXPERIMENTS[name]
    for options in runs:
        c = train.parse([*options.split(), "--seed", "0"])
        train.check_options(c)
        train.prune.check_damage(GPTConfig(), train.split_damage(c.degrade)[1], c.group_size)  # of the default model
    assert len(seeds) >= 3 and (name != "sweep" or len(runs) >= 20)


def test_what_an_experiment_and_its_caller_want_measured_is_measured():
    assert with_options(["--eval", "a", "--seed", "0"], ["--eval", "b,c", "--steps", "2"]) == [
        "--eval", "a,b,c", "--seed", "0", "--steps", "2"]
    assert with_options(["--seed", "0"], ["--eval", "b"]) == ["--seed", "0", "--eval", "b"]
