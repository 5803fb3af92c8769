"""model.py against transformers: the same random weights in both, in memory and in folders; then
generation.

What one architecture passes, every architecture passes: `pair` goes over CONFIGS.
"""
import copy
import hashlib
import json
import os
import shutil
import types
import zipfile
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import model
from model import (
    GPT,
    GPTConfig,
    KVCache,
    attend,
    config_json,
    config_of,
    frozen_copy,
    generate,
    rope_frequencies,
    sample,
)
from quant import bake_, compute_in_, fake_quantize, quantize_

VOCAB, CONTEXT, LAYERS = 97, 64, 3
GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=CONTEXT,
            layer_norm_epsilon=1e-3, bos_token_id=0, eos_token_id=0)
LLAMA = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=56, num_hidden_layers=LAYERS,
             num_attention_heads=4, max_position_embeddings=CONTEXT, rms_norm_eps=1e-3)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=40)
LONGROPE = dict(rope_type="longrope", short_factor=[2.0, 1.0, 3.0, 1.5], attention_factor=1.0,
                long_factor=[2.0, 1.0, 3.0, 1.5], original_max_position_embeddings=CONTEXT)
CONFIGS = {
    "gpt2": GPT2Config(**GPT2),
    "gpt2-untied-narrow": GPT2Config(**GPT2, n_inner=40, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True,
                              rope_theta=300.0),
    "llama-untied": LlamaConfig(**LLAMA, num_key_value_heads=1, head_dim=12,
                                tie_word_embeddings=False, rope_theta=5e5),
    "llama-biases": LlamaConfig(**LLAMA, num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e6),
    "llama3": LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True,
                          rope_parameters={**LLAMA3, "rope_theta": 300.0}),
    "linear": LlamaConfig(**LLAMA, rope_parameters={
        "rope_type": "linear", "factor": 3.0, "rope_theta": 300.0}),
    "longrope": LlamaConfig(**LLAMA, rope_parameters={**LONGROPE, "rope_theta": 300.0}),
    "qwen3": Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=12, rope_theta=1e6),
    "smollm3": SmolLM3Config(**LLAMA, num_key_value_heads=2, no_rope_layers=[1, 0, 1],
                             rope_theta=300.0, pad_token_id=0),
    "mistral": MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=None,
                             hidden_act="gelu"),
}
OURS = GPTConfig("llama", VOCAB, LAYERS, 32, 4, 2, 12, 56, CONTEXT, 1e-3, 700.0, True, True, True,
                 False)
FRESH = {  # configurations that came from no config.json
    "gpt2": GPTConfig("gpt2", VOCAB, LAYERS, 32, 4, 4, 8, 40, CONTEXT, 1e-3, 0.0, True, True, True,
                      True),
    "llama": OURS,
    "qwen2": replace(OURS, model_type="qwen2", head_dim=8, out_bias=False, mlp_bias=False,
                     tie_embeddings=True),
    "llama3": replace(OURS, rope_scaling=LLAMA3, rope_theta=300.0),
    "linear": replace(OURS, rope_scaling={"rope_type": "linear", "factor": 3.0}, activation="relu"),
    "qwen3": replace(OURS, model_type="qwen3", mlp_bias=False),
    "smollm3": replace(OURS, model_type="smollm3", head_dim=8, no_rope=(0, 2)),
    "mistral": replace(OURS, model_type="mistral", qkv_bias=False, out_bias=False, mlp_bias=False),
}


def randomise(lm, seed=0):
    """Move every parameter, norms and biases too, so that no two could be exchanged unnoticed."""
    generator = seeded(seed)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return lm.eval()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def write(name, folder, **options):
    """transformers' model of CONFIGS[name], random, saved in folder."""
    theirs = randomise(AutoModelForCausalLM.from_config(CONFIGS[name]))
    theirs.save_pretrained(folder, **options)
    return theirs


