"""Fake quantization (§5.2): weights that live on an integer grid, trained with straight-through gradients.

Also what else stands between a weight and its use: a low-rank update (LoRA), and the type of computation. Each is a
parametrization of `torch.nn.utils.parametrize`, in this order, and `bake_` ends them all.

First the primitives on tensors, then the module that puts them on a `nn.Linear`. A weight [out, in] is cut into groups of
`group_size` inputs (None: one group per output channel), each with its own scale s and zero point z:

    symmetric    s = max|w| / (2^(b-1) - 1),  z = 0,             q = round(w/s)      in [-(2^(b-1) - 1), 2^(b-1) - 1]
    asymmetric   s = (max w - min w) / (2^b - 1), z = round(-min w / s), q = round(w/s) + z  in [0, 2^b - 1]

    w_hat = s (q - z)

where the asymmetric range is first widened to hold 0, so that 0 stays exactly 0. The paper quantizes to NF4 and does not say
how the quantized student trains; we train straight through (Bengio et al., 1308.3432): w_hat is used forward, and its gradient
goes to w as if rounding were the identity, except where w was clipped.
"""
import re

import torch
from torch import nn
from torch.nn.utils import parametrize

from model import exact_weight


def quantize_int(w, bits, group_size=None, symmetric=True):
    """w [out, in] -> q [out, in] (int8 if symmetric, else uint8), scale and zero_point [out, groups].

    ValueError unless 2 <= bits <= 8 and group_size divides the inputs.
    """
    low, high = integer_range(bits, symmetric)
    groups = _grouped(w, group_size)
    scale, zero_point = grid(groups, bits, symmetric)
    q = (_round_to_grid(groups, scale, zero_point)).clamp_(low, high)
    return q.reshape(w.shape).to(torch.int8 if symmetric else torch.uint8), scale[..., 0], zero_point[..., 0].int()


def dequantize_int(q, scale, zero_point):
    """The inverse: q [out, in], scale and zero_point [out, groups] -> w_hat [out, in] in scale's dtype."""
    groups = q.reshape(q.size(0), scale.size(1), -1).to(scale.dtype)
    return ((groups - zero_point[..., None]) * scale[..., None]).reshape(q.shape)


def fake_quantize(w, bits, group_size=None, symmetric=True):
    """w [out, in] -> w_hat [out, in] on the grid; the gradient passes straight through to w where w was not clipped."""
    return _StraightThrough.apply(w, bits, group_size, symmetric)


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


def _round_to_grid(groups, scale, zero_point):
    return (groups / scale).round_().add_(zero_point)


class _StraightThrough(torch.autograd.Function):
    """Quantize and dequantize. What backward needs is kept on ctx itself, not saved with save_for_backward: one
    quantized weight serves several micro-batches, whose backward passes each go through it."""

    @staticmethod
    def forward(ctx, w, bits, group_size, symmetric):
        low, high = integer_range(bits, symmetric)
        groups = _grouped(w, group_size)
        scale, zero_point = grid(groups, bits, symmetric)
        q = _round_to_grid(groups, scale, zero_point)
        ctx.inside = None if symmetric else ((q >= low) & (q <= high)).reshape(w.shape)  # symmetric never clips
        return q.clamp_(low, high).sub_(zero_point).mul_(scale).reshape(w.shape).to(w.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad if ctx.inside is None else grad * ctx.inside, None, None, None


class FakeQuantize(nn.Module):
    """A parametrization: the wrapped weight is seen on the grid, the optimizer holds it in full precision."""

    def __init__(self, bits, group_size, symmetric):
        super().__init__()
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric

    def forward(self, w):
        return fake_quantize(w, self.bits, self.group_size, self.symmetric)


def scheme_bits(scheme):
    """'int4' -> 4. ValueError for anything but int2 … int8."""
    match = re.fullmatch(r"int([2-8])", scheme)
    if not match:
        raise ValueError(f"unknown quantization scheme {scheme!r}: choose int2 … int8")
    return int(match[1])


def quantize_(model, scheme, group_size=None, symmetric=True):
    """Fake-quantize, in place, every linear of the blocks ('int2' … 'int8'); embeddings, head and norms stay.

    Returns the number of weights put on the grid. ValueError for an unknown scheme or a group size that does not fit.
    """
    bits, linears = scheme_bits(scheme), block_linears(model)
    for linear in linears:
        _grouped(linear.weight, group_size)  # every error comes before the first change
    for linear in linears:
        parametrize.register_parametrization(linear, "weight", FakeQuantize(bits, group_size, symmetric))
    return sum(linear.weight.numel() for linear in linears)


class LowRank(nn.Module):
    """A parametrization: w + alpha/r B A, with A [r, in] random and B [out, r] zero at first (LoRA, 2106.09685)."""

    def __init__(self, w, rank, alpha, generator):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, w.size(1), generator=generator).to(w.device) / w.size(1) ** 0.5)
        self.b = nn.Parameter(torch.zeros(w.size(0), rank, device=w.device))
        self.scale = alpha / rank

    def forward(self, w):
        return w + _Product.apply(self.b, self.a, self.scale)


class _Product(torch.autograd.Function):
    """scale B A; as in `_StraightThrough`, one product serves several backward passes."""

    @staticmethod
    def forward(ctx, b, a, scale):
        ctx.saved = b, a, scale
        return scale * (b @ a)

    @staticmethod
    def backward(ctx, grad):
        b, a, scale = ctx.saved
        return scale * (grad @ a.T), scale * (b.T @ grad), None


def add_lora_(model, rank=16, alpha=32, generator=None):
    """Freeze a model, in place, and add a trainable low-rank update to every linear of its blocks, after any quantization.

    Baked or saved, the update is merged into the weights, which then no longer lie on the grid.
    """
    model.requires_grad_(False)
    for linear in block_linears(model):
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank, alpha, generator),
                                               unsafe=True)  # float32, whatever the frozen weight is
    return model


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
