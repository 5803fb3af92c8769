"""What goes wrong at the end of a run takes nothing with it: a full disk, a terminal of few
characters, a reader that goes away. Each is a real process."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import launch, make_folder

import resume
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


def forked(folder, out):
    """(exit code, what was said) of a run in a fork of this process."""
    log = Path(folder).with_name("log")
    argv = ["--model", folder, "--out", out, *QUICK.split(), "--save-every", 1]
    process = launch(argv, log)
    process.join(120)
    return process.exitcode, log.read_text()


def error_of(said):
    """The one line in which a run ended."""
    assert "Traceback" not in said
    line, = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


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


def test_an_earlier_runs_student_is_not_taken_for_that_of_a_run_that_had_no_room(folder, tmp_path):
    """Neither a checkpoint nor the student could be written: the same command does it again."""
    out = tmp_path / "out"
    assert run(folder, out)[0] == 0
    code, _, err = run(folder, out, "--seed 1", before="ulimit -f 100;")
    assert code == 2 and "student/ (" in error_of(err.decode())
    shutil.rmtree(out / "checkpoint")
    code, said, _ = run(folder, out, "--seed 1")
    assert code == 0 and b"holds this run, finished" not in said
    assert (out / "student" / "model.safetensors").exists()


# -------------------------------------------------------------------------------- a disk of its own

@pytest.fixture
def disk(tmp_path):
    """mount(options): a tmpfs with these options at the path that it returns; again: it is
    mounted anew with these."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(options):
        again = ["-o", "remount," + options] if path.is_mount() else ["-o", options]
        try:
            subprocess.run(["mount", "-t", "tmpfs", *again, "tmpfs", path], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"nothing can be mounted here: {error}")
        return path
    yield mount
    if path.is_mount():
        subprocess.run(["umount", path], check=True)


# What fills the disk, in KiB beyond the weights: all but the first checkpoints, the pointer to
# one, results.json, the tokenizer, the picture, the student; at last nothing.
SIZES = {0: "-0.safetensors:", 4: "latest.json:", 8: "results.json (", 16: "student/ (No space",
         76: "report.png (", 276: "student/ (cannot", 676: ""}


@pytest.mark.parametrize("more", SIZES)
def test_whatever_fills_the_disk_all_else_is_whole_and_more_room_ends_the_run(more, folder, disk):
    """324 KiB are what the free room is asked to be beforehand, the student's weights."""
    out = disk(f"size={324 + more}k") / "out"
    code, said = forked(folder, out)
    assert code == (2 if SIZES[more] else 0)
    assert SIZES[more] in (said if more < 8 or not code else error_of(said))
    assert "recovered fraction" in said and not list(out.rglob("*.part"))
    assert len([json.loads(line) for line in (out / "metrics.jsonl").open()]) == 2
    if (out / "results.json").exists():
        assert json.loads((out / "results.json").read_text())["stages"]["recovered"]
    if (out / "report.png").exists():
        assert (out / "report.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    if SIZES[more]:
        assert not (out / "student" / "model.safetensors").exists()
        with pytest.raises((OSError, ValueError)):
            GPT.from_pretrained(out / "student")
        assert f"; the same command goes on from {out}/checkpoint" in error_of(said)
        disk("size=4m")
        assert forked(folder, out)[0] == 0
    GPT.from_pretrained(out / "student")
    assert {path.name for path in out.iterdir()} == {
        "results.json", "metrics.jsonl", "report.png", "student"}


def test_a_line_that_does_not_fit_is_not_there_by_half(disk):
    """A full tmpfs takes the beginning of what is written. With more room, all lines are there."""
    out = disk("size=8k")
    run = SimpleNamespace(config=SimpleNamespace(out=out), lines=[])
    with train.log_of(run, "recovered") as log:
        for step in range(100):
            log({"step": step, "text": "x" * 99})
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert 0 < len(lines) < 100 and lines == run.lines[:len(lines)]
    with pytest.raises(OSError):
        resume.write_lines(run, out)
    assert [path.name for path in out.iterdir()] == ["metrics.jsonl"]
    disk("size=1m")
    resume.write_lines(run, out)
    assert [json.loads(line) for line in (out / "metrics.jsonl").open()] == run.lines


def test_a_disk_that_may_only_be_read_is_said_before_anything_is_computed(folder, disk):
    path = disk("size=4m")
    (path / "old").mkdir()
    (path / "old" / "results.json").write_text("{}")
    disk("ro")
    for out in (path / "out", path / "old"):
        code, said = forked(folder, out)
        assert code == 2 and "measure" not in said
        assert error_of(said) == (f"error: cannot write to --out {out}: Read-only file system; "
                                  "choose another folder")
    assert [str(p.relative_to(path)) for p in path.rglob("*")] == ["old", "old/results.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write wherever the disk may be written")
def test_a_folder_that_may_only_be_read_is_said_before_anything_is_computed(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o500)
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        code, said = forked(folder, out)
        assert code == 2 and "measure" not in said
        assert f"cannot write to --out {out}: Permission denied" in error_of(said)


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_is_no_folder_to_write_to(out, folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, said = forked(folder, tmp_path / out)
    assert code == 2 and f"cannot write to --out {tmp_path / out}: " in error_of(said)
    assert (tmp_path / "file").read_text() == "mine"


# ------------------------------------------------------------------------------- who reads the text

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
