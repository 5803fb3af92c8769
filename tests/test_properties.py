"""What holds for every input, on inputs that hypothesis makes up: grids, masks, CKA, losses and
their gradients, tokenizers, generation, files, and the split of a user's rows.

PROPERTIES=1000 in the environment is the long form: so many examples of each, here a dozen.
"""
import importlib
import json
import math
import os
import tempfile
import unicodedata
from functools import cache, partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import GPT2, QWEN2, QWEN3, SMOLLM3, slopes, squared_distance, tiny
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import data
import model as plain
import sdft
from cka import KINDS, between_layers, linear_cka, rbf_cka, sample_level, token_level
from model import GPT, GPTConfig
from prune import prune_
from quant import (
    NF4_CODE,
    bake_,
    fake_nf4,
    fake_quantize,
    quantize_,
    quantize_int,
)

FAST = [importlib.import_module("extras.fast")] if (  # it may be deleted
    Path(sdft.__file__).parent / "extras" / "fast.py").exists() else []
EXAMPLES = int(os.environ.get("PROPERTIES", 12))


def examples(times=1):
    """Settings: the same examples in every run, `times` as many of what is fast."""
    return settings(max_examples=times * EXAMPLES, derandomize=True, deadline=None, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


seeds = st.integers(0, 2 ** 32 - 1)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module", autouse=True)
def float64_where_the_model_is():
    """Attention in the model's own type: sums in another order differ by 1e-15, not by 1e-6."""
    with mock.patch("model.attention_dtype", lambda device, dtype: dtype):
        yield


# --------------------------------------------------------------------------------------- the grids

numbers = st.one_of(st.floats(-4, 4, width=32), st.floats(-2.0 ** 100, 2.0 ** 100, width=32),
                    st.sampled_from([0.0, -0.0, 0.25, 0.5, -1.5, 2.5, 3.5, -5.0, 6.0, 7.0, -8.0]))
SIGNS = {"any": torch.clone, "none": torch.abs, "all": lambda w: -w.abs()}


@st.composite
def weights(draw):
    """[1 to 3, 32], in each row of any sign or all of one."""
    signs = draw(st.lists(st.sampled_from(list(SIGNS)), min_size=1, max_size=3))
    values = st.lists(numbers, min_size=32, max_size=32)
    return torch.stack([SIGNS[sign](torch.tensor(draw(values))) for sign in signs])


integers = st.fixed_dictionaries({"bits": st.integers(2, 8), "symmetric": st.booleans(),
                                  "group_size": st.sampled_from([None, 4, 16])})
GRIDS = {"nf4": fake_nf4}
grids = st.one_of(st.sampled_from(list(GRIDS.values())), integers.map(
    lambda how: partial(fake_quantize, **how)))


def in_groups(w, size):
    """In float64, where a sum of two float32 is exact: [groups, size]."""
    return w.double().reshape(-1, size or w.size(1))


@examples(6)
@given(weights(), integers)
def test_an_integer_grid_errs_by_half_a_step_at_most(w, how):
    groups, high = in_groups(w, how["group_size"]), 2 ** how["bits"] - 1
    error = (in_groups(fake_quantize(w, **how), how["group_size"]) - groups).abs()
    if how["symmetric"]:
        step = groups.abs().amax(1) / (2 ** (how["bits"] - 1) - 1)
    else:
        step = (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)) / high
    assert (error <= step[:, None] * (0.5 + 1e-4)).all()


@examples(6)
@given(weights(), integers)
def test_an_integer_grid_leaves_what_lies_on_it_but_for_the_scales_last_digits(w, how):
    """The codes are the same again. An asymmetric grid whose two ends are both ties is not reached
    at one of them: w_hat has a smaller range, and a grid of its own."""
    w_hat = fake_quantize(w, **how)
    codes, scale, zero_point = quantize_int(w, **how)
    again, _, _ = quantize_int(w_hat, **how)
    size, high = how["group_size"], 2 ** how["bits"] - 1
    if not how["symmetric"]:
        q, z = codes.reshape(-1, size or 32).int(), zero_point.reshape(-1, 1)
        reached = torch.maximum(q.amax(1, True), z) - torch.minimum(q.amin(1, True), z) == high
        assume(bool((reached | (q == z).all(1, keepdim=True)).all()))
    assert torch.equal(again, codes)
    torch.testing.assert_close(fake_quantize(w_hat, **how), w_hat, rtol=3e-7, atol=0)


