"""model.py against transformers: the same random weights in both; then saving, generation and error messages."""
import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

import model as model_file
from model import GPT, GPTConfig, KVCache, blocked_weights, exact_weight, generate, sample
from quant import bake_, compute_in_, quantize_

VOCAB, CONTEXT, LAYERS = 97, 64, 3
GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=CONTEXT, layer_norm_epsilon=1e-3,
            bos_token_id=0, eos_token_id=0)
LLAMA = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=56, num_hidden_layers=LAYERS, num_attention_heads=4,
             max_position_embeddings=CONTEXT, rms_norm_eps=1e-3)
CONFIGS = {
    "gpt2": GPT2Config(**GPT2),
    "gpt2-untied-narrow": GPT2Config(**GPT2, n_inner=40, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=300.0),
    "llama-untied": LlamaConfig(**LLAMA, num_key_value_heads=1, head_dim=12, tie_word_embeddings=False, rope_theta=5e5),
    "llama-biases": LlamaConfig(**LLAMA, num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e6),
}
OURS = GPTConfig("llama", VOCAB, LAYERS, 32, 4, 2, 12, 56, CONTEXT, 1e-3, 700.0, True, True, True, False)
FRESH = {  # configurations that came from no config.json
    "gpt2": GPTConfig("gpt2", VOCAB, LAYERS, 32, 4, 4, 8, 40, CONTEXT, 1e-3, 0.0, True, True, True, True),
    "llama": OURS,
    "qwen2": replace(OURS, model_type="qwen2", head_dim=8, out_bias=False, mlp_bias=False, tie_embeddings=True),
}


def randomise(model, seed=0):
    """Move every parameter, norms and biases too, so that no two could be exchanged unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def write(name, folder, **options):
    """transformers' model of CONFIGS[name], random, saved in folder."""
    oracle = randomise(AutoModelForCausalLM.from_config(CONFIGS[name]))
    oracle.save_pretrained(folder, **options)
    return oracle


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from the folder that it wrote)."""
    folder = tmp_path_factory.mktemp(request.param)
    return write(request.param, folder), GPT.from_pretrained(folder)


def random_rows(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


def padded(rows, side):
    """Rows -> ids [B, T] and mask [B, T]; the padding is 7, a token like any other."""
    fill = [[7] * (max(map(len, rows)) - len(row)) for row in rows]
    ids = [f + row if side == "left" else row + f for f, row in zip(fill, rows)]
    mask = [[0] * len(f) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(f) for f, row in zip(fill, rows)]
    return torch.tensor(ids), torch.tensor(mask).bool()


@torch.no_grad()
def oracle_logits(oracle, row):
    """transformers' logits [T, V] of one row, no padding, no cache."""
    return oracle(torch.tensor([row])).logits[0]


def same_logits(ours, oracle, tolerance=1e-4):
    ids = torch.tensor(random_rows(CONTEXT))
    with torch.no_grad():
        a, b = ours(ids), oracle(ids)
    a, b = getattr(a, "logits", a), getattr(b, "logits", b)
    assert b.float().std() > 0.3, "logits too flat to compare"
    assert (a.float() - b.float()).abs().max() < tolerance


# ---------------------------------------------------------------------------------------------------------------------
# The same function as transformers

