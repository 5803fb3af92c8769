"""LoRA (2106.09685): a trainable low-rank update of frozen weights, W + alpha/r B A; of quantized ones: QLoRA (2305.14314)."""
import torch
from torch import nn
from torch.nn.utils import parametrize

from prune import Mask
from quant import block_linears


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

    Baked or saved, the update is merged into the weights, which then no longer lie on the grid; pruned ones stay zero.
    """
    model.requires_grad_(False)
    for linear in block_linears(model):
        masks = [p for p in linear.parametrizations.weight if isinstance(p, Mask)] if parametrize.is_parametrized(linear) else []
        for step in (LowRank(linear.weight, rank, alpha, generator), *masks):
            parametrize.register_parametrization(linear, "weight", step, unsafe=True)  # float32, whatever the weight is
    return model
