"""The losses worked by hand and against torch, the chunked backward against the plain one, and whole recoveries."""
import copy
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from cka import linear_cka
from model import GPT, GPTConfig, frozen_copy, generate
from quant import compute_in_, quantize_
from sdft import (
    BETAS,
    LOSSES,
    CompactAdamW,
    Prompt,
    accumulate,
    alike,
    completion_states,
    follow,
    forward_kl,
    jsd,
    micro_batches,
    recover,
    reverse_kl,
    sft,
)

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())

# One token, two words: p_T = (1/2, 1/2), p_S = (1/4, 3/4).
# KL(T||S) = 1/2 ln(2) + 1/2 ln(2/3) = 1/2 ln(4/3)       = 0.1438410
# KL(S||T) = 1/4 ln(1/2) + 3/4 ln(3/2) = 3/4 ln 3 - ln 2 = 0.1308120
# jsd(1/2), m = (3/8, 5/8):   1/2 [1/2 ln(4/3) + 1/2 ln(4/5)] + 1/2 [1/4 ln(2/3) + 3/4 ln(6/5)]   = 0.0338221
# jsd(1/4), m = (5/16, 11/16): 1/4 [1/2 ln(8/5) + 1/2 ln(8/11)] + 3/4 [1/4 ln(4/5) + 3/4 ln(12/11)] = 0.0260482
TEACHER, STUDENT = torch.tensor([[1.0, 1.0]]).log(), torch.tensor([[1.0, 3.0]]).log()


def random_logits(n=12, v=7):
    """A flat student's and a peaked teacher's logits [n, v], and a mask [n] that leaves some tokens out."""
    student, teacher = torch.randn(2, n, v, generator=torch.Generator().manual_seed(0))
    return (student / 2).requires_grad_(), (2 * teacher).requires_grad_(), torch.arange(n) % 3 > 0


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=64, n_layer=2, d_model=32, n_head=4, n_kv_head=2, head_dim=8, d_ff=64, context_length=64)
    model = GPT(GPTConfig(**sizes | changes))
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, 0, 0.2)  # logits of standard deviation about 1
    return model


def ragged(rows, seed=0, longest=9):
    """Lists of 1 to `longest` token ids."""
    draw = random.Random(seed)
    return [[draw.randrange(64) for _ in range(draw.randint(1, longest))] for _ in range(rows)]


def noisy(model, scale=0.3):
    """A damaged copy: every weight matrix of the blocks with noise on it."""
    student, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for p in student.layers.parameters():
        if p.dim() == 2:
            p.data += scale * p.data.std() * torch.randn(p.shape, generator=generator)
    return student


def last_gradients(model):
    """A dict that holds each parameter's accumulated gradient of the latest step, before it is clipped and zeroed."""
    kept = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: kept.update({name: p.grad.clone()}))
    return kept


def rollout(tokens=6, seed=0):
    return partial(generate, max_new_tokens=tokens, generator=torch.Generator().manual_seed(seed), eos_id=None)


def batches_of(steps, rows=4, teacher_prefix=()):
    prompts = ragged(steps * rows, seed=3)
    return [[Prompt(p, [*teacher_prefix, *p]) for p in prompts[i:i + rows]] for i in range(0, len(prompts), rows)]


# ---------------------------------------------------------------------------------------------------------- the losses

@pytest.mark.parametrize("loss, expected", [(forward_kl, 0.1438410), (reverse_kl, 0.1308120), (jsd, 0.0338221),
                                            (partial(jsd, beta=0.25), 0.0260482)])
def test_worked_by_hand(loss, expected):
    """And unchanged by what is added to all the logits of a token."""
    one = torch.ones(1)
    assert loss(STUDENT, TEACHER, one).item() == pytest.approx(expected, abs=2e-7)
    assert loss(STUDENT + 3, TEACHER - 5, one).item() == pytest.approx(expected, abs=1e-6)


def test_directions_differ_and_are_each_others_mirror():
    student, teacher, mask = random_logits()
    assert abs(forward_kl(student, teacher, mask) - reverse_kl(student, teacher, mask)) > 0.1
    assert forward_kl(student, teacher, mask).item() == pytest.approx(reverse_kl(teacher, student, mask).item(), rel=1e-6)


