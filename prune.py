"""Pruning (§5.2): neurons taken out of the feed-forward network, or weights held at zero.

Structured, as in the paper's Table 4: the least important hidden neurons of each block are removed
for good, with their rows of gate and up and their column of down, so that the model is smaller. The
paper cites LLM-Pruner and gives no criterion. A neuron j with activations h_j over calibration data
is worth

    activation   |h_j|_2 |W_down[:, j]|_2                     what it adds to the residual stream
    weight       |W_gate[j]|_2 |W_up[j]|_2 |W_down[:, j]|_2   (GPT-2 has no gate)

Unstructured: a mask of a weight [out, in], True = kept, that survives training. A weight is worth
|W_ij| (magnitude, compared over its matrix) or |W_ij| |X_j|_2, with X_j the j-th input over
calibration data (Wanda, 2306.11695, compared within its row); n:m keeps n of every m neighbours.
"""
import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from quant import StraightThrough, block_linears

# ----------------------------------------------------------------------------------------- masks

def magnitude_mask(w, sparsity):
    """Keep the largest ceil((1 - sparsity) * numel) weights of w by absolute value -> bool, True =
    kept; of equals the first. ValueError unless 0 <= sparsity < 1.

    >>> magnitude_mask(torch.tensor([[3.0, -1.0], [-2.0, 0.1]]), 0.5).tolist()
    [[True, False], [True, False]]
    """
    return _keep_largest(w.abs().flatten(), _kept(w.numel(), sparsity)).view_as(w)


def wanda_mask(w, x_norm, sparsity=None, n=None, m=None):
    """Keep, in each row of w [out, in], the largest by |W_ij| |X_j|_2: ceil((1 - sparsity) * in) of
    them, or n of every m neighbours -> bool, True = kept.

    x_norm [in] is the 2-norm of each input over the calibration tokens; ones give magnitudes.
    ValueError unless m divides the inputs and 0 < n <= m, or 0 <= sparsity < 1.

    >>> w, x_norm = torch.tensor([[1.0, -2.0, 3.0, 9.0]]), torch.tensor([1.0, 2.0, 1.0, 0.0])
    >>> wanda_mask(w, x_norm, sparsity=0.5).tolist()      # scores 1, 4, 3, 0
    [[False, True, True, False]]
    >>> wanda_mask(w, x_norm, n=1, m=2).tolist()
    [[False, True, True, False]]
    """
    score = w.abs() * x_norm
    if m is None:
        return _keep_largest(score, _kept(w.size(1), sparsity))
    if not 0 < n <= m or w.size(1) % m:
        raise ValueError(f"{n}:{m} sparsity needs 0 < {n} <= {m}, and {m} to divide "
                         f"the {w.size(1)} inputs of a linear layer")
    return _keep_largest(score.unflatten(1, (-1, m)), n).flatten(1)


def _kept(n, sparsity):
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and less than 1, not {sparsity}")
    return math.ceil(round((1 - sparsity) * n, 6))  # 0.7 * 10 is 7.000000000000001


def _keep_largest(score, k):
    """True at the k largest of the last dimension, the first of equals."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order[..., :k], True)


class Mask(nn.Module):
    """A parametrization: pruned weights are seen as 0 and get no gradient, whatever the optimizer
    holds."""

    mask: torch.Tensor
    lasting = True  # also after a low-rank update, see quant.add_lora_

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, w):
        return StraightThrough.apply(w, w.detach().masked_fill(~self.mask, 0), self.mask)


def prune_(model, method, sparsity=None, n=None, m=None, norms=None):
    """Hold weights of every linear of the blocks at zero, in place; returns how many.

    method: magnitude, or wanda (with norms from `input_norms`). With n and m, n of every m
    neighbours in a row are kept.
    """
    masks = {}
    for linear in block_linears(model):
        w = linear.weight.detach().float()
        if method == "magnitude" and m is None:
            masks[linear] = magnitude_mask(w, sparsity)
        else:
            x_norm = norms[linear] if method == "wanda" else torch.ones(w.size(1), device=w.device)
            masks[linear] = wanda_mask(w, x_norm, sparsity, n, m)
    for linear, mask in masks.items():
        parametrize.register_parametrization(linear, "weight", Mask(mask))
    return sum(int((~mask).sum()) for mask in masks.values())


@torch.no_grad()
def input_norms(model, sequences, done=None):
    """{linear: 2-norm of each of its inputs over all tokens of the sequences, [in] float32}.

    For every linear of the blocks; sequences are lists of ids. done(1) is called after each.
    """
    squares, hooks = {}, []

    def add(linear, inputs):
        x = inputs[0].flatten(0, -2).float()
        squares[linear] = squares.get(linear, 0) + x.square().sum(0)

    for linear in block_linears(model):
        hooks.append(linear.register_forward_pre_hook(add))
    try:
        for ids in sequences:
            model.backbone(torch.tensor([ids], device=model.device))
            if done:
                done(1)
    finally:
        for hook in hooks:
            hook.remove()
    return {linear: s.sqrt() for linear, s in squares.items()}


# --------------------------------------------------------------------------------------- neurons

@torch.no_grad()
def prune_ffn_(model, fraction, norms=None, multiple=1):
    """Remove the least important `fraction` of each block's hidden neurons, in place and for good.

    Returns how many in all. Important by activation with norms from `input_norms`, else by weight.
    Every block keeps the same number, see `neurons_kept`.
    """
    old, keep = model.config.d_ff, neurons_kept(model.config.d_ff, fraction, multiple)
    for layer in model.layers:
        mlp, score = layer.mlp, importance(layer.mlp, norms)
        kept = score.argsort(descending=True, stable=True)[:keep].sort().values
        if hasattr(mlp, "gate_proj"):
            mlp.gate_proj = _part(mlp.gate_proj, kept, 0)
        mlp.up_proj = _part(mlp.up_proj, kept, 0)
        mlp.down_proj = _part(mlp.down_proj, kept, 1)
    model.config.d_ff = keep
    return (old - keep) * len(model.layers)


def importance(mlp, norms=None):
    """What each hidden neuron of a feed-forward network is worth, [d_ff]: see the head of this
    file; by activation with norms from `input_norms`, else by weight."""
    score = mlp.down_proj.weight.float().norm(dim=0)
    if norms is not None:
        return score * norms[mlp.down_proj]
    if hasattr(mlp, "gate_proj"):
        score = score * mlp.gate_proj.weight.float().norm(dim=1)
    return score * mlp.up_proj.weight.float().norm(dim=1)


def neurons_kept(neurons, fraction, multiple=1):
    """How many are left without `fraction` of them: the nearest multiple (of a group of what comes
    after), at least one.

    >>> neurons_kept(1536, 0.1), neurons_kept(1536, 0.1, multiple=64)    # 1382 / 64 = 21.6
    (1382, 1408)
    """
    groups = round((neurons - round(fraction * neurons)) / multiple)
    return min(max(1, groups), neurons // multiple) * multiple


def _part(linear, kept, dim):
    """A linear with only these outputs (dim 0) or inputs (dim 1)."""
    w, b = linear.weight.index_select(dim, kept), linear.bias
    part = nn.Linear(w.size(1), w.size(0), bias=b is not None, device="meta")
    part.weight = nn.Parameter(w)
    if b is not None:
        part.bias = nn.Parameter(b[kept] if dim == 0 else b.clone())
    return part
