"""Pruning (§5.2): neurons taken out of the feed-forward network, or single weights held at zero.

Structured, as in the paper's Table 4: of each block's hidden neurons the least important are removed for good, with the rows of
gate and up and the column of down that belong to them, so that the model is smaller. The paper cites LLM-Pruner and gives no
criterion; a neuron j with activations h_j over some calibration data is worth

    activation   |h_j|_2 |W_down[:, j]|_2                     what it adds to the residual stream
    weight       |W_gate[j]|_2 |W_up[j]|_2 |W_down[:, j]|_2   (GPT-2 has no gate)

Unstructured: a mask of a weight [out, in], True = kept, that survives training. A weight is worth |W_ij| (magnitude, compared
over its matrix) or |W_ij| |X_j|_2 with X_j the j-th input over calibration data (Wanda, 2306.11695, compared within its row);
n:m keeps n of every m neighbours in a row.
"""
import math
import re

import torch
from torch import nn
from torch.nn.utils import parametrize

from model import Linear
from quant import block_linears, quantize_


def magnitude_mask(w, sparsity):
    """Keep the largest ceil((1 - sparsity) * numel) weights of w by absolute value -> bool, True = kept; ties by position."""
    return _keep_largest(w.abs().flatten(), _kept(w.numel(), sparsity)).view_as(w)


def wanda_mask(w, x_norm, sparsity=None, n=None, m=None):
    """Keep, in each row of w [out, in], the largest by |W_ij| |X_j|_2: ceil((1 - sparsity) * in), or n of every m neighbours.

    x_norm [in] is the 2-norm of each input over the calibration tokens; ones give plain magnitudes. -> bool, True = kept.
    ValueError unless m divides the inputs and 0 < n <= m, or 0 <= sparsity < 1.
    """
    score = w.abs() * x_norm
    if m is None:
        return _keep_largest(score, _kept(w.size(1), sparsity))
    if not 0 < n <= m or w.size(1) % m:
        raise ValueError(f"{n}:{m} sparsity needs 0 < {n} <= {m}, and {m} to divide the {w.size(1)} inputs of a linear layer")
    return _keep_largest(score.unflatten(1, (-1, m)), n).flatten(1)


def _kept(n, sparsity):
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and less than 1, not {sparsity}")
    return math.ceil(round((1 - sparsity) * n, 6))  # 0.7 * 10 is 7.000000000000001


def _keep_largest(score, k):
    """True at the k largest of the last dimension, the first of equals."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order[..., :k], True)


class _Masked(torch.autograd.Function):
    """w where kept, else exactly 0; nothing is saved that one backward pass would free (see quant._StraightThrough)."""

    @staticmethod
    def forward(ctx, w, mask):
        ctx.mask = mask
        return w.masked_fill(~mask, 0)

    @staticmethod
    def backward(ctx, grad):
        return grad.masked_fill(~ctx.mask, 0), None


class Mask(nn.Module):
    """A parametrization: pruned weights are seen as 0 and get no gradient, whatever the optimizer holds."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, w):
        return _Masked.apply(w, self.mask)