def of_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from the folder that it wrote)."""
    folder = tmp_path_factory.mktemp(request.param)
    return write(request.param, folder), GPT.from_pretrained(folder)


def random_rows(*lengths, seed=1):
    generator = seeded(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


def padded(rows, side="right"):
    """Rows -> ids [B, T] and mask [B, T], True = real; the padding is 7, a token like any other."""
    T = max(map(len, rows))
    ids, mask = torch.full((len(rows), T), 7), torch.zeros(len(rows), T, dtype=torch.bool)
    for b, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(T - len(row), T)
        ids[b, place], mask[b, place] = torch.tensor(row, dtype=torch.long), True
    return ids, mask


def same_logits(ours, theirs, tolerance=1e-4):
    ids = torch.tensor(random_rows(CONTEXT))
    with torch.no_grad():
        a, b = ours(ids), theirs(ids)
    a, b = getattr(a, "logits", a), getattr(b, "logits", b)
    assert b.float().std() > 0.3, "logits too flat to compare"
    assert (a.float() - b.float()).abs().max() < tolerance


# ---------------------------------------------------------------- the same function as transformers

def test_logits_equal_transformers(pair):
    same_logits(pair[1], pair[0])


@torch.no_grad()
def test_padding_on_the_right_needs_no_mask(pair):
    theirs, ours = pair
    ids, mask = padded(random_rows(23, 9, 1, 16))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    assert (ours(ids) - expected)[mask].abs().max() < 1e-4
    other = ids.where(mask, 3)  # what stands at the padding changes nothing
    assert torch.equal(ours(other)[mask], ours(ids)[mask])
    assert torch.equal(ours(ids, lengths=mask.sum(1)), ours(ids)), "lengths are for a cache"


@torch.no_grad()
def test_hidden_states_are_every_blocks_output_with_the_last_after_the_norm(pair):
    theirs, ours = pair
    ids, mask = padded(random_rows(12, 17))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions,
                      output_hidden_states=True).hidden_states[1:]
    logits, states = ours(ids, hidden=True)
    assert len(states) == len(expected) == LAYERS
    assert all((h - e)[mask].abs().max() < 1e-4 for h, e in zip(states, expected))
    assert torch.equal(logits, ours(ids)) and torch.equal(logits, ours.head(states[-1]))
    assert torch.equal(ours.backbone(ids), states[-1])


@torch.no_grad()
def test_cache_after_a_padded_prefill_and_with_ragged_chunks(pair):
    """Each row in its own pieces: a padded prefill, single tokens, a padded chunk, single tokens; a
    row leaves midway."""
    theirs, ours = pair
    rows = random_rows(26, 21, 24)
    expected = [theirs(torch.tensor([row])).logits[0] for row in rows]
    cache, at, kept = KVCache(ours, 3, CONTEXT), [0, 0, 0], [0, 1, 2]
    for sizes in ([12, 4, 9], [1, 1, 1], [1, 1, 1], [2, 7, 5], [1, 1, 1], None, [1, 0, 1],
                  [3, 0, 1]):
        if sizes is None:
            cache.keep([2, 0])
            kept = [2, 0]
            continue
        ids, mask = padded([rows[i][at[i]:at[i] + sizes[i]] for i in kept])
        logits = ours(ids, None if mask.all() else mask.sum(1), cache)
        for b, i in enumerate(kept):
            right = expected[i][at[i]:at[i] + sizes[i]]
            assert (logits[b][mask[b]] - right).abs().max() < 1e-4
            at[i] += sizes[i]
    assert cache.length.tolist() == [at[2], at[0]]


def test_llama3_rope_worked_by_hand():
    """Wavelengths 2 pi theta^(2i/K) of 6.28, 19.9, 62.8 and 199 tokens: with low 1, high 4 and
    original 80, one under 20 stays, one over 80 is 8 times as long, and the third lies at
    (80 / 62.8 - 1) / 3 between 1/8 and 1."""
    scaled = replace(OURS, head_dim=8, rope_theta=100.0,
                     rope_scaling=LLAMA3 | {"original_max_position_embeddings": 80})
    plain = rope_frequencies(replace(scaled, rope_scaling={}))
    kept = (80 / (2 * torch.pi * 10) - 1) / 3
    times = torch.tensor([1, 1, (1 - kept) / 8 + kept, 1 / 8])
    torch.testing.assert_close(rope_frequencies(scaled), plain * times)


@torch.no_grad()
def test_tokens_in_another_order_have_the_same_states(pair):
    ours, ids = pair[1], torch.tensor(random_rows(20, 20))
    order = torch.randperm(20, generator=seeded(0))
    mask = (order <= order[:, None])[None, None]  # [1, 1, T, T]: each sees what came before it
    x, states = ours.backbone(ids[:, order], hidden=True, attend=partial(attend, mask=mask),
                              positions=order[None])
    plain = ours.backbone(ids, hidden=True)[1]
    for given, right in zip([*states, x], [*plain, plain[-1]]):
        torch.testing.assert_close(given, right[:, order], rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_packed_into_one_have_the_same_states_as_alone(pair):
    ours, rows = pair[1], random_rows(9, 4, 13)
    ids = torch.tensor([token for row in rows for token in row])[None]
    owner = torch.tensor([b for b, row in enumerate(rows) for _ in row])
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    mask = (owner == owner[:, None]) & (positions <= positions[:, None])
    x = ours.backbone(ids, attend=partial(attend, mask=mask[None, None]),
                      positions=positions[None])[0]
    for row, given in zip(rows, x.split([len(row) for row in rows])):
        right = ours.backbone(torch.tensor([row]))[0]
        torch.testing.assert_close(given, right, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------- bfloat16 over float32

def test_computing_in_bfloat16_equals_a_bfloat16_model_and_trains_float32_weights(pair, tmp_path):
    ours = copy.deepcopy(pair[1])
    half, ids = copy.deepcopy(ours).bfloat16(), torch.tensor(random_rows(20, 20))
    names = [name for name, _ in ours.named_parameters()]
    compute_in_(ours, torch.bfloat16)
    logits = ours(ids)
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, half(ids))
    weights = torch.randn(logits.shape, dtype=torch.bfloat16)
    (logits * weights).sum().backward()
    (half(ids) * weights).sum().backward()
    for name in names:
        p = ours.stored(name)
        assert p.dtype == p.grad.dtype == torch.float32, name
        assert torch.equal(p.grad.bfloat16(), half.get_parameter(name).grad), name
    ours.save_pretrained(tmp_path)
    saved = GPT.from_pretrained(tmp_path)
    for name in names:
        right = pair[1].get_parameter(name)
        assert torch.equal(saved.get_parameter(name), right), name
        assert torch.equal(ours.weight(name), right), name


@torch.no_grad()
def test_bfloat16_logits_are_as_near_those_of_float32_as_transformers_are(pair):
    theirs, ours = pair
    ids = torch.tensor(random_rows(30, 30))
    exact = theirs(ids).logits
    ours, theirs = compute_in_(copy.deepcopy(ours), torch.bfloat16), copy.deepcopy(theirs)
    error = (ours(ids).float() - exact).square().mean().sqrt()
    their_error = (theirs.bfloat16()(ids).logits.float() - exact).square().mean().sqrt()
    assert 0 < error < 2 * their_error


@torch.no_grad()
def test_bfloat16_generation_equals_the_uncached_forward(pair):
    """A token that wins by more than the cache's rounding is the same; a near tie may fall either
    way."""
    half = copy.deepcopy(pair[1]).bfloat16()
    for prompt in random_rows(5, 9, 14):
        completion, = generate(half, [prompt], 6, temperature=0)
        logits = half(torch.tensor([prompt + completion]))[0, len(prompt) - 1:-1].float()
        chosen = logits[torch.arange(6), completion]
        assert (logits.max(-1).values - chosen).max() < 0.05 * logits.std()


def test_named_weights_and_a_frozen_copy_are_a_plain_models_parameters_as_they_act(pair):
    """Quantized weights come on their grid, and what is rounded for speed alone comes exact."""
    before, ours = dict(pair[1].named_parameters()), copy.deepcopy(pair[1])
    assert all(torch.equal(w, before[name]) for name, w in ours.named_weights())
    quantize_(ours, "int4", group_size=None)
    compute_in_(ours, torch.bfloat16)
    weights, frozen = dict(ours.named_weights()), frozen_copy(ours, torch.float32)
    assert list(weights) == list(before) == [name for name, _ in frozen.named_parameters()]
    for name, w in weights.items():
        quantized = name.endswith("_proj.weight")
        right = fake_quantize(before[name], 4) if quantized else before[name]
        assert torch.equal(w, right) and w.dtype == torch.float32 and not w.requires_grad, name
        assert torch.equal(ours.weight(name), w) and torch.equal(ours.stored(name), before[name])
        assert quantized == (not torch.equal(w, before[name])), name
        copied = frozen.get_parameter(name)
        assert torch.equal(copied, w) and not copied.requires_grad
        assert copied.data_ptr() != ours.stored(name).data_ptr()


def test_gradient_checkpointing_gives_the_same_gradients_from_less_memory():
    lm = GPT(replace(OURS, d_ff=256, n_layer=4))
    ids, gradients, kept = torch.tensor(random_rows(40, 40)), [], []
    for lm.gradient_checkpointing in (False, True):
        sizes = []

        def keep(x, sizes=sizes):
            sizes.append(x.numel())
            return x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = lm(ids).square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in lm.parameters()])
        kept.append(sum(sizes))
        lm.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and kept[1] < 0.5 * kept[0]


# -------------------------------------------------------------------------------------- generation

RAGGED = random_rows(9, 3, 14, 1, 6, seed=2)
SHARED = [[5, 4, 3, 2, 1, 9, *row] for row in RAGGED] + [[5, 4, 3, 2, 1, 9]]


@torch.no_grad()
def slow_greedy(lm, prompt, max_new_tokens, *ends):
    """The definition: the most likely next token of a full forward, again and again."""
    completion = []
    while len(completion) < max_new_tokens and (not completion or completion[-1] not in ends):
        logits = lm(torch.tensor([prompt + completion]))
        completion.append(int(logits[0, -1].argmax()))
    return completion


@pytest.mark.parametrize("prompts", [RAGGED, SHARED, RAGGED[3:4], [[8]] * 3],
                         ids=["ragged", "shared", "one-token", "equal"])
def test_greedy_equals_a_loop_of_full_forwards(pair, prompts):
    expected = [slow_greedy(pair[1], prompt, 10) for prompt in prompts]
    assert generate(pair[1], prompts, 10, temperature=0) == expected
    assert generate(pair[1], prompts, 10, temperature=0, batch_size=2) == expected


@pytest.mark.parametrize("prompts", [RAGGED, SHARED], ids=["ragged", "shared"])
def test_greedy_with_several_ends_equals_transformers_generate(pair, prompts):
    theirs, ours = pair
    free = [slow_greedy(ours, prompt, 12) for prompt in prompts]
    for ends in ([free[0][4]], [free[0][4], free[1][7], free[2][2]]):
        ids, mask = padded(prompts, "left")  # as transformers' generate wants it
        right = theirs.generate(ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False,
                                eos_token_id=ends, pad_token_id=0)[:, ids.size(1):].tolist()
        for form in (ends, tuple(ends), set(ends), *ends[:1] * (len(ends) == 1)):
            given = generate(ours, prompts, 12, temperature=0, eos_id=form)
            assert given == [slow_greedy(ours, prompt, 12, *ends) for prompt in prompts]
        for row, completion in zip(given, right):
            assert row == completion[:len(row)] and set(completion[len(row):]) <= {0}


def spied(lm, monkeypatch):
    """The shapes [rows, tokens] of the backbone's calls from now on."""
    shapes, backbone = [], lm.backbone

    def spy(ids, *args, **kwargs):
        shapes.append(tuple(ids.shape))
        return backbone(ids, *args, **kwargs)
    monkeypatch.setattr(lm, "backbone", spy, raising=False)
    return shapes


