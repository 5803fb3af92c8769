"""paper/tables.py: the tables in the texts are what the files give; numbers worked by hand."""
import math
import random
import re
import statistics

import pytest
import tables

ROOT = tables.HERE.parent
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8")
         for name in ("paper/RESULTS.md", "README.md")}
MARK = re.compile(r"<!-- table (\S+) -->\n(.*?)<!-- end -->", re.S)
MARKS = [(name, *mark) for name, text in TEXTS.items() for mark in MARK.findall(text)]
NUMBER = r"-?\d+(?:\.\d+)?(?!\w)"


def a_run(degraded, recovered, seed=0, healthy=50.0, change="better", fraction=0.5, cka=(0.9, 0.8),
          **config):
    """A run's results with one metric, "task", and the same CKA at both levels."""
    kinds = {name: {"linear_debiased": [1.0, value]}
             for name, value in zip(("degraded", "recovered"), cka)}
    stages = {"healthy": {"task": healthy}, "degraded": {"task": degraded},
              "recovered": {"task": recovered}}
    return {"config": {"degrade": "nf4", "seed": seed, "cka_samples": 64, **config},
            "environment": {"processor": "CPU"}, "stages": stages,
            "recovered_fraction": {"task": fraction}, "change": {"recovered": {"task": change}},
            "cka": {"tokens": kinds, "samples": kinds}}


@pytest.mark.parametrize("file, name, text", MARKS, ids=[mark[1] for mark in MARKS])
def test_each_table_is_what_its_files_give(file, name, text):
    """Words exactly, numbers to one unit of their last digit."""
    made = tables.generated(name) + "\n"
    assert re.sub(NUMBER, "#", made) == re.sub(NUMBER, "#", text)
    for ours, theirs in zip(re.findall(NUMBER, made), re.findall(NUMBER, text)):
        unit = 10.0 ** -len(theirs.partition(".")[2])
        assert abs(float(ours) - float(theirs)) < 1.01 * unit


def test_the_page_has_every_table_is_short_and_its_links_lead_somewhere():
    text = TEXTS["paper/RESULTS.md"]
    assert sorted(name for name, _ in MARK.findall(text)) == sorted([*tables.TABLES, *tables.MADE])
    assert len(text.encode()) <= 30 * 1024
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 110
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 30 and all((tables.HERE / link).exists() for link in links)


def test_a_table_is_put_into_its_place_and_nothing_else_is_changed(tmp_path):
    text = "a\n<!-- table rises -->\nold\n<!-- end -->\nb <!-- end -->\n"
    path = tmp_path / "text.md"
    path.write_text(text)
    tables.write([path])
    made = path.read_text()
    assert made == text.replace("old", tables.generated("rises"))
    tables.write([path])
    assert path.read_text() == made


def test_numbers_in_the_prose_are_in_the_tables():
    """What the text says of a control, of healthy scores and of kept steps, from the files."""
    prose = " ".join(MARK.sub("", TEXTS["paper/RESULTS.md"]).split())

    def science(where, stage):
        return tables.rounded(tables.mean_and_error(
            [r["stages"][stage][tables.SCIENCE] for r in tables.kept(where)])[0])
    assert (f"ends at {science('table2/0', 'recovered')} after NF4 and the control at "
            f"{science('control/0', 'recovered')}") in prose
    for where in ("default/0", "text/2", "settings/1"):
        assert f"{science(where, 'healthy')}" in prose
    trainings = others = 0
    for folder in tables.RESULTS.iterdir():
        for r in tables.kept(folder.name):
            for guard in r["guard"].values():
                if guard["watch"] == "loss" and r["config"]["keep"] == "best":
                    best = min(guard["checks"], key=lambda check: check["all"])["step"]
                    trainings, others = trainings + 1, others + (best != guard["kept"])
    assert f"{others} of the {trainings} trainings that kept their best weights" in prose
    files = [*tables.RESULTS.glob("*/*-*.json")]
    assert f"What {len(files)} kept runs say" in prose


def test_means_and_errors_are_those_of_statistics():
    rng = random.Random(0)
    values = [rng.gauss(30, 5) for _ in range(7)]
    mean, error = tables.mean_and_error(values)
    assert mean == pytest.approx(statistics.fmean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(7))
    assert tables.mean_and_error([4.0]) == (4.0, 0.0)
    assert tables.mean_and_error(sorted(values)) == (mean, error)  # in any order, to the last bit


@pytest.mark.parametrize("shift", [0, 1e-13, -1e-13])
def test_a_value_on_a_rounding_edge_is_printed_alike_everywhere(shift):
    """Sums in another order differ in the last bits; what is printed must not."""
    assert tables.rounded(-6.25 + shift) == "-6.3" and tables.rounded(43.75 + shift) == "43.8"
    assert tables.rounded(2.675 + shift, 2) == "2.68" and tables.rounded(0.05 + shift) == "0.1"
    assert [tables.rounded(x) for x in (None, math.nan, math.inf, -0.04)] == ["–"] * 3 + ["0.0"]


def test_a_verdict_is_what_most_seeds_say():
    def said(*words):
        return tables.verdict([a_run(1, 2, change=w) for w in words], "recovered", "task")
    assert said("better", "same", "better") == "better" and said("worse") == "worse"
    assert said("better", "same") == said("better", "same", "worse") == "seeds differ"
    assert tables.verdict([a_run(1, 2) | {"change": {}}], "recovered", "task") == ""


