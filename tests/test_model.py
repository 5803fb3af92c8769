"""model.py against transformers: the same random weights in both, in memory and in folders; then
generation.

What one architecture passes, every architecture passes: `pair` goes over CONFIGS.
"""
import copy
import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from conftest import tiny
from safetensors.torch import load_file, save_file

import model
from model import GPT, KVCache, config_json, config_of, generate
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
CONFIGS = {name: (getattr(transformers, kind), LLAMA | dict(changes)) for name, kind, changes in [
    ("llama-tied", "LlamaConfig", dict(num_key_value_heads=2, tie_word_embeddings=True,
                                       rope_theta=300.0)),
    ("llama-untied", "LlamaConfig", dict(num_key_value_heads=1, head_dim=12, rope_theta=5e5,
                                         tie_word_embeddings=False)),
    ("llama-biases", "LlamaConfig", dict(attention_bias=True, mlp_bias=True)),
    ("llama3", "LlamaConfig", dict(num_key_value_heads=2, tie_word_embeddings=True,
                                   rope_parameters={**LLAMA3, "rope_theta": 300.0})),
    ("linear", "LlamaConfig", dict(rope_parameters={
        "rope_type": "linear", "factor": 3.0, "rope_theta": 300.0})),
    ("longrope", "LlamaConfig", dict(rope_parameters={**LONGROPE, "rope_theta": 300.0})),
    ("qwen2", "Qwen2Config", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    ("qwen3", "Qwen3Config", dict(num_key_value_heads=2, head_dim=12, rope_theta=1e6)),
    ("smollm3", "SmolLM3Config", dict(num_key_value_heads=2, no_rope_layers=[1, 0, 1],
                                      rope_theta=300.0, pad_token_id=0)),
    ("mistral", "MistralConfig", dict(num_key_value_heads=2, sliding_window=None,
                                      hidden_act="gelu"))]}
CONFIGS = {name: kind(**entries) for name, (kind, entries) in CONFIGS.items()} | {
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt2-untied-narrow": transformers.GPT2Config(**GPT2, n_inner=40, tie_word_embeddings=False)}


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
    theirs = randomise(transformers.AutoModelForCausalLM.from_config(CONFIGS[name]))
    theirs.save_pretrained(folder, **options)
    return theirs


def of_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from the folder that it wrote)."""
    folder = tmp_path_factory.mktemp(request.param)
    return write(request.param, folder), GPT.from_pretrained(folder)


@pytest.fixture(scope="module", params=["gpt2", "llama-untied", "qwen2", "qwen3", "smollm3"])
def ours(request, tmp_path_factory):
    """A random model of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    write(request.param, folder)
    return GPT.from_pretrained(folder)


def random_rows(*lengths, seed=1):
    generator = seeded(seed)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


def padded(rows):
    """Rows -> ids [B, T] and mask [B, T], True = real; the padding is 7, a token like any other."""
    T = max(map(len, rows))
    ids, mask = torch.full((len(rows), T), 7), torch.zeros(len(rows), T, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids[b, :len(row)], mask[b, :len(row)] = torch.tensor(row, dtype=torch.long), True
    return ids, mask


def same_logits(ours, theirs, tolerance=1e-4):
    ids = torch.tensor(random_rows(CONTEXT))
    with torch.no_grad():
        a, b = ours(ids), theirs(ids)
    a, b = getattr(a, "logits", a), getattr(b, "logits", b)
    assert b.float().std() > 0.3, "logits too flat to compare"
    assert (a.float() - b.float()).abs().max() < tolerance


# ---------------------------------------------------------------- the same function as transformers

@torch.no_grad()
def test_logits_and_hidden_states_equal_transformers_beside_padding_too(pair):
    """Each block's output, the last after the norm; padding on the right needs no mask."""
    theirs, ours = pair
    same_logits(ours, theirs)  # of a whole context
    ids, mask = padded(random_rows(23, 9, 1, 16))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    right = theirs(ids, attention_mask=mask.long(), position_ids=positions,
                   output_hidden_states=True)
    logits, states = ours(ids, hidden=True)
    assert (logits - right.logits)[mask].abs().max() < 1e-4
    assert len(states) == LAYERS
    for ours_h, theirs_h in zip(states, right.hidden_states[1:]):
        assert (ours_h - theirs_h)[mask].abs().max() < 1e-4
    other = ids.where(mask, 3)  # what stands at the padding changes nothing
    assert torch.equal(ours(other)[mask], logits[mask])
    assert torch.equal(logits, ours(ids)) and torch.equal(logits, ours.head(states[-1]))


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


@torch.no_grad()
def test_rows_packed_into_one_have_the_same_states_as_alone(pair):
    ours, rows = pair[1], random_rows(9, 4, 13)
    ids = torch.tensor([token for row in rows for token in row])[None]
    owner = torch.tensor([b for b, row in enumerate(rows) for _ in row])
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    mask = (owner == owner[:, None]) & (positions <= positions[:, None])
    x = ours.backbone(ids, attend=partial(model.attend, mask=mask[None, None]),
                      positions=positions[None])[0]
    for row, given in zip(rows, x.split([len(row) for row in rows])):
        right = ours.backbone(torch.tensor([row]))[0]
        torch.testing.assert_close(given, right, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------ weights as they act

def test_computing_in_bfloat16_equals_a_bfloat16_model_and_trains_float32_weights(ours):
    half, ids = copy.deepcopy(ours).bfloat16(), torch.tensor(random_rows(20, 20))
    mixed = compute_in_(copy.deepcopy(ours), torch.bfloat16)
    logits = mixed(ids)
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, half(ids))
    weights = torch.randn(logits.shape, dtype=torch.bfloat16)
    for lm in (mixed, half):
        (lm(ids) * weights).sum().backward()
    for name, p in half.named_parameters():
        assert mixed.stored(name).grad.dtype == torch.float32
        assert torch.equal(mixed.stored(name).grad.bfloat16(), p.grad), name
        assert torch.equal(mixed.weight(name), ours.get_parameter(name)), name


def test_named_weights_and_a_frozen_copy_are_a_plain_models_parameters_as_they_act(ours):
    """Quantized weights come on their grid, and what is rounded for speed alone comes exact."""
    before, ours = dict(ours.named_parameters()), copy.deepcopy(ours)
    assert all(torch.equal(w, before[name]) for name, w in ours.named_weights())
    quantize_(ours, "int4", group_size=None)
    compute_in_(ours, torch.bfloat16)
    weights, frozen = dict(ours.named_weights()), model.frozen_copy(ours, torch.float32)
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


def test_gradient_checkpointing_gives_the_same_gradients_from_less_memory(ours):
    ids, gradients, sizes, ours = torch.tensor(random_rows(40, 40)), [], [0, 0], copy.copy(ours)
    for on in (False, True):
        ours.gradient_checkpointing = on

        def keep(x, on=on):
            sizes[on] += x.numel()
            return x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = ours(ids).square().mean()
        gradients.append(torch.autograd.grad(loss, [*ours.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and sizes[1] < 0.7 * sizes[0]


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
def test_greedy_equals_a_loop_of_full_forwards(ours, prompts):
    expected = [slow_greedy(ours, prompt, 10) for prompt in prompts]
    assert generate(ours, prompts, 10, temperature=0) == expected
    assert generate(ours, prompts, 10, temperature=0, batch_size=2) == expected


def test_the_first_of_several_ends_ends_a_row_as_in_transformers(tmp_path):
    theirs, prompts = write("llama-tied", tmp_path), RAGGED[:3]
    ours = GPT.from_pretrained(tmp_path)
    free = [slow_greedy(ours, prompt, 12) for prompt in prompts]
    for ends in ([free[0][4]], [free[0][4], free[1][7], free[2][2]]):
        right = [theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
                                 eos_token_id=ends, pad_token_id=0)[0, len(prompt):].tolist()
                 for prompt in prompts]
        for form in (ends, tuple(ends), set(ends), *([ends[0]] if len(ends) == 1 else [])):
            assert generate(ours, prompts, 12, temperature=0, eos_id=form) == right


def test_rows_that_have_ended_leave_the_batch(ours, monkeypatch):
    shapes, told, backbone = [], [], ours.backbone

    def spy(ids, *args, **kwargs):
        shapes.append(tuple(ids.shape))
        return backbone(ids, *args, **kwargs)
    eos = slow_greedy(ours, SHARED[0], 12)[2]
    right = [slow_greedy(ours, prompt, 12, eos) for prompt in SHARED]
    monkeypatch.setattr(ours, "backbone", spy, raising=False)
    assert generate(ours, SHARED, 12, temperature=0, eos_id=eos, done=told.append) == right
    assert shapes[0][0] == 1 and shapes[1][0] == len(SHARED), "the common prefix is read once"
    running = [sum(len(row) > step for row in right) for step in range(12)]
    assert shapes[2:] == [(n, 1) for n in running[1:] if n] and running[-1] < len(SHARED)
    ended = [a - b for a, b in zip(running, [*running[1:], 0])]
    assert told == ended[:len(told)] and sum(told) == len(SHARED), "done is told of each row once"


def test_no_tokens_and_the_last_place_of_the_context(ours):
    for temperature in (0, 1.0):
        assert generate(ours, [[1], [2, 3]], 0, temperature) == [[], []]
    assert generate(ours, [], 5) == generate(ours, [[1]], 5, rows=[]) == []
    assert {len(row) for row in generate(ours, RAGGED, 7, generator=seeded(0))} == {7}
    full, longer = random_rows(CONTEXT - 3, CONTEXT + 1)
    assert generate(ours, [full], 4, temperature=0) == [slow_greedy(ours, full, 4)]
    with pytest.raises(ValueError, match=rf"^{CONTEXT + 1} tokens .* context of {CONTEXT}$"):
        generate(ours, [full, longer], 1, temperature=0)
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        generate(ours, [[1], []], 5)


def test_a_row_does_not_depend_on_its_neighbours_or_their_order(ours):
    order = [3, 0, 4, 1, 2]
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
    everything = generate(ours, SHARED, 8, generator=seeded(3), eos_id=5, batch_size=4)
    assert everything != generate(ours, SHARED, 8, generator=seeded(9), eos_id=5, batch_size=4)
    for rows in ([4, 1], [0], [], [3, 5, 2]):
        some = generate(ours, SHARED, 8, generator=seeded(3), eos_id=5, batch_size=2, rows=rows)
        assert some == [everything[i] for i in rows]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sample_frequencies_match_the_softmax(temperature):
    n, logits = 20000, torch.tensor([0.0, 1.0, -1.0, 2.0, 0.3, -3.0, 1.5])
    tokens = model.sample(logits.expand(n, -1), temperature, u=torch.rand(n, generator=seeded(0)))
    expected = n * (logits / temperature).softmax(-1)
    chi_square = ((tokens.bincount(minlength=7) - expected) ** 2 / expected).sum()
    assert chi_square < 22.5  # 6 degrees of freedom: p = 0.001


def test_top_p_never_leaves_the_nucleus_even_at_the_ends_of_u():
    logits = 3 * torch.randn(3000, 40, generator=seeded(0))
    ranked, order = logits.softmax(-1).sort(descending=True)
    for top_p in (0.1, 0.5, 0.9):
        size = (ranked.double().cumsum(-1) < top_p).sum(-1) + 1  # fewest tokens that reach top_p
        for u in (0.0, 0.5, 1 - 2 ** -24):  # torch.rand's least and greatest
            tokens = model.sample(logits, 1.0, top_p, torch.full((3000,), u))
            assert ((order == tokens[:, None]).int().argmax(-1) < size).all()


# ----------------------------------------------------------------------------------------- folders

@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_in_shards_loads_and_what_is_saved_loads_in_transformers(name, tmp_path):
    theirs = write(name, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same_logits(GPT.from_pretrained(tmp_path), theirs)
    (tmp_path / "model.safetensors.index.json").unlink()
    ours = GPT.from_pretrained(tmp_path)
    same_logits(ours, theirs)
    plain = replace(ours.config, hf={})  # as if it came from no file
    assert replace(config_of(config_json(ours.config)), hf={}) == plain
    assert replace(config_of(config_json(plain)), hf={}) == plain
    changed, folder = randomise(GPT(plain), seed=3), tmp_path / "ours"
    changed.save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    again = of_transformers(folder)
    same_logits(again, changed)
    same_logits(GPT.from_pretrained(folder), changed, tolerance=1e-6)
    with pytest.raises(AssertionError):
        same_logits(again, theirs)
    changed.save_pretrained(tmp_path)  # the shards that are there must not win
    same_logits(of_transformers(tmp_path), changed)
    same_logits(GPT.from_pretrained(tmp_path), changed)


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


def head(how):
    """Store a head: alone, or another one than the embeddings, or the same in another type."""
    def change(tensors):
        table = next(key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight")))
        w = tensors.pop(table) if how == "alone" else tensors[table]
        if how == "same":
            tensors[table] = w = w.bfloat16()
        tensors["lm_head.weight"] = w.flip(0) if how == "another" else w.float().clone()
    return change


@pytest.mark.parametrize("change", ["bare", "alone", "another", "same"])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "smollm3"])
def test_stored_heads_and_prefixes_are_read_as_transformers_reads_them(name, change, tmp_path):
    """A head stored alone is the embeddings, too; one that differs from them is its own."""
    write(name, tmp_path)
    edit_tensors(bare if change == "bare" else head(change))(tmp_path)
    ours, theirs = GPT.from_pretrained(tmp_path), of_transformers(tmp_path)
    same_logits(ours, theirs)
    assert ours.config.tie_embeddings == (change != "another")
    ours.save_pretrained(tmp_path / "again")
    same_logits(of_transformers(tmp_path / "again"), theirs)


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
    state = transformers.AutoModelForCausalLM.from_pretrained(half, dtype="auto").state_dict()
    for key, w in theirs.state_dict().items():
        assert torch.equal(state[key], w.bfloat16()) and state[key].dtype == torch.bfloat16
    same_logits(GPT.from_pretrained(half), of_transformers(half))  # in float32


def test_a_failed_save_leaves_the_old_model_and_files_are_as_the_umask_says(tmp_path, monkeypatch):
    theirs = write("llama-tied", tmp_path)

    def disk_full(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("no space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(model, "save_file", disk_full)
        with pytest.raises(OSError):
            randomise(tiny()).save_pretrained(tmp_path)
    same_logits(GPT.from_pretrained(tmp_path), theirs)
    for mask in (0o022, 0o077):
        before, folder = os.umask(mask), tmp_path / f"{mask}"
        tiny().save_pretrained(folder)
        os.umask(before)
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}


# ------------------------------------------------------------------------------------- config.json

@pytest.mark.parametrize("kind", ["GPT2", "Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"])
def test_a_key_that_is_missing_is_what_transformers_takes_or_named(kind):
    window = {"sliding_window": None} if kind == "Mistral" else {}
    config = getattr(transformers, f"{kind}Config")(**window)
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


TRIED = {  # values of keys that a default config.json may lack, or has in another form
    "rope_scaling": [{"type": "linear", "factor": 4}, LLAMA3, {"rope_type": "yarn", "factor": 2.0},
                     {"rope_type": "dynamic", "factor": 2.0}, {**LLAMA3, "attention_factor": 2.0},
                     {**LONGROPE, "long_factor": [3.0] * 4}, {**LONGROPE, "factor": 1.0}],
    "rope_theta": [77.0], "partial_rotary_factor": [0.5], "head_dim": [8],
    "no_rope_layers": [[0, 0, 1], None], "no_rope_layer_interval": [2],
    "layer_types": [["sliding_attention"] * LAYERS], "mlp_bias": [True], "attention_bias": [True],
    "hidden_act": ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh"],
    "activation_function": ["gelu", "gelu_new", "relu", "silu", "tanh"],
    "use_sliding_window": [True], "sliding_window": [4], "max_window_layers": [0],
    "attn_logit_softcapping": [30.0], "some_new_key": [1]}
NAMES = {"architectures", "dtype", "id2label", "label2id", "problem_type", "model_type",
         "rope_parameters", "return_dict", "summary_activation"}  # no numbers, or tried above
REFUSED = {
    "gpt2": {"scale_attn_weights", "scale_attn_by_inverse_layer_idx", "activation_function"},
    "mistral": {"sliding_window", "mlp_bias"}, "qwen2": {"mlp_bias", "use_sliding_window"}}


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "qwen2", "qwen3", "smollm3", "mistral"])
def test_a_changed_key_gives_transformers_logits_or_is_refused_by_name(name, tmp_path):
    """Each key of config.json at another value. Those that change nothing here are tried at once,
    and change nothing there."""
    write(name, tmp_path)
    usual, refused = json.loads(CONFIGS[name].to_json_string(use_diff=False)), set()
    another = {bool: lambda x: not x, float: lambda x: x / 2 + 0.25, int: lambda x: 2 * x + 1}
    changes = [(key, another[type(value)](value)) for key, value in usual.items()
               if type(value) in another and key not in NAMES]
    changes += [(key, value) for key, values in TRIED.items() for value in values]
    ignored, trials = {}, []
    for key, value in changes:
        kept = {k: v for k, v in usual.items()
                if not (key.startswith("rope_") and k == "rope_parameters")}
        try:
            if config_of({**kept, key: value}) == config_of(kept):
                ignored[key] = value
            else:
                trials.append((key, {**kept, key: value}))
        except ValueError as error:
            assert any(word in str(error) for word in (key, "rope", "_factor")), (key, str(error))
            refused.add(key)
    for key, config in [*trials, ("those ignored", usual | ignored)]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            ours = GPT.from_pretrained(tmp_path)
        except ValueError as error:
            assert "tensor" in str(error), key  # it has another shape now
            continue
        try:
            theirs = of_transformers(tmp_path)
        except (KeyError, RuntimeError):  # RoPE for GPT-2, or for half as many pairs
            assert key == "rope_scaling"
        else:
            same_logits(ours, theirs)
    assert REFUSED.get(name, {"partial_rotary_factor", "rope_scaling", "layer_types"}) <= refused
    assert not {"max_position_embeddings", "bos_token_id", "use_cache", "rms_norm_eps"} & refused


UP = "model.layers.1.mlp.up_proj.weight"


def tensor(key=UP, to=None):
    def change(tensors):
        w = tensors.pop(key, torch.ones(()))
        if to:
            tensors[key] = to(w)
    return edit_tensors(change)


def config(**changes):
    def change(raw):
        entries = json.loads(raw) | changes
        return json.dumps({key: x for key, x in entries.items() if x != "gone"}).encode()
    return content("config.json", change)


def content(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def index(text):
    """Replace the weights by this text as the index of shards."""
    def spoil(folder):
        (folder / "model.safetensors.index.json").write_text(text)
        (folder / "model.safetensors").unlink()
    return spoil


BROKEN = [  # how to break a folder, what the line must name
    (index('{"weight_map": {"a": "no.safetensors"}}'), "no.safetensors"),
    (index("<html>"), "model.safetensors.index.json"), (index("{}"), "model.safetensors.index"),
    (tensor("model.norm.weight"), "model.norm.weight is missing"),
    (tensor("surprise", torch.clone), "surprise has no place"),
    (tensor(to=lambda w: w[:55].clone()), UP), (tensor(to=lambda w: w[0, 0].clone()), UP),
    (tensor(to=lambda w: w * float("inf")), UP), (tensor(to=lambda w: w.to(torch.int8)), "int8"),
    (tensor(to=lambda w: w.to(torch.float8_e4m3fn)), "quantized"),
    (content("model.safetensors", lambda raw: raw[:-9]), "model.safetensors cannot be read"),
    (content("model.safetensors", lambda raw: b"<html>"), "model.safetensors cannot be read"),
    (content("config.json", lambda raw: b"{"), "config.json"),
    (content("config.json", lambda raw: b"[1]"), "config.json"),
    (config(intermediate_size="gone"), "no entry 'intermediate_size'"),
    (config(hidden_size="wide"), "config.json"), (config(hidden_size=None), "config.json"),
    (config(num_attention_heads=0), "config.json"), (config(hidden_size=32.5), "config.json"),
    (config(vocab_size=-1), "config.json"), (config(num_hidden_layers=[3]), "config.json"),
    (config(rope_parameters="x"), "config.json"), (config(hidden_act=["x"]), "config.json"),
    (config(model_type="mamba"), "mamba"), (config(model_type=["llama"]), "llama"),
    (config(quantization_config={"quant_method": "bitsandbytes"}), "bitsandbytes"),
    (config(quantization={"bits": 4}), "quantization")]


@pytest.mark.parametrize("n", range(len(BROKEN)))
def test_a_broken_folder_is_named_in_one_line(n, tmp_path):
    spoil, culprit = BROKEN[n]
    write("llama-tied", tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        GPT.from_pretrained(tmp_path)
    message = str(caught.value)
    assert culprit in message and str(tmp_path) in message and "\n" not in message
