"""Everything in fast.py against the plain code that it stands in for: signatures, values,
gradients, and what is left behind."""
import copy
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

fast = pytest.importorskip("extras.fast")
import model as plain
import sdft
from model import GPT
from quant import bake_, block_linears, compute_in_, quantize_
from sdft import forward_kl, jsd, reverse_kl

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


@every_shape
@pytest.mark.parametrize("prompts", [ragged(6, seed=1), prompts_of(6), [CHAT] * 3, [[5]]],
                         ids=["ragged", "half alike", "all the same", "one"])
@torch.no_grad()
def test_score_in_float32_equals_each_row_alone(changes, prompts):
    model, completions = tiny(**changes), ragged(len(prompts), seed=2)
    states = fast.score(model, prompts, completions)
    alone = [model.backbone(torch.tensor([p + c]))[0, len(p) - 1:-1]
             for p, c in zip(prompts, completions)]
    assert [len(row) for row in alone] == [len(c) for c in completions]
    torch.testing.assert_close(states[0], torch.cat(alone), rtol=1e-5, atol=1e-5)
    theirs = sdft.score(model, prompts, completions, hidden=True)
    ours = fast.score(model, prompts, completions, hidden=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[-1], states[0])


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
        values = backward(loss, student, s, teacher, t, len(t))
        found.append(values)
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
def test_weights_laid_out_for_decoding_give_the_same_logits(changes, monkeypatch):
    """One product for each linear, and one for the head."""
    model, ids, products = tiny(**changes), torch.tensor([ragged(1)[0] * 2] * 2), []
    expected, product = model(ids), fast._product

    def counted(*args, **kwargs):
        products.append(1)
        return product(*args, **kwargs)

    monkeypatch.setattr(fast, "_product", counted)
    with fast.blocked_weights(model, 2):
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)
        if torch.backends.mkldnn.is_available():
            linears = [m for m in model.layers.modules() if isinstance(m, torch.nn.Linear)]
            assert len(replaced(model)) == len(linears) + 1 and "" in replaced(model)
            assert len(products) == len(block_linears(model)) + 1  # and the head
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


class UpFirst(plain.MLP):
    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(up * torch.nn.functional.silu(self.gate_proj(x)))


class Gated(plain.Attention):
    def forward(self, x, rope, attend):
        return super().forward(x, rope, attend) * self.gate(x).sigmoid()


# ------------------------------------------------------------------------------ all of it together



