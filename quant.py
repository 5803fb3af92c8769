"""Fake quantization (§5.2): weights that live on a grid, trained with straight-through gradients.

First the grids on tensors, then the modules that put them on an `nn.Linear`. A weight [out, in] is
cut into groups of `group_size` inputs (None: one group per output channel), each with its own scale
s and zero point z:

    symmetric    s = max|w| / (2^(b-1) - 1),  z = 0
                 q = round(w/s)      in [-(2^(b-1) - 1), 2^(b-1) - 1]
    asymmetric   s = (max w - min w) / (2^b - 1),  z = round(-min w / s)
                 q = round(w/s) + z  in [0, 2^b - 1]

    w_hat = s (q - z)

The asymmetric range is first widened to hold 0, so that 0 stays exactly 0. The paper's own NF4 is
here too. The paper does not say how the quantized student trains. Here it trains straight through
(Bengio et al., 1308.3432): w_hat is used forward, and its gradient goes to w as if rounding were
the identity, except where w was clipped. QLoRA is the other way: a frozen grid and a low-rank
update. `compute_in_` comes last and only rounds to bfloat16, for speed: what is saved is the weight
as it acts without that rounding (`model.GPT.weight`).
"""
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize


class StraightThrough(torch.autograd.Function):
    """w_hat in place of w; the gradient of w_hat goes to w where `passes` [w's shape] is True
    (None: everywhere).

    What backward needs is kept on ctx itself, not by save_for_backward: one quantized weight serves
    several micro-batches, whose backward passes each go through it.

    >>> w = torch.tensor([0.9, -0.2], requires_grad=True)
    >>> StraightThrough.apply(w, w.detach().round(), None)
    tensor([1., -0.], grad_fn=<StraightThroughBackward>)
    >>> passes = torch.tensor([True, False])
    >>> StraightThrough.apply(w, torch.tensor([0.9, 0.0]), passes).sum().backward()
    >>> w.grad
    tensor([1., 0.])
    """

    @staticmethod
    def forward(ctx, w, w_hat, passes):
        ctx.passes = passes
        return w_hat.to(w.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad if ctx.passes is None else grad.masked_fill(~ctx.passes, 0), None, None


# -------------------------------------------------------------------------------- integer grids
# Training goes through `fake_quantize`; the two before it are the same grid in integers, to store.

def quantize_int(w, bits, group_size=None, symmetric=True):
    """w [out, in] -> q [out, in] (int8 if symmetric, else uint8), scale, zero_point [out, groups].

    ValueError unless 2 <= bits <= 8 and group_size divides the inputs.

    >>> q, scale, zero_point = quantize_int(torch.tensor([[6.0, -1.1, 3.0, 0.9]]), bits=3)
    >>> q.tolist(), scale.item(), zero_point.item()       # s = 6 / 3; 3.0 / 2 rounds to even
    ([[3, -1, 2, 0]], 2.0, 0)
    """
    q, scale, zero_point = _rounded(w, bits, group_size, symmetric)
    q = q.clamp_(*integer_range(bits, symmetric)).reshape(w.shape)
    q = q.to(torch.int8 if symmetric else torch.uint8)
    return q, scale[..., 0], zero_point[..., 0].int()


def dequantize_int(q, scale, zero_point):
    """The inverse: q [out, in], scale and zero_point [out, groups] -> w_hat [out, in], in scale's
    dtype.

    >>> dequantize_int(torch.tensor([[0, 3, 1]]), torch.tensor([[2.0]]), torch.tensor([[1]]))
    tensor([[-2.,  4.,  0.]])
    """
    groups = q.reshape(q.size(0), scale.size(1), -1).to(scale.dtype, copy=True)
    return groups.sub_(zero_point[..., None]).mul_(scale[..., None]).reshape(q.shape)


def fake_quantize(w, bits, group_size=None, symmetric=True):
    """w [out, in] -> w_hat [out, in] on the grid; the gradient passes to w where w is not clipped.

    >>> w = torch.tensor([[-2.0, 4.0, 0.0, 1.2]])         # s = 6 / 3, z = 1
    >>> fake_quantize(w, bits=2, symmetric=False)
    tensor([[-2.,  4.,  0.,  2.]])
    """
    (low, high), passes = integer_range(bits, symmetric), None
    q, scale, zero_point = _rounded(w.detach(), bits, group_size, symmetric)
    if not symmetric:  # a symmetric grid reaches every weight
        passes = ((q >= low) & (q <= high)).reshape(w.shape)
    w_hat = q.clamp_(low, high).sub_(zero_point).mul_(scale)  # s (q - z)
    return StraightThrough.apply(w, w_hat.reshape(w.shape), passes)


def integer_range(bits, symmetric):
    """(lowest, highest) integer of the grid.

    >>> integer_range(4, symmetric=True), integer_range(4, symmetric=False)
    ((-7, 7), (0, 15))
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"cannot quantize to {bits} bits: choose 2 to 8")
    highest = 2 ** (bits - 1) - 1
    return (-highest, highest) if symmetric else (0, 2 ** bits - 1)


def _rounded(w, bits, group_size, symmetric):
    """round(w/s) + z, not yet clipped, [out, groups, group_size]; s and z [out, groups, 1].

    In at least float32. A group of zeros gets the scale 1.
    """
    low, high = integer_range(bits, symmetric)
    size = group_size or w.size(1)
    if w.size(1) % size:
        raise ValueError(f"group_size {size} does not divide the {w.size(1)} inputs of a linear")
    groups = w.reshape(w.size(0), -1, size).to(torch.promote_types(w.dtype, torch.float32))
    if symmetric:
        scale = groups.abs().amax(-1, keepdim=True) / high
        scale = torch.where(scale == 0, 1.0, scale)
        return (groups / scale).round_(), scale, torch.zeros_like(scale)
    least = groups.amin(-1, keepdim=True).clamp(max=0)
    scale = (groups.amax(-1, keepdim=True).clamp(min=0) - least) / high
    scale = torch.where(scale == 0, 1.0, scale)
    zero_point = (-least / scale).round().clamp(low, high)
    return (groups / scale).round_().add_(zero_point), scale, zero_point


# ------------------------------------------------------------------------------------------- NF4
# NF4 (QLoRA, 2305.14314): 16 quantiles of a normal distribution, scaled to [-1, 1], one of them
# exactly 0. A block of 64 weights, in the order of memory, is scaled by its largest absolute value.

NF4_CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0])


def nf4_quantize(w, block_size=64):
    """w -> codes uint8 [numel], indices of NF4_CODE, and absmax float32 [blocks].

    The nearest value is taken, of two the lower. Blocks run over w in the order of memory; the last
    may be short. A block of zeros has absmax 0 and stays zero.

    >>> codes, absmax = nf4_quantize(torch.tensor([2.0, -2.0, 0.0, 1.2]), block_size=4)
    >>> codes.tolist(), absmax.item()                    # 1.2 / 2 = 0.6 is nearest to code 13, .563
    ([15, 0, 7, 13], 2.0)
    """
    blocks = _blocks(w, block_size)
    absmax = blocks.abs().amax(1)
    unit = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    codes = torch.zeros_like(unit, dtype=torch.uint8)
    for middle in _midpoints(NF4_CODE).tolist():  # four times as fast as torch.bucketize
        codes += unit > middle
    return codes.flatten()[:w.numel()], absmax


def nf4_dequantize(codes, absmax, shape, block_size=64):
    """The inverse: float32 of this shape.

    >>> nf4_dequantize(torch.tensor([15, 0, 7]), torch.tensor([2.0]), (1, 3), block_size=3)
    tensor([[ 2., -2.,  0.]])
    """
    values = NF4_CODE.to(codes.device).index_select(0, codes.flatten().int())
    values = _blocks(values, block_size) * absmax[:, None]
    return values.flatten()[:codes.numel()].reshape(shape)


def fake_nf4(w, group_size=None, symmetric=True):
    """w -> w_hat on the NF4 grid, whatever the group size; the gradient passes to w everywhere."""
    codes, absmax = nf4_quantize(w.detach())
    return StraightThrough.apply(w, nf4_dequantize(codes, absmax, w.shape), None)


def _midpoints(code):
    return (code[:-1] + code[1:]) / 2


def _blocks(x, size):
    """x of any shape -> [blocks, size] in float32, the last padded with zeros."""
    flat = x.detach().flatten().float()
    return nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


# ---------------------------------------------------------------------- on the linears of a model

# --degrade's name -> a function of w, group_size and symmetric that gives w_hat
SCHEMES = {f"int{bits}": partial(fake_quantize, bits=bits) for bits in range(2, 9)}
SCHEMES["nf4"] = fake_nf4
BLOCK: dict[str, int] = {}  # scheme -> inputs that share a scale, where its format fixes them


class FakeQuantize(nn.Module):
    """A parametrization: computation sees the weight on its grid, the optimizer in full precision.

    quantize(w) -> w_hat, as `fake_quantize` or `fake_nf4`.
    """

    def __init__(self, quantize):
        super().__init__()
        self.quantize = quantize

    def forward(self, w):
        return self.quantize(w)


def quantize_(model, scheme, group_size=None, symmetric=True):
    """Fake-quantize, in place, every linear of the blocks by a name in SCHEMES.

    Embeddings, head and norms stay. Returns how many weights were put on the grid. ValueError for
    an unknown scheme or a group size that does not fit, before anything is changed.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown quantization scheme {scheme!r}: choose of {', '.join(SCHEMES)}")
    quantize = partial(SCHEMES[scheme], group_size=group_size, symmetric=symmetric)
    linears = block_linears(model)
    for linear in linears:
        quantize(linear.weight[:1])  # raises what it has to, on one row
    for linear in linears:
        parametrize.register_parametrization(linear, "weight", FakeQuantize(quantize))
    return sum(linear.weight.numel() for linear in linears)


def block_linears(model):
    """The linears of a transformer's blocks, without the head."""
    return [m for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and not name.endswith("lm_head")]


class LowRank(nn.Module):
    """A parametrization: w + alpha/r B A (LoRA, 2106.09685), A [r, in] random, B [out, r] zero."""

    def __init__(self, w, rank, alpha, generator):
        super().__init__()
        a = torch.randn(rank, w.size(1), generator=generator).to(w.device) / w.size(1) ** 0.5
        self.a, self.scale = nn.Parameter(a), alpha / rank
        self.b = nn.Parameter(torch.zeros(w.size(0), rank, device=w.device))

    def forward(self, w):
        return w + _Product.apply(self.b, self.a, self.scale)


class _Product(torch.autograd.Function):
    """scale B A; as in StraightThrough, one product serves several backward passes."""

    @staticmethod
    def forward(ctx, b, a, scale):
        ctx.saved = b, a, scale
        return scale * (b @ a)

    @staticmethod
    def backward(ctx, grad):
        b, a, scale = ctx.saved
        return scale * (grad @ a.T), scale * (b.T @ grad), None


def add_lora_(model, rank=16, alpha=32, generator=None):
    """Freeze a model, in place, and add a trainable low-rank update to every linear of its blocks.

    On a quantized model that is QLoRA (2305.14314). Saved or baked, the update is merged into the
    weights, which then no longer lie on the grid. A parametrization that says lasting = True (a
    mask) is done once more, after the update.
    """
    model.requires_grad_(False)
    for linear in block_linears(model):
        before = [*linear.parametrizations.weight] if parametrize.is_parametrized(linear) else []
        lasting = [step for step in before if getattr(step, "lasting", False)]
        for step in (LowRank(linear.weight, rank, alpha, generator), *lasting):
            # unsafe: the update is float32, whatever the weight is
            parametrize.register_parametrization(linear, "weight", step, unsafe=True)
    return model


class Cast(nn.Module):
    """A parametrization: computation sees the weight rounded to dtype, the optimizer and the saved
    folder do not."""

    changes_the_model = False

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, w):
        return w.to(self.dtype)


def compute_in_(model, dtype):
    """Compute in dtype (bfloat16), in place, from float32 parameters: master weights. This is the
    last of what is done to a weight."""
    kinds = nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm
    for module in [m for m in model.modules() if isinstance(m, kinds)]:
        plain = dict(module.named_parameters(recurse=False))
        for name in [*plain, *getattr(module, "parametrizations", ())]:
            if getattr(module, name).dtype != dtype:  # unsafe: it changes the type
                parametrize.register_parametrization(module, name, Cast(dtype), unsafe=True)
    return model


@torch.no_grad()
def bake_(model):
    """Replace every parametrized weight by the value it acts with: exactly on its grid, an ordinary
    parameter again."""
    for module in [m for m in model.modules() if parametrize.is_parametrized(m)]:
        for name, steps in list(module.parametrizations.items()):
            w = steps.original
            for step in steps:
                w = step(w) if getattr(step, "changes_the_model", True) else w
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
            getattr(module, name).data = w.detach()
    return model
