"""Pruning: masks worked by hand and counted, zeros through AdamW, removed neurons against neurons
held at zero."""
import copy
import math

import pytest
import torch
from conftest import GPT2, QWEN3, tiny
from transformers import AutoModelForCausalLM

import prune
from model import GPT, GPTConfig
from quant import (
    add_lora_,
    bake_,
    block_linears,
    compute_in_,
    fake_quantize,
    nf4_dequantize,
    nf4_quantize,
    quantize_,
)
from train import Config, degrade_, multiple_of_groups

IDS = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------------------- masks

def test_magnitude_worked_by_hand():
    w = torch.tensor([[3.0, -1.0, 0.5], [-2.0, 0.1, -4.0]])
    assert prune.magnitude_mask(w, 0.5).tolist() == [[True, False, False], [True, False, True]]
    assert prune.magnitude_mask(w, 0).all()


def test_wanda_worked_by_hand():
    """|W| |X|: the first row's scores are 1, 4, 3, 0; the second's 8, 2, 0.3, 0. Magnitude alone
    would keep others."""
    w = torch.tensor([[1.0, -2.0, 3.0, 9.0], [8.0, 1.0, 0.3, -5.0]])
    x, yes, no = torch.tensor([1.0, 2.0, 1.0, 0.0]), True, False
    assert prune.wanda_mask(w, x, 0.5).tolist() == [[no, yes, yes, no], [yes, yes, no, no]]
    assert prune.wanda_mask(w, x, n=1, m=2).tolist() == [[no, yes, yes, no], [yes, no, yes, no]]


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.7, 0.99])
@pytest.mark.parametrize("inputs", [7, 10, 64])
def test_how_many_are_kept(sparsity, inputs):
    """ceil((1 - s) d) in each row for Wanda, of all for magnitude; equal scores too."""
    for w in (torch.randn(6, inputs), torch.ones(6, inputs)):
        expected = math.ceil(inputs - sparsity * inputs - 1e-9)
        of_all = math.ceil(w.numel() - sparsity * w.numel() - 1e-9)
        assert (prune.wanda_mask(w, torch.rand(inputs), sparsity).sum(1) == expected).all()
        assert prune.magnitude_mask(w, sparsity).sum() == of_all


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (3, 3)])
def test_n_of_every_m_and_they_are_the_largest(n, m):
    w, x = torch.randn(5, 24), torch.rand(24)
    score = (w.abs() * x).unflatten(1, (-1, m))
    mask = prune.wanda_mask(w, x, n=n, m=m).unflatten(1, (-1, m))
    assert (mask.sum(-1) == n).all()
    for group, kept in zip(score.flatten(0, 1), mask.flatten(0, 1)):
        assert n == m or group[kept].min() >= group[~kept].max()


def test_wanda_keeps_what_matters_for_the_output():
    """Over inputs of very different size it changes the output less than magnitude does at the same
    sparsity."""
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-1, 1, 64)
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    wanda, magnitude = prune.wanda_mask(w, x.norm(dim=0), 0.5), prune.magnitude_mask(w, 0.5)
    error = {name: (x @ (w * ~mask).T).norm().item()
             for name, mask in (("wanda", wanda), ("magnitude", magnitude))}
    assert error["wanda"] < 0.5 * error["magnitude"]


@pytest.mark.parametrize("arguments, says", [
    (dict(sparsity=1), "sparsity"), (dict(sparsity=-0.1), "sparsity"),
    (dict(n=2, m=5), "5 to divide the 8"), (dict(n=5, m=4), "5:4"), (dict(n=0, m=4), "0:4")])
def test_masks_that_make_no_sense_are_errors(arguments, says):
    with pytest.raises(ValueError, match=says):
        prune.wanda_mask(torch.randn(2, 8), torch.ones(8), **arguments)


# --------------------------------------------------------------------------- activations and models

@pytest.mark.parametrize("changes", [{}, GPT2, QWEN3])
def test_input_norms_are_those_of_the_inputs(changes):
    model = tiny(**changes)
    sequences, seen = [[1, 2, 3], [4, 5, 6, 7, 8]], {}
    norms = prune.input_norms(model, sequences)
    assert list(norms) == block_linears(model)
    assert not model.layers[0].mlp.up_proj._forward_pre_hooks

    def keep(linear, x):
        seen.setdefault(linear, []).append(x[0][0])
    for linear in block_linears(model):
        linear.register_forward_pre_hook(keep)
    for ids in sequences:
        model(torch.tensor([ids]))
    for linear, norm in norms.items():
        torch.testing.assert_close(norm, torch.cat(seen[linear]).norm(dim=0))


