"""What goes wrong at the end of a run takes nothing with it: a full disk, a terminal of few
characters, a reader that goes away. Each is a real process."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_folder

import train
from model import GPT

ROOT = Path(train.__file__).parent
QUICK = ("--steps 2 --batch-size 2 --rollout-tokens 4 --eval-tokens 4 --eval-limit 2 --cka-samples "
         "4 --group-size 16 --teacher-check 2 --calibration 4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model"), vocab_size=2000)


def run(folder, out, *more, before="", **env):
    """(exit code, stdout, stderr) of a run in a shell, after `before`; bytes."""
    command = f"{before} exec {sys.executable} train.py --model {folder} --out {out} {QUICK}"
    done = subprocess.run(["bash", "-c", " ".join([command, *more])], cwd=ROOT, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | env, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_a_full_disk_costs_what_does_not_fit_and_nothing_else(folder, tmp_path):
    """No file may be longer than 100 KiB: student/ and report.png are."""
    code, out, err = run(folder, tmp_path / "out", before="ulimit -f 100;")
    assert code == 2 and b"Traceback" not in err
    line, = [line for line in err.decode().splitlines() if "error: " in line]
    assert "could not be written" in line and "student/" in line and "report.png" in line
    assert "recovered fraction" in out.decode()  # the report
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["stages"]["recovered"]
    assert b"no checkpoint could be written" in err
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    left -= {path.name for path in (tmp_path / "out" / "checkpoint").iterdir()}  # it is not done
    assert left == {"results.json", "metrics.jsonl", "tokenizer.json", "tokenizer_config.json"}
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_where_not_even_the_results_fit_the_report_is_printed(folder, tmp_path):
    code, out, err = run(folder, tmp_path / "out", before="ulimit -f 1;")
    assert code == 2 and b"Traceback" not in err
    assert "results.json (" in err.decode() and "recovered fraction" in out.decode()
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_of_few_characters_gets_question_marks(encoding, folder, tmp_path):
    code, out, err = run(folder, tmp_path / "out", PYTHONIOENCODING=encoding)
    assert code == 0 and b"Traceback" not in err
    assert b"?" in out and b"recovered fraction" in out and out.rstrip().endswith(b"report.png")
    assert (tmp_path / "out" / "report.png").exists()
    GPT.from_pretrained(tmp_path / "out" / "student")


def test_help_is_shown_by_an_ascii_terminal():
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"}, timeout=120)
    assert done.returncode == 0 and b"--degrade" in done.stdout


def test_a_reader_that_goes_away_loses_the_report_alone(folder, tmp_path):
    _, _, err = run(folder, tmp_path / "out", "| true", before="set -o pipefail;")
    assert b"Traceback" not in err and b"error: the report (Broken pipe)" in err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["stages"]
    GPT.from_pretrained(tmp_path / "out" / "student")


def test_a_disk_that_is_too_full_is_said_before_anything_is_computed(folder, tmp_path, monkeypatch,
                                                                    capsys):
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("resume.shutil.disk_usage", lambda path: full)
    options = ["--model", str(folder), "--out", str(tmp_path / "out"), *QUICK.split()]
    assert train.main(options) == 2
    assert "GB are free there and the students take" in capsys.readouterr().err
