"""extras/fast.py against the plain code that it replaces: signatures, values, gradients, and what
is left behind."""
import copy
import inspect
import json
from functools import partial
from types import MethodType

import pytest
import torch
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

import model as plain
import sdft
import train
from extras import fast
from model import GPT
from quant import bake_, compute_in_, quantize_
from sdft import Prompt, forward_kl, jsd, reverse_kl

SHAPES = {"llama": {}, "untied": dict(tie_embeddings=False), "gpt2": GPT2, "qwen2": QWEN2,
          "qwen3": QWEN3, "smollm3": SMOLLM3}
every_shape = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
every_loss = pytest.mark.parametrize("loss", fast.GRADIENTS)

CHAT = [1, 2, 3, 4, 5, 6, 7, 8, 9]  # what some prompts begin with


def prompts_of(rows, seed=1):
    """Ragged prompts, every other one of which begins with CHAT."""
    return [CHAT + p if i % 2 else p for i, p in enumerate(ragged(rows, seed))]


@pytest.fixture
def float64(monkeypatch):
    """Attention in the model's own type: entries near 0 that are sums of larger ones differ, in
    float32, by more than the tolerances here, on some processors."""
    monkeypatch.setattr("model.attention_dtype", lambda device, dtype: dtype)


def same_gradients(one, other, **tolerance):
    for name, p in one.named_parameters():
        theirs = other.get_parameter(name).grad
        assert (p.grad is None) == (theirs is None), name
        if theirs is not None:
            torch.testing.assert_close(p.grad, theirs, msg=name, **tolerance)


# -------------------------------------------------------------------------------------- signatures

def test_signatures_are_those_of_the_plain_code():
    """But for the default of backward's chunk."""
    pairs = [(fast.score, sdft.score), (fast.backward, sdft.backward),
             (fast.generate, plain.generate)]
    for ours, theirs in pairs:
        ours, theirs = (inspect.signature(f).parameters for f in (ours, theirs))
        assert [(p.name, p.kind) for p in ours.values()] == \
               [(p.name, p.kind) for p in theirs.values()]
        assert all(ours[name].default == p.default for name, p in theirs.items() if name != "chunk")
        assert ("chunk" in ours) == ("chunk" in theirs)
    attend = list(inspect.signature(fast.attend).parameters)
    assert attend[1:] == list(inspect.signature(plain.attend).parameters)[:3]


# ------------------------------------------------------------------------------------------- score