@pytest.mark.parametrize("method, strength", [
    ("magnitude", dict(sparsity=0.3)), ("wanda", dict(sparsity=0.3)),
    ("wanda", dict(n=2, m=4)), ("magnitude", dict(n=2, m=4))])
def test_prune_masks_every_linear_of_the_blocks(method, strength):
    model, plain = tiny(), tiny()
    norms = prune.input_norms(model, [[1, 2, 3]])
    zeros = prune.prune_(model, method, **strength, norms=norms)
    expected, by_name = 0, dict(plain.named_modules())
    for name, linear in model.named_modules():
        if linear not in norms:
            continue
        w = by_name[name].weight
        x = norms[linear] if method == "wanda" else torch.ones(w.size(1))
        mask = prune.wanda_mask(w, x, **strength)
        if method == "magnitude" and "m" not in strength:
            mask = prune.magnitude_mask(w, 0.3)
        assert torch.equal(linear.weight, w * mask), name
        expected += (~mask).sum().item()
    assert zeros == expected > 0
    assert torch.equal(model.embed_tokens.weight, plain.embed_tokens.weight)


STRENGTHS = {"wanda": dict(sparsity=0.3), "2:4": dict(n=2, m=4)}


def train_(model, steps, mask):
    """With weight decay; momentum is warm before the question is asked, too."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    for step in range(steps):
        if step == 10 and mask:
            assert all(state["exp_avg"].abs().max() > 0 for state in optimizer.state.values())
        optimizer.zero_grad()
        logits, targets = model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten()
        torch.nn.functional.cross_entropy(logits, targets).backward()
        optimizer.step()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("grid", [None, "int4", "nf4"])
@pytest.mark.parametrize("mask", [None, *STRENGTHS])
def test_zeros_and_grids_survive_fifty_steps_in_memory_and_on_disk(mask, grid, lora, tmp_path):
    """With LoRA the merged weights are off the grid, and the zeros stay."""
    model = tiny()
    before = copy.deepcopy(model)
    if mask:
        norms = prune.input_norms(model, IDS.tolist())
        prune.prune_(model, "wanda", **STRENGTHS[mask], norms=norms)
    zero = {name: m.weight == 0 for name, m in model.named_modules() if m in block_linears(model)}
    if grid:
        quantize_(model, grid, 16)
    if lora:
        add_lora_(model, rank=2, generator=torch.Generator().manual_seed(0))
    train_(model, 60, mask)
    trained = {name: model.get_submodule(name).weight.detach().clone() for name in zero}
    model.save_pretrained(tmp_path)
    saved = GPT.from_pretrained(tmp_path)
    bake_(model)
    for name, w in trained.items():
        assert torch.equal(saved.get_submodule(name).weight, w), name
        assert torch.equal(model.get_submodule(name).weight, w), name
        assert not torch.equal(w, before.get_submodule(name).weight)
        assert not mask or (w[zero[name]] == 0).all() and zero[name].float().mean() > 0.25
        if grid == "int4" and not lora:
            assert torch.equal(fake_quantize(w, 4, 16), w)
        if grid == "nf4" and not lora:
            assert torch.equal(nf4_dequantize(*nf4_quantize(w), w.shape), w)


def test_gradient_reaches_kept_weights_only():
    """A pruned weight is seen as 0, whatever it is, and whatever comes back, nothing reaches it."""
    mask = torch.tensor([[True, False, True], [False, True, True]])
    w = torch.tensor([[1.0, torch.inf, -3.0], [torch.nan, 5.0, 0.0]], requires_grad=True)
    seen = prune.Mask(mask)(w)
    assert seen.tolist() == [[1, 0, -3], [0, 5, 0]]
    seen.backward(torch.tensor([[7.0, torch.nan, 2.0], [torch.inf, -1.0, 3.0]]))
    assert w.grad.tolist() == [[7, 0, 2], [0, -1, 3]]
    half = prune.Mask(mask)(w.detach().bfloat16().requires_grad_())
    assert half.dtype == torch.bfloat16 and half.grad_fn is not None
    assert half.float().tolist() == seen.tolist()


def test_two_backwards_through_one_masked_weight():
    """As micro-batches do; gradients reach kept weights only."""
    model = tiny()
    prune.prune_(model, "magnitude", 0.5)
    linear = model.layers[0].mlp.up_proj
    with torch.nn.utils.parametrize.cached():
        for x in torch.randn(2, 3, 32):
            linear(x).square().sum().backward()
    grad = linear.parametrizations.weight.original.grad
    assert torch.equal(grad != 0, linear.weight != 0)


# ------------------------------------------------------------------------------------------ neurons

def least_important(mlp, norms, n):
    """The n hidden neurons of a block that are worth least."""
    score = mlp.down_proj.weight.norm(dim=0)
    if norms is not None:
        return (score * norms).argsort()[:n]
    if hasattr(mlp, "gate_proj"):
        score = score * mlp.gate_proj.weight.norm(dim=1)
    return (score * mlp.up_proj.weight.norm(dim=1)).argsort()[:n]


@pytest.mark.parametrize("changes", [{}, GPT2, QWEN3])
@pytest.mark.parametrize("importance", ["activation", "weight"])
@torch.no_grad()
def test_removing_neurons_equals_holding_them_at_zero(changes, importance, tmp_path):
    """And the ones removed are the least important; the saved folder loads in transformers with the
    smaller size."""
    model, masked = tiny(**changes), tiny(**changes)
    norms = prune.input_norms(model, IDS.tolist()) if importance == "activation" else None
    for ours, layer in zip(model.layers, masked.layers):
        of_block = norms and norms[ours.mlp.down_proj]
        layer.mlp.down_proj.weight[:, least_important(layer.mlp, of_block, 6)] = 0
    assert prune.prune_ffn_(model, 0.1, norms) == 2 * 6  # 10 % of 64
    assert model.config.d_ff == 58
    assert model.layers[1].mlp.down_proj.weight.shape == (32, 58)
    torch.testing.assert_close(model(IDS), masked(IDS), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    c = theirs.config
    assert getattr(c, "intermediate_size", None) == 58 or c.n_inner == 58
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(IDS), GPT.from_pretrained(tmp_path)(IDS), atol=0, rtol=0)


def test_removed_neurons_then_a_mask_then_a_grid_then_bfloat16():
    model = tiny()
    prune.prune_ffn_(model, 0.5)
    prune.prune_(model, "magnitude", n=2, m=4)
    quantize_(model, "int4", 16)
    compute_in_(model, torch.bfloat16)
    down = model.layers[0].mlp.down_proj
    assert down.weight.shape == (32, 32) and down.weight.dtype == torch.bfloat16
    assert ((down.weight == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all()
    assert model(IDS).dtype == torch.bfloat16


def test_neurons_kept_fit_the_groups_of_what_comes_after():
    """1536 neurons without 10 % are 1382; the nearest multiples of 4 and of 64 are 1384 and
    1408."""
    assert [prune.neurons_kept(1536, 0.1, n) for n in (1, 4, 64)] == [1382, 1384, 1408]
    assert prune.neurons_kept(8, 0.9, 4) == 4
    assert prune.neurons_kept(1536, 0.05, 576) == 1152  # 1728 is nearer, and more than 1536


def test_damages_that_follow_one_another_fit():
    config = GPTConfig(d_model=64, d_ff=100, n_head=4, n_kv_head=2, head_dim=16)
    fitting = {"ffn10": 1, "ffn10,nf4": 1, "ffn,wanda2:4,nf4": 4, "ffn,wanda2:4,int4": 16}
    for schemes, multiple in fitting.items():
        assert multiple_of_groups(Config(degrade=schemes, group_size=16), config) == multiple
    with pytest.raises(ValueError, match="groups of 16 .* do not divide the 100 inputs"):
        multiple_of_groups(Config(degrade="int4", group_size=16), config)
    model = tiny(vocab_size=16, n_layer=1, d_ff=100, context_length=8)
    done = degrade_(Config(degrade="ffn10,wanda2:4,int4", group_size=16), model, [[1, 2, 3]])
    down = model.layers[0].mlp.down_proj
    assert done["neurons_removed"] == 4 and down.weight.shape == (32, 96)
    assert done["weights_quantized"] == sum(m.weight.numel() for m in block_linears(model))
    assert done["weights_held_at_zero"] == done["weights_quantized"] / 2