@examples(6)
@given(weights())
def test_nf4_takes_the_nearest_of_its_values_and_leaves_what_lies_on_it(w):
    blocks = nn.functional.pad(w.double().flatten(), (0, -w.numel() % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1)[:, None]
    nearest = (blocks[..., None] - NF4_CODE.double() * absmax[..., None]).abs().amin(-1)
    error = (fake_nf4(w).double() - w.double()).abs().flatten()
    bound = nearest + 1e-6 * absmax + 1e-44
    assert (error <= bound.flatten()[:w.numel()]).all()
    assert (nearest <= 0.152 * absmax).all()  # half of the largest gap, of -1 and -.696
    assert torch.equal(fake_nf4(fake_nf4(w)), fake_nf4(w))


@examples(6)
@given(weights(), grids)
def test_zero_stays_zero_on_every_grid(w, grid):
    assert (grid(w)[w == 0] == 0).all() and grid(w).isfinite().all()
    assert (grid(torch.zeros_like(w)) == 0).all()


MASKS = {"magnitude": dict(method="magnitude", sparsity=0.4),
         "n of m": dict(method="magnitude", n=2, m=4), "wanda": dict(method="wanda", sparsity=0.7)}


@examples(2)
@given(weights(), st.sampled_from(list(MASKS.values())), seeds, st.booleans(),
       st.sampled_from(["int2", "int3", "int4", "int8", "nf4"]))
def test_what_is_pruned_and_then_quantized_keeps_its_zeros(w, mask, seed, symmetric, scheme):
    """Also after steps of an optimizer that remembers gradients from before, and baked."""
    layer = nn.Linear(32, len(w), bias=False)
    layer.weight.data = w.clamp(-1e6, 1e6)
    model = nn.Sequential(layer)
    norms = {layer: normal(seed, 32).abs().float()} if mask["method"] == "wanda" else None
    pruned = prune_(model, **mask, norms=norms)
    zeros = ~layer.parametrizations.weight[0].mask
    assert zeros.sum() == pruned > 0
    quantize_(model, scheme, group_size=16, symmetric=symmetric)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer.state[layer.parametrizations.weight.original] = {
        "step": torch.tensor(5.0), "exp_avg": torch.ones_like(w), "exp_avg_sq": torch.ones_like(w)}
    for _ in range(2):
        assert (layer.weight[zeros] == 0).all()
        model(normal(seed, 5, 32).float()).square().mean().backward()
        optimizer.step()
    assert (bake_(model)[0].weight[zeros] == 0).all()


# --------------------------------------------------------------------------------------------- CKA

ESTIMATORS = [partial(cka, debiased=debiased) for cka in (linear_cka, rbf_cka)
              for debiased in (False, True)]
sizes = st.integers(1, 9)


def rotation(seed, d):
    """[d, d] orthogonal, at random."""
    return torch.linalg.qr(normal(seed, d, d)).Q


close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)


@examples(4)
@given(seeds, st.integers(5, 12), sizes, sizes, st.floats(1e-3, 1e3), st.floats(-10, 10),
       st.sampled_from(ESTIMATORS))
def test_cka_does_not_see_a_rotation_a_scale_or_a_shift(seed, n, d1, d2, scale, shift, cka):
    x = normal(seed, n, d1)
    y = normal(seed + 1, n, d2) + x[:, :1]
    value = cka(x, y)
    turned = scale * x @ rotation(seed + 2, d1) + shift * normal(seed + 3, d1)
    close(cka(turned, y), value)
    close(cka(y, turned), value)
    assert value <= 1 + 1e-9 and (cka.keywords["debiased"] or value >= 0)
    close(cka(x, turned), torch.ones_like(value))


