"""The losses worked by hand and against torch, score against each row alone, backward against
autograd, and whole recoveries."""
import copy
import gc
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    GPT2,
    QWEN2,
    QWEN3,
    SMOLLM3,
    peak_blocks,
    ragged,
    slopes,
    squared_distance,
    tiny,
)
from torch.distributions import Categorical, kl_divergence
from torch.nn.utils import parametrize

from model import generate
from quant import compute_in_, fake_quantize, quantize_
from sdft import (
    LOSSES,
    Prompt,
    alike,
    backward,
    forward_kl,
    jsd,
    micro_batches,
    recover,
    reverse_kl,
    score,
    sft,
)

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())

# One token, two words: p_T = (1/2, 1/2), p_S = (1/4, 3/4).
# KL(T||S) = 1/2 ln(2) + 1/2 ln(2/3) = 1/2 ln(4/3)       = 0.1438410
# KL(S||T) = 1/4 ln(1/2) + 3/4 ln(3/2) = 3/4 ln 3 - ln 2 = 0.1308120
# jsd(1/2), m = (3/8, 5/8):
#     1/2 [1/2 ln(4/3) + 1/2 ln(4/5)] + 1/2 [1/4 ln(2/3) + 3/4 ln(6/5)]   = 0.0338221
# jsd(1/4), m = (5/16, 11/16):
#     1/4 [1/2 ln(8/5) + 1/2 ln(8/11)] + 3/4 [1/4 ln(4/5) + 3/4 ln(12/11)] = 0.0260482
TEACHER, STUDENT = torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[1.0, 3.0]]).log()


def random_logits(n=12, v=7):
    """A flat student's and a peaked teacher's logits [n, v]; a mask [n] that leaves some out."""
    student, teacher = torch.randn(2, n, v, generator=torch.Generator().manual_seed(0))
    student, teacher = (student / 2).requires_grad_(), (2 * teacher).requires_grad_()
    return student, teacher, torch.arange(n) % 3 > 0


def noisy(model, scale=0.3):
    """A damaged copy: every weight matrix of the blocks with noise on it."""
    student, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for p in student.layers.parameters():
        if p.dim() == 2:
            p.data += scale * p.data.std() * torch.randn(p.shape, generator=generator)
    return student


def quantized(model, scheme="int3", **grid):
    """A copy on a grid."""
    student = copy.deepcopy(model)
    quantize_(student, scheme, group_size=16, **grid)
    return student


def last_gradients(model):
    """{name: each parameter's accumulated gradient of the latest step, before it is clipped}."""
    kept = {}

    def keep(p, name):
        kept[name] = p.grad.clone()
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(partial(keep, name=name))
    return kept


