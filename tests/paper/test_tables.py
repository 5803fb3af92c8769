"""paper/: tables stand in RESULTS.md as the files give them; worked cases; one tiny run."""
import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest
from conftest import make_folder

pytest.importorskip("tables")
import along
import experiments
import tables

import train

ROOT = Path(train.__file__).parent
TEXT = (ROOT / "paper" / "RESULTS.md").read_text(encoding="utf-8")
MARKS = re.findall(r"<!-- table (\S+) -->\n(.*?)<!-- end -->", TEXT, re.S)
TINY = ["--steps", "2", "--batch-size", "2", "--eval-limit", "4", "--eval-tokens", "4",
        "--rollout-tokens", "4", "--teacher-check", "2", "--cka-samples", "4", "--group-size",
        "16", "--dtype", "float32", "--calibration", "4"]


@pytest.mark.parametrize("name, text", MARKS, ids=[name for name, _ in MARKS])
def test_each_table_is_what_its_files_give(name, text):
    """Words exactly, numbers to one unit of their last digit."""
    made = tables.generated(name) + "\n"
    number = r"-?\d+\.\d+"
    assert re.sub(number, "#", made) == re.sub(number, "#", text)
    for ours, theirs in zip(re.findall(number, made), re.findall(number, text)):
        unit = 10.0 ** -len(theirs.partition(".")[2])
        assert abs(float(ours) - float(theirs)) < 1.01 * unit


def test_every_table_of_the_paper_is_there():
    assert {"nf4", "ffn", "forgetting", "bootstrap", "control", "rises"} <= {n for n, _ in MARKS}
    assert len(TEXT.encode()) <= 30 * 1024
    assert max(len(line) for line in TEXT.splitlines() if not line.startswith("|")) <= 120


def test_every_kept_run_is_read_and_named():
    folders = sorted(path for path in tables.RESULTS.iterdir() if path.is_dir())
    runs = tables.read(*folders)
    assert len(runs) == len([*tables.RESULTS.glob("*/*.json")]) > 300
    for *_, results in runs:
        assert {"stages", "cka", "change", "config"} <= results.keys()
        assert results["environment"]["commit"]
        assert tables.options_of(results).count("--") <= 14


def test_means_errors_and_cells_by_hand():
    rng = random.Random(0)
    values = [rng.gauss(30, 5) for _ in range(7)]
    mean, error = tables.mean_and_error(values)
    assert mean == pytest.approx(statistics.fmean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(7))
    assert tables.cell([1.0, None, 3.0]) == "2.0 ± 1.0" and tables.cell([]) == "–"


@pytest.mark.parametrize("shift", [0, 1e-13, -1e-13])
def test_a_value_on_a_rounding_edge_is_printed_alike_everywhere(shift):
    assert tables.rounded(-6.25 + shift) == "-6.3" and tables.rounded(43.75 + shift) == "43.8"


def test_correlations_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(1)
    x = [rng.randrange(6) for _ in range(20)]
    y = [v + rng.gauss(0, 2) for v in x]
    assert tables.correlation(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    spearman = tables.correlation(tables.ranks(x), tables.ranks(y))
    assert spearman == pytest.approx(stats.spearmanr(x, y)[0])
    low, high = tables.interval(x, y)
    assert low < spearman < high


def test_a_correlation_table_by_hand():
    """Four damages whose CKA falls as their accuracy does, and rises as their perplexity does."""
    def run(n, likeness):
        kinds = {"degraded": {"linear_debiased": [likeness]}}
        return "sweep", n, 0, {"cka": {"tokens": kinds, "samples": kinds}, "stages": {
            "degraded": {"task": 100 * likeness, "perplexity": 1 / likeness}}}
    text = tables.correlation_table([run(n, x) for n, x in enumerate([0.9, 0.5, 0.7, 0.6])],
                                    ("task", "perplexity"))
    rows = [line.split(" | ") for line in text.splitlines()[2:]]
    assert [row[3] for row in rows] == ["1.00", "-1.00"] * 2


def test_the_experiments_are_commands_that_train_parses():
    for name, runs in experiments.EXPERIMENTS.items():
        for options in runs:
            c, extras = train.parse(options.replace("BASE", "folder").split())
            for extra in extras:
                extra.attach(dict(train.PARTS))
            c.degrade = c.degrade or "none"
            train.damages(c)
            assert set(c.recover.split(",")) <= train.WAYS.keys(), name


def test_a_tiny_experiment_runs_once_and_is_told(tmp_path, monkeypatch, capsys):
    folder = make_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(experiments.EXPERIMENTS, "small", ["--degrade nf4"])
    argv = ["small", "--seeds", "0", "--model", str(folder), *TINY]
    assert experiments.main(argv) == 0
    told = capsys.readouterr().out
    assert told.count("python train.py") == 1 and "| --degrade nf4" in told
    assert experiments.main(argv) == 0 and "python train.py" not in capsys.readouterr().out
    assert len([*tmp_path.glob("runs/*/*/results.json")]) == 1
    assert not [*tmp_path.glob("runs/*/*/student")]


def test_numbers_are_kept_without_what_no_table_needs(tmp_path, monkeypatch):
    results = json.loads(next(tables.RESULTS.glob("default/0-0.json")).read_text())
    results |= {"step": {}, "answers": {}, "environment": results["environment"]
                | {"revision": "a" * 40}}
    for number, revision in (("0-0", "a" * 40), ("1-0", "a" * 40 + " and changes")):
        (tmp_path / "runs" / "mine" / number).mkdir(parents=True)
        results["environment"]["revision"] = revision
        (tmp_path / "runs" / "mine" / number / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    with pytest.raises(ValueError, match="1-0"):
        experiments.keep(tmp_path / "runs" / "mine")
    kept = json.loads((tmp_path / "results" / "mine" / "0-0.json").read_text())
    assert "step" not in kept
    for stage, values in kept["stages"].items():
        assert values == pytest.approx(results["stages"][stage], abs=1e-6)


def test_points_on_the_way_are_measured(folder, tmp_path):
    """Every third step of five, and the run's own results beside."""
    argv = ["--model", folder, "--out", tmp_path / "out", *TINY, "--steps", "5"]
    assert along.main([*map(str, argv)]) == 0
    point, = json.loads((tmp_path / "out" / "along.json").read_text())
    assert point["step"] == 3 and {"perplexity", "cka"} <= point.keys()
    assert (tmp_path / "out" / "results.json").exists()