def test_logits_equal_transformers(pair):
    same_logits(pair[1], pair[0])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_of_either_side_equals_transformers(pair, side):
    oracle, ours = pair
    ids, mask = padded(random_rows(23, 9, 1, 16), side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = oracle(ids, attention_mask=mask.long(), position_ids=positions).logits
    assert (ours(ids, mask) - expected)[mask].abs().max() < 1e-4
    other = ids.where(mask, 3)  # what stands at the padding changes nothing
    assert torch.equal(ours(other, mask)[mask], ours(ids, mask)[mask])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_hidden_states_are_every_blocks_output_with_the_last_after_the_norm(pair, side):
    oracle, ours = pair
    ids, mask = padded(random_rows(12, 17), side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = oracle(ids, attention_mask=mask.long(), position_ids=positions, output_hidden_states=True).hidden_states[1:]
    logits, states = ours(ids, mask, hidden=True)
    assert len(states) == len(expected) == LAYERS
    assert all((h - e)[mask].abs().max() < 1e-4 for h, e in zip(states, expected))
    assert torch.equal(logits, ours(ids, mask)) and torch.equal(logits, ours.head(states[-1]))


@torch.no_grad()
def test_cache_prefill_then_single_tokens_then_a_chunk(pair):
    oracle, ours = pair
    ids = torch.tensor(random_rows(30, 30))
    cache = KVCache(ours, 2, 30)
    parts = [ours(ids[:, :11], cache=cache)]
    parts += [ours(ids[:, t:t + 1], cache=cache) for t in range(11, 17)]
    parts += [ours(ids[:, 17:25], cache=cache), ours(ids[:, 25:], cache=cache)]
    assert (torch.cat(parts, 1) - oracle(ids).logits).abs().max() < 1e-4
    assert cache.length.tolist() == [30, 30]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_cache_after_a_padded_prefill_and_with_ragged_chunks(pair, side):
    """Each row in its own pieces: a padded prefill, single tokens, a padded chunk, single tokens; a row leaves midway."""
    oracle, ours = pair
    rows = random_rows(26, 21, 24)
    expected = [oracle_logits(oracle, row) for row in rows]
    cache, at, kept = KVCache(ours, 3, CONTEXT), [0, 0, 0], [0, 1, 2]
    for sizes in ([12, 4, 9], [1, 1, 1], [1, 1, 1], [2, 7, 5], [1, 1, 1], None, [1, 0, 1], [3, 0, 1]):
        if sizes is None:
            cache.keep([2, 0])
            kept = [2, 0]
            continue
        ids, mask = padded([rows[i][at[i]:at[i] + sizes[i]] for i in kept], side)
        logits = ours(ids, None if mask.all() else mask, cache)
        for b, i in enumerate(kept):
            assert (logits[b][mask[b]] - expected[i][at[i]:at[i] + sizes[i]]).abs().max() < 1e-4
            at[i] += sizes[i]
    assert cache.length.tolist() == [at[2], at[0]]


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16 over float32

def test_computing_in_bfloat16_equals_a_bfloat16_model_and_trains_float32_weights(pair, tmp_path):
    ours = copy.deepcopy(pair[1])
    half, ids = copy.deepcopy(ours).bfloat16(), torch.tensor(random_rows(20, 20))
    names = [name for name, _ in ours.named_parameters()]
    compute_in_(ours, torch.bfloat16)
    logits = ours(ids)
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, half(ids))
    weights, expected = torch.randn(logits.shape, dtype=torch.bfloat16), {}
    (logits * weights).sum().backward()
    (half(ids) * weights).sum().backward()
    for name, p in half.named_parameters():
        expected[name] = p.grad
    for name, p in ours.named_parameters():
        plain = name.replace("parametrizations.", "").removesuffix(".original")
        assert p.dtype == p.grad.dtype == torch.float32 and torch.equal(p.grad.bfloat16(), expected[plain]), name
    ours.save_pretrained(tmp_path)
    saved = GPT.from_pretrained(tmp_path)
    for name in names:
        assert torch.equal(saved.get_parameter(name), pair[1].get_parameter(name)) and torch.equal(
            exact_weight(ours, name), pair[1].get_parameter(name)), name


@torch.no_grad()
def test_bfloat16_logits_are_near_those_of_float32(pair):
    """As near as those of transformers' own bfloat16 model, within a factor of 2."""
    oracle, ours = pair
    ids = torch.tensor(random_rows(30, 30))
    exact = oracle(ids).logits
    error = (compute_in_(copy.deepcopy(ours), torch.bfloat16)(ids).float() - exact).square().mean().sqrt()
    theirs = (copy.deepcopy(oracle).bfloat16()(ids).logits.float() - exact).square().mean().sqrt()
    assert 0 < error < 2 * theirs


@torch.no_grad()
def test_bfloat16_generation_equals_the_uncached_forward(pair):
    """A token that wins by more than the cache's rounding is the same; a near tie may fall either way."""
    model = copy.deepcopy(pair[1]).bfloat16()
    for prompt in random_rows(5, 9, 14):
        completion, = generate(model, [prompt], 6, temperature=0)
        logits = model(torch.tensor([prompt + completion]))[0, len(prompt) - 1:-1].float()
        chosen = logits[torch.arange(6), completion]
        assert (logits.max(-1).values - chosen).max() < 0.05 * logits.std()


def test_checkpointing_gives_the_same_gradients_from_less_memory():
    model = GPT(GPTConfig(vocab_size=VOCAB, n_layer=4, d_model=32, n_head=4, n_kv_head=2, head_dim=8, d_ff=256))
    ids, gradients, kept = torch.tensor(random_rows(40, 40)), [], []
    for model.checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            loss = model(ids).square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        kept.append(sum(sizes))
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and kept[1] < 0.5 * kept[0]


# ---------------------------------------------------------------------------------------------------------------------
# Folders

@pytest.mark.parametrize("name", CONFIGS)
def test_sharded_checkpoint_loads(name, tmp_path):
    oracle = write(name, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    same_logits(GPT.from_pretrained(tmp_path), oracle)


def test_original_gpt2_names_load(tmp_path):
    """The checkpoint as OpenAI's was published: no 'transformer.' prefix, causal masks among the tensors."""
    oracle = write("gpt2", tmp_path)
    tensors = {k.removeprefix("transformer."): w for k, w in load_file(tmp_path / "model.safetensors").items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, CONTEXT, CONTEXT).tril() for i in range(LAYERS)}
    save_file(tensors, tmp_path / "model.safetensors")
    same_logits(GPT.from_pretrained(tmp_path), oracle)


def test_save_pretrained_loads_in_transformers_and_here(pair, tmp_path):
    oracle, ours = pair
    changed = randomise(GPT(ours.config), seed=3)
    changed.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    same_logits(theirs, changed)
    same_logits(GPT.from_pretrained(tmp_path), changed, tolerance=1e-6)
    with pytest.raises(AssertionError):
        same_logits(theirs, oracle)


@pytest.mark.parametrize("name", FRESH)
def test_a_model_made_from_scratch_loads_in_transformers(name, tmp_path):
    ours = randomise(GPT(FRESH[name]))
    ours.save_pretrained(tmp_path)
    same_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), ours)


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_bfloat16_is_kept_on_disk_and_in_the_config(name, tmp_path):
    oracle = write(name, tmp_path)
    ours = GPT.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path / "half")
    assert {w.dtype for w in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert all(torch.equal(w, oracle.state_dict()[k].bfloat16()) for k, w in theirs.state_dict().items())
    same_logits(GPT.from_pretrained(tmp_path / "half"), GPT.from_pretrained(tmp_path), tolerance=0.2)


@pytest.mark.parametrize("name", ["gpt2", "llama-untied"])
def test_quantized_weights_are_saved_as_they_act(name, tmp_path):
    oracle = write(name, tmp_path / "healthy")
    student = GPT.from_pretrained(tmp_path / "healthy")
    quantize_(student, "int4", group_size=None)
    student.save_pretrained(tmp_path / "student")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    same_logits(theirs, student)
    with pytest.raises(AssertionError):
        same_logits(theirs, oracle)
    assert hasattr(student.layers[0].mlp.up_proj, "parametrizations"), "saving must not bake"
    reread, baked = GPT.from_pretrained(tmp_path / "student"), bake_(student)
    assert all(torch.equal(w, reread.state_dict()[k]) for k, w in baked.state_dict().items())
    assert all(row.unique().numel() <= 15 for row in reread.layers[0].mlp.up_proj.weight)


def test_saving_over_a_sharded_folder_replaces_it(tmp_path):
    """The shards and the index that were there must not win over the model saved last."""
    write("llama-tied", tmp_path, max_shard_size="20KB")
    changed = randomise(GPT.from_pretrained(tmp_path), seed=5)
    changed.save_pretrained(tmp_path)
    same_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), changed)
    same_logits(GPT.from_pretrained(tmp_path), changed)


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    oracle = write("llama-tied", tmp_path)

    def disk_full(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(model_file, "save_file", disk_full)
    with pytest.raises(OSError):
        randomise(GPT(FRESH["llama"])).save_pretrained(tmp_path)
    same_logits(GPT.from_pretrained(tmp_path), oracle)


@pytest.mark.parametrize("name", FRESH)
def test_config_round_trip(name):
    ours = FRESH[name]
    assert replace(GPTConfig.from_hf(ours.to_hf()), hf={}) == ours


@pytest.mark.parametrize("name", CONFIGS)
def test_config_reads_transformers_and_keeps_keys_it_does_not_know(name):
    theirs = {**json.loads(CONFIGS[name].to_json_string(use_diff=False)), "some_new_key": [1, 2]}
    ours = GPTConfig.from_hf(theirs)
    assert (ours.d_model, ours.n_head, ours.n_layer, ours.norm_eps) == (32, 4, LAYERS, 1e-3)
    again = GPTConfig.from_hf(ours.to_hf())
    assert ours.to_hf()["some_new_key"] == [1, 2] and replace(again, hf={}) == replace(ours, hf={})


def test_rope_theta_is_read_in_the_form_of_transformers_4_and_5():
    old = {**OURS.to_hf(), "rope_theta": 123.0, "rope_scaling": None}
    new = {k: v for k, v in old.items() if k != "rope_theta"} | {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}
    assert GPTConfig.from_hf(old).rope_theta == GPTConfig.from_hf(new).rope_theta == 123.0


# ---------------------------------------------------------------------------------------------------------------------
# Generation

RAGGED = random_rows(9, 3, 14, 1, 6, seed=2)
SHARED = [[5, 4, 3, 2, 1, 9, *row] for row in RAGGED] + [[5, 4, 3, 2, 1, 9]]


@torch.no_grad()
def slow_greedy(model, prompt, max_new_tokens, eos_id=None):
    """The definition: the most likely next token of a full forward, again and again."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens and (len(ids) == len(prompt) or ids[-1] != eos_id):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prompts", [RAGGED, SHARED, RAGGED[3:4], [[8]] * 3], ids=["ragged", "shared", "one-token", "equal"])
def test_greedy_equals_a_loop_of_full_forwards(pair, prompts):
    expected = [slow_greedy(pair[1], prompt, 10) for prompt in prompts]
    assert generate(pair[1], prompts, 10, temperature=0) == expected
    assert generate(pair[1], prompts, 10, temperature=0, batch_size=2) == expected


@torch.no_grad()
def test_weights_laid_out_for_decoding_give_the_same_logits(pair):
    model, ids = pair[1], torch.tensor(random_rows(9, 9))
    plain, entrance = model(ids), model.layers[0].self_attn.q_proj
    with blocked_weights(model, 2):
        if torch.backends.mkldnn.is_available():
            assert len(entrance(torch.zeros(1, 1, model.config.d_model)).flatten()) == sum(  # q, k and v in one product
                linear.out_features for linear in (entrance, model.layers[0].self_attn.k_proj, model.layers[0].self_attn.v_proj))
        torch.testing.assert_close(model(ids), plain, rtol=0, atol=1e-5)
    assert entrance.blocked is None and model.blocked is None
    torch.testing.assert_close(model(ids), plain, rtol=0, atol=0)


@pytest.mark.parametrize("prompts", [RAGGED, SHARED], ids=["ragged", "shared"])
def test_greedy_equals_transformers_generate(pair, prompts):
    oracle, ours = pair
    eos = slow_greedy(ours, prompts[0], 12)[4]
    ids, mask = padded(prompts, "left")
    theirs = oracle.generate(ids, attention_mask=mask.long(), max_new_tokens=12, do_sample=False, eos_token_id=eos,
                             pad_token_id=0)
    for row, completion in zip(generate(ours, prompts, 12, temperature=0, eos_id=eos), theirs[:, ids.size(1):].tolist()):
        assert row == completion[:len(row)] and set(completion[len(row):]) <= {0}


def spied(model, monkeypatch):
    """The shapes [rows, tokens] of the backbone's calls from now on."""
    shapes, backbone = [], model.backbone

    def spy(ids, *args, **kwargs):
        shapes.append(tuple(ids.shape))
        return backbone(ids, *args, **kwargs)
    monkeypatch.setattr(model, "backbone", spy, raising=False)
    return shapes


def test_rows_stop_at_eos_and_leave_the_batch(pair, monkeypatch):
    ours = pair[1]
    free = [slow_greedy(ours, prompt, 12) for prompt in SHARED]
    eos = free[0][2]
    expected = [slow_greedy(ours, prompt, 12, eos) for prompt in SHARED]
    shapes = spied(ours, monkeypatch)
    completions = generate(ours, SHARED, 12, temperature=0, eos_id=eos)
    monkeypatch.undo()
    assert completions == expected
    assert eos in completions[0] and len(completions[0]) <= 3 and all(eos not in row[:-1] for row in completions)
    assert shapes[0][0] == 1 and shapes[1][0] == len(SHARED), "the common prefix is read once"
    running = [sum(len(row) > step for row in expected) for step in range(1, 12)]
    assert shapes[2:] == [(n, 1) for n in running if n] and running[-1] < len(SHARED)


def test_batch_size_bounds_the_rows_of_a_forward(pair, monkeypatch):
    shapes = spied(pair[1], monkeypatch)
    generate(pair[1], RAGGED, 2, temperature=0, batch_size=2)
    assert max(rows for rows, _ in shapes) == 2


def test_max_new_tokens_and_the_last_place_of_the_context(pair):
    assert [len(row) for row in generate(pair[1], RAGGED, 1, temperature=0)] == [1] * 5
    assert {len(row) for row in generate(pair[1], RAGGED, 7, generator=seeded(0))} == {7}
    full = random_rows(CONTEXT - 3)
    assert generate(pair[1], full, 4, temperature=0) == [slow_greedy(pair[1], full[0], 4)]


def test_a_row_does_not_depend_on_its_neighbours_or_their_order(pair):
    ours, order = pair[1], [3, 0, 4, 1, 2]
    alone = [generate(ours, [prompt], 10, temperature=0)[0] for prompt in RAGGED]
    assert generate(ours, [RAGGED[i] for i in order], 10, temperature=0) == [alone[i] for i in order]
    row = RAGGED[2]
    a = generate(ours, [RAGGED[0], row, RAGGED[1]], 10, generator=seeded(4))[1]
    b = generate(ours, [RAGGED[3], row], 10, generator=seeded(4))[1]
    c = generate(ours, [SHARED[4], row, *SHARED], 10, generator=seeded(4), batch_size=3)[1]
    assert a == b == c
    eos = a[3]
    assert generate(ours, [RAGGED[1], row, RAGGED[4]], 10, generator=seeded(4), eos_id=eos)[1] == a[:a.index(eos) + 1]


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
    assert ((frequency - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1 / n).all()


def test_top_p_keeps_the_smallest_nucleus_and_its_proportions():
    n, p = 20000, torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    tokens = sample(p.log().expand(n, -1), 1.0, top_p=0.75, u=torch.rand(n, generator=seeded(0)))
    expected = n * torch.tensor([0.0, 0.4, 0.15, 0.3, 0.0]) / 0.85
    counts = tokens.bincount(minlength=5)
    assert counts[0] == counts[4] == 0
    assert ((counts - expected) ** 2 / expected)[1:4].sum() < 13.8  # 2 degrees of freedom: p = 0.001


def test_top_p_never_leaves_the_nucleus_even_at_the_ends_of_u():
    logits = 3 * torch.randn(3000, 40, generator=seeded(0))
    ranked, order = logits.softmax(-1).sort(descending=True)
    for top_p in (0.1, 0.5, 0.9):
        size = (ranked.double().cumsum(-1) < top_p).sum(-1) + 1  # the fewest tokens that reach top_p
        for u in (0.0, 0.5, 1 - 2 ** -24):  # torch.rand's least and greatest
            tokens = sample(logits, 1.0, top_p, torch.full((3000,), u))
            rank = (order == tokens[:, None]).int().argmax(-1)
            assert (rank < size).all()


# ---------------------------------------------------------------------------------------------------------------------
# Errors: one line that names the culprit

def edit_config(folder, drop=None, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config.pop(drop, None)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def wrong_shape(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(55, 32)


def index_reads(text):
    """Replace the weights by this text as the index of shards."""
    def spoil(folder):
        (folder / "model.safetensors.index.json").write_text(text)
        (folder / "model.safetensors").unlink()
    return spoil


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
BROKEN = {  # what -> (how to break a folder, the error, what its message must name)
    "no folder": (shutil.rmtree, FileNotFoundError, "broken"),
    "no config.json": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
    "no safetensors": (lambda f: (f / "model.safetensors").unlink(), ValueError, "safetensors"),
    "missing shard": (index_reads('{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'),
                      FileNotFoundError, "model-00001-of-00002.safetensors"),
    "index not JSON": (index_reads("<html>"), ValueError, "model.safetensors.index.json"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), ValueError, "model.norm.weight"),
    "unexpected tensor": (lambda f: edit_tensors(f, lambda t: t.update(surprise=torch.ones(1))), ValueError, "surprise"),
    "wrong shape": (lambda f: edit_tensors(f, wrong_shape), ValueError, "model.layers.1.mlp.up_proj.weight"),
    "model_type": (lambda f: edit_config(f, model_type="mamba"), ValueError, "mamba"),
    "rope_parameters": (lambda f: edit_config(f, rope_parameters=LINEAR), ValueError, "linear"),
    "rope_scaling": (lambda f: edit_config(f, "rope_parameters", rope_scaling={"type": "dynamic"}), ValueError, "dynamic"),
    "corrupt file": (lambda f: (f / "model.safetensors").write_bytes(b"\x08not safetensors"), ValueError, "model.safetensors"),
    "truncated file": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
                       ValueError, "model.safetensors"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json"),
    "config lacks a key": (lambda f: edit_config(f, "intermediate_size"), ValueError, "intermediate_size"),
    "activation": (lambda f: edit_config(f, hidden_act="relu"), ValueError, "hidden_act"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_named_in_one_line(what, tmp_path):
    spoil, error, culprit = BROKEN[what]
    folder = tmp_path / "broken"
    write("llama-tied", folder)
    spoil(folder)
    with pytest.raises(error) as caught:
        GPT.from_pretrained(folder)
    message = str(caught.value)
    assert type(caught.value) is error and culprit in message and str(folder) in message and "\n" not in message


def test_more_tokens_than_the_context_is_an_error(pair):
    prompts = random_rows(4, CONTEXT + 1)
    with pytest.raises(ValueError, match=rf"^{CONTEXT + 1} tokens .* context of {CONTEXT}$"):
        generate(pair[1], prompts, 1, temperature=0)
    with pytest.raises(ValueError, match=str(CONTEXT)):
        pair[1](torch.tensor(prompts[1:]))
    with pytest.raises(ValueError, match="prompt"):
        generate(pair[1], [[1], []], 1, temperature=0)
