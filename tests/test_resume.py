"""A run that is broken off goes on to the same end, to the last bit: its losses, weights, numbers.

Most runs here "die" by an exception as a checkpoint has been written; some are real processes that
are killed, whenever.
"""
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import GPT2, QWEN2, launch, make_folder
from safetensors import safe_open
from tqdm import tqdm

import resume
import train

pytestmark = pytest.mark.usefixtures("no_picture")
QUICK = ("--steps 7 --batch-size 4 --rollout-tokens 5 --eval-tokens 4 --eval-limit 4 --cka-samples "
         "4 --group-size 16 --teacher-check 2 --calibration 4 --lr 1e-3 --save-every 2").split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"llama": make_folder(root / "llama"), "gpt2": make_folder(root / "gpt2", **GPT2),
            "qwen2": make_folder(root / "qwen2", **QWEN2),
            "larger": make_folder(root / "larger", seed=3, d_ff=96)}


class Died(BaseException):
    """The process, at this point."""


def left_by(out):
    """What a finished run leaves that does not depend on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    r = json.loads((out / "results.json").read_text())
    numbers = {name: r[name] for name in ("stages", "change", "teacher", "cka", "cka_layers",
                                          "step", "items", "kl")}
    numbers["along"] = {stage: [p | {"seconds": 0} for p in points]
                        for stage, points in r["along"].items()}
    guard = {stage: {k: v for k, v in found.items() if k != "seconds"}
             for stage, found in r["guard"].items()}
    weights = {p.parent.name: p.read_bytes() for p in sorted(out.glob("student*/*.safetensors"))}
    return lines, numbers, guard, weights


def run(out, *options):
    return train.main(["--out", str(out), *QUICK, *map(str, options)])


RUNS = {
    "sdft": "--ema 0.1 --adam-dtype bfloat16", "kd and sft": "--recover kd,sft --keep last",
    "lora": "--lora 2 --dtype bfloat16",
    "compressed": "--model {gpt2} --degrade ffn50,wanda,nf4 --teacher healthy,base",
    "cka": "--watch cka --patience 3 --cka-weight 0.5",
    "along": "--measure-every 3 --interpolate 0.5 --recover own,sft --anchor 1",
    "forgetting": "--forget tooluse --forget-steps 3 --expert-steps 5 --plain",
    "bootstrap": "--model {qwen2} --bootstrap {larger} --expert-steps 5 --degrade int4"}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_dies_goes_on_to_the_same_end(name, folders, tmp_path, monkeypatch):
    """It dies as its fourth checkpoint is written, goes on, dies at a third, and goes on."""
    options = RUNS[name].format(**folders).split()
    options = options if "--model" in options else ["--model", folders["llama"], *options]
    assert run(tmp_path / "whole", *options) == 0
    for life in (4, 3):
        saves = iter(range(1, life + 1))

        def save_and_die(*state, save=resume.save, saves=saves, life=life):
            save(*state)
            if next(saves) == life:
                raise Died
        with monkeypatch.context() as dying, pytest.raises(Died):
            dying.setattr(resume, "save", save_and_die)
            run(tmp_path / "broken", *options)
    assert run(tmp_path / "broken", *options) == 0
    assert left_by(tmp_path / "broken") == left_by(tmp_path / "whole")
    left = {path.name for path in (tmp_path / "broken").iterdir()}
    assert left == {path.name for path in (tmp_path / "whole").iterdir()}
    assert "checkpoint" not in left and "results.json" in left


def test_another_run_is_refused_by_the_options_that_differ(folders, tmp_path, monkeypatch, capsys):
    out, model = tmp_path / "out", ["--model", folders["llama"]]
    with monkeypatch.context() as dying:
        dying.setattr(train, "teach", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(out, *model)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(out, *model, "--seed", "3", "--lora", "2") == 2
    error = capsys.readouterr().err
    assert "unfinished run with other --lora, --seed: go on" in error and "--no-resume" in error
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(out, *model, "--seed", "3", "--no-resume") == 0
    assert not (out / "checkpoint").exists()


def test_with_other_threads_it_goes_on_and_says_so(folders, tmp_path, monkeypatch, capsys):
    """float32 sums of several threads are in another order; of torch and the processor likewise."""
    options = tmp_path / "out", "--model", folders["llama"]
    with monkeypatch.context() as dying:
        dying.setattr(train, "teach", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*options)
    with monkeypatch.context() as rebooted:
        rebooted.setattr(torch, "get_num_threads", lambda: 7)
        assert run(*options) == 0
        line, = [line for line in capsys.readouterr().err.splitlines() if "begun with" in line]
        assert line == (f"{tmp_path}/out was begun with threads 1, now 7: it goes on, and its "
                        "numbers may be others in their last digits")
        assert run(*options) == 0  # it is finished
    environment = json.loads((tmp_path / "out" / "results.json").read_text())["environment"]
    assert environment["threads"] == 7 and environment["begun_on"]["threads"] == 1
    assert run(*options) == 0 and "holds this run, finished" in capsys.readouterr().out


def test_a_finished_run_says_so_and_leaves(folders, tmp_path, capsys):
    options = tmp_path / "out", "--model", folders["llama"]
    assert run(*options) == 0
    before = left_by(tmp_path / "out")
    (tmp_path / "out" / "student" / "mark").touch()
    assert run(*options) == 0
    assert "holds this run, finished: --no-resume does it again" in capsys.readouterr().out
    assert (tmp_path / "out" / "student" / "mark").exists()
    assert run(*options, "--no-resume") == 0 and left_by(tmp_path / "out") == before
    assert run(*options, "--seed", "1") == 0 and left_by(tmp_path / "out") != before


def test_save_every_0_writes_no_checkpoint(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "write", lambda *_: 1 / 0)
    assert run(tmp_path / "out", "--model", folders["llama"], "--save-every", "0") == 0


def test_two_runs_do_not_share_a_folder(folders, tmp_path, capsys):
    held = resume.lock(tmp_path / "out")
    assert run(tmp_path / "out", "--model", folders["llama"]) == 2
    assert "another run is at work in --out" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    os.close(held)
    assert run(tmp_path / "out", "--model", folders["llama"]) == 0


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_broken_checkpoint_is_said_in_one_line(damage, folders, tmp_path, monkeypatch, capsys):
    options = tmp_path / "out", "--model", folders["llama"]
    with monkeypatch.context() as dying:
        dying.setattr(train, "teach", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*options)
    state, = (tmp_path / "out" / "checkpoint").glob("*.safetensors")
    whole = state.read_bytes()
    state.write_bytes({"cut": whole[:-9], "empty": b"",
                       "other": (folders["llama"] / "model.safetensors").read_bytes()}[damage])
    assert run(*options) == 2
    assert "not a checkpoint of this project" in capsys.readouterr().err
    assert run(*options, "--no-resume") == 0


@pytest.mark.parametrize("content", ["", "{}", "[]", "7", '{"saves": 9}', '{"saves": "x"}'])
def test_a_broken_pointer_is_said_in_one_line(content, folders, tmp_path, capsys):
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint" / "latest.json").write_text(content)
    assert run(tmp_path / "out", "--model", folders["llama"]) == 2
    error = capsys.readouterr().err
    assert "not a checkpoint of this project" in error and error.count("\n") == 1


def test_other_weights_or_rows_are_another_run(folders, tmp_path, monkeypatch, capsys):
    """Of the same paths."""
    model, rows = make_folder(tmp_path / "model"), tmp_path / "tensor.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i}?", "response": f"{i}"}) + "\n"
                            for i in range(60)))
    options = tmp_path / "out", "--model", model, "--data", rows
    with monkeypatch.context() as dying:
        dying.setattr(train, "teach", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*options)
    make_folder(model, seed=8)
    rows.write_text(rows.read_text().replace('"response": "7"', '"response": "8"'))
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert "other " in error and "inputs_sha256, model_sha256" in error
    assert run(*options, "--no-resume") == 0


def test_a_run_that_the_guard_ended_is_finished_with_its_code(folders, tmp_path):
    options = tmp_path / "out", "--model", folders["llama"], "--lr", "1e9"
    assert run(*options) == 1 and run(*options) == 1


def test_a_full_disk_keeps_the_last_checkpoint_and_counts_no_line_twice(folders, tmp_path,
                                                                      monkeypatch, capsys):
    options = tmp_path / "out", "--model", folders["llama"]
    assert run(tmp_path / "whole", *options[1:]) == 0

    def write(path, state, real=resume.write):
        if path.name == "recovered.safetensors":
            raise OSError(28, "No space left on device")
        real(path, state)

    def measure(*asked):
        raise Died
    with monkeypatch.context() as full, pytest.raises(Died):
        full.setattr(resume, "write", write)
        full.setattr(train, "results_of", measure)
        run(*options)
    assert "No space left" in capsys.readouterr().err
    assert run(*options) == 0
    assert left_by(tmp_path / "out") == left_by(tmp_path / "whole")


def test_results_without_their_student_are_not_finished(folders, tmp_path):
    options = tmp_path / "out", "--model", folders["llama"]
    assert run(*options) == 0
    (tmp_path / "out" / "student" / "model.safetensors").unlink()
    assert run(*options) == 0
    assert (tmp_path / "out" / "student" / "model.safetensors").exists()


def test_a_state_comes_back_as_it_was(tmp_path):
    """Another reader of safetensors reads it, too."""
    state = {"a": torch.randn(3, 4), "b": [torch.arange(5), {"c": torch.tensor(1.5).bfloat16()}],
             "n": 0.1 + 0.2, "nan": float("inf"), "text": "½", "none": None, "empty": torch.ones(0),
             "rows": torch.randn(4, 6).T, "bytes": torch.zeros(3, dtype=torch.uint8)}
    resume.write(tmp_path / "state.safetensors", state)
    found = resume.read(tmp_path / "state.safetensors")
    assert found.keys() == state.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    for name in ("n", "nan", "text", "none"):
        assert found[name] == state[name]
    pairs = [(found[k], state[k]) for k in ("a", "empty", "rows", "bytes")]
    pairs += [(found["b"][0], state["b"][0]), (found["b"][1]["c"], state["b"][1]["c"])]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    with safe_open(tmp_path / "state.safetensors", framework="np") as file:
        assert (file.get_tensor("0") == state["a"].numpy()).all()


# ------------------------------------------------------------------------------- real processes

def start(out, folder, *more, before=lambda: None):
    options = "--out", out, "--model", folder, *QUICK, "--steps", 25, *more
    return launch(options, f"{out}.log", before)


def said(out):
    return Path(f"{out}.log").read_text()


def wait_for(process, path, lines):
    until = time.monotonic() + 90
    while process.exitcode is None and time.monotonic() < until:
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.02)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "term"])
def test_who_is_asked_to_stop_saves_first(which, folders, tmp_path):
    """Also where a shell has it ignored, as it has Ctrl-C of what runs in the background."""
    out = tmp_path / "out"
    process = start(out, folders["llama"], before=lambda: signal.signal(which, signal.SIG_IGN))
    wait_for(process, out / "metrics.jsonl", 5)
    os.kill(process.pid, which)
    process.join(60)
    assert process.exitcode == 1 and "Traceback" not in said(out)
    line, = [line for line in said(out).splitlines() if line.startswith("error: ")]
    assert line == f"error: interrupted; the same command goes on from {out / 'checkpoint'}"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint", "metrics.jsonl"]
    steps = len((out / "metrics.jsonl").read_text().splitlines())
    latest = json.loads((out / "checkpoint" / "latest.json").read_text())["saves"]
    state = resume.read(out / "checkpoint" / f"{latest}-0.safetensors")
    assert state["training"]["memory"]["step"] == steps == len(state["lines"])


@pytest.mark.parametrize("module, name, more", [
    (train, "write_results", ()), (train, "save_student", ()), (resume, "end", ()),
    (train, "save_student", ("--save-every", 0))])
def test_who_is_asked_to_stop_while_it_writes_what_came_of_it_writes_all_of_it(
        module, name, more, folders, tmp_path, monkeypatch):
    """What was measured is not thrown away; the same command then finds it finished."""
    function, out = getattr(module, name), tmp_path / "out"

    def asked(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return function(*args)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, asked)
        process = start(out, folders["llama"], "--steps", 2, *more)
        process.join(60)
    assert process.exitcode == 0 and "Traceback" not in said(out)
    assert "what came of this run is written first" in said(out) and f"wrote {out}/" in said(out)
    assert sorted(path.name for path in out.iterdir()) == [
        "metrics.jsonl", "results.json", "student"]
    assert run(out, "--model", folders["llama"], "--steps", 2, *more) == 0
    assert (out / "student" / "model.safetensors").exists()


def test_who_is_asked_to_stop_after_the_last_step_saves_the_trained_student(folders, tmp_path,
                                                                           monkeypatch):
    out = tmp_path / "out"

    def asked(*args, keep_best=train.keep_best):
        os.kill(os.getpid(), signal.SIGINT)
        keep_best(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, "keep_best", asked)
        process = start(out, folders["llama"], "--steps", 2)
        process.join(60)
    assert process.exitcode == 1 and "this step is finished and saved first" in said(out)
    latest = json.loads((out / "checkpoint" / "latest.json").read_text())["saves"]
    state = resume.read(out / "checkpoint" / f"{latest}-0.safetensors")
    assert state["trained"] == ["recovered"] and state["training"] is None


def test_who_is_asked_twice_leaves_at_once_and_goes_on(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def asked(*_):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_student", asked)
        process = start(out, folders["llama"], "--no-resume")
        process.join(60)
    assert process.exitcode == 1 and "Traceback" not in said(out)
    assert (f"error: interrupted; the same command without --no-resume goes on from {out}/"
            "checkpoint\n") in said(out)
    assert not list(out.rglob("*.part")) and not (out / "student" / "model.safetensors").exists()
    for path in (out, tmp_path / "whole"):
        process = start(path, folders["llama"])
        process.join(60)
    assert left_by(out) == left_by(tmp_path / "whole")


def test_a_signal_to_the_tests_ends_them_and_not_a_run():
    with resume.Interrupt().caught(), pytest.raises(pytest.exit.Exception):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def test_who_is_killed_while_it_draws_its_bar_holds_up_no_other(folders, tmp_path):
    def killed():
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    tqdm.get_lock()  # the tests' own, which is there as soon as one of them has drawn a bar
    start(tmp_path / "killed", folders["llama"], before=killed).join()
    process = start(tmp_path / "next", folders["llama"])
    process.join(60)
    assert process.exitcode == 0


KILLS = int(os.environ.get("KILLS", 3))


def test_killed_at_random_moments_it_goes_on_to_the_same_end(folders, tmp_path):
    """KILLS=30 python -m pytest tests/test_resume.py -k random is the long form."""
    whole, broken, draw = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    began = time.monotonic()
    start(whole, folders["llama"]).join()
    length, kills = time.monotonic() - began, 0
    while kills < KILLS:
        process = start(broken, folders["llama"])
        process.join(draw.uniform(0, 1) * length)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:  # it came to its end: begin again
            assert process.exitcode == 0 and left_by(broken) == left_by(whole)
            shutil.rmtree(broken)
    process = start(broken, folders["llama"])
    process.join()
    assert process.exitcode == 0 and left_by(broken) == left_by(whole)