def test_a_damage_is_one_where_most_seeds_lost_something():
    runs = [a_run(1, 2, fraction=f) for f in (0.5, None, 0.25)]
    assert tables.was_damaged(runs, "recovered", "task")
    assert not tables.was_damaged(runs[1:2], "recovered", "task")
    several = [{"recovered_fraction": {"recovered_base": {"task": None}}}]
    assert not tables.was_damaged(several, "recovered_base", "task")


def test_a_row_by_hand():
    runs = [a_run(20.0, 40.0 + 2 * seed, seed) for seed in range(3)]
    lines = tables.table([("mine", runs, "recovered")], ["task"], ["tokens"]).splitlines()
    assert lines == ["| run | n | task | CKA, tokens |", "|---|---|---|---|",
                     "| mine | 3 | 50.0 → 20.0 → 42.0 ± 1.2 (better) | 0.900 → 0.800 |"]


def test_an_undamaged_run_has_no_degraded_and_a_bootstrap_begins_with_its_base():
    run = a_run(50.0, 60.0)
    run["cka"] = {level: {"recovered": {"linear_debiased": [0.7]}} for level in run["cka"]}
    assert tables.stages_of([run], "recovered") == ["healthy", "recovered"]
    run["stages"] = {"base": {"task": 10.0}} | run["stages"]
    assert "10.0 → 50.0 → 60.0" in tables.table([("mine", [run], "recovered")], ["task"])
    assert tables.likeness([run], "recovered", "tokens") == "0.700"


def test_a_metric_that_a_run_lacks_is_left_empty_and_fewer_samples_are_left_out():
    runs = [a_run(20.0, 40.0), a_run(20.0, 40.0, cka=(0.5, 0.5), cka_samples=8)]
    assert "|  |" in tables.table([("mine", runs, "recovered")], ["task", "other"], [])
    assert tables.likeness(runs, "recovered", "samples") == "0.900 → 0.800"


def test_general_ability_is_the_mean_of_three_tests():
    values = tables.kept("table2/0")[0]["stages"]["healthy"]
    assert values["general"] == pytest.approx(sum(values[m] for m in tables.GENERAL) / 3)


def test_correlations_by_hand():
    rng = random.Random(1)
    pairs = [(rng.randrange(6), rng.gauss(0, 2)) for _ in range(20)]
    assert tables.pearson(pairs) == pytest.approx(statistics.correlation(*zip(*pairs)))
    assert tables.spearman([(1, 10), (1, 100), (2, 50), (7, 90)]) == pytest.approx(
        statistics.correlation([1.5, 1.5, 3, 4], [1, 4, 2, 3]))
    assert math.isnan(tables.pearson([(1.0, 2.0), (1.0, 3.0)]))


def test_a_correlation_table_by_hand():
    """Five damages: CKA falls as accuracy does, and as the logarithm of perplexity rises."""
    runs = [a_run(100 * x, 0, cka=(x, x), degrade=f"ffn{n}")
            for n, x in enumerate((0.9, 0.5, 0.7, 0.6, 0.8))]
    for r in runs:
        r["stages"]["degraded"]["perplexity"] = math.exp(9 - r["stages"]["degraded"]["task"] / 20)
    assert tables.correlation_table(runs, ["task", "perplexity"]).splitlines()[2:] == [
        f"| {level} | {metric} | 5 | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] |"
        for level in ("tokens", "samples") for metric in ("task", "perplexity")]


def test_an_interval_draws_whole_damages():
    """Ten copies of a point are one damage: as wide an interval as of one copy."""
    mean, once = statistics.fmean, {n: [float(n)] for n in range(6)}
    tenfold = {n: 10 * [float(n)] for n in range(6)}
    assert tables.with_interval(mean, once) == tables.with_interval(mean, tenfold)
    low, high = (float(x) for x in re.findall(r"[\d.]+", tables.with_interval(mean, once))[1:])
    expected = 1.96 * statistics.pstdev(range(6)) / math.sqrt(6)
    assert high - low == pytest.approx(2 * expected, rel=0.15)


def test_along_a_recovery_by_hand():
    """Two damages: r is 1 along the first, -1 along the second; the damaged model is a point."""
    runs = []
    for degrade, sign in (("int4", 1), ("nf4", -1)):
        run = a_run(0.0, 30.0, degrade=degrade, cka=(0.5, 0.8))
        run["along"] = {"recovered": [
            {"step": 3 * i, "values": {"task": 10.0 * i},
             "cka": {level: {"linear_debiased": [0.5 + sign * i / 10, 0.0]}
                     for level in ("tokens", "samples")}} for i in (1, 2, 3)]}
        runs.append(run)
    assert tables.along_table(runs[:1], ["task"]).splitlines()[2] == (
        "| tokens | task | 1 | 1.00 [1.00, 1.00] |")
    assert "| samples | task | 2 | 0.00 [-1.00, 1.00] |" in tables.along_table(runs, ["task"])


def test_rises_are_counted_over_recoveries(monkeypatch):
    runs = [a_run(1, 2, cka=cka) for cka in ((0.5, 0.6), (0.5, 0.5), (0.7, 0.6))]
    monkeypatch.setattr(tables, "kept", lambda experiment: runs)
    assert tables.rises(["one", "two"], "tokens") == (2, 6)


def test_the_claims_begin_with_the_control_and_sign_each_model():
    rows = [line.strip("| ").split(" | ") for line in tables.claims_table().splitlines()[2:]]
    assert len(rows) == 5 and "control" in rows[0][0]
    assert all(re.fullmatch("[✓✗–] [✓✗–]", row[-1]) for row in rows)
    assert rows[0][-1] == "– –"  # nothing was lost, so nothing comes back
