"""Many runs as tables: means and errors by hand, names, correlations whose answer is known, between
damages and on the way of a recovery."""
import dataclasses
import json
import math

import numpy as np
import pytest

import pictures
import tables
import train
from cka import KINDS
from evaluate import to_json

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
    runs = tables.read_runs([tmp_path])
    table = tables.performance_table(runs).splitlines()
    assert ("| `--degrade int4` | task % |  | 50.0 | 20.0 | 41.0 ± 1.7 | 38.0, 44.0, 41.0 | "
            "0.70 ± 0.06 |") in table
    assert ("| `--degrade int4` | perplexity |  | 10.00 | 20.00 | 12.00 | 12.00, 12.00, 12.00 | "
            "not damaged |") in table
    assert any(line.startswith("| `--degrade int4 --recover kd --demo none` | task % |")
               for line in table)
    runs[0][2]["recovered_fraction"]["task"] = None
    assert "| not damaged in 1 of 3 |" in tables.performance_table(runs)
    assert ("| `--degrade int4` | samples | linear, debiased | 0.900 | 0.450 | 0.950 | 0.725 |"
            in tables.cka_table(runs))
    pictures.draw_runs(runs, tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_a_broken_model_is_no_recovery(tmp_path):
    write(tmp_path / "a", 0, 38.0)
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    results["stages"]["recovered"]["task"] = math.inf
    results["stages"]["degraded"]["perplexity"] = math.inf
    results["cka"]["samples"]["recovered"]["linear"] = [math.nan] * 2
    (tmp_path / "a" / "results.json").write_text(to_json(results))
    shown = tables.all_tables(tables.read_runs([tmp_path]))
    assert "| `--degrade int4` | task % |  | 50.0 | 20.0 | nan | nan | nan |" in shown
    assert "| `--degrade int4` | perplexity |  | 10.00 | nan | 12.00 | 12.00 | nan |" in shown
    assert "| `--degrade int4` | samples | linear | 0.900 | nan | 0.950 | nan |" in shown


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
    assert set(tables.name_of(config).split()) == set(name.split())  # in whatever order


def test_results_that_are_kept_are_read_under_their_own_names(tmp_path):
    write(tmp_path / "table2", 0, 38.0, file="0-0.json")
    write(tmp_path / "table2", 1, 44.0, file="0-1.json")
    (tmp_path / "table2" / "config.json").write_text("{}")
    assert "38.0, 44.0" in tables.performance_table(tables.read_runs([tmp_path]))


def test_correlations_by_hand(tmp_path):
    """Ranks 1, 2, 3.5, 3.5, 5; a monotone curve has Spearman's r of 1 and a smaller Pearson's."""
    pearson, spearman, interval = tables.pearson, tables.spearman, tables.interval
    x = np.array([1.0, 2, 3, 3, 9])
    assert tables.ranks(x).tolist() == [1, 2, 3.5, 3.5, 5]
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
    table = tables.correlation_table(tables.read_runs([tmp_path]))
    wanted = "| degraded | samples | linear, debiased | last | task |"
    row = next(line for line in table.splitlines() if line.startswith(wanted))
    assert row == f"{wanted} 6 | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |"
    assert "recovered" not in table  # nobody recovered


def test_a_damaged_model_counts_once_and_every_recovery(tmp_path):
    for seed in range(3):
        write(tmp_path / str(seed), seed, 40.0 + seed)
    runs = tables.read_runs([tmp_path])
    assert [stage for stage, *_ in tables.points(runs)].count("degraded") == 1
    assert len(tables.points(runs, ("recovered",))) == 3


def test_what_was_forgotten_is_the_damage_of_a_point(tmp_path):
    write(tmp_path / "a", 0, 40.0, degrade="none", forget="tooluse")
    write(tmp_path / "b", 0, 40.0, degrade="none", forget="science", degraded=21.0)
    damages = [damage for *_, damage in tables.points(tables.read_runs([tmp_path]))]
    assert sorted(set(damages)) == ["forget science", "forget tooluse"]


# --------------------------------------------------------------------- CKA on the way of a recovery

def on_the_way(folder, i, rises):
    """A run of six points whose CKA over samples, of unit norm, is a line in accuracy, and whose
    plain CKA rises with it or falls."""
    write(folder, i, 40.0, degraded=20.0, degrade=f"int{2 + i}")
    results = json.loads((folder / "results.json").read_text())

    def kinds(k):
        plain = 0.5 + k / 20 if rises else 0.9 - k / 20
        return {"linear_debiased": plain, "unit_debiased": 0.6 + k / 20, "rbf_debiased": 0.5}
    for level in results["cka"].values():
        level["degraded"] |= {kind: [v, v] for kind, v in kinds(0).items()}
        level["recovered"] |= {kind: [v, v] for kind, v in kinds(5).items()}
    points = []
    for k in (3, 1, 2, 5, 4):
        cka = {level: {kind: [v, v] for kind, v in kinds(k).items()} for level in results["cka"]}
        values = {"task": 20.0 + 4 * k, "perplexity": 20.0 * math.exp(-k)}
        points.append({"step": 5 * k, "part": None, "seconds": 1.0 * k, "values": values,
                       "items": {}, "kl": {}, "cka": cka})
    points.insert(0, points[3] | {"part": 0.5, "values": {"task": 0.0, "perplexity": 1.0}})
    results["along"] = {"recovered": points}
    (folder / "results.json").write_text(json.dumps(results))


def test_within_recoveries_r_is_that_of_each_runs_own_points(tmp_path):
    """Levels that differ from run to run tell nothing, and weights between start and end are not on
    the way."""
    for i in range(6):
        on_the_way(tmp_path / str(i), i, rises=i < 3)
    runs = tables.read_runs([tmp_path])
    assert [damage for damage, _ in tables.ways(runs)] == [f"int{2 + i}" for i in range(6)]
    assert all(len(way) == 6 for _, way in tables.ways(runs))
    table = tables.within_table(runs)
    for metric in ("task", "perplexity"):  # minus its logarithm, a line, too
        assert f"| samples | unit, debiased | last | {metric} | 6 | 1.00 [1.00, 1.00] |" in table
    row = next(line for line in table.splitlines()
               if line.startswith("| tokens | linear, debiased | mean | task |"))
    assert "| 6 | 0.00 [" in row  # three of 1, three of -1
    assert "rbf" not in table  # it does not vary
    follows = tables.follows_table(runs)
    row = next(line for line in follows.splitlines()
               if line.startswith("| recoveries | samples | last | task |"))
    assert "| 6 | 0.00 | 1.00 | 1.00 [" in row


@pytest.mark.parametrize("rises, word", [(False, "unit norm"), (True, "no difference")])
def test_what_follows_is_told_by_an_interval_off_nought(rises, word, tmp_path):
    for i in range(6):
        on_the_way(tmp_path / str(i), i, rises)
    follows = tables.follows_table(tables.read_runs([tmp_path]))
    row = next(line for line in follows.splitlines()
               if line.startswith("| recoveries | samples | last | task |"))
    assert row.endswith(f"| {word} |")


def test_old_files_have_no_way(tmp_path):
    write(tmp_path / "a", 0, 40.0)
    runs = tables.read_runs([tmp_path])
    assert tables.within_table(runs) == tables.follows_table(runs) == "" == (
        tables.correlation_table(runs))