@every_shape
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_score_equals_the_plain_one(changes, hidden, checkpointing, float64):
    """States and gradients, of rows with a common beginning among others."""
    one = tiny(**changes).double()
    one.gradient_checkpointing = checkpointing
    other, rows = copy.deepcopy(one), (prompts_of(7), ragged(7, seed=2))
    ours, theirs = fast.score(one, *rows, hidden), sdft.score(other, *rows, hidden)
    assert ours.shape == theirs.shape and len(ours) == (2 if hidden else 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    same_gradients(one, other, rtol=1e-7, atol=1e-9)


def test_a_shared_beginning_passes_once_with_the_same_states_and_gradients(float64):
    """Against each row alone: 5 rows begin with the same 7 tokens; the last ends with them."""
    one, widths = tiny().double(), []
    other, completions = copy.deepcopy(one), ragged(5, seed=2)
    prompts = [[1, 2, 3, 4, 5, 6, 7] + tail for tail in ragged(4, seed=1) + [[]]]
    one.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[:2]))
    states = fast.score(one, prompts, completions)[0]
    alone = torch.cat([other.backbone(torch.tensor([p + c]))[0, len(p) - 1:-1]
                       for p, c in zip(prompts, completions)])
    torch.testing.assert_close(states, alone, rtol=1e-5, atol=1e-5)
    longest = max(len(p) + len(c) for p, c in zip(prompts, completions)) - 1
    assert widths == [(1, 6 + 5 * (longest - 6))]  # 6: the shortest prompt keeps its last token
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    (states * weights).sum().backward()
    (alone * weights).sum().backward()
    same_gradients(one, other, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------- backward

@every_loss
@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize("tied", [True, False])
def test_backward_equals_the_plain_one(loss, chunk, tied):
    """In value, and in the gradient of every parameter of the student."""
    one, teacher = tiny(0, tie_embeddings=tied), tiny(1, tie_embeddings=tied)
    other, rows = copy.deepcopy(one), (ragged(5, seed=1), ragged(5, seed=2))
    t, found = sdft.score(teacher, *rows)[-1].detach(), []
    for student, backward in ((one, partial(fast.backward, chunk=chunk)), (other, sdft.backward)):
        s = sdft.score(student, *rows)[-1]
        found.append(backward(loss, student, s, teacher, t, len(t)))
    assert found[0].tolist() == pytest.approx(found[1].tolist(), abs=1e-6)
    assert found[0].shape == (2,) and found[0][0] > 0.01
    for name, p in other.named_parameters():
        assert (one.get_parameter(name).grad - p.grad).abs().max() <= 1e-6, name


@every_loss
@pytest.mark.parametrize("student_v, teacher_v", [(64, 64), (64, 80), (80, 64)])
@pytest.mark.parametrize("changes", [GPT2, QWEN2], ids=["gpt2", "qwen2"])
def test_backward_of_vocabularies_of_different_size(loss, student_v, teacher_v, changes):
    student = tiny(0, **changes | dict(vocab_size=student_v))
    teacher = tiny(1, **changes | dict(vocab_size=teacher_v))
    asked = loss, student, torch.randn(10, 32), teacher, torch.randn(10, 32), 30
    ours, theirs = slopes(fast.backward, *asked, chunk=4), slopes(sdft.backward, *asked)
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6)
    assert (ours[2][64:] == 0).all() and ours[2][:64].abs().sum() > 0


@every_loss
def test_backward_leaves_a_frozen_head_alone(loss):
    student = tiny(0).requires_grad_(False)
    asked = loss, student, torch.randn(10, 32), tiny(1), torch.randn(10, 32), 10
    ours, theirs = slopes(fast.backward, *asked), slopes(sdft.backward, *asked)
    for our, their in zip(ours[:2], theirs[:2]):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6)
    assert ours[2] is theirs[2] is None and not ours[0].requires_grad


def test_backward_without_tokens_changes_nothing():
    """As in a process that has no rows of a batch."""
    values, slope, of_head = slopes(
        fast.backward, forward_kl, tiny(0), torch.zeros(0, 32), tiny(1), torch.zeros(0, 32), 10)
    assert values.tolist() == [0, 0] and slope.shape == (0, 32) and (of_head == 0).all()


@every_loss
def test_backward_in_bfloat16_over_float32_weights_equals_the_plain_one(loss):
    student, teacher = tiny(0), tiny(1).bfloat16()
    compute_in_(student, torch.bfloat16)
    s, t = torch.randn(2, 10, 32).bfloat16()
    ours, theirs = (slopes(backward, loss, student, s, teacher, t, 10)
                    for backward in (fast.backward, sdft.backward))
    assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16, torch.float32]
    for our, their in zip(ours, theirs):
        assert our.dtype == their.dtype
        assert (our - their).float().norm() < 0.02 * their.float().norm()


@every_loss
def test_backward_never_holds_more_than_two_vocabulary_wide_blocks(loss):
    n, v, sizes = 256, 2048, dict(n_layer=1, d_model=8, n_head=1, n_kv_head=1)
    student, teacher = (tiny(seed, vocab_size=v, **sizes) for seed in (0, 1))
    s, t = torch.randn(n, 8), torch.randn(n, 8)
    peak = peak_blocks(lambda: slopes(fast.backward, loss, student, s, teacher, t, n), n, v)
    assert 0.5 < peak <= 2


class Capped(GPT):
    """A fork's model: its logits stay within ±2."""

    def head(self, x):
        return 2 * torch.tanh(GPT.head(self, x) / 2)


def capped(model, how):
    """The model with another head, its class's or its own, in place."""
    if how == "class":
        model.__class__ = Capped
    else:
        model.head = MethodType(Capped.head, model)
    return model