def test_answers_of_no_tokens_are_empty_and_a_prompt_of_none_is_refused():
    lm = tiny()
    for temperature in (0, 1.0):
        assert generate(lm, [[1], [2, 3]], 0, temperature) == [[], []]
    assert generate(lm, [], 5) == generate(lm, [[1]], 5, rows=[]) == []
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        generate(lm, [[1], []], 5)


def test_rows_stop_at_eos_and_leave_the_batch(pair, monkeypatch):
    ours = pair[1]
    eos = slow_greedy(ours, SHARED[0], 12)[2]
    expected = [slow_greedy(ours, prompt, 12, eos) for prompt in SHARED]
    shapes = spied(ours, monkeypatch)
    completions = generate(ours, SHARED, 12, temperature=0, eos_id=eos)
    assert completions == expected and len(completions[0]) <= 3
    assert shapes[0][0] == 1 and shapes[1][0] == len(SHARED), "the common prefix is read once"
    running = [sum(len(row) > step for row in expected) for step in range(1, 12)]
    assert shapes[2:] == [(n, 1) for n in running if n] and running[-1] < len(SHARED)
    shapes.clear()
    generate(ours, RAGGED, 2, temperature=0, batch_size=2)
    assert max(rows for rows, _ in shapes) == 2


def test_max_new_tokens_and_the_last_place_of_the_context(pair):
    assert [len(row) for row in generate(pair[1], RAGGED, 1, temperature=0)] == [1] * 5
    assert {len(row) for row in generate(pair[1], RAGGED, 7, generator=seeded(0))} == {7}
    full, longer = random_rows(CONTEXT - 3, CONTEXT + 1)
    assert generate(pair[1], [full], 4, temperature=0) == [slow_greedy(pair[1], full, 4)]
    with pytest.raises(ValueError, match=rf"^{CONTEXT + 1} tokens .* context of {CONTEXT}$"):
        generate(pair[1], [full, longer], 1, temperature=0)
    with pytest.raises(ValueError, match=str(CONTEXT)):
        pair[1](torch.tensor([longer]))