def answers_of(seed, layers, d):
    """Hidden states of six sequences of five to nine tokens."""
    return [normal(seed + i, layers, 5 + i % 5, d) for i in range(6)]


@examples()
@given(seeds, st.integers(1, 3), st.integers(2, 6), st.floats(1e-3, 1e3))
def test_token_level_does_not_see_a_rotation_a_scale_or_a_shift_of_a_layer(seed, layers, d, scale):
    """The kind of unit rows sees a shift, and does not see a scale of each token's own."""
    a, b = answers_of(seed, layers, d), answers_of(seed + 9, layers, d)
    a = [x + y[..., :1] for x, y in zip(a, b)]
    shift = normal(seed + 20, d)
    turned = [scale * x @ rotation(seed + 19, d) + shift for x in a]
    ours, theirs = token_level(turned, b), token_level(a, b)
    assert list(ours) == list(KINDS)
    for kind in set(KINDS) - {"unit_debiased"}:
        close(torch.tensor(ours[kind]), torch.tensor(theirs[kind]))
    turned = [normal(seed, layers, x.size(1), 1).exp() * x @ rotation(seed + 19, d) for x in a]
    unit = token_level(turned, b)["unit_debiased"]
    close(torch.tensor(unit), torch.tensor(theirs["unit_debiased"]))


@examples()
@given(seeds, st.integers(1, 3), st.integers(2, 6))
def test_sample_level_does_not_see_a_scale_or_a_shift_of_each_dimension(seed, layers, d):
    """Dimensions are z-scored: each may be scaled, turned round and shifted by itself, and change
    places with others. A rotation that mixes them is seen."""
    a, b = answers_of(seed, layers, d), answers_of(seed + 9, layers, d)
    scale, shift = normal(seed + 19, d).exp(), normal(seed + 20, d)
    scale[::2] *= -1
    order = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    moved = [(scale * x + shift)[..., order] for x in a]
    ours, theirs = sample_level(moved, b), sample_level(a, b)
    for kind in KINDS:
        close(torch.tensor(ours[kind]), torch.tensor(theirs[kind]))
    close(torch.tensor(between_layers(moved, b)), torch.tensor(between_layers(a, b)))
    stretched = [torch.arange(1.0, d + 1).exp() * x @ rotation(seed + 19, d) for x in a]
    assert sample_level(stretched, b)["linear"] != pytest.approx(theirs["linear"], abs=1e-9)


# -------------------------------------------------------------------------------------- the losses

@st.composite
def two_logits(draw, most=20.0):
    """Student's and teacher's, [N, V] each."""
    n, v = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    values = st.lists(st.floats(-most, most, width=32), min_size=n * v, max_size=n * v)
    return tuple(torch.tensor(draw(values)).view(n, v) for _ in range(2))


betas = st.floats(0.05, 0.95)


@examples(6)
@given(two_logits(100.0), betas)
def test_divergences_are_at_least_pinskers_bound_which_is_zero_for_equals_only(logits, beta):
    """KL >= |p - q|_1^2 / 2, and from both of its KLs jsd >= beta (1 - beta) |p - q|_1^2 / 2."""
    s, t = logits
    ones = torch.ones(len(s))
    distance = (s.double().softmax(-1) - t.double().softmax(-1)).abs().sum(-1)
    bound = distance.square().mean() / 2 - 1e-5
    assert sdft.forward_kl(s, t, ones) >= bound and sdft.reverse_kl(s, t, ones) >= bound
    assert sdft.jsd(s, t, ones, beta) >= beta * (1 - beta) * bound - 1e-5
    for loss in (*sdft.LOSSES.values(), partial(sdft.jsd, beta=beta)):
        assert abs(loss(s, s, ones)) <= 1e-6  # and what is added to all logits is not seen
        assert abs(loss(s + 3, s, ones)) <= 1e-4


