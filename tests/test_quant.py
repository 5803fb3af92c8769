"""Fake quantization: against torch.fake_quantize_per_channel_affine, cases worked by hand, and
through AdamW, LoRA and bake_."""
import copy
import json

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
from conftest import GPT2, QWEN2, QWEN3, tiny
from torch import nn
from torch.nn.utils import parametrize

from model import GPT
from quant import (
    NF4_CODE,
    StraightThrough,
    _midpoints,
    add_lora_,
    bake_,
    compute_in_,
    dequantize_int,
    fake_quantize,
    nf4_dequantize,
    nf4_quantize,
    quantize_,
    quantize_int,
)

EVERY_GRID = [(bits, group_size, symmetric) for bits in range(2, 9)
              for group_size in (None, 16) for symmetric in (True, False)]
every_grid = pytest.mark.parametrize("bits, group_size, symmetric", EVERY_GRID)


def varied_weight(dtype=torch.float32):
    """[8, 64]: ordinary, all-positive, all-negative, all-zero, outlier, tiny and huge rows, and
    zeros here and there."""
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    w[1], w[2], w[3] = w[1].abs() + 1, -w[2].abs() - 1, 0
    w[4, 5], w[5], w[6] = 50.0, w[5] * 1e-12, w[6] * 1e12
    w[:, ::7] = 0
    return w.to(dtype)


def integer_limits(bits, symmetric):
    return (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2 ** bits - 1)


def torch_fake_quantize(w, bits, group_size, symmetric):
    """The oracle: PyTorch's own kernel on our scales and zero points, a row per group."""
    _, scale, zero_point = quantize_int(w.detach(), bits, group_size, symmetric)
    rows = w.reshape(-1, group_size or w.size(1))
    grid = scale.flatten(), zero_point.flatten(), 0, *integer_limits(bits, symmetric)
    return torch.fake_quantize_per_channel_affine(rows, *grid).reshape(w.shape)


def value_and_grad(function, w, *grid):
    w = w.clone().requires_grad_()
    out = function(w, *grid)
    out.backward(torch.randn(w.shape, generator=torch.Generator().manual_seed(1)))
    return out.detach(), w.grad


def parametrized(model):
    return {name for name, m in model.named_modules() if parametrize.is_parametrized(m)}


def latent(linear):
    return linear.parametrizations.weight.original


def ids_of(rows=4, tokens=12):
    return torch.randint(64, (rows, tokens), generator=torch.Generator().manual_seed(0))


def train_(model, parameters, steps, weight_decay):
    """A few steps of AdamW on the next token."""
    optimizer, ids = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=weight_decay), ids_of()
    for _ in range(steps):
        optimizer.zero_grad()
        logits, targets = model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten()
        nn.functional.cross_entropy(logits, targets).backward()
        optimizer.step()


# --------------------------------------------------------------------------------- straight through

def test_gradient_passes_straight_through_or_where_it_is_let():
    """What comes back at other places, be it infinite, is dropped; a grid's and a mask's are the
    same function."""
    w, w_hat = torch.tensor([0.9, -0.2, 3.0]), torch.tensor([1.0, 0.0, 2.0])
    back = torch.tensor([5.0, torch.inf, torch.nan])
    for passes, expected in ((None, back), (torch.tensor([True, False, False]), [5, 0, 0])):
        leaf = w.clone().requires_grad_()
        out = StraightThrough.apply(leaf, w_hat, passes)
        assert torch.equal(out, w_hat)
        out.backward(back)
        torch.testing.assert_close(leaf.grad, torch.as_tensor(expected).float(), equal_nan=True)


def test_straight_through_has_the_weights_type_and_serves_several_backward_passes():
    w = torch.tensor([0.9, -0.2], dtype=torch.bfloat16, requires_grad=True)
    out = StraightThrough.apply(w, torch.tensor([1.0, 0.0]), torch.tensor([True, False]))
    assert out.dtype == torch.bfloat16
    for _ in range(2):
        (out * torch.tensor([3.0, 4.0])).sum().backward()
    assert w.grad.tolist() == [6, 0]


