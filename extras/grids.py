"""Further grids: the FP4 formats, and NF4 with double quantization, by their names in --degrade.

    nvfp4    E2M1 in blocks of 16 with a scale in E4M3, and one for the tensor (2509.25149)
    mxfp4    E2M1 in blocks of 32 with a power of two as scale (OCP MX 1.0, §6.3)
    nf4dq    NF4 whose scales are quantized to 8 bits, too (QLoRA, 2305.14314, §3)
"""
import torch

import quant
from quant import StraightThrough, _blocks, _midpoints


def attach(parts):
    """Add the grids to quant.SCHEMES."""
    quant.SCHEMES |= {"nvfp4": fake_nvfp4, "mxfp4": fake_mxfp4, "nf4dq": fake_nf4dq}
    quant.BLOCK |= BLOCK


# E2M1, a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6. Blocks of
# inputs share a scale. What a scale leaves above 6, rounded, is clipped, as on an asymmetric grid.

BLOCK = {"mxfp4": 32, "nvfp4": 16}


def round_fp4(x):
    """x -> (the nearest E2M1 value, ties to the even mantissa, at most 6; bool: not clipped).

    >>> round_fp4(torch.tensor([0.25, 0.75, -2.5, 5.0, 6.9, 7.0]))
    (tensor([ 0.,  1., -2.,  4.,  6.,  6.]), tensor([ True,  True,  True,  True,  True, False]))
    """
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    values = (x / step).round_().mul_(step)
    return values.clamp(-6, 6), values.abs() <= 6


def fake_mxfp4(w, group_size=None, symmetric=True):
    """w [out, in] -> w_hat: blocks of 32 inputs, X = 2^(floor(log2 amax) - 2) (OCP MX 1.0, §6.3).

    This is the floor rule: what lies above 6 X becomes 6 X, and no gradient passes above 7 X.

    >>> fake_mxfp4(torch.tensor([[7.5, -1.2] + 30 * [0.1]]))[0, :3]              # X = 1
    tensor([ 6., -1.,  0.])
    """
    blocks = _fp4_blocks(w, "mxfp4")
    amax = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(amax).exponent - 3  # frexp's mantissa is in [1/2, 1)
    scale = torch.ldexp(torch.ones_like(amax), exponent.clamp(-127, 127))
    values, passes = round_fp4(blocks / scale)
    return StraightThrough.apply(w, (values * scale).view(w.shape), passes.view(w.shape))


def fake_nvfp4(w, group_size=None, symmetric=True):
    """w [out, in] -> w_hat: blocks of 16 inputs with a scale s in E4M3, times one of the tensor, g
    = amax / (6 * 448) (2509.25149).

    >>> fake_nvfp4(torch.tensor([[2688.0, 400.0] + 14 * [0.0]]))[0, :2]          # g = 1, s = 448
    tensor([2688.,  448.])
    """
    blocks = _fp4_blocks(w, "nvfp4")
    amax = blocks.abs().amax(-1, keepdim=True)
    of_tensor = (amax.max() / (6 * 448)).clamp(min=2 ** -121)  # its inverse by s stays finite
    scale = (amax / 6 / of_tensor).clamp(2 ** -6, 448)  # a cast alone need not saturate
    scale = scale.to(torch.float8_e4m3fn).float()
    values, passes = round_fp4(blocks * (1 / of_tensor / scale))
    w_hat = values * (of_tensor * scale)
    return StraightThrough.apply(w, w_hat.view(w.shape), passes.view(w.shape))


def _fp4_blocks(w, scheme):
    """w [out, in] in float32 -> [out, blocks, inputs of a block]."""
    size = BLOCK[scheme]
    if w.size(1) % size:
        blocks = f"{scheme}'s blocks of {size} do"
        raise ValueError(f"{blocks} not divide the {w.size(1)} inputs of a linear layer")
    return w.detach().float().reshape(w.size(0), -1, size)


# ------------------------------------------------------------------- NF4 with double quantization

def fake_nf4dq(w, group_size=None, symmetric=True):
    """w -> w_hat on the NF4 grid with quantized scales; the gradient passes to w everywhere."""
    codes, absmax = quant.nf4_quantize(w.detach())
    w_hat = quant.nf4_dequantize(codes, quantize_absmax(absmax), w.shape)
    return StraightThrough.apply(w, w_hat, None)


def quantize_absmax(absmax, block_size=256):
    """Double quantization: absmax as it comes back from 8 bits, with the mean taken off first
    (QLoRA §3), float32 [blocks].

    The 8-bit code is bitsandbytes' dynamic one (2110.02861): a sign, a power of ten, and a fraction
    of the bits left.
    """
    mean = absmax.mean()
    blocks = _blocks(absmax - mean, block_size)
    scale = blocks.abs().amax(1, keepdim=True)
    code = _dynamic_code().to(absmax.device)
    unit = blocks * (1 / scale.clamp(min=1e-38))
    values = code[torch.bucketize(unit, _midpoints(code))] * scale
    return values.flatten()[:absmax.numel()] + mean


def _dynamic_code():
    """The 256 values of the dynamic 8-bit code, rising: for each power of ten, 2^i equal steps from
    a tenth of it to itself."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** i + 1, dtype=torch.float32)
        steps = 10 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*steps.tolist(), *(-steps).tolist()]
    return torch.tensor(sorted(values))