@examples(6)
@given(two_logits(100.0), betas)
def test_forward_of_one_is_reverse_of_the_other_and_jsd_of_a_half_knows_no_side(logits, beta):
    """jsd changes sides with beta; it is at most the entropy of (beta, 1 - beta), log 2 at 1/2."""
    s, t = logits
    ones = torch.ones(len(s))
    assert sdft.forward_kl(s, t, ones) == sdft.reverse_kl(t, s, ones)
    torch.testing.assert_close(sdft.jsd(s, t, ones), sdft.jsd(t, s, ones), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sdft.jsd(s, t, ones, beta), sdft.jsd(t, s, ones, 1 - beta),
                               rtol=1e-4, atol=1e-6)
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert sdft.jsd(s, t, ones, beta) <= entropy + 1e-6
    assert sdft.jsd(s, t, ones) <= math.log(2) + 1e-6


@examples(2)
@given(two_logits(5.0), betas, st.data())
def test_the_gradient_of_every_loss_is_its_slope(logits, beta, draw):
    """By finite differences, in float64, over a mask."""
    s, t = (x.double() for x in logits)
    mask = torch.tensor([True] + draw.draw(st.lists(st.booleans(), min_size=len(s) - 1,
                                                    max_size=len(s) - 1)))
    losses = *sdft.LOSSES.values(), partial(sdft.jsd, beta=beta), squared_distance
    with mock.patch("sdft._log_probs", lambda x: x.log_softmax(-1)):  # not by way of float32
        for loss in losses:
            assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, t, mask),
                                            s.clone().requires_grad_())


@examples()
@given(seeds, st.integers(5, 7), sizes, sizes, st.sampled_from(ESTIMATORS))
def test_the_gradient_of_cka_is_its_slope(seed, n, d1, d2, cka):
    x, y = normal(seed, n, d1).requires_grad_(), normal(seed + 1, n, d2)
    assert torch.autograd.gradcheck(partial(cka, y=y + x.detach()[:, :1]), x)


# ------------------------------------------------------------------------------- models, in batches

SHAPES = {"llama": {}, "gpt2": GPT2, "qwen2": QWEN2, "qwen3": QWEN3, "smollm3": SMOLLM3}


@cache
def model_of(name, dtype=torch.float64, seed=0, vocab_size=64):
    return tiny(seed, **SHAPES[name] | {"vocab_size": vocab_size}).to(dtype)


tokens = st.integers(0, 63)
beginnings = st.sampled_from([[], [], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 3]])
a_prompt = st.builds(list.__add__, beginnings, st.lists(tokens, min_size=1, max_size=7))
a_batch = st.lists(a_prompt, min_size=1, max_size=6)
names = st.sampled_from(list(SHAPES))
sampling = st.fixed_dictionaries({
    "temperature": st.sampled_from([0, 0.6, 1.5]), "top_p": st.sampled_from([1.0, 0.7]),
    "eos_id": st.sampled_from([None, 5, list(range(0, 64, 5))])})


def generated(model, prompts, how, n, batch_size, rows=None, generate=plain.generate):
    return generate(model, prompts, n, **how, generator=torch.Generator().manual_seed(3),
                    batch_size=batch_size, rows=rows)


@examples(2)
@given(names, a_batch, sampling, st.integers(1, 6), st.integers(1, 4), st.data())
def test_an_answer_does_not_depend_on_its_neighbours(name, prompts, how, n, batch_size, draw):
    """Not on what the other prompts are, which of them are asked for, their order, or how many run
    together."""
    model = model_of(name)
    answers = generated(model, prompts, how, n, 64)
    assert all(0 < len(answer) <= n for answer in answers)
    assert generated(model, prompts, how, n, batch_size) == answers
    rows = draw.draw(st.permutations(range(len(prompts))))[:draw.draw(st.integers(1, 6))]
    assert generated(model, prompts, how, n, batch_size, rows) == [answers[i] for i in rows]
    others = draw.draw(st.lists(a_prompt, min_size=len(prompts), max_size=len(prompts)))
    others[rows[0]] = prompts[rows[0]]
    assert generated(model, others, how, n, batch_size)[rows[0]] == answers[rows[0]]
    if how["temperature"] == 0:
        order = [prompts[i] for i in rows]
        assert generated(model, order, how, n, batch_size) == [answers[i] for i in rows]