@pytest.mark.parametrize("how", ["class", "instance", "teacher", None])
@pytest.mark.parametrize("loss", [forward_kl, jsd, partial(jsd, beta=0.25), squared_distance,
                                  lambda s, t, mask: reverse_kl(s, t, mask)])
def test_another_head_and_another_loss_have_the_right_gradient(how, loss):
    """Against autograd through all logits at once."""
    student, teacher = tiny(0), tiny(1)
    if how:
        capped(teacher if how == "teacher" else student, "class" if how == "teacher" else how)
    s, t = torch.randn(2, 10, 32)
    values, slope, of_head = slopes(fast.backward, loss, student, s, teacher, t, 10)
    student.zero_grad()
    leaf, scored = s.clone().requires_grad_(), teacher.head(t).detach()
    expected = loss(student.head(leaf), scored, torch.ones(10))
    expected.backward()
    assert values[0].item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(slope, leaf.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(of_head, student.head_weight.grad, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------- generate

SAMPLING = {"greedy": dict(temperature=0), "sampled": dict(temperature=1.0),
            "nucleus": dict(temperature=0.7, top_p=0.9)}


def replaced(model):
    """Names of the modules with a forward or a head of their own; "" is the model."""
    return [name for name, m in model.named_modules() if {"forward", "head"} & vars(m).keys()]


@every_shape
@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("rows", [None, [4, 0, 3]])
def test_generate_equals_the_plain_one_token_for_token(changes, sampling, rows):
    model, prompts, found = tiny(**changes), prompts_of(7), []
    before = copy.deepcopy(model.state_dict())
    for generate in (fast.generate, plain.generate):
        ended, generator = [], torch.Generator().manual_seed(3)
        answers = generate(model, prompts, 12, **sampling, eos_id=5, generator=generator,
                           batch_size=3, rows=rows, done=ended.append)
        found.append((answers, ended, generator.get_state().tolist()))
    assert found[0] == found[1] and len(found[0][0]) == sum(found[0][1]) == len(rows or prompts)
    after = model.state_dict()
    assert not replaced(model) and all(torch.equal(after[name], w) for name, w in before.items())


@pytest.mark.parametrize("scheme", ["int3", "nf4"])
def test_generate_of_a_quantized_student_within_a_step_equals_the_plain_one(scheme):
    """Its weights are those that the step computed once, and they keep their graph."""
    student, prompts = tiny(), prompts_of(5)
    quantize_(student, scheme, 16)
    with sdft.once_(student):
        up = student.layers[0].mlp.up_proj
        before = up.weight
        ours, theirs = (generate(student, prompts, 10, generator=torch.Generator().manual_seed(3))
                        for generate in (fast.generate, plain.generate))
        assert ours == theirs and up.weight is before and before.requires_grad
    bake_(student)
    assert ours == fast.generate(student, prompts, 10, generator=torch.Generator().manual_seed(3))


def test_generate_in_bfloat16_has_likely_tokens():
    """Rounding decides between near-equals, so that the tokens need not be the plain ones."""
    student, prompts = tiny(), prompts_of(5)
    compute_in_(student, torch.bfloat16)
    for prompt, answer in zip(prompts, fast.generate(student, prompts, 10, temperature=0)):
        with torch.no_grad():
            logits = student(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1].float()
        chosen = logits[torch.arange(len(answer)), answer]
        assert (logits.max(-1).values - chosen).max() < 0.1 * logits.std()
    assert not replaced(student)


@every_shape
@torch.no_grad()
def test_weights_laid_out_for_decoding_give_the_same_logits(changes):
    model, ids = tiny(**changes), torch.tensor([ragged(1)[0] * 2] * 2)
    expected = model(ids)
    with fast.blocked_weights(model, 2):
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)
        if torch.backends.mkldnn.is_available():
            linears = [m for m in model.layers.modules() if isinstance(m, torch.nn.Linear)]
            assert len(replaced(model)) == len(linears) + 1 and "" in replaced(model)
        torch.testing.assert_close(model(ids[:, :1]), expected[:, :1], rtol=0, atol=1e-5)
    assert not replaced(model)
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=0)


