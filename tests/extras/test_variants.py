"""extras/variants.py: each further way of recovery against autograd, or against its own formula."""
import copy
import importlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ragged, tiny

import train
from cka import linear_cka
from model import frozen_copy, generate
from sdft import Prompt, forward_kl, micro_batches, score

variants = pytest.importorskip("extras.variants")
OPTIONS = {name: default for name, (default, _) in variants.OPTIONS.items()}


def noisy(model, scale=0.3):
    """A damaged copy: every weight matrix of the blocks with noise on it."""
    student, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for p in student.layers.parameters():
        if p.dim() == 2:
            p.data += scale * p.data.std() * torch.randn(p.shape, generator=generator)
    return student


def gradients_of(model):
    """{name: each parameter's gradient of the latest step, before it is clipped}."""
    kept = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(
            lambda p, name=name: kept.__setitem__(name, p.grad.clone()))
    return kept


def batch_of(rows=5):
    return [Prompt(p, [7, *p], answer) for p, answer in zip(ragged(rows, 1), ragged(rows, 2))]


def taught(way, student, teacher, batches, monkeypatch, rollout=None, stop=None, **options):
    """What was logged, after this way of recovery."""
    monkeypatch.setitem(train.PARTS, "config", SimpleNamespace(**OPTIONS | options))
    lines, memory = [], {"step": 0}
    loss, backward = forward_kl, train.PARTS["backward"]
    way(student, teacher, batches, rollout, loss=loss, backward=backward, score=score, share=list,
        micro_batch=2, stop=stop, memory=memory, log=lines.append, progress="", lr=1e-2)
    return lines


def equal(gradients, model):
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_skip_leaves_out_the_first_tokens_of_each_answer(monkeypatch):
    """An answer that is no longer counts with its last token."""
    teacher = tiny()
    student = noisy(teacher)
    plain, gradients = copy.deepcopy(student), gradients_of(student)
    batch = [Prompt([3, 4, 5], [7, 3, 4, 5], [8, 9, 10, 11]), Prompt([6, 5], [6, 5], [12, 13])]
    line, = taught(variants.skip, student, teacher, [batch], monkeypatch, skip_tokens=2,
                   rollout=lambda *_: [p.answer for p in batch])
    parts = []
    for (prompt, shown, answer), kept in zip(batch, ([2, 3], [1])):
        s = plain(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]
        t = teacher(torch.tensor([shown + answer]))[0, len(shown) - 1:-1]
        parts.append((s[kept], t[kept]))
    expected = forward_kl(*map(torch.cat, zip(*parts)), torch.ones(3))
    expected.backward()
    assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)
    equal(gradients, plain)


@pytest.mark.parametrize("balance", [False, True])
def test_cka_in_the_loss_adds_its_gradient(balance, monkeypatch):
    """KL + w (1 - CKA), or KL + w sg(KL / (1 - CKA)) (1 - CKA), for each micro-batch."""
    teacher, answers, batch = tiny(), ragged(5, seed=4), batch_of()
    student = noisy(teacher)
    plain, gradients = copy.deepcopy(student), gradients_of(student)
    taught(variants.with_cka, student, teacher, [batch], monkeypatch, lambda *_: answers,
           cka_weight=0.7, cka_balance=balance)
    tokens = sum(map(len, answers))
    for prompts, part in micro_batches(batch, answers, 2):
        ours = score(plain, [p.student for p in prompts], part, hidden=True)
        theirs = score(teacher, [p.teacher for p in prompts], part, hidden=True)
        share = ours.size(1) / tokens
        kl = share * forward_kl(plain.head(ours[-1]), teacher.head(theirs[-1]),
                                torch.ones(ours.size(1)))
        distance = torch.stack([1 - linear_cka(a, b) for a, b in zip(ours, theirs)]).mean()
        if ours.size(1) < 3:
            distance = distance * 0
        (kl + 0.7 * distance * ((kl / (distance + 1e-6)).detach() if balance else share)).backward()
    equal(gradients, plain)


def test_an_anchor_adds_its_kl_to_the_gradient_of_sft(monkeypatch):
    teacher, batch = tiny(), batch_of(3)
    student = noisy(teacher)
    plain, gradients = copy.deepcopy(student), gradients_of(student)
    line, = taught(variants.anchor, student, teacher, [batch], monkeypatch, anchor_weight=0.7)
    s, t = (torch.cat([m(torch.tensor([p + a]))[0, len(p) - 1:-1] for p, _, a in batch])
            for m in (plain, teacher))
    targets = torch.tensor([token for *_, answer in batch for token in answer])
    expected = F.cross_entropy(s, targets) + 0.7 * forward_kl(s, t, torch.ones(len(s)))
    expected.backward()
    assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)
    equal(gradients, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ema_teacher_follows_the_student_and_the_other_stays(dtype, monkeypatch):
    """phi <- r theta + (1 - r) phi at each step, also by steps that bfloat16 cannot hold."""
    seen, kept = [], frozen_copy
    monkeypatch.setattr(variants, "frozen_copy", lambda *a: seen.append(kept(*a)) or seen[-1])
    student, teacher = tiny(1), tiny().to(dtype)
    before, thetas = teacher.norm.weight.float().clone(), []
    rollout = partial(generate, max_new_tokens=4, temperature=0)
    taught(variants.ema, student, teacher, [batch_of(2)] * 10, monkeypatch, rollout, ema=0.005,
           stop=lambda: thetas.append(student.norm.weight.detach().clone()))
    phi = before
    for theta in thetas:
        phi = phi.lerp(theta, 0.005)
    tolerance = 2 ** -8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(seen[0].norm.weight.float(), phi, rtol=tolerance, atol=0)
    assert torch.equal(teacher.norm.weight.float(), before)
    with pytest.raises(ValueError, match="own shape"):
        taught(variants.ema, student, tiny(d_ff=48), [batch_of(2)], monkeypatch, rollout)


def test_training_ends_once_cka_has_fallen(monkeypatch):
    """By the estimator on the last layer; a student that only moves away stops at the second."""
    student, teacher = tiny(), tiny()
    with pytest.MonkeyPatch.context() as patch:
        values = iter([0.9, 0.8])
        patch.setattr(variants.cka, "sample_level",
                      lambda *_: {"linear_debiased": [0.0, next(values)]})
        lines = taught(partial(variants.stop_by_cka, every=2), student, teacher,
                       [batch_of(2)] * 9, monkeypatch, partial(generate, max_new_tokens=4))
    assert len(lines) == 4


@pytest.mark.parametrize("way", ["ema", "skip", "cka", "stop", "anchor", "own"])
def test_a_whole_run_by_the_value_alone(way, folder, tmp_path):
    """A name in --recover brings the extra; the student comes nearer to what is watched."""
    importlib.reload(variants)
    argv = ["--model", folder, "--out", tmp_path, "--recover", way, "--steps", 4, "--batch-size", 4,
            "--eval-limit", 4, "--eval-tokens", 4, "--rollout-tokens", 4, "--teacher-check", 2,
            "--cka-samples", 4, "--group-size", 16, "--lr", "3e-3", "--dtype", "float32"]
    assert train.main([*map(str, argv)]) == 0
    assert (tmp_path / "student" / "model.safetensors").exists()