def test_a_row_does_not_depend_on_its_neighbours_or_their_order(pair):
    ours, order = pair[1], [3, 0, 4, 1, 2]
    alone = [generate(ours, [prompt], 10, temperature=0)[0] for prompt in RAGGED]
    shuffled = generate(ours, [RAGGED[i] for i in order], 10, temperature=0)
    assert shuffled == [alone[i] for i in order]
    row = RAGGED[2]
    a = generate(ours, [RAGGED[0], row, RAGGED[1]], 10, generator=seeded(4))[1]
    b = generate(ours, [RAGGED[3], row], 10, generator=seeded(4))[1]
    c = generate(ours, [SHARED[4], row, *SHARED], 10, generator=seeded(4), batch_size=3)[1]
    assert a == b == c
    eos = a[3]
    short = generate(ours, [RAGGED[1], row, RAGGED[4]], 10, generator=seeded(4), eos_id=eos)[1]
    assert short == a[:a.index(eos) + 1]


def test_some_rows_alone_are_as_among_all_the_others(pair):
    everything = generate(pair[1], SHARED, 8, generator=seeded(3), eos_id=5, batch_size=4)
    for rows in ([4, 1], [0], [], [3, 5, 2]):
        some = generate(pair[1], SHARED, 8, generator=seeded(3), eos_id=5, batch_size=2, rows=rows)
        assert some == [everything[i] for i in rows]


