"""Two processes on one CPU give the numbers of one; AdamW's moments in bfloat16.

The processes are forks of this one, which are told what torchrun would tell them.
"""
import json
import os
import random
import time

import pytest
import torch
import torch._dynamo  # each fork would import it again, in seconds
from conftest import launch, launch_two, make_folder, tiny

import sdft
import train
from extras import scale
from extras.scale import CompactAdamW

QUICK = ("--with scale --steps 3 --batch-size 4 --micro-batch 2 --rollout-tokens 5 --eval-tokens 4 "
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
def quick(monkeypatch):
    """Torchrun keeps the store of the processes, and no picture is drawn."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda *_: None)


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
    ["--lora", "4", "--gradient-checkpointing", "--eval-limit", "1", "--steps", "2"],
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
        files, expected = (sorted(path.relative_to(tmp_path / out)
                                  for path in (tmp_path / out).rglob("*")) for out in (name, "one"))
        assert files == expected


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


def test_a_sharded_run_that_keepbest_ends_writes_the_weights_of_before(usual, tmp_path):
    """All processes end with code 1, but not before process 0 has written."""
    far = *usual, "--steps", "2", "--lr", "1e9"
    assert run(launch, tmp_path / "one", *far)[0] == [1]
    codes, said = run(launch_two, tmp_path / "two", *far, "--shard")
    assert codes == [1, 1] and said.count("error: ") == 1 and "went back to step 0" in said
    one, two = ((tmp_path / name / "student" / "model.safetensors").read_bytes()
                for name in ("one", "two"))
    assert one == two


def test_a_process_without_held_out_prompts_goes_along(usual, tmp_path):
    """Of 12 rows one is held out, so one of two processes has none: sharded, it computes nothing,
    but with the other."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(usual[3].open().readlines()[:15]))
    for start, name, more in ((launch, "one", []), (launch_two, "two", ["--shard"])):
        codes, said = run(start, tmp_path / name, *usual, "--data", rows, "--steps", "1", *more)
        assert set(codes) == {0}, said
    same_numbers(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("mistake, says", [
    (["--batch-size", "3"], "2 processes cannot share --batch-size 3"),
    (["--model", "nowhere"], "nowhere"), (["--out", "/dev/null/out"], "--out /dev/null/out")])
def test_a_mistake_is_one_line_from_one_process(mistake, says, usual, tmp_path):
    codes, said = run(launch_two, tmp_path / "out", *usual, *mistake)
    line, = [line for line in said.splitlines() if "rror" in line]
    assert codes == [2, 2] and line.startswith("error: ") and says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mistake, says", [
    (["--shard"], "start the run by torchrun"),
    (["--adam-dtype", "float16"], "--adam-dtype takes")])
def test_a_mistake_of_one_process_is_one_line(mistake, says, usual, tmp_path, capsys):
    assert train.main([*QUICK, *map(str, usual), "--out", str(tmp_path / "out"), *mistake]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert says in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["whole", "sharded"])
def test_two_processes_that_are_broken_off_go_on_to_the_same_end(shard, usual, tmp_path):
    """To the last bit: as many processes add in one order. The first time one is asked to stop and
    takes the other with it; the second time one is killed."""
    whole, broken, draw = tmp_path / "whole", tmp_path / "broken", random.Random(len(shard))
    options = *usual, "--with", "resume", "--save-every", "2", "--steps", "7", *shard
    assert run(launch_two, whole, *options)[0] == [0, 0]
    lines = broken / "metrics.jsonl"
    for end in ("terminate", "kill"):
        lines.unlink(missing_ok=True)
        both = launch_two([*QUICK, "--out", broken, *options], tmp_path / "log")
        steps, until = draw.randint(2, 4), time.monotonic() + 60
        while time.monotonic() < until and not (
                lines.exists() and lines.read_text().count("\n") >= steps):
            time.sleep(0.02)
        getattr(both[1], end)()
        for process in both:
            process.join(60)
        assert both[0].exitcode == 1 and (broken / ".sdft-resume").exists()
    assert run(launch_two, broken, *options)[0] == [0, 0]
    found, right = ([json.loads(line) | {"seconds": 0} for line in
                     (out / "metrics.jsonl").read_text().splitlines()] for out in (broken, whole))
    assert found == right
    weights = [(out / "student" / "model.safetensors").read_bytes() for out in (broken, whole)]
    assert weights[0] == weights[1] and not os.path.exists(broken / ".sdft-resume")


def test_compact_adamw_is_torchs_adamw_and_in_bfloat16_stays_near():
    torch.manual_seed(0)
    start, slopes = torch.randn(50, 40), torch.randn(30, 50, 40) + 0.5

    def trained(make):
        p = torch.nn.Parameter(start.clone())
        optimizer = make([{"params": [p], "lr": 1e-2}], betas=sdft.BETAS, weight_decay=0.1)
        for g in slopes:
            p.grad = g.clone()
            optimizer.step()
        return p.detach() - start, optimizer.state[p]

    expected, _ = trained(sdft.AdamW)
    same, _ = trained(lambda *groups, **how: CompactAdamW(*groups, dtype=torch.float32, **how))
    near, state = trained(CompactAdamW)
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-6)
    assert 0 < (near - expected).norm() / expected.norm() < 0.01
    assert state["m"].dtype == state["v"].dtype == torch.bfloat16


def test_one_process_may_save_memory_too():
    c, _ = train.parse(["--with", "scale", "--gradient-checkpointing", "--adam-dtype", "bfloat16"])
    scale.attach(parts := train.PARTS | {"config": c})
    assert parts["ready"](tiny()).gradient_checkpointing and parts["optimizer"] is CompactAdamW
    assert parts["cached"] and parts["share"] is list