def test_against_torch_distributions_and_kl_div():
    student, teacher, mask = random_logits()
    s, t = Categorical(logits=student), Categorical(logits=teacher)
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    forward, reverse = forward_kl(student, teacher, mask), reverse_kl(student, teacher, mask)
    torch.testing.assert_close(forward, kl_divergence(t, s)[mask].mean())
    torch.testing.assert_close(reverse, kl_divergence(s, t)[mask].mean())
    torch.testing.assert_close(forward, F.kl_div(log_s[mask], log_t[mask], log_target=True, reduction="batchmean"))
    torch.testing.assert_close(reverse, F.kl_div(log_t[mask], log_s[mask], log_target=True, reduction="batchmean"))


def test_jsd_against_torch_distributions():
    student, teacher, mask = random_logits()
    s, t = Categorical(logits=student), Categorical(logits=teacher)
    for beta in (0.1, 0.5, 0.9):
        m = Categorical(probs=beta * t.probs + (1 - beta) * s.probs)
        expected = beta * kl_divergence(t, m) + (1 - beta) * kl_divergence(s, m)
        torch.testing.assert_close(jsd(student, teacher, mask, beta), expected[mask].mean())


def test_jsd_ends_are_the_two_directions():
    student, teacher, mask = random_logits()
    forward, reverse = forward_kl(student, teacher, mask).item(), reverse_kl(student, teacher, mask).item()
    assert jsd(student, teacher, mask, 1e-3).item() / 1e-3 == pytest.approx(forward, rel=0.02)
    assert jsd(student, teacher, mask, 1 - 1e-3).item() / 1e-3 == pytest.approx(reverse, rel=0.02)
    assert abs(forward - reverse) > 0.1 * forward  # so that neither would pass for the other
    assert jsd(student, teacher, mask).item() == pytest.approx(jsd(teacher, student, mask).item(), rel=1e-6)


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
    by_token = [loss(student[i:i + 1], teacher[i:i + 1], torch.ones(1)).item() for i in range(len(mask)) if mask[i]]
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
    log_s, log_t, n = student.detach().log_softmax(-1), teacher.detach().log_softmax(-1), mask.sum()
    forward, = torch.autograd.grad(forward_kl(student, teacher, mask), student)
    torch.testing.assert_close(forward, mask[:, None] * (log_s.exp() - log_t.exp()) / n, rtol=1e-5, atol=1e-7)
    reverse, = torch.autograd.grad(reverse_kl(student, teacher, mask), student)
    kl = (log_s.exp() * (log_s - log_t)).sum(-1, keepdim=True)
    torch.testing.assert_close(reverse, mask[:, None] * log_s.exp() * (log_s - log_t - kl) / n, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------- completions and their head

@pytest.mark.parametrize("changes", [dict(), dict(model_type="gpt2", n_kv_head=4, qkv_bias=True, out_bias=True, mlp_bias=True)])
def test_completion_states_equal_each_row_alone_without_padding(changes):
    model, prompts, completions = tiny(**changes), ragged(6, seed=1), ragged(6, seed=2)
    states = completion_states(model, prompts, completions)
    alone = [model.backbone(torch.tensor([p + c]))[0, len(p) - 1:-1] for p, c in zip(prompts, completions)]
    assert [len(row) for row in alone] == [len(c) for c in completions]
    torch.testing.assert_close(states, torch.cat(alone), rtol=1e-5, atol=1e-5)


@every_loss
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("tied", [True, False])
def test_accumulate_equals_the_plain_backward(loss, chunk, tied):
    plain, teacher = tiny(0, tie_embeddings=tied), tiny(1, tie_embeddings=tied)
    student = copy.deepcopy(plain)
    prompts, completions = ragged(5, seed=1), ragged(5, seed=2)
    scored = teacher.head(completion_states(teacher, prompts, completions)).detach()
    ones = torch.ones(len(scored))
    logits = plain.head(completion_states(plain, prompts, completions))
    expected = loss(logits, scored, ones)
    expected.backward()

    states = completion_states(student, prompts, completions)
    total = accumulate(student, states, lambda rows: scored[rows].clone(), loss, 1 / len(scored), chunk=chunk)
    assert total[0].item() == pytest.approx(expected.item(), abs=1e-6)
    kl = forward_kl if loss is forward_kl else reverse_kl
    assert total[1].item() == pytest.approx(kl(logits, scored, ones).item(), abs=1e-6)
    for name, p in plain.named_parameters():
        assert (student.get_parameter(name).grad - p.grad).abs().max() <= 1e-6, name


@pytest.mark.parametrize("student_v, teacher_v", [(64, 80), (80, 64)])
def test_vocabularies_of_different_size_compare_the_ids_they_share(student_v, teacher_v):
    student, teacher = tiny(0, vocab_size=student_v), tiny(1, vocab_size=teacher_v)
    states, scored = torch.randn(10, 32, requires_grad=True), torch.randn(10, 32)
    accumulate(student, states, lambda rows: teacher.head(scored[rows]).detach(), forward_kl, 1 / 10)
    weight, leaf = student.embed_tokens.weight.detach()[:64].clone().requires_grad_(), states.detach().requires_grad_()
    forward_kl(leaf @ weight.T, teacher.head(scored).detach()[:, :64], torch.ones(10)).backward()
    torch.testing.assert_close(states.grad, leaf.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(student.embed_tokens.weight.grad[:64], weight.grad, rtol=1e-4, atol=1e-6)
    assert (student.embed_tokens.weight.grad[64:] == 0).all()


class LiveWide(TorchDispatchMode):
    """Follows the storages of all tensors with `width` columns; `peak` is the most bytes of them alive after any operation."""

    def __init__(self, width):
        super().__init__()
        self.width, self.alive, self.peak = width, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.dim() and x.size(-1) == self.width:
                storage = x.untyped_storage()
                ref = StorageWeakRef(storage)
                self.alive[ref.cdata] = ref, storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def peak_blocks(function, n, v):
    """The most float32 blocks' worth [n, v] of vocabulary-wide tensors alive at once while function runs."""
    with LiveWide(v) as live:
        function()
    return live.peak / (4 * n * v)


@every_loss
def test_accumulate_never_holds_more_than_two_vocabulary_wide_blocks(loss):
    n, v = 256, 2048
    student, teacher = (tiny(seed, vocab_size=v, n_layer=1, d_model=8, n_head=1, n_kv_head=1) for seed in (0, 1))
    states, scored = torch.randn(n, 8, requires_grad=True), torch.randn(n, 8)

    def score(rows):
        with torch.no_grad():
            return teacher.head(scored[rows])

    def plain():
        loss(student.head(states), score(slice(None)), torch.ones(n)).backward()

    assert 0.5 < peak_blocks(lambda: accumulate(student, states, score, loss, 1 / n), n, v) <= 2
    assert peak_blocks(plain, n, v) > 4  # the tracker does see what the plain way holds


def test_a_shared_beginning_passes_once_with_the_same_states_and_gradients(monkeypatch):
    """Against each row alone: 5 rows that begin with the same 7 tokens, the last of which ends where the others go on.
    All in float64: in float32, entries near 0 that are sums of larger ones differ by more than this, on some processors."""
    monkeypatch.setattr("model.attention_dtype", lambda device, dtype: dtype)
    one, widths = tiny().double(), []
    other, completions = copy.deepcopy(one), ragged(5, seed=2)
    prompts = [[1, 2, 3, 4, 5, 6, 7] + tail for tail in ragged(4, seed=1) + [[]]]
    one.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[:2]))
    states = completion_states(one, prompts, completions)
    alone = torch.cat([other.backbone(torch.tensor([p + c]))[0, len(p) - 1:-1] for p, c in zip(prompts, completions)])
    torch.testing.assert_close(states, alone, rtol=1e-5, atol=1e-5)
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions)) - 1
    assert widths == [(1, 6 + 5 * (longest - 6))]  # 6: the shortest prompt keeps its last token
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    (states * weights).sum().backward()
    (alone * weights).sum().backward()
    for name, p in one.layers.named_parameters():
        torch.testing.assert_close(p.grad, other.layers.get_parameter(name).grad, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(one.embed_tokens.weight.grad, other.embed_tokens.weight.grad, rtol=1e-4, atol=1e-5)


def test_micro_batches_keep_rows_that_begin_alike_together():
    chats, texts = [list(range(8)) + [9] * n for n in (3, 1, 2)], [[20 + n] * (n + 1) for n in range(4)]
    prompts = [p for pair in zip(chats, texts) for p in pair] + [texts[3]]
    assert alike(prompts) == [[0, 2, 4], [1, 3, 5, 6]]
    split = micro_batches([Prompt(p, p) for p in prompts], [[i] for i in range(7)], 3)
    assert [[len(p.student) for p in rows] for rows, _ in split] == [[9, 10, 11], [1, 2, 3], [4]]
    assert [completions for _, completions in split] == [[[2], [4], [0]], [[1], [3], [5]], [[6]]]


# ------------------------------------------------------------------------------------------------------------- recover

@pytest.mark.parametrize("damage", ["int2", "noise"])
@every_loss
def test_recover_lowers_the_divergence_and_leaves_the_teacher_alone(damage, loss):
    teacher, lines = tiny(), []
    student = noisy(teacher) if damage == "noise" else copy.deepcopy(teacher)
    if damage == "int2":
        quantize_(student, damage, group_size=16)
    before = copy.deepcopy(teacher.state_dict())
    recover(student, teacher, batches_of(1, rows=8) * 30, rollout(4), loss=loss, lr=3e-3, log=lines.append, progress="")
    kl = [line["kl"] for line in lines]
    assert sum(kl[-5:]) < 0.7 * sum(kl[:5])
    after = teacher.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in teacher.parameters())


