"""paper/experiments.py and paper/along.py: the paper's tables as commands, made once, reported."""
import json
import subprocess
import sys
from pathlib import Path

import along
import experiments
import pytest
import tables
from conftest import make_folder

import train

ROOT = Path(train.__file__).parent
TINY = ["--steps", "2", "--batch-size", "2", "--eval-limit", "4", "--eval-tokens", "4",
        "--rollout-tokens", "4", "--teacher-check", "2", "--cka-samples", "4", "--group-size",
        "16", "--dtype", "float32", "--calibration", "4"]


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_experiment_is_a_command_line(name):
    for options in experiments.EXPERIMENTS[name]:
        c, extras = train.parse(options.replace("BASE", "folder").split())
        for extra in extras:
            extra.attach(dict(train.PARTS))
        c.degrade = c.degrade or "none"
        train.damages(c)
        assert {*c.recover.split(",")} <= train.WAYS.keys()
    assert len(experiments.EXPERIMENTS) == 15 and len(experiments.EXPERIMENTS["sweep"]) == 23


def test_the_kept_runs_are_of_these_commands():
    """A kept run of the paper's tables has what its experiment asks for."""
    for name in ("table1", "table2", "control", "table4", "default", "damages", "sweep"):
        for number, _, r in tables.read(tables.RESULTS / name):
            c, _ = train.parse(experiments.EXPERIMENTS[name][number].split())
            for option in ("forget", "data", "teacher", "demo", "lr_fraction", "group_size"):
                assert r["config"][option] == getattr(c, option), (name, number, option)
            assert r["config"]["degrade"] == (c.degrade or "none")


@pytest.mark.parametrize("argv, says", [
    (["table9"], "table9"), ([], "experiments"), (["table2", "--seeds", "a"], "'a'"),
    (["report", "nowhere"], "nowhere"), (["keep", "nowhere"], "nowhere"), (["keep"], "folder"),
    (["keep", "a", "--nam", "b"], "--nam")])
def test_a_mistake_is_one_line_and_exit_code_2(argv, says, capsys):
    assert experiments.main(argv) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


def test_the_program_runs_from_the_root_of_the_repository():
    for program in ("experiments", "along"):
        command = [sys.executable, f"paper/{program}.py", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "usage" in done.stdout


def test_an_experiment_runs_once_is_told_and_can_be_reported(tmp_path, monkeypatch, capsys):
    """The whole way with a tiny model, train.py as a process."""
    folder = make_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(experiments.EXPERIMENTS, "small", ["--degrade nf4"])
    argv = ["small", "--seeds", "0", "--model", str(folder), *TINY]
    assert experiments.main(argv) == 0
    said = capsys.readouterr().out
    assert said.count("python train.py") == 1 and "`--" in said and "--degrade nf4" in said
    assert experiments.main(argv) == 0 and "python train.py" not in capsys.readouterr().out
    runs, = (tmp_path / "runs").iterdir()
    assert (runs / "0-0" / "results.json").exists() and not (runs / "0-0" / "student").exists()
    assert experiments.main(["report", str(runs)]) == 0
    assert capsys.readouterr().out in said


@pytest.fixture
def made(monkeypatch, tmp_path):
    """What train.py is called with; in its place stands what writes results, or dies at 7 steps."""
    calls = []

    def call(command, **_):
        calls.append(command[2:])
        out, died = Path(command[command.index("--out") + 1]), "7" in command
        (out / "log.txt").write_text("a\nerror: too few\n")
        if not died:
            kept = tables.RESULTS / "default" / "0-0.json"
            (out / "results.json").write_text(kept.read_text())
            (out / "student").mkdir()
        return subprocess.CompletedProcess(command, int(died or "11" in command))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", call)
    return calls


def test_each_seed_makes_each_run_with_the_further_options(made):
    assert experiments.main(["table4", "--seeds", "0,1", "--steps", "9"]) == 0
    assert [words[-6:] for words in made] == [
        ["--steps", "9", "--seed", str(seed), "--out", f"runs/table4--steps9/{n}-{seed}"]
        for seed in (0, 1) for n in (0, 1)]
    assert not [*Path("runs").rglob("student")]


def test_a_run_that_fails_ends_it_and_one_that_the_guard_ended_does_not(made, capsys):
    assert experiments.main(["demos", "--seeds", "0", "--steps", "7"]) == 1
    assert len(made) == 1 and "too few" in (error := capsys.readouterr().err)
    assert len(error.splitlines()) == 1
    assert experiments.main(["demos", "--seeds", "0", "--steps", "11"]) == 0 and len(made) == 3


def test_a_seed_that_changes_nothing_is_left_out(made):
    """Quantized, or pruned by magnitude, a model is the same at each seed."""
    assert experiments.main(["sweep", "--seeds", "0,1"]) == 0
    again = [" ".join(words) for words in made if words[words.index("--seed") + 1] == "1"]
    drawn = [level for level in experiments.LEVELS if "ffn" in level or "wanda" in level]
    assert len(made) == 23 + len(drawn) and len(again) == len(drawn) == 12


def test_table5_makes_its_small_model_and_names_the_larger_one(made, monkeypatch):
    monkeypatch.setattr(experiments.model, "default_model", lambda: Path("whole"))
    assert experiments.main(["table5", "--seeds", "0"]) == 0
    assert made[0][:4] == ["--degrade", "ffn30", "--recover", "none"]
    assert [*Path("runs/small").glob("student")] and len(made) == 5
    assert sum("whole" in words for words in made) == 2
    made.clear()
    own = ["--model", "small", "--bootstrap", "large"]
    assert experiments.main(["table5", "--seeds", "0", *own]) == 0 and len(made) == 4
    assert [words.count("large") for words in made] == [0, 1, 0, 1]


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    import figures
    figures.draw_all(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"fig6.png", "fig8a.png", "fig8b.png"}
    assert all(p.stat().st_size > 10_000 for p in tmp_path.iterdir())


def test_points_along_a_recovery_are_measured_and_change_nothing(folder, tmp_path):
    """Every third step of seven; the run's own numbers are those of train.py."""
    argv = ["--model", str(folder), *TINY, "--steps", "7", "--degrade", "int4"]
    before = dict(train.PARTS)
    assert along.main([*argv, "--out", str(tmp_path / "along")]) == 0
    assert train.PARTS == before
    assert train.main([*argv, "--out", str(tmp_path / "plain")]) == 0
    ours, plain = (json.loads((tmp_path / name / "results.json").read_text())
                   for name in ("along", "plain"))
    points = ours["along"]["recovered"]
    assert [p["step"] for p in points] == [3, 6]
    assert points[0]["values"].keys() == plain["stages"]["healthy"].keys()
    assert 0 < points[0]["cka"]["tokens"]["linear_debiased"][0] <= 1
    for part in ("stages", "cka", "change"):
        assert ours[part] == plain[part]
    assert "| tokens | " in tables.along_table([ours], ["perplexity"])