def test_an_error_while_generating_leaves_the_model_as_it_was():
    model = tiny()

    def fails(n):
        raise RuntimeError("not done")

    with pytest.raises(RuntimeError, match="not done"):
        fast.generate(model, prompts_of(3), 4, temperature=0, done=fails)
    assert not replaced(model)
    with pytest.raises(ValueError, match="no tokens"):
        fast.generate(model, [[1], []], 4)
    assert not replaced(model)


def test_an_error_while_weights_are_laid_out_leaves_the_model_as_it_was(monkeypatch):
    model, made = tiny(), []
    if not torch.backends.mkldnn.is_available():
        pytest.skip("oneDNN is not there")

    def fails(w, rows):
        made.append(w)
        if len(made) > 5:
            raise RuntimeError("out of memory")
        return w

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        fast.generate(model, prompts_of(3), 4)
    assert len(made) == 6 and not replaced(model)


@pytest.mark.parametrize("how", ["class", "instance"])
def test_generate_samples_from_a_head_that_a_fork_changed(how):
    """And it is still there afterwards."""
    model, prompts, found = capped(tiny(), how), prompts_of(5), []
    before = vars(model).get("head")
    for generate in (fast.generate, plain.generate):
        generator = torch.Generator().manual_seed(3)
        found.append(generate(model, prompts, 20, generator=generator))
    assert found[0] == found[1] and vars(model).get("head") is before
    ordinary = plain.generate(tiny(), prompts, 20, generator=torch.Generator().manual_seed(3))
    assert found[0] != ordinary


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_generate_of_a_fork_with_another_linear_equals_the_plain_one(sampling):
    model, prompts, answers = tiny(), prompts_of(5), []
    model.layers[0].mlp.up_proj.__class__ = Doubled
    for generate in (fast.generate, plain.generate):
        generator = torch.Generator().manual_seed(3)
        answers.append(generate(model, prompts, 20, generator=generator, **sampling))
    assert answers[0] == answers[1] and not replaced(model)


# ------------------------------------------------------------------------------ all of it together

@every_shape
def test_a_recovery_equals_the_plain_one(changes):
    """Three steps of a quantized student, which answers as it has learned so far."""
    runs, batch = [], [Prompt(p, [7, *p]) for p in prompts_of(6)]
    parts = dict(train.PARTS)
    for attach in (fast.attach, lambda parts: None):
        student, teacher, lines = tiny(**changes), tiny(**changes), []
        quantize_(student, "int3", 16)
        attach(parts)
        rollout = partial(parts["generate"], max_new_tokens=6,
                          generator=torch.Generator().manual_seed(0))
        sdft.recover(student, teacher, [batch] * 3, rollout, micro_batch=4, lr=1e-3, progress="",
                     score=parts["score"], backward=parts["backward"], log=lines.append)
        runs.append(lines)
        parts = dict(train.PARTS)
    for ours, theirs in zip(*runs, strict=True):
        del ours["seconds"], theirs["seconds"]
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_run_with_fast_says_what_a_plain_one_says(folder, tmp_path, monkeypatch):
    """In float32 all numbers agree to 1e-3: perplexity, accuracy, CKA."""
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda _: None)  # draws no picture
    argv = ["--model", folder, "--steps", 3, "--batch-size", 4, "--eval-limit", 4,
            "--eval-tokens", 4, "--rollout-tokens", 4, "--teacher-check", 2, "--cka-samples", 4,
            "--group-size", 16, "--degrade", "int4", "--dtype", "float32"]
    results = []
    for name, words in (("fast", ["--with", "fast"]), ("plain", [])):
        before = dict(train.PARTS)
        assert train.main([*map(str, argv), "--out", str(tmp_path / name), *words]) == 0
        assert train.PARTS == before
        results.append(json.loads((tmp_path / name / "results.json").read_text()))
    for stage, metrics in results[1]["stages"].items():
        assert results[0]["stages"][stage] == pytest.approx(metrics, rel=1e-3)
    ours, theirs = (r["cka"]["samples"]["recovered"]["linear_debiased"] for r in results)
    assert ours == pytest.approx(theirs, abs=1e-3)
