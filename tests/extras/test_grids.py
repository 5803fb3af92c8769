"""extras/grids.py: against torchao, gguf's own MXFP4, bitsandbytes, and cases worked by hand."""
import bitsandbytes.functional as bitsandbytes
import gguf
import pytest
import torch
from conftest import tiny
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

import prune
import quant
import train
from model import GPT
from quant import block_linears, nf4_dequantize, nf4_quantize, quantize_

grids = pytest.importorskip("extras.grids")
fake_mxfp4, fake_nvfp4, round_fp4 = grids.fake_mxfp4, grids.fake_nvfp4, grids.round_fp4

@pytest.fixture(autouse=True)
def attached():
    grids.attach({})


VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def torchao_mxfp4(w):
    return MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32).dequantize(torch.float32)


def torchao_nvfp4(w):
    scale = per_tensor_amax_to_scale(w.abs().max())
    return NVFP4Tensor.to_nvfp4(w, per_tensor_scale=scale).dequantize(torch.float32)


def weights():
    """{name: float32 [out, in]}, one of each kind."""
    draw = torch.Generator().manual_seed(0)
    w = torch.randn(24, 128, generator=draw)
    outliers, zeros, mixed = w.clone(), w.clone(), w.clone()
    outliers[::5, ::31] *= 1000
    zeros[3:5] = 0
    mixed[1], mixed[2] = w[1] * 1e-20, w[2] * 1e20
    return {"random": w, "outliers": outliers, "zero blocks": zeros, "rows apart": mixed,
            "tiny": w * 1e-30, "huge": w * 1e35, "bfloat16": w.bfloat16().float(),
            "ties": torch.arange(-1536, 1536).view(24, 128) / 8}


@pytest.mark.parametrize("name", weights())
@pytest.mark.parametrize("ours, theirs", [(fake_mxfp4, torchao_mxfp4), (fake_nvfp4, torchao_nvfp4)])
def test_equals_torchao_bit_for_bit(ours, theirs, name):
    w = weights()[name]
    assert torch.equal(ours(w), theirs(w))
    assert not torch.equal(ours(w), w)


@pytest.mark.parametrize("name", weights())
def test_mxfp4_equals_ggufs_but_at_ties(name):
    """A weight halfway between two values goes to the even one here, to the smaller one there."""
    w, kind = weights()[name], gguf.GGMLQuantizationType.MXFP4
    theirs = gguf.dequantize(gguf.quantize(w.numpy(), kind), kind)
    differ = fake_mxfp4(w) != torch.from_numpy(theirs)
    blocks = w.view(24, -1, 32)
    amax = blocks.abs().amax(-1, keepdim=True)
    unit = (blocks / 2.0 ** (amax.log2().floor() - 2)).view(w.shape).abs()
    odd = torch.isin(unit, torch.tensor([0.75, 1.75, 3.5]))  # here the smaller one is odd
    assert torch.equal(differ, odd)
    assert odd.any() == (name in ("bfloat16", "ties"))


def test_a_tensor_of_zeros_stays_zero():
    zeros = torch.zeros(4, 64)
    assert (fake_mxfp4(zeros) == 0).all() and (fake_nvfp4(zeros) == 0).all()


def test_every_midpoint_goes_to_the_even_neighbour():
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    assert round_fp4(middles)[0].tolist() == [0, 1, 1, 2, 2, 4, 4]
    for below, above, middle in zip(VALUES, VALUES[1:], middles):
        near = torch.stack((middle - 1e-3, middle + 1e-3))
        assert round_fp4(near)[0].tolist() == [below, above]
        assert round_fp4(-near)[0].tolist() == [-below, -above]


def test_mxfp4_by_hand():
    """amax 7: X = 2^(2 - 2) = 1; 6.9 becomes 6, and 7 is clipped, so its gradient is 0."""
    w = torch.zeros(1, 64)
    w[0, :4], w[0, 32:34] = torch.tensor([7.0, 6.9, -0.8, 0.2]), torch.tensor([0.3, -0.06])
    w.requires_grad_()
    w_hat = fake_mxfp4(w)
    assert w_hat[0, :4].tolist() == [6, 6, -1, 0]
    assert w_hat[0, 32:34].tolist() == [0.25, -0.0625]  # X = 2^(-2 - 2)
    w_hat.sum().backward()
    assert (w.grad == 0).nonzero().tolist() == [[0, 0]]