# ------------------------------------------------------------------------------------ integer grids

@every_grid
def test_equals_torch_forward_and_gradient(bits, group_size, symmetric):
    w = varied_weight()
    ours, our_grad = value_and_grad(fake_quantize, w, bits, group_size, symmetric)
    theirs, their_grad = value_and_grad(torch_fake_quantize, w, bits, group_size, symmetric)
    assert torch.equal(ours, theirs) and torch.equal(our_grad, their_grad)


@pytest.mark.parametrize("bits", range(2, 9))
def test_gradient_is_zero_exactly_where_asymmetric_clips(bits):
    """On [-L/2, L/2], L = 2^b - 1: s = 1, z = 2^(b-1), so the largest weight asks for 2^b, one past
    the grid."""
    half = (2 ** bits - 1) / 2
    w = torch.arange(-half, half + 0.25, 0.5)[None]
    ours, our_grad = value_and_grad(fake_quantize, w, bits, None, False)
    theirs, their_grad = value_and_grad(torch_fake_quantize, w, bits, None, False)
    assert torch.equal(ours, theirs) and torch.equal(our_grad, their_grad)
    assert torch.equal(our_grad == 0, w == half)
    assert ours[0, -1] == half - 0.5  # clipped from half + 0.5, what it would have been rounded to


def test_symmetric_worked_by_hand():
    """3 bits, q in [-3, 3]. First group s = 6/3 = 2; second s = 0.75/3 = 0.25; half way rounds to
    even."""
    w = torch.tensor([[6.0, -1.1, 3.0, 0.9, -0.75, 0.3, 0.0, 0.375]])
    q, scale, zero_point = quantize_int(w, 3, group_size=4)
    assert scale.tolist() == [[2.0, 0.25]] and zero_point.tolist() == [[0, 0]]
    assert q.tolist() == [[3, -1, 2, 0, -3, 1, 0, 2]]
    assert fake_quantize(w, 3, 4).tolist() == [[6.0, -2.0, 4.0, 0.0, -0.75, 0.25, 0.0, 0.5]]


def test_asymmetric_worked_by_hand():
    """2 bits, q in [0, 3]. Mixed signs: s = (4 + 2)/3 = 2, z = 1. All positive or all negative: the
    range reaches to 0."""
    w = torch.tensor([[-2.0, 4.0, 0.0, 1.2], [5.0, 6.0, 5.5, 2.9], [-3.0, -2.0, -1.4, -2.9]])
    q, scale, zero_point = quantize_int(w, 2, symmetric=False)
    assert scale.tolist() == [[2.0], [2.0], [1.0]] and zero_point.tolist() == [[1], [0], [3]]
    assert q.tolist() == [[0, 3, 1, 2], [2, 3, 3, 1], [0, 1, 2, 0]]
    expected = [[-2, 4, 0, 2], [4, 6, 6, 2], [-3, -2, -1, -3]]
    assert fake_quantize(w, 2, symmetric=False).tolist() == expected