@examples(2)
@given(names, a_batch, st.data())
@torch.no_grad()
def test_scores_are_those_of_each_row_alone_plain_and_fast(name, prompts, draw):
    model = model_of(name)
    completions = draw.draw(st.lists(st.lists(tokens, min_size=1, max_size=5),
                                     min_size=len(prompts), max_size=len(prompts)))
    alone = torch.cat([sdft.score(model, [p], [c], hidden=True)
                       for p, c in zip(prompts, completions)], dim=1)
    for score in (sdft.score, *(fast.score for fast in FAST)):
        found = score(model, prompts, completions, hidden=True)
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(score(model, prompts, completions)[0], alone[-1], rtol=1e-9,
                                   atol=1e-9)


@examples(4)
@given(names, seeds, st.integers(1, 12), st.integers(0, 9), st.integers(1, 14),
       st.sampled_from([(64, 64), (64, 80), (80, 64)]),
       st.sampled_from([*sdft.LOSSES.values(), partial(sdft.jsd, beta=0.3), squared_distance]))
def test_backward_in_chunks_is_autograd_of_the_whole_loss(name, seed, n, others, chunk, vs, loss):
    """Plain and fast: loss, KL, and the gradients of states and head; tokens of other
    micro-batches count, ids beyond the smaller vocabulary do not."""
    student, teacher = (model_of(name, torch.float32, i, v) for i, v in enumerate(vs))
    s, t = normal(seed, n, 32, dtype=torch.float32), normal(seed + 1, n, 32, dtype=torch.float32)
    leaf, w = s.clone().requires_grad_(), student.head_weight.detach().clone().requires_grad_()
    logits = (leaf @ w.T)[:, :min(vs)], teacher.head(t).detach()[:, :min(vs)]
    part = n / (n + others)
    value = loss(*logits, torch.ones(n)) * part
    value.backward()
    kl = sdft.forward_kl if loss is sdft.forward_kl else sdft.reverse_kl
    values = torch.stack((value, kl(*logits, torch.ones(n)) * part)).detach()
    for backward in (sdft.backward, *(fast.backward for fast in FAST)):
        found = slopes(backward, loss, student, s, teacher, t, n + others, chunk=chunk)
        for ours, expected in zip(found, (values, leaf.grad, w.grad)):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------- files

@st.composite
def configs(draw):
    """A GPTConfig of any of the six architectures, with whatever its folder can say."""
    kind = draw(st.sampled_from(["gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3"]))
    size, heads, layers = st.integers(1, 9), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    width, some, gpt2 = 2 * draw(st.integers(1, 3)), st.booleans(), kind == "gpt2"
    free = kind not in ("gpt2", "llama")  # a head's width need not be the model's, divided
    scalings = [{}, {"rope_type": "linear", "factor": 2.5}, {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}]
    attention_bias = kind in ("llama", "qwen3", "smollm3") and draw(some)
    return GPTConfig(
        model_type=kind, vocab_size=draw(size), n_layer=layers, n_head=heads, head_dim=width,
        d_model=draw(size) if free else width * heads, d_ff=draw(size),
        n_kv_head=heads if gpt2 else draw(st.sampled_from([n for n in (1, 2, 3, 4)
                                                           if heads % n == 0])),
        context_length=draw(size), norm_eps=draw(st.sampled_from([1e-5, 1e-6, 0.1])),
        rope_theta=0.0 if gpt2 else draw(st.sampled_from([1e4, 1e5, 123.5])),
        rope_scaling={} if gpt2 else draw(st.sampled_from(scalings)),
        qkv_bias=gpt2 or kind == "qwen2" or attention_bias, out_bias=gpt2 or attention_bias,
        mlp_bias=gpt2 or kind in ("llama", "smollm3") and draw(some), tie_embeddings=draw(some),
        activation=draw(st.sampled_from(["silu", "relu", "gelu", "gelu_new"])),
        no_rope=tuple(i for i in range(layers) if draw(some)) if kind == "smollm3" else ())