@every_loss
def test_recover_step_is_the_loss_of_each_side_on_its_own_prompt(loss):
    """The step's loss and gradients equal the plain ones of unpadded rows: the teacher on Prompt.teacher, the student on
    Prompt.student, both followed by what the student answered to its own prompt."""
    teacher = tiny()
    student, lines, asked, answers = noisy(teacher), [], [], ragged(5, seed=4)
    plain, gradients = copy.deepcopy(student), last_gradients(student)
    batch, = batches_of(1, rows=5, teacher_prefix=(7, 8, 9))

    def answer(model, prompts):
        assert model is student
        asked.extend(prompts)
        return answers

    recover(student, teacher, [batch], answer, loss=loss, micro_batch=2, log=lines.append, progress="")
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
    batch = [Prompt(p, [7, *p], answer) for p, answer in zip(ragged(4, seed=1), ragged(4, seed=2))]
    lines, gradients = [], []
    for rollout_ in (None, lambda *_: [p.answer for p in batch]):
        student = noisy(tiny())
        gradients.append(last_gradients(student))
        recover(student, tiny(), [batch], rollout_, log=lines.append, progress="")
    assert lines[0]["loss"] == lines[1]["loss"] > 0 and lines[0]["tokens"] == sum(len(p.answer) for p in batch)
    assert all(torch.equal(gradients[0][name], g) for name, g in gradients[1].items())