def rollout(tokens=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return partial(generate, max_new_tokens=tokens, generator=generator, eos_id=None)


def batches_of(steps, rows=4, teacher_prefix=()):
    prompts = [Prompt(p, [*teacher_prefix, *p]) for p in ragged(steps * rows, seed=3)]
    return [prompts[i:i + rows] for i in range(0, len(prompts), rows)]


def answered(rows=4):
    """A batch with the experts' answers."""
    pairs = zip(ragged(rows, seed=1), ragged(rows, seed=2))
    return [Prompt(p, [7, *p], answer) for p, answer in pairs]


# -------------------------------------------------------------------------------------- the losses

@pytest.mark.parametrize("loss, expected", [
    (forward_kl, 0.1438410), (reverse_kl, 0.1308120), (jsd, 0.0338221),
    (partial(jsd, beta=0.25), 0.0260482)])
def test_worked_by_hand(loss, expected):
    """And unchanged by what is added to all the logits of a token."""
    one = torch.ones(1)
    assert loss(STUDENT, TEACHER, one).item() == pytest.approx(expected, abs=2e-7)
    assert loss(STUDENT + 3, TEACHER - 5, one).item() == pytest.approx(expected, abs=1e-6)


def test_directions_differ_and_are_each_others_mirror():
    student, teacher, mask = random_logits()
    forward, reverse = forward_kl(student, teacher, mask), reverse_kl(student, teacher, mask)
    mirrored = reverse_kl(teacher, student, mask)
    assert abs(forward - reverse) > 0.1
    assert forward.item() == pytest.approx(mirrored.item(), rel=1e-6)


def test_against_torch_distributions_and_kl_div():
    student, teacher, mask = random_logits()
    s, t = Categorical(logits=student), Categorical(logits=teacher)
    log_s, log_t = student.log_softmax(-1)[mask], teacher.log_softmax(-1)[mask]
    forward, reverse = forward_kl(student, teacher, mask), reverse_kl(student, teacher, mask)
    torch.testing.assert_close(forward, kl_divergence(t, s)[mask].mean())
    torch.testing.assert_close(reverse, kl_divergence(s, t)[mask].mean())
    kl_div = partial(F.kl_div, log_target=True, reduction="batchmean")
    torch.testing.assert_close(forward, kl_div(log_s, log_t))
    torch.testing.assert_close(reverse, kl_div(log_t, log_s))


def test_jsd_against_torch_distributions():
    student, teacher, mask = random_logits()
    s, t = Categorical(logits=student), Categorical(logits=teacher)
    for beta in (0.1, 0.5, 0.9):
        m = Categorical(probs=beta * t.probs + (1 - beta) * s.probs)
        expected = beta * kl_divergence(t, m) + (1 - beta) * kl_divergence(s, m)
        torch.testing.assert_close(jsd(student, teacher, mask, beta), expected[mask].mean())


def test_jsd_ends_are_the_two_directions():
    student, teacher, mask = random_logits()
    forward = forward_kl(student, teacher, mask).item()
    reverse = reverse_kl(student, teacher, mask).item()
    assert jsd(student, teacher, mask, 1e-3).item() / 1e-3 == pytest.approx(forward, rel=0.02)
    assert jsd(student, teacher, mask, 1 - 1e-3).item() / 1e-3 == pytest.approx(reverse, rel=0.02)
    assert abs(forward - reverse) > 0.1 * forward  # so that neither would pass for the other
    mirrored = jsd(teacher, student, mask).item()
    assert jsd(student, teacher, mask).item() == pytest.approx(mirrored, rel=1e-6)


@pytest.mark.parametrize("beta", [0, 1, -0.1, 1.1])
def test_jsd_has_no_ends(beta):
    with pytest.raises(ValueError, match="beta"):
        jsd(STUDENT, TEACHER, torch.ones(1), beta)


@every_loss
def test_zero_in_value_and_gradient_when_teacher_is_student(loss):
    student, _, mask = random_logits()
    value = loss(student, student.detach().clone(), mask)
    value.backward()
    assert abs(value.item()) < 1e-6 and student.grad.abs().max() < 1e-6


@every_loss
def test_mask_leaves_tokens_out_and_the_mean_is_per_token_left(loss):
    student, teacher, mask = random_logits()
    value = loss(student, teacher, mask)
    value.backward()
    by_token = [loss(student[i:i + 1], teacher[i:i + 1], torch.ones(1)).item()
                for i in range(len(mask)) if mask[i]]
    assert value.item() == pytest.approx(sum(by_token) / len(by_token), rel=1e-5)
    assert torch.equal(student.grad.abs().sum(-1) > 0, mask)
    assert loss(student, teacher, mask.float()).item() == value.item()
    other = torch.where(mask[:, None], student, 100 * torch.randn_like(student))
    assert loss(other, teacher, mask).item() == value.item()


@every_loss
def test_bfloat16_logits_are_computed_in_float32(loss):
    student, teacher, mask = random_logits(v=1000)
    s, t = student.detach().bfloat16(), teacher.detach().bfloat16()
    value = loss(s, t, mask)
    assert value.dtype == torch.float32 and value.dim() == 0
    assert value.item() == loss(s.float(), t.float(), mask).item()


@every_loss
def test_gradient_reaches_the_student_only(loss):
    student, teacher, mask = random_logits()
    loss(student, teacher, mask).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_gradients_are_the_analytic_ones():
    """Forward: (p_S - p_T) / N. Reverse: p_S (log p_S - log p_T - KL) / N."""
    student, teacher, mask = random_logits()
    log_s, log_t = student.detach().log_softmax(-1), teacher.detach().log_softmax(-1)
    each = mask[:, None] / mask.sum()
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-7)
    forward, = torch.autograd.grad(forward_kl(student, teacher, mask), student)
    close(forward, each * (log_s.exp() - log_t.exp()))
    reverse, = torch.autograd.grad(reverse_kl(student, teacher, mask), student)
    kl = (log_s.exp() * (log_s - log_t)).sum(-1, keepdim=True)
    close(reverse, each * log_s.exp() * (log_s - log_t - kl))