@pytest.mark.parametrize("ends", [True, False], ids=["eos", "no eos"])
@pytest.mark.parametrize("rows", [None, [4, 0, 3, 1]], ids=["all", "some"])
def test_done_is_told_of_each_row_once_as_it_ends(pair, ends, rows):
    ours, told = pair[1], []
    eos = generate(ours, RAGGED, 6, generator=seeded(0))[0][2] if ends else None
    completions = generate(ours, RAGGED, 6, generator=seeded(0), eos_id=eos, rows=rows,
                           done=told.append)
    lengths = [len(row) for row in completions]
    assert told == [lengths.count(n) for n in range(1, max(lengths) + 1)]
    assert sum(told) == len(completions) and (told[-1] < len(completions)) == ends


def test_the_generator_decides_the_sample(pair):
    def draw(seed):
        return generate(pair[1], RAGGED, 10, generator=seeded(seed))
    assert draw(1) == draw(1) != draw(2)
    twins = generate(pair[1], [RAGGED[0]] * 4, 10, generator=seeded(1))
    assert len({tuple(row) for row in twins}) == 4, "each row draws its own numbers"


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sample_frequencies_match_the_softmax(temperature):
    n, logits = 20000, torch.tensor([0.0, 1.0, -1.0, 2.0, 0.3, -3.0, 1.5])
    tokens = sample(logits.expand(n, -1), temperature, u=torch.rand(n, generator=seeded(0)))
    expected = n * (logits / temperature).softmax(-1)
    chi_square = ((tokens.bincount(minlength=7) - expected) ** 2 / expected).sum()
    assert chi_square < 22.5  # 6 degrees of freedom: p = 0.001