@torch.no_grad()
def input_norms(model, sequences):
    """{linear: 2-norm of each of its inputs over all tokens of the sequences, [in] float32} for every linear of the blocks."""
    squares, hooks = {}, []
    for linear in block_linears(model):
        def add(linear, inputs):
            x = inputs[0].flatten(0, -2).float()
            squares[linear] = squares.get(linear, 0) + x.square().sum(0)
        hooks.append(linear.register_forward_pre_hook(add))
    try:
        for ids in sequences:
            model.backbone(torch.tensor([ids], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {linear: s.sqrt() for linear, s in squares.items()}


def prune_(model, method, sparsity=None, n=None, m=None, norms=None):
    """Hold weights of every linear of the blocks at zero, in place. method: magnitude, wanda (with norms from `input_norms`).

    With n and m, n of every m neighbours in a row are kept. Returns the number of weights held at zero.
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
def prune_ffn_(model, fraction, norms=None, multiple=1):
    """Remove the least important `fraction` of each block's hidden neurons, in place, and for good; returns how many in all.

    Important by activation with norms from `input_norms`, else by weight. Every block keeps the same number, see `neurons_kept`.
    """
    old, keep = model.config.d_ff, neurons_kept(model.config.d_ff, fraction, multiple)
    for layer in model.layers:
        mlp = layer.mlp
        score = mlp.down_proj.weight.float().norm(dim=0)
        if norms is not None:
            score = score * norms[mlp.down_proj]
        else:
            for name in ("gate_proj", "up_proj"):
                score = score * (getattr(mlp, name).weight.float().norm(dim=1) if hasattr(mlp, name) else 1)
        kept = score.argsort(descending=True, stable=True)[:keep].sort().values
        for name in ("gate_proj", "up_proj"):
            if hasattr(mlp, name):
                setattr(mlp, name, _part(getattr(mlp, name), kept, 0))
        mlp.down_proj = _part(mlp.down_proj, kept, 1)
    model.config.d_ff = keep
    return (old - keep) * len(model.layers)


def neurons_kept(neurons, fraction, multiple=1):
    """How many are left, without `fraction` of them: the nearest multiple (of a group of what comes after), at least one."""
    return min(max(1, round((neurons - round(fraction * neurons)) / multiple)), neurons // multiple) * multiple


def _part(linear, kept, dim):
    """A linear with only these outputs (dim 0) or inputs (dim 1)."""
    w, b = linear.weight.index_select(dim, kept), linear.bias
    part = Linear(w.size(1), w.size(0), bias=b is not None, device="meta")
    part.weight = nn.Parameter(w)
    if b is not None:
        part.bias = nn.Parameter(b[kept] if dim == 0 else b.clone())
    return part


# Damages compose: 'ffn10,wanda30,int4' is done in this order, whatever the order written.

DAMAGES = re.compile(r"(?P<ffn>ffn)(?P<fraction>\d+)?|(?P<mask>magnitude|wanda)(?:(?P<n>\d+):(?P<m>\d+)|(?P<sparsity>\d+))?"
                     r"|(?P<grid>int[2-8]|nf4)")


def parse_damage(text):
    """'ffn10,int4' -> the matches of DAMAGES by what they do: {"ffn": …, "grid": …}. ValueError for anything else."""
    found = {}
    for scheme in text.split(","):
        match = DAMAGES.fullmatch(scheme)
        if not match:
            raise ValueError(f"--degrade: unknown damage {scheme!r}: choose of ffn10, magnitude30, wanda30, wanda2:4, int4, nf4")
        if int(match["fraction"] or match["sparsity"] or 0) >= 100:
            raise ValueError(f"--degrade: {scheme} would leave nothing")
        if match["m"] and not 0 < int(match["n"]) <= int(match["m"]):
            raise ValueError(f"--degrade: {scheme} keeps {match['n']} of {match['m']}: it must keep at least 1, at most all")
        kind = match["ffn"] or match["mask"] and "mask" or "grid"
        if kind in found:
            raise ValueError(f"--degrade: {found[kind][0]} and {scheme} cannot both be done to one weight")
        found[kind] = match
    return found


def check_damage(config, damage, group_size):
    """Of what the number of neurons that a block keeps must be a multiple; config is the GPTConfig of what will be damaged.

    ValueError if the groups of what comes after neurons, n:m or a quantization's, do not fit its linears.
    """
    found = parse_damage(damage) if damage else {}
    sizes = {}
    if "mask" in found and found["mask"]["m"]:
        sizes[f"{found['mask'][0]}: its groups of {found['mask']['m']} do"] = int(found["mask"]["m"])
    if "grid" in found and found["grid"][0] != "nf4" and group_size:
        sizes[f"group_size {group_size} does"] = group_size
    multiple = math.lcm(*sizes.values())
    if "ffn" in found and multiple > config.d_ff:
        raise ValueError(f"--degrade: groups of {multiple} cannot be made of a block's {config.d_ff} neurons")
    for name, size in sizes.items():
        for inputs in (config.d_model, config.n_head * config.head_dim, multiple if "ffn" in found else config.d_ff):
            if inputs % size:
                raise ValueError(f"{name} not divide the {inputs} inputs of a linear layer")
    return multiple


def damage_(student, damage, sequences, importance, group_size, symmetric, double):
    """Remove neurons, then mask weights, then quantize, in place; what was done, in numbers.

    sequences: ids that activations are taken from, if they are needed; importance: of neurons, activation or weight; the rest
    is quantize_'s.
    """
    found, done, multiple = parse_damage(damage), {}, check_damage(student.config, damage, group_size)
    if "ffn" in found:
        norms = input_norms(student, sequences) if importance == "activation" else None
        done["neurons"] = student.config.d_ff * student.config.n_layer
        done["neurons_removed"] = prune_ffn_(student, int(found["ffn"]["fraction"] or 10) / 100, norms, multiple)
    if "mask" in found:
        mask = found["mask"]
        norms = input_norms(student, sequences) if mask["mask"] == "wanda" else None
        n, m = (int(mask["n"]), int(mask["m"])) if mask["m"] else (None, None)
        done["weights_held_at_zero"] = prune_(student, mask["mask"], int(mask["sparsity"] or 30) / 100, n, m, norms)
    if "grid" in found:
        done["weights_quantized"] = quantize_(student, found["grid"][0], group_size, symmetric, double)
    return done