@every_grid
def test_error_is_at_most_half_a_step(bits, group_size, symmetric):
    w = varied_weight()
    _, scale, _ = quantize_int(w, bits, group_size, symmetric)
    step = scale.repeat_interleave(w.size(1) // scale.size(1), dim=1)
    error = (fake_quantize(w, bits, group_size, symmetric) - w).abs()
    assert (error <= step / 2 + 1e-6 * w.abs()).all()  # clipping costs no more than that, either
    assert (error[w.abs() > 0] > step[w.abs() > 0] / 100).any()


@every_grid
def test_zero_stays_exactly_zero(bits, group_size, symmetric):
    w = varied_weight()
    out = fake_quantize(w, bits, group_size, symmetric)
    assert (out[w == 0] == 0).all() and out.isfinite().all()
    _, scale, _ = quantize_int(w, bits, group_size, symmetric)
    assert (scale[3] == 1).all() and (scale > 0).all()  # row 3 is all zeros


@every_grid
def test_codes_are_small_integers_of_the_documented_shapes(bits, group_size, symmetric):
    w = varied_weight()
    q, scale, zero_point = quantize_int(w, bits, group_size, symmetric)
    low, high = integer_limits(bits, symmetric)
    assert q.dtype == (torch.int8 if symmetric else torch.uint8) and q.shape == w.shape
    assert low <= q.min() and q.max() <= high
    assert scale.shape == zero_point.shape == (8, 64 // (group_size or 64))
    assert not zero_point.is_floating_point()
    assert low <= zero_point.min() and zero_point.max() <= high


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_grid
def test_fake_quantize_is_dequantize_of_quantize(bits, group_size, symmetric, dtype):
    w = varied_weight(dtype)
    out = fake_quantize(w, bits, group_size, symmetric)
    expected = dequantize_int(*quantize_int(w, bits, group_size, symmetric)).to(dtype)
    assert out.dtype == dtype and torch.equal(out, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_and_smaller_groups_err_less(symmetric):
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    error = [(fake_quantize(w, bits, 16, symmetric) - w).square().mean().item()
             for bits in range(2, 9)]
    assert all(later < 0.5 * earlier for earlier, later in zip(error, error[1:]))
    assert error[2] < (fake_quantize(w, 4, None, symmetric) - w).square().mean()


# ------------------------------------------------------------------------ on the linears of a model

@pytest.mark.parametrize("changes", [{}, QWEN2, GPT2, QWEN3])
def test_quantize_touches_the_linears_of_the_blocks_and_nothing_else(changes):
    model = tiny(**changes)
    before = copy.deepcopy(model.state_dict())
    mlp = ["up", "down"] if model.config.model_type == "gpt2" else ["gate", "up", "down"]
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in mlp]
    linears = {f"layers.{i}.{part}" for i in range(2) for part in parts}
    weights = {name: before[f"{name}.weight"] for name in linears}
    assert quantize_(model, "int4", group_size=16) == sum(w.numel() for w in weights.values())
    assert parametrized(model) == linears
    after = {name.replace("parametrizations.weight.original", "weight"): w
             for name, w in model.state_dict().items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    for name, w in weights.items():
        expected = fake_quantize(w, 4, 16)
        assert torch.equal(model.get_submodule(name).weight, expected)
        assert not torch.equal(expected, w)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bake_leaves_ordinary_weights_on_the_grid(bits, group_size, symmetric):
    """Baked values are s(q - z) exactly. Quantized again, they are the same to the bit if
    symmetric; asymmetric the codes are the same, the scale to 1 ulp and so the weights to 2."""
    model, plain = tiny(), tiny()
    quantize_(model, f"int{bits}", group_size, symmetric)
    assert bake_(model) is model and not parametrized(model)
    assert dict(model.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    for name, p in plain.named_parameters():
        baked = model.get_parameter(name)
        assert type(baked) is nn.Parameter and baked.requires_grad and baked.is_leaf
        if not name.endswith("proj.weight"):
            assert torch.equal(baked, p)
            continue
        q, scale, zero_point = quantize_int(p.detach(), bits, group_size, symmetric)
        assert torch.equal(baked, dequantize_int(q, scale, zero_point))
        again, new_scale, new_zero = quantize_int(baked.detach(), bits, group_size, symmetric)
        assert torch.equal(again, q) and torch.equal(new_zero, zero_point)
        if symmetric:
            assert torch.equal(new_scale, scale)
            assert torch.equal(fake_quantize(baked, bits, group_size), baked)
        else:
            assert ((new_scale - scale).abs() <= torch.finfo().eps * scale).all()
            ulp = torch.nextafter(baked.abs(), torch.tensor(torch.inf)) - baked.abs()
            error = fake_quantize(baked, bits, group_size, False) - baked
            assert (error.abs() <= 2 * ulp).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_adamw_moves_the_latent_weights_and_the_effective_ones_stay_on_the_grid(symmetric):
    model = tiny()
    quantize_(model, "int3", 16, symmetric)
    linears = [model.get_submodule(name) for name in parametrized(model)]
    first = [(latent(x).detach().clone(), x.weight.detach().clone()) for x in linears]
    train_(model, model.parameters(), steps=5, weight_decay=0.1)

    def most_values_in_a_group(w):
        return max(len(group.unique()) for group in w.detach().reshape(-1, 16))

    for linear, (old_latent, old_weight) in zip(linears, first):
        assert not torch.equal(latent(linear), old_latent)
        assert not torch.equal(linear.weight, old_weight)
        assert most_values_in_a_group(linear.weight) <= 8 < most_values_in_a_group(latent(linear))
        q, scale, zero_point = quantize_int(latent(linear).detach(), 3, 16, symmetric)
        assert torch.equal(linear.weight, dequantize_int(q, scale, zero_point))


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_backwards_through_one_cached_weight_equal_one_of_the_sum(symmetric):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    row = torch.tensor([-1.5, 1.5, 0.5, 0.0, 1.0, -1.0])  # 2 asymmetric bits clip at 1.5
    model[0].weight.data[0] = row
    quantize_(model, "int2", symmetric=symmetric)
    x1, x2 = torch.randn(2, 5, 6)
    (model(x1).square().sum() + model(x2).square().sum()).backward()
    expected = latent(model[0]).grad.clone()
    model.zero_grad()
    with parametrize.cached():
        assert model[0].weight is model[0].weight
        for x in (x1, x2):
            model(x).square().sum().backward()
    torch.testing.assert_close(latent(model[0]).grad, expected, rtol=1e-6, atol=1e-6)
    assert (expected[0, 1] == 0) == (not symmetric)


# ---------------------------------------------------------------------------------------------- NF4

def weights_to_quantize():
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(24, 128, generator=draw)
    outliers = w * torch.where(torch.rand(24, 128, generator=draw) < 0.02, 50.0, 0.02)
    zeros = w.clone()
    zeros[3:5] = 0
    between = _midpoints(NF4_CODE).repeat(24, 9)[:, :127]  # two values of the code
    ties = torch.cat((torch.ones(24, 1), between), dim=1)
    return {"random": w, "outliers": outliers, "zero blocks": zeros, "all zero": torch.zeros(8, 64),
            "tiny": w * 1e-30, "short block": torch.randn(5, 41, generator=draw), "ties": ties}


@pytest.mark.parametrize("name", weights_to_quantize())
def test_nf4_equals_bitsandbytes_bit_for_bit(name):
    """Codes, absmax and what comes back, against its CPU implementation."""
    w = weights_to_quantize()[name]
    packed, state = bitsandbytes.quantize_4bit(w, blocksize=64, quant_type="nf4")
    halves = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1)
    codes, absmax = nf4_quantize(w)
    assert codes.dtype == torch.uint8 and torch.equal(codes, halves.flatten()[:w.numel()])
    assert torch.equal(absmax, state.absmax) and torch.equal(NF4_CODE, state.code)
    ours = nf4_dequantize(codes, absmax, w.shape)
    assert torch.equal(ours, bitsandbytes.dequantize_4bit(packed, state))
    if name == "all zero":
        assert (ours == 0).all()


def test_nf4_code_is_made_of_normal_quantiles():
    """8 evenly spaced quantiles below 0 and 9 above, from 1 - 0.9677083, scaled to 1 (QLoRA,
    appendix E)."""
    negative, positive = (
        torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64))[:-1]
        for n in (8, 9))
    zero = torch.zeros(1, dtype=torch.float64)
    code = torch.cat((-negative, zero, positive.flip(0))) / positive[0]
    torch.testing.assert_close(code.float(), NF4_CODE, atol=1e-6, rtol=0)


def test_nf4_student_trains_straight_through_and_stays_on_the_grid():
    model = tiny()
    assert quantize_(model, "nf4") > 0
    up = model.layers[0].mlp.up_proj
    assert torch.equal(up.weight, nf4_dequantize(*nf4_quantize(latent(up)), up.weight.shape))
    up.weight.sum().backward()
    assert (latent(up).grad == 1).all()


def test_bake_forgets_the_type_of_computation():
    model, plain = tiny(), tiny()
    quantize_(model, "int4", 16)
    compute_in_(model, torch.bfloat16)
    up = model.layers[0].mlp.up_proj
    expected = fake_quantize(plain.layers[0].mlp.up_proj.weight.detach(), 4, 16)
    assert torch.equal(up.weight, expected.bfloat16())
    assert not parametrized(bake_(model)) and torch.equal(up.weight, expected)
    assert torch.equal(model.norm.weight, plain.norm.weight)
    assert model.norm.weight.dtype == torch.float32


# --------------------------------------------------------------------------------------------- LoRA

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_starts_at_nothing_trains_only_its_factors_and_is_merged(dtype, tmp_path):
    model, ids = tiny().to(dtype), ids_of()
    quantize_(model, "int4", 16)
    before, frozen = model(ids).detach(), {k: v.clone() for k, v in model.state_dict().items()}
    add_lora_(model, rank=3, alpha=6, generator=torch.Generator().manual_seed(1))
    compute_in_(model, dtype)
    assert torch.equal(model(ids), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 7 and all(p.dtype == torch.float32 for p in trained)
    train_(model, trained, steps=3, weight_decay=0.01)
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in frozen.items() if k in state)
    up = model.layers[0].mlp.up_proj
    factors = up.parametrizations.weight[1]
    assert factors.a.shape == (3, 32) and factors.b.shape == (64, 3)
    assert factors.b.abs().min() > 0
    update = 2 * factors.b.detach() @ factors.a.detach()  # alpha / rank = 2
    merged, after = fake_quantize(latent(up).detach(), 4, 16) + update, model(ids).detach()
    model.save_pretrained(tmp_path)  # in float32, the type of the merged weights
    assert torch.equal(GPT.from_pretrained(tmp_path).layers[0].mlp.up_proj.weight, merged)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    bake_(model)
    assert torch.equal(up.weight, merged) and not parametrized(model)
    torch.testing.assert_close(compute_in_(model, dtype)(ids), after)


# ----------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("scheme", ["int9", "int1", "nf3", "", "int", "int44", "xint4", "INT4"])
def test_unknown_scheme_is_an_error(scheme):
    model = tiny()
    with pytest.raises(ValueError, match="scheme"):
        quantize_(model, scheme)
    assert not parametrized(model)


@pytest.mark.parametrize("function", [quantize_int, fake_quantize])
@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_out_of_range_are_an_error(function, bits):
    with pytest.raises(ValueError, match="bits"):
        function(torch.ones(2, 4), bits)


def test_group_size_that_does_not_divide_is_an_error():
    for function in (quantize_int, fake_quantize):
        with pytest.raises(ValueError, match="group_size 12 does not divide the 32"):
            function(torch.ones(2, 32), 4, 12)
    with pytest.raises(ValueError, match="group_size 12 does not divide the 32"):
        quantize_(tiny(), "int4", group_size=12)


def test_group_size_that_fits_only_some_linears_leaves_the_model_untouched():
    """32 divides every linear's inputs but down_proj's 48: an error must not leave the model half
    quantized."""
    model = tiny(d_ff=48)
    with pytest.raises(ValueError, match="group_size 32 does not divide the 48"):
        quantize_(model, "int4", group_size=32)
    assert not parametrized(model)
