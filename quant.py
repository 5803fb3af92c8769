"""Fake quantization (§5.2): weights that live on an integer grid, trained with straight-through gradients.

Also the last that stands between a weight and its use, the type of computation; and `bake_`, which ends all of it.

First the primitives on tensors, then the module that puts them on a `nn.Linear`. A weight [out, in] is cut into groups of
`group_size` inputs (None: one group per output channel), each with its own scale s and zero point z:

    symmetric    s = max|w| / (2^(b-1) - 1),  z = 0,             q = round(w/s)      in [-(2^(b-1) - 1), 2^(b-1) - 1]
    asymmetric   s = (max w - min w) / (2^b - 1), z = round(-min w / s), q = round(w/s) + z  in [0, 2^b - 1]

    w_hat = s (q - z)

where the asymmetric range is first widened to hold 0, so that 0 stays exactly 0. The paper's own NF4 is here too. It does not say
how the quantized student trains; we train straight through (Bengio et al., 1308.3432): w_hat is used forward, and its gradient
goes to w as if rounding were the identity, except where w was clipped.
"""
import functools
import re

import torch
from torch import nn
from torch.nn.utils import parametrize

from model import exact_weight


def quantize_int(w, bits, group_size=None, symmetric=True):
    """w [out, in] -> q [out, in] (int8 if symmetric, else uint8), scale and zero_point [out, groups].

    ValueError unless 2 <= bits <= 8 and group_size divides the inputs.
    """
    q, scale, zero_point = _round_to_grid(w, bits, group_size, symmetric)
    q = q.clamp_(*integer_range(bits, symmetric))
    return q.reshape(w.shape).to(torch.int8 if symmetric else torch.uint8), scale[..., 0], zero_point[..., 0].int()


def dequantize_int(q, scale, zero_point):
    """The inverse: q [out, in], scale and zero_point [out, groups] -> w_hat [out, in] in scale's dtype."""
    groups = q.reshape(q.size(0), scale.size(1), -1).to(scale.dtype)
    return ((groups - zero_point[..., None]) * scale[..., None]).reshape(q.shape)


def fake_quantize(w, bits, group_size=None, symmetric=True):
    """w [out, in] -> w_hat [out, in] on the grid; the gradient passes straight through to w where w was not clipped."""
    return _StraightThrough.apply(w, functools.partial(_on_integer_grid, bits=bits, group_size=group_size, symmetric=symmetric))


def integer_range(bits, symmetric):
    """(lowest, highest) integer of the grid."""
    if not 2 <= bits <= 8:
        raise ValueError(f"cannot quantize to {bits} bits: choose 2 to 8")
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2 ** bits - 1)


def grid(groups, bits, symmetric):
    """groups [out, groups, group_size] -> scale, zero_point [out, groups, 1]; a group of zeros gets scale 1."""
    low, high = integer_range(bits, symmetric)
    if symmetric:
        scale = groups.abs().amax(-1, keepdim=True) / high
    else:
        least = groups.amin(-1, keepdim=True).clamp(max=0)
        scale = (groups.amax(-1, keepdim=True).clamp(min=0) - least) / high
    scale = torch.where(scale == 0, 1.0, scale)
    return scale, torch.zeros_like(scale) if symmetric else (-least / scale).round().clamp(low, high)


def _grouped(w, group_size):
    """w [out, in] -> [out, groups, group_size] in at least float32, in which the grid is computed."""
    size = group_size or w.size(1)
    if w.size(1) % size:
        raise ValueError(f"group_size {size} does not divide the {w.size(1)} inputs of a linear layer")
    return w.reshape(w.size(0), -1, size).to(torch.promote_types(w.dtype, torch.float32))


def _round_to_grid(w, bits, group_size, symmetric):
    """q [out, groups, group_size], rounded but not yet clipped; scale and zero_point [out, groups, 1]."""
    groups = _grouped(w, group_size)
    scale, zero_point = grid(groups, bits, symmetric)
    return (groups / scale).round_().add_(zero_point), scale, zero_point


def _on_integer_grid(w, bits, group_size, symmetric):
    """w_hat, and where w was not clipped (None: everywhere)."""
    low, high = integer_range(bits, symmetric)
    q, scale, zero_point = _round_to_grid(w, bits, group_size, symmetric)
    inside = None if symmetric else ((q >= low) & (q <= high)).reshape(w.shape)  # symmetric never clips
    return q.clamp_(low, high).sub_(zero_point).mul_(scale).reshape(w.shape), inside