def test_generate_draws_first_tokens_from_the_model(pair):
    n, prompt = 4000, RAGGED[0]
    first = generate(pair[1], [prompt] * n, 1, generator=seeded(0), batch_size=n)
    with torch.no_grad():
        expected = pair[1](torch.tensor([prompt]))[0, -1].softmax(-1)
    frequency = torch.tensor(first)[:, 0].bincount(minlength=VOCAB) / n
    error = (expected * (1 - expected) / n).sqrt()
    assert ((frequency - expected).abs() < 5 * error + 1 / n).all()


def test_top_p_keeps_the_smallest_nucleus_and_its_proportions():
    n, p = 20000, torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    u = torch.rand(n, generator=seeded(0))
    counts = sample(p.log().expand(n, -1), 1.0, top_p=0.75, u=u).bincount(minlength=5)
    expected = n * torch.tensor([0.0, 0.4, 0.15, 0.3, 0.0]) / 0.85
    assert counts[0] == counts[4] == 0
    chi_square = ((counts - expected) ** 2 / expected)[1:4].sum()
    assert chi_square < 13.8  # 2 degrees of freedom: p = 0.001


def test_top_p_never_leaves_the_nucleus_even_at_the_ends_of_u():
    logits = 3 * torch.randn(3000, 40, generator=seeded(0))
    ranked, order = logits.softmax(-1).sort(descending=True)
    for top_p in (0.1, 0.5, 0.9):
        size = (ranked.double().cumsum(-1) < top_p).sum(-1) + 1  # fewest tokens that reach top_p
        for u in (0.0, 0.5, 1 - 2 ** -24):  # torch.rand's least and greatest
            tokens = sample(logits, 1.0, top_p, torch.full((3000,), u))
            assert ((order == tokens[:, None]).int().argmax(-1) < size).all()


# ------------------------------------------------------------------------------- folders, to and fro

@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_in_shards_loads_and_what_is_saved_loads_in_transformers(name, tmp_path):
    theirs = write(name, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same_logits(GPT.from_pretrained(tmp_path), theirs)
    (tmp_path / "model.safetensors.index.json").unlink()
    ours = GPT.from_pretrained(tmp_path)
    same_logits(ours, theirs)
    changed, folder = randomise(GPT(ours.config), seed=3), tmp_path / "ours"
    changed.save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    again, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                         output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    same_logits(again, changed)
    same_logits(GPT.from_pretrained(folder), changed, tolerance=1e-6)
    with pytest.raises(AssertionError):
        same_logits(again, theirs)
    changed.save_pretrained(tmp_path)  # the shards that are there must not win
    same_logits(of_transformers(tmp_path), changed)
    same_logits(GPT.from_pretrained(tmp_path), changed)


@pytest.mark.parametrize("name", FRESH)
def test_a_model_made_from_scratch_loads_in_transformers(name, tmp_path):
    ours = randomise(GPT(FRESH[name]))
    ours.save_pretrained(tmp_path)
    same_logits(of_transformers(tmp_path), ours)
    assert replace(config_of(config_json(ours.config)), hf={}) == FRESH[name]


def edit_tensors(change):
    """Let `change` edit the dictionary of tensors."""
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return spoil


def bare(tensors):
    """As the model without its head is stored, but for the head; GPT-2's with its masks."""
    for key in [key for key in tensors if key != "lm_head.weight"]:
        tensors[key.split(".", 1)[1]] = tensors.pop(key)
    if "wte.weight" in tensors:
        tensors["h.0.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT).tril()


def table_of(tensors):
    return next(key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight")))


def head_alone(tensors):
    tensors["lm_head.weight"] = tensors.pop(table_of(tensors))


def another_head(tensors):
    tensors["lm_head.weight"] = tensors[table_of(tensors)].flip(0)


def same_head(tensors):
    """And of another type, in which it is the same."""
    table = table_of(tensors)
    tensors[table] = tensors[table].bfloat16()
    tensors["lm_head.weight"] = tensors[table].float()


@pytest.mark.parametrize("change", [bare, head_alone, another_head, same_head])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "qwen2", "smollm3"])
def test_stored_heads_and_prefixes_are_read_as_transformers_reads_them(name, change, tmp_path):
    """A head stored alone is the embeddings, too; one that differs from them is its own."""
    write(name, tmp_path)
    edit_tensors(change)(tmp_path)
    ours, theirs = GPT.from_pretrained(tmp_path), of_transformers(tmp_path)
    same_logits(ours, theirs)
    assert ours.config.tie_embeddings == (change is not another_head)
    ours.save_pretrained(tmp_path / "again")
    same_logits(of_transformers(tmp_path / "again"), theirs)


@pytest.mark.parametrize("name", ["gpt2-untied-narrow", "llama-untied", "qwen3"])
def test_an_untied_model_without_the_prefix_loads(name, tmp_path):
    theirs = write(name, tmp_path)
    edit_tensors(bare)(tmp_path)
    same_logits(GPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "qwen2"])