def test_nvfp4_by_hand():
    """g = 5376 / 2688 = 2; the second block's amax 21 / (6 g) = 1.75 is a value of E4M3."""
    w = torch.zeros(1, 32)
    w[0, :2], w[0, 16:19] = torch.tensor([5376.0, -1000.0]), torch.tensor([21.0, 5.5, -6.0])
    w_hat = fake_nvfp4(w)
    assert w_hat[0, :2].tolist() == [5376, -896]             # s g = 896
    assert w_hat[0, 16:19].tolist() == [21, 5.25, -5.25]     # s g = 3.5


@pytest.mark.parametrize("scheme, fake", [("mxfp4", fake_mxfp4), ("nvfp4", fake_nvfp4)])
@pytest.mark.parametrize("masked", [False, True])
def test_after_fifty_steps_the_saved_weights_lie_on_the_grid(scheme, fake, masked, tmp_path):
    model = tiny()
    before = {name: w.clone() for name, w in model.named_weights()}
    if masked:
        prune.prune_(model, "magnitude", 0.3)
    quantize_(model, scheme)
    zero = [linear.weight == 0 for linear in block_linears(model)]
    step = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(50):
        step.zero_grad()
        model(ids).logsumexp(-1).mean().backward()
        step.step()
    model.save_pretrained(tmp_path)
    saved = GPT.from_pretrained(tmp_path)
    for linear, zeros in zip(block_linears(saved), zero):
        w = linear.weight.detach()
        torch.testing.assert_close(fake(w), w, rtol=1e-6, atol=0)  # g anew: to its last digit
        unit = on_grid(w, scheme)
        assert torch.isin(unit.abs(), torch.tensor(VALUES)).all()
        assert not masked or (w[zeros] == 0).all() and zeros.float().mean() > 0.25
    changed = [name for name, w in saved.named_weights() if not torch.equal(w, before[name])]
    assert len(changed) == len(before)


def on_grid(w, scheme):
    """w over its blocks' scales, found anew: the largest of a block is 4 or 6 times its scale."""
    blocks = w.view(w.size(0), -1, {"mxfp4": 32, "nvfp4": 16}[scheme])
    amax = blocks.abs().amax(-1, keepdim=True)
    if scheme == "mxfp4":
        return blocks / 2.0 ** (amax.log2().floor() - 2)
    return (blocks / (amax / 6) * 4096).round() / 4096


@pytest.mark.parametrize("scheme, size", [("mxfp4", 32), ("nvfp4", 16)])
def test_blocks_that_do_not_divide_the_inputs_leave_the_model_untouched(scheme, size):
    model = tiny(d_ff=72)
    with pytest.raises(ValueError, match=f"{scheme}'s blocks of {size} do not divide the 72 "):
        quantize_(model, scheme)
    assert not any("parametrizations" in name for name, _ in model.named_parameters())


def test_double_quantization_is_bitsandbytes_but_for_its_lookup_table():
    """On the CPU bitsandbytes finds the nearest 8-bit value by a table, and now and then the second
    nearest: 1 in 200 differ, and each of them lies nearer to what it stands for here."""
    w = torch.randn(500, 1024, generator=torch.Generator().manual_seed(0))
    w[7] = 0
    packed, state = bitsandbytes.quantize_4bit(w, blocksize=64, quant_type="nf4",
                                               compress_statistics=True)
    theirs = bitsandbytes.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes, absmax = nf4_quantize(w)
    ours = grids.quantize_absmax(absmax)
    differ = ours != theirs
    assert differ.float().mean() < 0.005
    assert ((ours - absmax).abs() <= (theirs - absmax).abs())[differ].all()
    expected = bitsandbytes.dequantize_4bit(packed, state)
    assert torch.equal(nf4_dequantize(codes, theirs, w.shape), expected)


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "nf4dq"])
def test_a_value_brings_the_extra_through_a_whole_run(scheme, folder, tmp_path):
    argv = ["--model", folder, "--out", tmp_path, "--degrade", scheme, "--steps", 2, "--batch-size",
            4, "--eval-limit", 4, "--eval-tokens", 4, "--rollout-tokens", 4, "--teacher-check", 2,
            "--cka-samples", 4, "--dtype", "float32"]
    assert train.main([*map(str, argv)]) == 0
    student = GPT.from_pretrained(tmp_path / "student")
    fake = quant.SCHEMES[scheme]
    for linear in block_linears(student):
        w = linear.weight.detach()
        torch.testing.assert_close(fake(w), w, rtol=0.1 if scheme == "nf4dq" else 1e-5, atol=1e-4)