# ----------------------------------------------------------------------------- score and backward

@pytest.mark.parametrize("changes", [{}, GPT2, QWEN2, QWEN3, SMOLLM3])
def test_score_equals_each_row_alone_without_padding(changes):
    model, prompts, completions = tiny(**changes), ragged(6, seed=1), ragged(6, seed=2)
    states, layers = score(model, prompts, completions), [[], []]
    for p, c in zip(prompts, completions):
        for layer, h in zip(layers, model.backbone(torch.tensor([p + c]), hidden=True)[1]):
            layer.append(h[0, len(p) - 1:-1])
    assert [len(row) for row in layers[-1]] == [len(c) for c in completions]
    assert states.shape == (1, sum(map(len, completions)), 32)
    torch.testing.assert_close(states[0], torch.cat(layers[-1]), rtol=1e-5, atol=1e-5)
    hidden = score(model, prompts, completions, hidden=True)
    alone = torch.stack([torch.cat(layer) for layer in layers])
    torch.testing.assert_close(hidden, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(hidden[-1], states[-1])


@every_loss
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("tied", [True, False])
def test_backward_equals_the_plain_gradient(loss, chunk, tied):
    """Against the loss of all logits at once, by autograd, in every parameter of the student."""
    plain, teacher = tiny(0, tie_embeddings=tied), tiny(1, tie_embeddings=tied)
    student = copy.deepcopy(plain)
    prompts, completions = ragged(5, seed=1), ragged(5, seed=2)
    t = score(teacher, prompts, completions)[-1].detach()
    scored, ones = teacher.head(t).detach(), torch.ones(len(t))
    logits = plain.head(score(plain, prompts, completions)[-1])
    expected = loss(logits, scored, ones)
    expected.backward()

    s = score(student, prompts, completions)[-1]
    values = backward(loss, student, s, teacher, t, len(t), chunk=chunk)
    assert values[0].item() == pytest.approx(expected.item(), abs=1e-6)
    kl = forward_kl if loss is forward_kl else reverse_kl
    assert values[1].item() == pytest.approx(kl(logits, scored, ones).item(), abs=1e-6)
    for name, p in plain.named_parameters():
        assert (student.get_parameter(name).grad - p.grad).abs().max() <= 1e-6, name


def test_backward_divides_by_the_tokens_of_the_whole_batch_and_leaves_a_frozen_head_alone():
    student, teacher = tiny(0), tiny(1)
    s, t = torch.randn(2, 10, 32)
    values, slope, of_head = slopes(backward, forward_kl, student, s, teacher, t, 10)
    assert of_head.abs().sum() > 0 and slope.shape == s.shape
    student.requires_grad_(False)
    third, part, of_frozen = slopes(backward, forward_kl, student, s, teacher, t, 30)
    torch.testing.assert_close(3 * third, values)
    torch.testing.assert_close(3 * part, slope)
    assert of_frozen is None and not values.requires_grad
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("student_v, teacher_v", [(64, 80), (80, 64)])
def test_vocabularies_of_different_size_compare_the_ids_they_share(student_v, teacher_v):
    student, teacher = tiny(0, vocab_size=student_v), tiny(1, vocab_size=teacher_v)
    s, t = torch.randn(10, 32), torch.randn(10, 32)
    _, slope, of_head = slopes(backward, forward_kl, student, s, teacher, t, 10)
    weight = student.embed_tokens.weight.detach()[:64].clone().requires_grad_()
    leaf = s.clone().requires_grad_()
    scored = teacher.head(t).detach()[:, :64]
    forward_kl(leaf @ weight.T, scored, torch.ones(10)).backward()
    torch.testing.assert_close(slope, leaf.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(of_head[:64], weight.grad, rtol=1e-4, atol=1e-6)
    assert (of_head[64:] == 0).all()


@every_loss
def test_backward_never_holds_more_than_two_vocabulary_wide_blocks(loss):
    n, v, sizes = 256, 2048, dict(n_layer=1, d_model=8, n_head=1, n_kv_head=1)
    student, teacher = (tiny(seed, vocab_size=v, **sizes) for seed in (0, 1))
    s, t = torch.randn(n, 8, requires_grad=True), torch.randn(n, 8)

    def chunked():
        slopes(backward, loss, student, s, teacher, t, n)

    def whole():
        with torch.no_grad():
            scored = teacher.head(t)
        loss(student.head(s), scored, torch.ones(n)).backward()

    assert 0.5 < peak_blocks(chunked, n, v) <= 2
    assert peak_blocks(whole, n, v) > 4  # the tracker does see what the plain way holds


def test_micro_batches_keep_rows_that_begin_alike_together():
    chats = [list(range(8)) + [9] * n for n in (3, 1, 2)]
    texts = [[20 + n] * (n + 1) for n in range(4)]
    prompts = [p for pair in zip(chats, texts) for p in pair] + [texts[3]]
    assert alike(prompts) == [[0, 2, 4], [1, 3, 5, 6]]
    split = micro_batches([Prompt(p, p) for p in prompts], [[i] for i in range(7)], 3)
    lengths = [[len(p.student) for p in rows] for rows, _ in split]
    assert lengths == [[9, 10, 11], [1, 2, 3], [4]]
    parts = [completions for _, completions in split]
    assert parts == [[[2], [4], [0]], [[1], [3], [5]], [[6]]]


# ----------------------------------------------------------------------------------------- recover

OF_ONES_OWN = {"jsd with beta": partial(jsd, beta=0.25), "squared_distance": squared_distance}


@pytest.mark.parametrize("damage", ["int2", "noise"])
@pytest.mark.parametrize("loss", [*LOSSES.values(), *OF_ONES_OWN.values()],
                         ids=[*LOSSES, *OF_ONES_OWN])
def test_recover_lowers_the_divergence_and_leaves_the_teacher_alone(damage, loss):
    teacher, lines = tiny(), []
    student = noisy(teacher) if damage == "noise" else quantized(teacher, damage)
    before = copy.deepcopy(teacher.state_dict())
    same = recover(student, teacher, batches_of(1, rows=8) * 30, rollout(4), loss=loss, lr=3e-3,
                   log=lines.append, progress="")
    assert same is student and not student.training
    for name in ("loss", "kl"):
        values = [line[name] for line in lines]
        assert sum(values[-5:]) < 0.7 * sum(values[:5])
    after = teacher.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in teacher.parameters())


@every_loss
def test_recover_step_is_the_loss_of_each_side_on_its_own_prompt(loss):
    """The step's loss and gradients equal the plain ones of unpadded rows: the teacher on
    Prompt.teacher, the student on Prompt.student, both followed by what the student answered."""
    teacher = tiny()
    student, lines, asked, answers = noisy(teacher), [], [], ragged(5, seed=4)
    plain, gradients = copy.deepcopy(student), last_gradients(student)
    batch, = batches_of(1, rows=5, teacher_prefix=(7, 8, 9))

    def answer(model, prompts):
        assert model is student
        asked.extend(prompts)
        return answers

    recover(student, teacher, [batch], answer, loss=loss, micro_batch=2, log=lines.append,
            progress="")
    assert asked == [p.student for p in batch]

    def logits(model, prompt, answer):
        return model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]

    s = torch.cat([logits(plain, p.student, a) for p, a in zip(batch, answers)])
    t = torch.cat([logits(teacher, p.teacher, a) for p, a in zip(batch, answers)])
    expected = loss(s, t, torch.ones(len(s)))
    expected.backward()
    assert lines[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert lines[0]["tokens"] == sum(map(len, answers)) == len(s)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_without_rollouts_the_experts_answers_are_scored():
    """Off-policy distillation: the same step as if the student had answered so."""
    batch, lines, gradients = answered(), [], []
    for rollout_ in (None, lambda *_: [p.answer for p in batch]):
        student = noisy(tiny())
        gradients.append(last_gradients(student))
        recover(student, tiny(), [batch], rollout_, log=lines.append, progress="")
    assert lines[0]["loss"] == lines[1]["loss"] > 0
    assert lines[0]["tokens"] == sum(len(p.answer) for p in batch)
    assert all(torch.equal(gradients[0][name], g) for name, g in gradients[1].items())


def test_neither_micro_batch_nor_cached_weights_change_the_result():
    """Of a quantized student, whose weights are shared by the micro-batches of a step."""
    runs, ways = [], (dict(micro_batch=1), dict(micro_batch=3), dict(micro_batch=8),
                      dict(micro_batch=3, cached=False))
    for way in ways:
        teacher, lines = tiny(), []
        student = quantized(teacher, symmetric=False)
        gradients = last_gradients(student)
        recover(student, teacher, batches_of(1, rows=8), rollout(), log=lines.append, progress="",
                **way)
        runs.append((lines[0], gradients))
    for line, gradients in runs[1:]:
        for key in ("loss", "kl", "tokens", "grad_norm"):
            assert line[key] == pytest.approx(runs[0][0][key], rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, runs[0][1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_weights_are_quantized_once_a_step_for_rollout_and_every_micro_batch():
    teacher, calls = tiny(), []
    student = quantized(teacher)
    grid = student.layers[0].mlp.up_proj.parametrizations.weight[0]
    grid.register_forward_hook(lambda *_: calls.append(1))
    recover(student, teacher, batches_of(3), rollout(), micro_batch=2, progress="")
    assert len(calls) == 3


def test_log_lines_and_learning_rate():
    teacher, lines = tiny(), []
    recover(noisy(teacher), teacher, batches_of(6), rollout(5), lr=0.06, warmup=2,
            log=lines.append, progress="")
    names = {"step", "loss", "kl", "tokens", "lr", "grad_norm", "seconds"}
    assert [line["step"] for line in lines] == list(range(6))
    assert all(line.keys() == names for line in lines)
    numbers = [x for line in lines for x in line.values()]
    assert all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers)
    assert all(line["tokens"] == 4 * 5 for line in lines)
    assert all(line["grad_norm"] > 0 and line["seconds"] > 0 for line in lines)
    expected = [0.02, 0.04, 0.06, 0.06, 0.04, 0.02]
    assert [line["lr"] for line in lines] == pytest.approx(expected)


def test_same_seeds_give_the_same_student_and_no_global_generator_is_touched():
    """Bit for bit."""
    def states():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    def run(seed):
        teacher = tiny()
        student, before = quantized(teacher), states()
        recover(student, teacher, batches_of(4), rollout(seed=seed), lr=1e-2, progress="")
        assert states() == before
        return student.state_dict()

    one, same, other = run(0), run(0), run(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@every_loss
def test_recovery_in_bfloat16_follows_that_in_float32(loss):
    """Same rollouts; losses within a few percent, and the student's own weights stay float32."""
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher, lines = noisy(tiny()), tiny().to(dtype), []
        compute_in_(student, dtype)
        recover(student, teacher, batches_of(1) * 12, lambda *_: ragged(4, seed=10), loss=loss,
                lr=3e-3, log=lines.append, progress="")
        losses[dtype] = [line["loss"] for line in lines]
        assert all(p.dtype == torch.float32 for p in student.parameters())
    exact, half = losses.values()
    assert half == pytest.approx(exact, rel=0.05) and half != exact
    assert half[-1] < 0.8 * half[0]


# --------------------------------------------------------------------------------------------- sft

def test_sft_gradient_is_cross_entropy_on_the_responses_only():
    model, lines, batch = tiny(), [], answered(5)
    plain, gradients = copy.deepcopy(model), last_gradients(model)
    sft(model, [batch] * 2, micro_batch=2, lr=0.0, log=lines.append,
        progress="")  # twice: steps must not add up
    losses = []
    for prompt, _, response in batch:
        logp = plain(torch.tensor([prompt + response]))[0].log_softmax(-1)
        losses += [-logp[len(prompt) - 1 + i, token] for i, token in enumerate(response)]
    expected = torch.stack(losses).mean()
    expected.backward()
    assert lines[1]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert lines[1]["tokens"] == len(losses)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_sft_lowers_cross_entropy():
    lines = []
    sft(tiny(), [answered()] * 20, lr=1e-2, log=lines.append, progress="")
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]


# ------------------------------------------------------------- teachers, CKA as a loss, stopping


def learn_sft(model, batches, **settings):
    return sft(model, batches, progress="", **settings)


def learn_recover(model, batches, **settings):
    return recover(model, tiny(), batches, None, progress="", **settings)


both = pytest.mark.parametrize("learn", [learn_recover, learn_sft])


@both
def test_stop_ends_the_training_when_it_is_true(learn):
    lines, calls = [], []
    student = learn(noisy(tiny()), [answered()] * 6, log=lines.append,
                    stop=lambda: calls.append(1) or len(calls) == 2)
    assert len(lines) == len(calls) == 2
    assert parametrize._cache_enabled == 0 and not student.training


@both
def test_what_stop_sees_is_the_student_that_the_step_made(learn):
    """Not the weights that the step began with, which it computed once."""
    student, seen = quantized(tiny()), []
    up = student.layers[0].mlp.up_proj

    def stop():
        now = fake_quantize(up.parametrizations.weight.original, 3, 16)
        seen.append(torch.equal(up.weight, now))

    learn(student, [answered()] * 3, lr=3e-2, stop=stop)
    assert seen == [True] * 3


def part_of(rank, rows):
    """What the first or the second of two processes takes."""
    return rows[len(rows) * rank // 2:len(rows) * (rank + 1) // 2]


@both
def test_gradients_and_losses_of_two_shares_add_up_to_those_of_the_whole(learn):
    batch, runs = answered(5), []
    for share in (list, partial(part_of, 0), partial(part_of, 1)):
        student, lines = noisy(tiny()), []
        gradients = last_gradients(student)
        learn(student, [batch], share=share, log=lines.append)
        runs.append((lines[0], gradients))
    (whole, gradients), (first, one), (second, other) = runs
    assert first["loss"] + second["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert first["tokens"] == second["tokens"] == whole["tokens"]
    for name, gradient in gradients.items():
        both_ = one[name] + other[name]
        torch.testing.assert_close(both_, gradient, rtol=1e-4, atol=1e-6, msg=name)


@both
def test_reduce_is_called_once_a_step_before_the_gradient_is_clipped(learn):
    """With what is trained, and with the line, in which it changes what is logged."""
    norms, seen = [], []

    def reduce(parameters, line):
        seen.append((parameters, dict(line)))
        for p in parameters:
            p.grad.mul_(2)
        line["loss"] = 7.0

    for reduce_ in (None, reduce):
        student, lines = noisy(tiny()), []
        student.embed_tokens.requires_grad_(False)
        learn(student, [answered()] * 2, micro_batch=2, lr=0.0, reduce=reduce_, log=lines.append)
        norms.append([line["grad_norm"] for line in lines])
    assert norms[1] == pytest.approx([2 * norm for norm in norms[0]])
    assert len(seen) == 2 and [line["loss"] for line in lines] == [7, 7]
    trained = [p for p in student.parameters() if p.requires_grad]
    for parameters, line in seen:
        assert all(p is q for p, q in zip(parameters, trained, strict=True))
        assert 0 < line["loss"] != 7 and line["tokens"] == lines[0]["tokens"]


def test_an_error_in_a_rollout_leaves_nothing_switched_on():
    """Weights are computed anew when they are asked for; the student is in eval mode."""
    student = quantized(tiny())

    def fails(*_):
        raise RuntimeError("no rollout")

    with pytest.raises(RuntimeError, match="no rollout"):
        recover(student, tiny(), batches_of(2), fails, progress="")
    gc.collect()
    assert parametrize._cache_enabled == 0 and not parametrize._cache and not student.training
    up = student.layers[0].mlp.up_proj
    assert up.weight is not up.weight


def test_a_larger_vocabulary_is_compared_on_the_shared_ids():
    """A teacher padded to more ids gives the gradients of one that was never padded."""
    small, answers, batch = tiny(), ragged(4, seed=4), batches_of(1)[0]
    padded, found = tiny(vocab_size=80), []
    weights = dict(small.state_dict())
    weights["embed_tokens.weight"] = F.pad(small.embed_tokens.weight, (0, 0, 0, 16), value=3.0)
    padded.load_state_dict(weights)
    for teacher in (small, padded):
        student = noisy(tiny())
        gradients = last_gradients(student)
        recover(student, teacher, [batch], lambda *_: answers, progress="")
        found.append(dict(gradients))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])