def test_micro_batch_does_not_change_the_result():
    """Of a quantized student, whose weights are shared by the micro-batches of a step."""
    runs = []
    for micro_batch in (1, 3, 8):
        teacher, lines = tiny(), []
        student = copy.deepcopy(teacher)
        quantize_(student, "int3", group_size=16, symmetric=False)
        gradients = last_gradients(student)
        recover(student, teacher, batches_of(1, rows=8), rollout(), micro_batch=micro_batch, log=lines.append, progress="")
        runs.append((lines[0], gradients))
    for line, gradients in runs[1:]:
        for key in ("loss", "kl", "tokens", "grad_norm"):
            assert line[key] == pytest.approx(runs[0][0][key], rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, runs[0][1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_weights_are_quantized_once_a_step_for_rollout_and_every_micro_batch():
    teacher, calls = tiny(), []
    student = copy.deepcopy(teacher)
    quantize_(student, "int3", group_size=16)
    student.layers[0].mlp.up_proj.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    recover(student, teacher, batches_of(3), rollout(), micro_batch=2, progress="")
    assert len(calls) == 3


def test_log_lines_and_learning_rate():
    teacher, lines = tiny(), []
    recover(noisy(teacher), teacher, batches_of(6), rollout(5), lr=0.06, warmup=2, log=lines.append, progress="")
    assert [line["step"] for line in lines] == list(range(6))
    assert all(line.keys() == {"step", "loss", "kl", "tokens", "lr", "grad_norm", "seconds"} for line in lines)
    assert all(isinstance(x, (int, float)) and math.isfinite(x) for line in lines for x in line.values())
    assert all(line["tokens"] == 4 * 5 and line["grad_norm"] > 0 and line["seconds"] > 0 for line in lines)
    assert [line["lr"] for line in lines] == pytest.approx([0.02, 0.04, 0.06, 0.06, 0.04, 0.02])


def test_same_seeds_give_the_same_student_bit_for_bit_and_no_global_generator_is_touched():
    def run(seed):
        teacher = tiny()
        student = copy.deepcopy(teacher)
        quantize_(student, "int3", group_size=16)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        recover(student, teacher, batches_of(4), rollout(seed=seed), lr=1e-2, progress="")
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
        return student.state_dict()

    one, same, other = run(0), run(0), run(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_compact_adamw_is_torchs_adamw_and_in_bfloat16_stays_near():
    torch.manual_seed(0)
    start, steps = torch.randn(50, 40), torch.randn(30, 50, 40) + 0.5

    def trained(optimizer_of):
        p = torch.nn.Parameter(start.clone())
        optimizer = optimizer_of([p])
        for g in steps:
            p.grad = g.clone()
            optimizer.step()
        return p.detach() - start, optimizer.state[p]

    kind = dict(lr=1e-2, betas=BETAS, weight_decay=0.1, eps=1e-8)
    expected, _ = trained(lambda p: torch.optim.AdamW(p, **kind))
    same, _ = trained(lambda p: CompactAdamW(p, kind | {"dtype": torch.float32}))
    near, state = trained(lambda p: CompactAdamW(p, kind | {"dtype": torch.bfloat16}))
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-6)
    assert 0 < (near - expected).norm() / expected.norm() < 0.01
    assert state["m"].dtype == state["v"].dtype == torch.bfloat16


@every_loss
def test_recovery_in_bfloat16_follows_that_in_float32(loss):
    """Same rollouts; losses within a few percent, and the student's own weights stay float32."""
    lines = {}
    for dtype in (torch.float32, torch.bfloat16):
        student = noisy(tiny())
        teacher, lines[dtype] = tiny().to(dtype), []
        compute_in_(student, dtype)
        recover(student, teacher, batches_of(1) * 12, lambda *_: ragged(4, seed=10), loss=loss, lr=3e-3, log=lines[dtype].append,
                progress="")
        assert all(p.dtype == torch.float32 for p in student.parameters())
    exact, half = ([line["loss"] for line in lines[dtype]] for dtype in (torch.float32, torch.bfloat16))
    assert half == pytest.approx(exact, rel=0.05) and half != exact
    assert half[-1] < 0.8 * half[0]


# ----------------------------------------------------------------------------------------------------------------- sft

def test_sft_gradient_is_cross_entropy_on_the_responses_only():
    model, lines = tiny(), []
    plain, gradients = copy.deepcopy(model), last_gradients(model)
    rows = list(zip(ragged(5, seed=1), ragged(5, seed=2)))
    batch = [Prompt(p, [], answer) for p, answer in rows]
    sft(model, [batch] * 2, micro_batch=2, lr=0.0, log=lines.append, progress="")  # twice: steps must not add up
    losses = []
    for prompt, response in rows:
        logp = plain(torch.tensor([prompt + response]))[0].log_softmax(-1)
        losses += [-logp[len(prompt) - 1 + i, token] for i, token in enumerate(response)]
    expected = torch.stack(losses).mean()
    expected.backward()
    assert lines[1]["loss"] == pytest.approx(expected.item(), rel=1e-5) and lines[1]["tokens"] == len(losses)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_sft_lowers_cross_entropy():
    lines = []
    batch = [Prompt(p, [], answer) for p, answer in zip(ragged(4, seed=1), ragged(4, seed=2))]
    sft(tiny(), [batch] * 20, lr=1e-2, log=lines.append, progress="")
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]


# ------------------------------------------------------------------------------------------- teachers, CKA as a loss, stopping

@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("micro_batch", [2, 5])
def test_cka_in_the_loss_adds_its_gradient(balance, micro_batch):
    """Against autograd through KL + w (1 - CKA), and KL + w sg(KL / (1 - CKA)) (1 - CKA), of each micro-batch."""
    teacher = tiny()
    student, lines, answers = noisy(teacher), [], ragged(5, seed=4)
    plain, gradients = copy.deepcopy(student), last_gradients(student)
    batch, = batches_of(1, rows=5, teacher_prefix=(7, 8, 9))
    recover(student, teacher, [batch], lambda *_: answers, micro_batch=micro_batch, cka_weight=0.7, cka_balance=balance,
            log=lines.append, progress="")
    tokens, likeness = sum(map(len, answers)), 0
    for prompts, part in micro_batches(batch, answers, micro_batch):
        x, ours = completion_states(plain, [p.student for p in prompts], part, hidden=True)
        y, theirs = completion_states(teacher, [p.teacher for p in prompts], part, hidden=True)
        share = len(x) / tokens
        kl = share * forward_kl(plain.head(x), teacher.head(y), torch.ones(len(x)))
        distance = torch.stack([1 - linear_cka(a, b) for a, b in zip(ours, theirs)]).mean()
        assert torch.equal(ours[-1], x) and len(ours) == 2
        likeness += share * (1 - distance.item())
        (kl + 0.7 * distance * ((kl / distance).detach() if balance else share)).backward()
    assert lines[0]["cka"] == pytest.approx(likeness) and 0 < likeness < 1
    for name, p in plain.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_an_ema_teacher_follows_the_student():
    """phi <- rate theta + (1 - rate) phi, twice; in bfloat16 too, where a single small step would be lost."""
    student, teacher = noisy(tiny()), tiny()
    quantize_(student, "int3", group_size=16)
    theta, phi = frozen_copy(student, torch.float32), copy.deepcopy(teacher)
    rounded = frozen_copy(teacher, torch.bfloat16)
    for step in (follow(teacher, student, 0.1), follow(rounded, student, 0.1)):
        step()
        step()
    for name, p in teacher.named_parameters():
        expected = 0.81 * phi.get_parameter(name) + 0.19 * theta.get_parameter(name)
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rounded.get_parameter(name).float(), expected, rtol=1e-2, atol=1e-2)
    before, lines = copy.deepcopy(teacher), []
    recover(student, teacher, batches_of(3), rollout(), ema=0.05, lr=1e-2, log=lines.append, progress="")
    assert len(lines) == 3 and not torch.equal(teacher.norm.weight, before.norm.weight)
    with pytest.raises(ValueError, match="own shape"):
        follow(tiny(d_ff=48), student, 0.1)


def test_after_step_ends_the_training_when_it_is_true():
    lines, calls = [], []
    recover(noisy(tiny()), tiny(), batches_of(6), rollout(), log=lines.append, progress="",
            after_step=lambda: calls.append(1) or len(calls) == 2)
    assert len(lines) == len(calls) == 2


def test_a_larger_vocabulary_is_compared_on_the_shared_ids():
    """A teacher padded to more ids gives the gradients of one that was never padded."""
    small, answers, batch = tiny(), ragged(4, seed=4), batches_of(1)[0]
    padded = tiny(vocab_size=80)
    padded.load_state_dict({name: torch.cat((w, 3 * torch.ones(16, 32))) if name.startswith("embed") else w
                            for name, w in small.state_dict().items()})
    found = []
    for teacher in (small, padded):
        student = noisy(tiny())
        gradients = last_gradients(student)
        recover(student, teacher, [batch], lambda *_: answers, progress="")
        found.append(dict(gradients))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])
