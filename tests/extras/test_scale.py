"""Two processes on one CPU give the numbers of one; AdamW's moments in bfloat16.

The processes are forks of this one, which are told what torchrun would tell them.
"""
import json
import os
import random
import time

import pytest
import torch
from conftest import launch, launch_two, make_folder

import sdft
import train
from extras.scale import CompactAdamW

QUICK = ("--with scale --steps 4 --batch-size 4 --micro-batch 2 --rollout-tokens 5 --eval-tokens 4 "
         "--eval-limit 5 --cka-samples 5 --group-size 16 --teacher-check 3 --calibration 4 --lr "
         "1e-3 --dtype float32").split()


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Options of a run of a tiny model on sums, which takes a second."""
    root = tmp_path_factory.mktemp("usual")
    (root / "sums.jsonl").write_text("".join(
        json.dumps({"prompt": f"{i} + {i}?", "response": f"{2 * i}"}) + "\n" for i in range(60)))
    (root / "text.txt").write_text("The sum of two numbers is a number. " * 60)
    return ["--model", make_folder(root / "llama"), "--data", root / "sums.jsonl",
            "--text", root / "text.txt"]


@pytest.fixture(autouse=True)
def torchrun_keeps_the_store(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")


def run(start, out, *more):
    """(exit codes, what was said) of the processes that start() starts."""
    log = out.with_suffix(".log")
    started = start([*QUICK, "--out", out, *more], log)
    started = started if isinstance(started, list) else [started]
    for process in started:
        process.join(60)
    said = [path.read_text() for path in sorted(log.parent.glob(f"{log.name}*"))]
    return [process.exitcode for process in started], "".join(said)


def read(out):
    """results.json, and metrics.jsonl by column."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    columns = {name: [line.get(name, 0) for line in lines] for name in lines[0] | lines[-1]}
    return json.loads((out / "results.json").read_text()), columns


@pytest.mark.parametrize("options", [
    [], ["--train-embeddings", "--adam-dtype", "bfloat16", "--degrade", "wanda2:4,nf4",
         "--loss", "jsd"],  # whose loss is not its KL: no process may take one for the other
    ["--lora", "4", "--gradient-checkpointing", "--eval-limit", "1", "--micro-batch", "1"],
    ["--forget", "tooluse", "--forget-steps", "2", "--expert-steps", "2", "--recover", "kd,sft"]],
    ids=["usual", "all weights", "lora", "forgetting"])
def test_two_processes_give_the_numbers_of_one(options, usual, tmp_path):
    """Losses and gradient norms to 1e-4, CKA to 1e-5: the order of float32 sums is all that
    differs."""
    codes, said = run(launch, tmp_path / "one", *usual, *options)
    assert codes == [0], said
    for name, more in (("two", []), ("sharded", ["--shard"])):
        codes, said = run(launch_two, tmp_path / name, *usual, *options, *more)
        assert codes == [0, 0], said
        assert said.count("recovered fraction") == 1  # one of them speaks
        same_numbers(tmp_path / name, tmp_path / "one")
        names = [sorted(str(path.relative_to(tmp_path / out)) for path in (tmp_path / out).rglob("*"))
                 for out in (name, "one")]
        assert names[0] == names[1]


def same_numbers(out, alone):
    (two, lines), (one, right) = read(out), read(alone)
    assert two["environment"]["processes"] == 2 and one["environment"]["processes"] == 1
    assert lines["tokens"] == right["tokens"]
    for key in ("loss", "kl", "grad_norm"):
        assert lines[key] == pytest.approx(right[key], rel=1e-4), (out, key)
    for stage, guard in one["guard"].items():
        for check, expected in zip(two["guard"][stage]["checks"], guard["checks"], strict=True):
            assert check == pytest.approx(expected, rel=1e-4)
    for stage, metrics in one["stages"].items():
        assert two["stages"][stage] == pytest.approx(metrics, rel=1e-4), (out, stage)
    for level, stages in one["cka"].items():
        for stage, kinds in stages.items():
            for kind, values in kinds.items():
                where = out, level, stage, kind
                assert two["cka"][level][stage][kind] == pytest.approx(values, abs=1e-5), where
