"""What a fork adds in a few lines goes through a whole run: a loss, a damage, a task, a head."""
import inspect
import json
from functools import partial

import pytest
import torch
from conftest import slopes

import damage
import data
import fast
import model
import quant
import sdft
import train
from model import GPT

pytestmark = pytest.mark.usefixtures("no_picture")
QUICK = ("--steps 3 --batch-size 4 --micro-batch 2 --rollout-tokens 6 --eval-tokens 4 "
         "--eval-limit 6 --cka-samples 5 --group-size 16 --lr 1e-3 --dtype float32")


def job(folder, out, options):
    """A whole run: results.json, and the lines of metrics.jsonl."""
    argv = f"--model {folder} --out {out} {QUICK} {options}".split()
    assert train.main(argv) == 0
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return json.loads((out / "results.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture
def calls(monkeypatch):
    """How often each function of fast.py was called."""
    found = dict.fromkeys(("score", "backward", "generate"), 0)

    def counted(name, function):
        def count(*args, **kwargs):
            found[name] += 1
            return function(*args, **kwargs)
        return count
    for name in found:
        monkeypatch.setattr(fast, name, counted(name, getattr(fast, name)))
    return found


# ------------------------------------------------------------------- a loss, a damage and a task

def variation(student_logits, teacher_logits, mask):
    """Half the sum of |p_S - p_T|."""
    distance = (student_logits.softmax(-1) - teacher_logits.softmax(-1)).abs().sum(-1) / 2
    return (distance * mask).sum() / mask.sum()


def shrink(student, match, c, sequences):
    """shrink10: every linear of the blocks, by a tenth."""
    linears = quant.block_linears(student)
    for linear in linears:
        linear.weight.data *= 1 - int(match["percent"]) / 100
    return {"linears_shrunk": len(linears), "examples_seen": len(sequences)}


def doubles():
    """Twice a number; the first twenty are held out."""
    def example(n):
        return data.Example(f"Twice {n}?", f"It is {2 * n}.", data.contains(str(2 * n)))
    return data.Task("doubles", [example(n) for n in range(20, 60)],
                     {"held_out": [example(n) for n in range(20)]})


@pytest.fixture
def fork(monkeypatch):
    """This repository with the three; the entry of each is one line more."""
    monkeypatch.setitem(sdft.LOSSES, "variation", variation)
    monkeypatch.setitem(sdft.LOSSES, "jsd25", partial(sdft.jsd, beta=0.25))
    monkeypatch.setitem(damage.DAMAGES, r"shrink(?P<percent>\d+)", shrink)
    monkeypatch.setitem(data.TASKS, "doubles", doubles)


def test_an_addition_takes_at_most_ten_lines():
    for addition in (variation, shrink, doubles):
        assert len(inspect.getsource(addition).splitlines()) < 10


def test_a_loss_a_damage_and_a_task_go_through_a_whole_run(fork, folder, tmp_path, calls, capsys):
    options = "--loss variation --degrade int4,shrink10 --calibration 8 --data doubles,text"
    found, steps = job(folder, tmp_path / "fast", options)
    assert all(calls.values()) and calls["backward"] == 3 * 2  # micro-batches
    assert found["environment"]["damage"] == {
        "linears_shrunk": 14, "examples_seen": 8, "weights_quantized": 18_432}
    assert set(found["stages"]["healthy"]) == {"doubles_held_out", "perplexity"}
    assert found["stages"]["degraded"]["perplexity"] != found["stages"]["healthy"]["perplexity"]
    assert found["stages"]["recovered"]["perplexity"] != found["stages"]["degraded"]["perplexity"]
    assert all(0 < line["loss"] < 1 and line["grad_norm"] > 0 for line in steps)
    said = capsys.readouterr().out
    assert "damage int4,shrink10: 14 linears shrunk, 8 examples seen, 18,432 weights" in said
    _, plain = job(folder, tmp_path / "plain", options + " --plain")
    for key in ("loss", "kl", "grad_norm"):
        assert [s[key] for s in steps] == pytest.approx([s[key] for s in plain], rel=1e-4), key


def test_the_three_are_offered_and_checked_like_all_others(fork, folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    assert "jsd,variation,jsd25" in capsys.readouterr().out
    before = f"--model {folder} --out {tmp_path}/out {QUICK} --degrade".split()
    assert train.main([*before, "shrink100"]) == 2
    assert train.main([*before, "shrink1,shrink2"]) == 2
    assert "shrink100 would leave nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_of_a_fork_stays_behind():
    assert list(sdft.LOSSES) == ["forward_kl", "reverse_kl", "jsd"]
    assert list(data.TASKS) == ["science", "tooluse", "text", "instructions"]
    assert len(damage.DAMAGES) == 3


def test_a_loss_with_an_argument_of_its_own(fork, folder, tmp_path, calls, monkeypatch):
    """The first logged loss is the mean over the first rollouts, by the formula in sdft.py."""
    _, steps = job(folder, tmp_path / "run", "--loss jsd25 --steps 1")
    assert all(calls.values())
    seen = []

    def spied(student_logits, teacher_logits, mask):
        value = sdft.jsd(student_logits, teacher_logits, mask, 0.25)
        if torch.is_grad_enabled():  # else it is the guard's
            seen.append((value.item(), len(mask)))
        return value
    monkeypatch.setitem(sdft.LOSSES, "jsd25", spied)
    job(folder, tmp_path / "again", "--loss jsd25 --steps 1")
    tokens = sum(n for _, n in seen)
    assert steps[0]["tokens"] == tokens
    by_hand = sum(value * n for value, n in seen) / tokens
    assert steps[0]["loss"] == pytest.approx(by_hand, rel=1e-4)


# ----------------------------------------------------------------------------------------- a head

SCALE = 3.0
plain_head = GPT.head


def scaled_head(self, x):
    """Logits three times as large."""
    return SCALE * plain_head(self, x)


class Scaled(GPT):
    """A fork that adds a class of its own."""

    head = scaled_head


@pytest.fixture(params=["subclass", "edited"])
def forked(request, folder, monkeypatch):
    """A model whose head is another: of a class of its own, or GPT's own, edited."""
    student = GPT.from_pretrained(folder).eval()
    if request.param == "edited":
        monkeypatch.setattr(GPT, "head", scaled_head)
    else:
        student.__class__ = Scaled
    return student


@pytest.mark.parametrize("generate", [model.generate, fast.generate])
def test_a_forks_head_is_what_a_rollout_samples_from(generate, forked, folder):
    """Logits three times as large at temperature 1.5 are those of the plain head at 0.5."""
    prompts = [list(range(5, 5 + n)) for n in (4, 9, 9)]

    def say(student, temperature):
        generator = torch.Generator().manual_seed(0)
        return generate(student, prompts, 12, temperature, generator=generator)
    scaled = say(forked, 1.5)
    unscaled = GPT.from_pretrained(folder).eval()
    unscaled.head = partial(plain_head, unscaled)
    with torch.no_grad():
        assert torch.equal(forked.head(torch.ones(1, 32)), 3 * unscaled.head(torch.ones(1, 32)))
    generator = torch.Generator().manual_seed(0)
    assert scaled == model.generate(unscaled, prompts, 12, 0.5, generator=generator)


@pytest.mark.parametrize("backward", [sdft.backward, fast.backward])
@pytest.mark.parametrize("loss", sdft.LOSSES)
@pytest.mark.parametrize("embeddings", [False, True])
def test_a_forks_head_is_what_the_loss_is_taken_through(backward, loss, embeddings, forked):
    """Value, slope, and the gradient of the head, by autograd through all logits at once."""
    loss = sdft.LOSSES[loss]
    w = forked.embed_tokens.weight.requires_grad_(embeddings)
    s, t = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    leaf = s.clone().requires_grad_()
    value = loss(forked.head(leaf), forked.head(t).detach(), torch.ones(10)) * 10 / 25
    value.backward()
    expected = w.grad
    values, slope, found = slopes(backward, loss, forked, s, forked, t, 25)
    assert values[0].item() == pytest.approx(value.item(), rel=1e-4)
    torch.testing.assert_close(slope, leaf.grad, atol=1e-6, rtol=1e-4)
    if embeddings:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_a_run_with_a_forks_head_is_the_plain_one(folder, tmp_path, monkeypatch, calls):
    """With GPT.head edited, the default run samples from, and trains, what the plain one does."""
    monkeypatch.setattr(GPT, "head", scaled_head)
    found, steps = job(folder, tmp_path / "fast", "")
    assert all(calls.values())
    expected, plain = job(folder, tmp_path / "plain", "--plain")
    for key in ("tokens", "loss", "kl", "grad_norm"):
        assert [s[key] for s in steps] == pytest.approx([s[key] for s in plain], rel=1e-4), key
    for stage, values in expected["stages"].items():
        assert found["stages"][stage] == pytest.approx(values, rel=1e-4), stage
