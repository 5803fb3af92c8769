"""Two processes on one CPU: the same numbers as one process, and what happens when one is killed.

The run that is killed is started by torchrun; what compares numbers alone are two forks of this
process, told what torchrun would tell them.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import launch, launch_two

import parallel

ROOT = Path(parallel.__file__).parent
pytestmark = pytest.mark.usefixtures("no_picture")
QUICK = ["--batch-size", "4", "--micro-batch", "2", "--rollout-tokens", "6",
         "--eval-tokens", "4", "--eval-limit", "7", "--cka-samples", "5", "--group-size", "16",
         "--lr", "1e-3", "--dtype", "float32"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(start, out, *more):
    """(exit codes, what was said) of the processes that start() starts."""
    log = out.with_suffix(".log")
    started = start([*QUICK, "--out", out, *more], log)
    started = started if isinstance(started, list) else [started]
    for process in started:
        process.join(120)
    said = [path.read_text() for path in sorted(log.parent.glob(f"{log.name}*"))]
    return [process.exitcode for process in started], "".join(said)


def read(out):
    """results.json, and metrics.jsonl by column."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    columns = {name: [line[name] for line in lines] for name in lines[0]}
    return json.loads((out / "results.json").read_text()), columns


@pytest.mark.parametrize("options", [
    ["--cka-samples", "4"],
    ["--train-embeddings", "--adam-dtype", "bfloat16", "--degrade", "wanda2:4,nf4",
     "--loss", "jsd"],  # whose loss is not its KL: no process may take one for the other
    ["--lora", "16", "--gradient-checkpointing", "--eval-limit", "1", "--loss", "jsd"],
    ["--ema", "0.05", "--degrade", "magnitude30"],  # no grid: a sum may move a weight on one
    ["--plain", "--ema", "0.05", "--train-embeddings", "--loss", "jsd"]],
    ids=["default", "all weights", "lora", "ema", "plain"])
def test_two_processes_give_the_numbers_of_one(options, folder, tmp_path):
    """Losses and gradient norms to 1e-4, metrics to 1e-4, CKA to 1e-5: the order of float32 sums is
    all that differs."""
    command = "--model", folder, "--steps", "4", *options
    assert run(launch, tmp_path / "one", *command)[0] == [0]
    for name, more in (("data parallel", []), ("sharded", ["--shard"])):
        codes, said = run(launch_two, tmp_path / name, *command, *more)
        assert codes == [0, 0], said
        assert said.count("recovered fraction") == 1  # one of them speaks
        same_numbers(tmp_path / name, tmp_path / "one")
        student = tmp_path / name / "student"
        assert sorted(p.name for p in student.iterdir()) == [
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def same_numbers(out, alone):
    (two, lines), (one, right) = read(out), read(alone)
    assert two["environment"]["processes"] == 2 and one["environment"]["processes"] == 1
    assert lines["tokens"] == right["tokens"]
    for key in ("loss", "kl", "grad_norm"):
        assert lines[key] == pytest.approx(right[key], rel=1e-4), (out, key)
    for stage, metrics in one["stages"].items():
        assert two["stages"][stage] == pytest.approx(metrics, rel=1e-4), (out, stage)
    for level, stages in one["cka"].items():
        for stage, kinds in stages.items():
            for kind, values in kinds.items():
                where = out, level, stage, kind
                assert two["cka"][level][stage][kind] == pytest.approx(values, abs=1e-5), where


@pytest.mark.parametrize("mistake, says", [
    (["--model", "nowhere"], "nowhere"), (["--batch-size", "3"], "2 processes"),
    (["--out", "/dev/null/out"], "--out /dev/null/out"), (["--stepz", "1"], "stepz"),
    (["--moments", "float32"], "--adam-dtype"), (["--steps", "0"], "--steps")])
def test_a_mistake_is_one_line_from_one_process(mistake, says, folder, tmp_path):
    codes, said = run(launch_two, tmp_path / "out", "--model", folder, *mistake)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert codes[0] == 2 and len(lines) == 1 and says in lines[0], said
    assert not (tmp_path / "out").exists()


def test_variables_of_another_launcher_start_nothing(monkeypatch):
    """A container may say WORLD_SIZE of something else; torchrun says more."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parallel.start("cpu") == "cpu" and parallel.size() == 1 and parallel.first_to_speak()


def test_shares_are_everything_once_in_order(monkeypatch):
    for n, size in ((16, 2), (7, 3), (2, 5), (0, 2)):
        monkeypatch.setattr(parallel, "size", lambda size=size: size)
        shares = []
        for rank in range(size):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            shares.append(parallel.share(list(range(n))))
        assert sum(shares, []) == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def wait_for_steps(started, log, steps):
    """Return as the run has logged so many steps."""
    deadline = time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < steps:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def children(pid):
    """The processes that torchrun started, process 0 first."""
    return [int(i) for i in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("victim, more", [(0, []), (1, ["--shard", "--ema", "0.05"])],
                         ids=["data parallel", "sharded"])
def test_a_run_whose_peer_is_killed_says_so_in_one_line_and_goes_on_to_the_same_end(
        victim, more, folder, tmp_path):
    """To the last bit: as many processes add in one order."""
    options = ["--model", folder, "--steps", "25", "--save-every", "3", *more]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    command = [*TORCHRUN, "train.py", *map(str, [*QUICK, *options, "--out", broken])]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env=ENVIRONMENT)
    wait_for_steps(started, broken / "metrics.jsonl", 8)
    os.kill(children(started.pid)[victim], signal.SIGKILL)
    line, = [line for line in started.communicate(timeout=60)[1].splitlines()
             if line.startswith("error: ")]
    assert started.returncode and "another process of this run has died" in line
    assert f"the same command goes on from {broken}/checkpoint" in line
    assert sorted(p.name for p in broken.iterdir()) == ["checkpoint", "metrics.jsonl"]
    assert 8 <= (broken / "metrics.jsonl").read_text().count("\n") < 25
    for out in (broken, whole):
        assert run(launch_two, out, *options)[0] == [0, 0]
    found, right = ([json.loads(line) | {"seconds": 0} for line in
                     (out / "metrics.jsonl").read_text().splitlines()] for out in (broken, whole))
    assert found == right
    weights = [(out / "student" / "model.safetensors").read_bytes() for out in (broken, whole)]
    assert weights[0] == weights[1]


def test_a_run_that_the_guard_ends_writes_all_of_it_first(folder, tmp_path):
    """Only the process that writes says, by its exit code, that something went wrong: torchrun ends
    the others, and all the rest, when one has failed."""
    far = "--steps", "2", "--lr", "1e9"
    codes, said = run(launch_two, tmp_path / "out", "--model", folder, *far)
    assert codes == [1, 0] and "recovered: step" in said
    assert (tmp_path / "out" / "student" / "model.safetensors").exists()
