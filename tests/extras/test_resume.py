"""A run that is broken off goes on to the same end, to the last bit: losses, weights, numbers.

Most runs here "die" by an exception when a file of the state has been written. Some are real
processes, which are killed whenever.
"""
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # each fork would import it again, in seconds
from conftest import launch, make_folder

import train
from extras import resume

QUICK = ("--with resume --save-every 2 --steps 7 --batch-size 4 --rollout-tokens 5 --eval-tokens 4 "
         "--eval-limit 4 --cka-samples 4 --group-size 16 --teacher-check 2 --calibration 4 --lr "
         "1e-3 --dtype float32").split()


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Options of a run of a tiny model on sums, which takes a second."""
    root = tmp_path_factory.mktemp("usual")
    (root / "sums.jsonl").write_text("".join(
        json.dumps({"prompt": f"{i} + {i}?", "response": f"{2 * i}"}) + "\n" for i in range(60)))
    (root / "text.txt").write_text("The sum of two numbers is a number. " * 60)
    make_folder(root / "larger", seed=3, d_ff=96)
    return ["--model", make_folder(root / "llama"), "--data", root / "sums.jsonl",
            "--text", root / "text.txt"]


@pytest.fixture(autouse=True)
def signals_are_put_back(monkeypatch):
    """And no picture is drawn."""
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda *_: None)
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


class Died(BaseException):
    """The process, at this point."""


def run(out, *options):
    return train.main(["--out", str(out), *QUICK, *map(str, options)])


def run_until(monkeypatch, saves, out, *options):
    """A run that dies right after this many files of its state were written."""
    left = iter(range(saves - 1, -1, -1))

    def replace_and_die(part, path, replace=os.replace):
        replace(part, path)
        if ".sdft-resume" in str(path) and next(left) == 0:
            raise Died
    with monkeypatch.context() as dying, pytest.raises(Died):
        dying.setattr(os, "replace", replace_and_die)
        run(out, *options)


def left_by(out):
    """What a finished run leaves that does not depend on the clock."""
    lines = [json.loads(line) | {"seconds": 0}
             for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    numbers = {name: value for name, value in results.items()
               if name not in ("config", "environment", "seconds")}
    weights = {path.parent.name: path.read_bytes() for path in out.glob("student*/*.safetensors")}
    return lines, numbers, weights


RUNS = {
    "kd and sft": "--recover kd,sft --degrade ffn50,wanda,nf4",
    "lora": "--lora 2 --dtype bfloat16",
    "forgetting": "--forget tooluse --forget-steps 3 --expert-steps 5",
    "bootstrap": "--bootstrap {}/larger --expert-steps 3 --degrade int4 --train-embeddings"}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_dies_goes_on_to_the_same_end(name, usual, tmp_path, monkeypatch):
    """It dies with its fourth saved file, goes on, dies with its third, and goes on."""
    options = *usual, *RUNS[name].format(usual[1].parent).split()
    assert run(tmp_path / "whole", *options) == 0
    for saves in (4, 3):
        run_until(monkeypatch, saves, tmp_path / "broken", *options)
    assert run(tmp_path / "broken", *options) == 0
    assert left_by(tmp_path / "broken") == left_by(tmp_path / "whole")
    left = {path.name for path in (tmp_path / "broken").iterdir()}
    assert left == {path.name for path in (tmp_path / "whole").iterdir()}
    assert ".sdft-resume" not in left


def test_what_is_finished_is_not_done_again(usual, tmp_path, monkeypatch):
    """Neither a stage nor a step is, and metrics.jsonl begins with the steps of before."""
    out, options = tmp_path / "out", usual
    run_until(monkeypatch, 7, out, *options)  # run.pt, three stages, steps 2, 4 and 6
    measured = []

    def measure(*args, name, real=train.measure, **kwargs):
        measured.append(name)
        steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
        assert steps == [0, 1, 2, 3, 4, 5, 6]
        return real(*args, name=name, **kwargs)
    with monkeypatch.context() as watching:
        watching.setattr(train, "measure", measure)
        assert run(out, *options) == 0
    assert measured == ["recovered"]


def test_another_run_is_refused_by_what_differs(usual, tmp_path, monkeypatch, capsys):
    model, rows, out = make_folder(tmp_path / "model"), tmp_path / "sums.jsonl", tmp_path / "out"
    shutil.copyfile(usual[3], rows)
    options = "--model", model, "--data", rows, *usual[4:]
    run_until(monkeypatch, 2, out, *options)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(out, *options, "--seed", "3", "--lora", "2") == 2
    lines = capsys.readouterr().err.splitlines()
    line, = [line for line in lines if line.startswith("error: ")]
    assert "an unfinished run with other lora, seed: go on" in line
    assert f" with that, choose another --out, or delete {out}/.sdft-resume" in line
    make_folder(model, seed=8)  # other weights and rows under the same names
    rows.write_text(rows.read_text().replace('"response": "', '"response": "1'))
    assert run(out, *options) == 2
    assert "data_sha256" in (error := capsys.readouterr().err) and "model_sha256" in error
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.rmtree(out / ".sdft-resume")
    assert run(out, *options) == 0


@pytest.mark.parametrize("file, damage", [
    ("run.pt", "cut"), ("00.pt", "empty"), ("middle-0.pt", "cut"), ("middle-0.pt", "a bit"),
    ("02.pt", "other")])
def test_a_damaged_file_is_said_in_one_line(file, damage, usual, tmp_path, monkeypatch, capsys):
    out, options = tmp_path / "out", usual
    run_until(monkeypatch, 5, out, *options)  # run.pt, three stages, two steps
    path = out / ".sdft-resume" / file
    whole = path.read_bytes()
    at = len(whole) // 2  # in a tensor
    path.write_bytes({"cut": whole[:-9], "empty": b"",
                      "other": (usual[1] / "model.safetensors").read_bytes(),
                      "a bit": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]}[damage])
    capsys.readouterr()
    assert run(out, *options) == 2
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{path} is damaged: delete {path.parent}" in line


def test_a_full_disk_is_said_and_the_run_goes_on(usual, tmp_path, monkeypatch, capsys):
    """The last file that was whole stays, and from there the run could go on."""
    out, options = tmp_path / "out", usual
    saves = []

    def save(state, file, real=torch.save):
        saves.append(os.listdir(out / ".sdft-resume"))
        if len(saves) > 4:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(state, file)
    with monkeypatch.context() as full:
        full.setattr(torch, "save", save)
        assert run(out, *options) == 0
    errors = [line for line in capsys.readouterr().err.splitlines() if "could not be saved" in line]
    assert errors[0] == (f"{out}/.sdft-resume/middle-0.pt could not be saved (No space left on "
                         "device); the run goes on")
    assert len(errors) == len(saves) - 4
    assert sorted(saves[-1]) == ["00.pt", "01.pt", "02.pt", "04.part", "run.pt"]
    assert (out / "student" / "model.safetensors").exists()
    assert not (out / ".sdft-resume").exists()


def test_without_what_tells_a_run_from_others_nothing_is_saved(usual, tmp_path, monkeypatch):
    """Another run would take it for its own."""
    def save(state, file, real=torch.save):
        if file.name.endswith("run.part"):
            raise OSError(28, "No space left on device")
        real(state, file)
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(train, "results_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out", *usual)
    assert not list((tmp_path / "out" / ".sdft-resume").glob("*.pt"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_torch_says_in_one_line_that_a_disk_is_full(tmp_path, capsys):
    state = resume.Resume({"config": train.Config(out=str(tmp_path))})
    state.folder.mkdir()
    (state.folder / "run.part").symlink_to("/dev/full")
    state.save(state.folder / "run.pt", {"weights": torch.zeros(1 << 20)})
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "run.pt could not be saved (" in error
    assert list(state.folder.iterdir()) == []


def test_only_what_this_program_wrote_is_deleted(usual, tmp_path):
    mine = tmp_path / "out" / ".sdft-resume" / "notes.pt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert run(tmp_path / "out", *usual, "--save-every", "0") == 0
    assert [path.name for path in mine.parent.iterdir()] == ["notes.pt"]


@pytest.mark.parametrize("lr, steps", [("10", 7), ("100", 2)], ids=["held out", "not finite"])
def test_a_training_that_ends_early_does_so_at_the_same_step(lr, steps, usual, tmp_path,
                                                             monkeypatch):
    """KeepBest ends it; its stage is finished then, and the code that of a failed training."""
    options = *usual, "--lr", lr, "--steps", "9"
    assert run(tmp_path / "whole", *options) == 1
    for saves in (5, 2):  # in the training, and after it went on
        run_until(monkeypatch, saves, tmp_path / "broken", *options, "--save-every", steps - 1)
    assert run(tmp_path / "broken", *options) == 1
    assert left_by(tmp_path / "broken") == left_by(tmp_path / "whole")
    assert len(left_by(tmp_path / "whole")[0]) == steps


# ------------------------------------------------------------------------------- real processes

def start(out, usual, *more, before=lambda: None):
    return launch(["--out", out, *QUICK, *usual, *more], f"{out}.log", before)


def wait_for(process, path, lines):
    until = time.monotonic() + 60
    while process.exitcode is None and time.monotonic() < until:
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_who_is_asked_to_stop_saves_first(which, usual, tmp_path):
    """Also where a shell has it ignored, as it has Ctrl-C of what runs in the background."""
    out = tmp_path / "out"
    process = start(out, usual, before=lambda: signal.signal(which, signal.SIG_IGN))
    wait_for(process, out / "metrics.jsonl", 5)
    os.kill(process.pid, which)
    process.join(60)
    said = Path(f"{out}.log").read_text()
    assert process.exitcode == 1 and "Traceback" not in said
    line, = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line == (f"error: interrupted; the same command goes on from {out / '.sdft-resume'}; "
                    "no student was written")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    state = resume.read(out / ".sdft-resume" / "middle-0.pt")["memory"]
    assert state["step"] == len(lines) == len(state["lines"])


def test_who_is_asked_to_stop_between_trainings_leaves_at_once(usual, tmp_path, monkeypatch):
    """What is finished is saved; a student that is being trained to its end is, too."""
    out = tmp_path / "out"

    def asked(*args, real, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)
    for owner, name, saved in ((train, "measure", ["run.pt"]), (
            train.KeepBest, "restore", ["00.pt", "01.pt", "02.pt", "03.pt", "middle-0.pt"])):
        real = getattr(owner, name)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *args, real=real, **kw: asked(*args, real=real, **kw))
            process = start(out, usual, "--steps", 2)
            process.join(60)
        assert process.exitcode == 1 and "Traceback" not in Path(f"{out}.log").read_text()
        assert set(saved) <= {path.name for path in (out / ".sdft-resume").iterdir()}


def test_killed_ten_times_at_random_moments_it_goes_on_to_the_same_end(usual, tmp_path):
    whole, broken, draw = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    began = time.monotonic()
    start(whole, usual).join()
    length, kills = time.monotonic() - began, 0
    while kills < 10:
        process = start(broken, usual)
        process.join(draw.uniform(0.1, 0.8) * length)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:  # it came to its end: begin again
            assert process.exitcode == 0 and left_by(broken) == left_by(whole)
            shutil.rmtree(broken)
    process = start(broken, usual)
    process.join()
    assert process.exitcode == 0 and left_by(broken) == left_by(whole)
    assert not re.search("Traceback", Path(f"{broken}.log").read_text())