@examples(2)
@given(configs(), seeds, st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_models_folder_is_read_as_it_was_written(config, seed, dtype):
    """And written again it is the same, byte for byte."""
    torch.manual_seed(seed)
    model = GPT(config).to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model.save_pretrained(folder / "one")
        found = GPT.from_pretrained(folder / "one", dtype=dtype)
        assert found.config == config
        ours, theirs = dict(found.named_parameters()), dict(model.named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(w, theirs[name]) and w.dtype == dtype for name, w in ours.items())
        found.save_pretrained(folder / "two")
        for name in ("config.json", "model.safetensors"):
            assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()


# ------------------------------------------------------------------------------- the split of rows

WORDS = ["tin", "Étain", "groß", "ΣΊΣΥΦΟΣ", "Ǆ", "año", "東京", "what is"]
questions = st.integers(0, len(WORDS) - 1)


@st.composite
def disguised(draw, question):
    """A question's text in some case and white space, composed or not."""
    change = draw(st.sampled_from([str, str.upper, str.swapcase, str.casefold]))
    form = draw(st.sampled_from(["NFC", "NFD"]))
    blank = draw(st.sampled_from([" ", "  ", "\n", "\u3000"]))
    return unicodedata.normalize(form, change(f"{WORDS[question]} please?")).replace(" ", blank)


@st.composite
def row_files(draw):
    """[(the questions of a row, with what was answered before the last; the row)], in one form or
    another."""
    found = []
    for n in range(draw(st.integers(2, 16))):
        asked = draw(st.lists(questions, min_size=1, max_size=3))
        said = [draw(disguised(q)) for q in asked]
        turns, key = [], []
        for i, (question, text) in enumerate(zip(asked, said)):
            answer = f"answer {n}" if i == len(asked) - 1 else draw(st.sampled_from("ab"))
            turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            key += [question, answer]
        row = {"messages": turns} if len(asked) > 1 or draw(st.booleans()) else {
            "prompt": said[0], "response": f"answer {n}"}
        if "messages" in row and draw(st.booleans()):
            row["messages"] = [{"role": "system", "content": f"Be brief {n}."}, *turns]
        found.append((tuple(key[:-1]), row | {"id": n}))
    return found


def begins_with(one, other):
    return one[:len(other)] == other or other[:len(one)] == one


def none_on_both_sides(key_of, one, other):
    for a in one:
        for b in other:
            assert not begins_with(key_of[a.response], key_of[b.response]), (a, b)


@examples(4)
@given(row_files())
def test_no_question_stands_on_both_sides_of_a_split(found):
    """Nor a conversation that goes on from a question of the other side. Neither case nor white
    space makes another question, nor does a system message."""
    key_of = {f"answer {n}": key for n, (key, _) in enumerate(found)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for _, row in found), encoding="utf-8")
        try:
            task = data.load_task(path)
        except ValueError as error:
            assert "one question cannot be both" in str(error)
            assert all(begins_with(a, b) for a in key_of.values() for b in key_of.values()
                       if len(a) == 1)
            return
    held_out = task.eval["held_out"]
    assert len(task.train) + len(held_out) == len(found) and task.train and held_out
    none_on_both_sides(key_of, task.train, held_out)
    rest, watched = data.hold_out(task, 3)
    if len(rest.train) < len(task.train):
        none_on_both_sides(key_of, rest.train, watched)