def test_quantized_weights_are_saved_as_they_act_and_bfloat16_is_kept(name, tmp_path):
    theirs = write(name, tmp_path / "healthy")
    student = GPT.from_pretrained(tmp_path / "healthy")
    quantize_(student, "int4", group_size=None)
    student.save_pretrained(tmp_path / "student")
    saved = of_transformers(tmp_path / "student")
    same_logits(saved, student)
    with pytest.raises(AssertionError):
        same_logits(saved, theirs)
    assert hasattr(student.layers[0].mlp.up_proj, "parametrizations"), "saving must not bake"
    reread, baked = GPT.from_pretrained(tmp_path / "student"), bake_(student).state_dict()
    assert all(torch.equal(w, reread.state_dict()[key]) for key, w in baked.items())
    half = tmp_path / "half"
    GPT.from_pretrained(tmp_path / "healthy", dtype=torch.bfloat16).save_pretrained(half)
    assert {w.dtype for w in load_file(half / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(half).dtype == torch.bfloat16
    exact = theirs.state_dict()
    state = AutoModelForCausalLM.from_pretrained(half, dtype="auto").state_dict()
    assert all(torch.equal(w, exact[key].bfloat16()) for key, w in state.items())
    ours = GPT.from_pretrained(half)  # half of what was there, in float32
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    same_logits(ours, of_transformers(half))


def test_a_failed_save_leaves_the_old_model_and_files_are_as_the_umask_says(tmp_path, monkeypatch):
    theirs = write("llama-tied", tmp_path)

    def disk_full(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("no space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(model, "save_file", disk_full)
        with pytest.raises(OSError):
            randomise(GPT(OURS)).save_pretrained(tmp_path)
    same_logits(GPT.from_pretrained(tmp_path), theirs)
    for mask in (0o022, 0o077):
        before = os.umask(mask)
        GPT(OURS).save_pretrained(tmp_path / f"{mask}")
        os.umask(before)
        assert {p.stat().st_mode & 0o777 for p in (tmp_path / f"{mask}").iterdir()} == {
            0o666 & ~mask}


# ------------------------------------------------------------------------------------- config.json

@pytest.mark.parametrize("name", CONFIGS)
def test_config_reads_transformers_and_keeps_keys_that_change_nothing(name):
    theirs = {**json.loads(CONFIGS[name].to_json_string(use_diff=False)), "top_p": 0.5}
    ours = config_of(theirs)
    assert (ours.d_model, ours.n_head, ours.n_layer, ours.norm_eps) == (32, 4, LAYERS, 1e-3)
    assert config_json(ours)["top_p"] == 0.5
    assert replace(config_of(config_json(ours)), hf={}) == replace(ours, hf={})


@pytest.mark.parametrize("config", [
    GPT2Config(), LlamaConfig(), Qwen2Config(), Qwen3Config(), SmolLM3Config(),
    MistralConfig(sliding_window=None)], ids=lambda config: config.model_type)
def test_a_key_that_is_missing_is_what_transformers_takes_or_named(config):
    said = json.loads(config.to_json_string(use_diff=False))
    assert config_of(said).tie_embeddings == config.tie_word_embeddings
    for key in said.keys() - {"model_type", "sliding_window"}:
        rest = {k: value for k, value in said.items() if k != key}
        theirs = type(config)(**rest).to_dict() | {"model_type": config.model_type}
        try:
            ours = config_of(rest)
        except KeyError as error:
            assert key in str(error)
            continue
        assert replace(ours, hf={}) == replace(config_of(json.loads(json.dumps(theirs))), hf={})