class _StraightThrough(torch.autograd.Function):
    """quantize(w) -> w_hat, inside; the gradient of w_hat goes to w. What backward needs is kept on ctx itself, not saved with
    save_for_backward: one quantized weight serves several micro-batches, whose backward passes each go through it."""

    @staticmethod
    def forward(ctx, w, quantize):
        w_hat, ctx.inside = quantize(w)
        return w_hat.to(w.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad if ctx.inside is None else grad * ctx.inside, None


# NF4 (QLoRA, 2305.14314): 16 quantiles of a normal distribution, scaled to [-1, 1], one of them exactly 0. A block of 64 weights,
# in the order of memory, is scaled by its largest absolute value.

NF4_CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


def nf4_quantize(w, block_size=64):
    """w -> codes uint8 [numel], indices of NF4_CODE, and absmax float32 [blocks]; the nearest value, of two the lower.

    Blocks run over w in the order of memory, the last may be short. A block of zeros has absmax 0 and stays zero.
    """
    blocks = _blocks(w, block_size)
    absmax = blocks.abs().amax(1)
    unit = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    codes = torch.zeros_like(unit, dtype=torch.uint8)
    for middle in _midpoints(NF4_CODE).tolist():  # four times as fast as torch.bucketize
        codes += unit > middle
    return codes.flatten()[:w.numel()], absmax


def nf4_dequantize(codes, absmax, shape, block_size=64):
    """The inverse: float32 of this shape."""
    values = _blocks(NF4_CODE.to(codes.device).index_select(0, codes.flatten().int()), block_size) * absmax[:, None]
    return values.flatten()[:codes.numel()].reshape(shape)


def quantize_absmax(absmax, block_size=256):
    """Double quantization: absmax as it comes back from 8 bits, with the mean taken off first (QLoRA §3), float32 [blocks].

    The 8-bit code is bitsandbytes' dynamic one (2110.02861): a sign, a power of ten, and a fraction of the bits left.
    """
    mean = absmax.mean()
    blocks = _blocks(absmax - mean, block_size)
    scale = blocks.abs().amax(1, keepdim=True)
    code = _dynamic_code().to(absmax.device)
    unit = blocks * (1 / scale.clamp(min=1e-38))
    return (code[torch.bucketize(unit, _midpoints(code))] * scale).flatten()[:absmax.numel()] + mean


def _dynamic_code():
    """The 256 values of the dynamic 8-bit code, rising: for each power of ten, 2^i equal steps from a tenth of it to itself."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** i + 1, dtype=torch.float32)
        steps = 10 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*steps.tolist(), *(-steps).tolist()]
    return torch.tensor(sorted(values))


def _midpoints(code):
    return (code[:-1] + code[1:]) / 2


def _blocks(x, size):
    """x of any shape -> [blocks, size] in float32, the last padded with zeros."""
    flat = x.detach().flatten().float()
    return nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def _on_nf4_grid(w, double):
    """w_hat, and None: nothing is clipped."""
    codes, absmax = nf4_quantize(w)
    return nf4_dequantize(codes, quantize_absmax(absmax) if double else absmax, w.shape), None


class FakeQuantize(nn.Module):
    """A parametrization: the wrapped weight is seen on its grid, the optimizer holds it in full precision."""

    def __init__(self, quantize):
        super().__init__()
        self.quantize = quantize

    def forward(self, w):
        return _StraightThrough.apply(w, self.quantize)


def parse_scheme(scheme):
    """'int4' -> 4, 'nf4' -> None. ValueError for anything else than int2 … int8 and nf4."""
    match = re.fullmatch(r"int([2-8])|nf4", scheme)
    if not match:
        raise ValueError(f"unknown quantization scheme {scheme!r}: choose int2 … int8 or nf4")
    return match[1] and int(match[1])


def quantize_(model, scheme, group_size=None, symmetric=True, double=False):
    """Fake-quantize, in place, every linear of the blocks ('int2' … 'int8', 'nf4'); embeddings, head and norms stay.

    group_size and symmetric are for the integers, double (quantization of absmax) for NF4. Returns the number of weights put on
    the grid. ValueError for an unknown scheme or a group size that does not fit.
    """
    bits, linears = parse_scheme(scheme), block_linears(model)
    for linear in linears if bits else ():
        _grouped(linear.weight, group_size)  # every error comes before the first change
    quantize = functools.partial(_on_nf4_grid, double=double)
    if bits:
        quantize = functools.partial(_on_integer_grid, bits=bits, group_size=group_size, symmetric=symmetric)
    for linear in linears:
        parametrize.register_parametrization(linear, "weight", FakeQuantize(quantize))
    return sum(linear.weight.numel() for linear in linears)


class Cast(nn.Module):
    """A parametrization: computation sees the weight rounded to dtype, the optimizer and the saved folder do not."""

    changes_the_model = False

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, w):
        return w.to(self.dtype)


def compute_in_(model, dtype):
    """Compute in dtype (bfloat16), in place, from float32 parameters: master weights. Last of what is done to a weight."""
    leaves = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm))]
    for module in leaves:
        for name in [*dict(module.named_parameters(recurse=False)), *getattr(module, "parametrizations", ())]:
            if getattr(module, name).dtype != dtype:
                parametrize.register_parametrization(module, name, Cast(dtype), unsafe=True)  # unsafe: it changes the type
    return model


def bake_(model):
    """Replace every parametrized weight by the value it acts with: exactly on its grid, an ordinary parameter again."""
    for module in [m for m in model.modules() if parametrize.is_parametrized(m)]:
        for name in list(module.parametrizations):
            w = exact_weight(module, name)
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            getattr(module, name).data = w
    return model


def block_linears(model):
    """The linears of a transformer's blocks; its head, tied or not, is none of them."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.endswith("lm_head")]
