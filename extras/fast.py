"""The same numbers as the plain code up to rounding, faster: `--with fast`.

Three functions have the names and the signatures of the plain ones, and tests hold the two
together.

    score      sdft.score       prompts' common beginning passes through the model once
    backward   sdft.backward    the losses' gradients, worked out by hand: fewer passes over [n, V]
    generate   model.generate   while decoding on a CPU, weights lie in oneDNN's blocked layout
"""
import contextlib
import math
import os
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

import model as plain
import sdft
from quant import block_linears
from sdft import alike, forward_kl, jsd, reverse_kl


def attach(parts):
    """Put the three in the place of the plain ones."""
    parts |= {"score": score, "backward": backward, "generate": generate}


# ------------------------------------------------------------------------------------------- score
# All rows pass as one packed sequence [1, N] made of groups of rows. A group (P, B, T) is P tokens
# that its B rows begin with, once, and then T tokens of each row's own.

def score(model, prompts, completions, hidden=False):
    """`sdft.score`: hidden states [1 or n_layer, N, D] that predict the completions' tokens."""
    groups, ids, positions, wanted, offset = [], [], [], {}, 0
    for group in alike(prompts):
        shared = os.path.commonprefix([prompts[i] for i in group])[:-1]  # each keeps a token
        P = len(shared)
        own = [torch.tensor(prompts[i][P:] + completions[i][:-1]) for i in group]
        own = pad_sequence(own, batch_first=True)
        B, T = own.shape
        ids += [torch.tensor(shared, dtype=torch.long), own.flatten()]
        positions += [torch.arange(P), torch.arange(P, P + T).repeat(B)]
        for b, i in enumerate(group):
            first = offset + b * T + len(prompts[i]) - 1  # its prompt's last token
            wanted[i] = torch.arange(first, first + len(completions[i]))
        groups.append((P, B, T))
        offset += P + B * T
    ids, positions = (torch.cat(x)[None].to(model.device) for x in (ids, positions))
    x = model.backbone(ids, hidden=hidden, attend=partial(attend, groups), positions=positions)
    rows = torch.cat([wanted[i] for i in range(len(prompts))]).to(model.device)
    return torch.stack([h[0, rows] for h in (x[1] if hidden else [x])])


def attend(groups, q, k, v):
    """`model.attend` of a packed batch: q [1, N, H, K], k and v [1, N, G, K] -> [1, N, H, K]."""
    outputs, sizes = [], [P + B * T for P, B, T in groups]
    for group, *qkv in zip(groups, *(x.split(sizes, dim=1) for x in (q, k, v))):
        y = plain.attend(*(_unpack(x, *group) for x in qkv))
        P = group[0]
        outputs += [y[0, :P], y[:, P:].flatten(0, 1)]  # the beginning's from the first row
    return torch.cat(outputs)[None]


def _unpack(x, P, B, T):
    """A group's part of a packed batch, [1, P + B T, ...] -> its whole rows [B, P + T, ...]."""
    shared, own = x.split((P, B * T), dim=1)
    own = own.reshape(B, T, *own.shape[2:])
    return torch.cat((shared.expand(B, -1, *own.shape[2:]), own), dim=1)


# ---------------------------------------------------------------------------------------- backward
# log_s, log_t [n, V], overwritten, and a third block of that size to work in
# -> loss [n], KL [n] and d loss / d logits [n, V].

def _forward_kl(log_s, log_t, work):
    """d/dlogits sum_v p_T (log p_T - log p_S) = p_S - p_T."""
    p_t = torch.exp(log_t, out=work)
    kl = _dot(p_t, log_t.sub_(log_s))
    return kl, kl, log_s.exp_().sub_(p_t)


def _reverse_kl(log_s, log_t, work):
    """d/dlogits sum_v p_S (log p_S - log p_T) = p_S (log p_S - log p_T - KL)."""
    p_s, ratio = torch.exp(log_s, out=work), log_s.sub_(log_t)
    kl = _dot(p_s, ratio)
    return kl, kl, ratio.sub_(kl[:, None]).mul_(p_s)


def _jsd(log_s, log_t, work, beta=0.5):
    """d/dlogits jsd = (1 - beta) p_S (log p_S - log m - KL(p_S || m)); those of m cancel."""
    kl = _dot(log_s.exp(), log_s - log_t)  # what is logged beside the loss: KL(p_S || p_T)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta), out=work)
    p_s = log_s.exp()
    t_m, s_m = _dot(log_t.exp(), log_t.sub_(log_m)), _dot(p_s, log_s.sub_(log_m))
    slope = log_s.sub_(s_m[:, None]).mul_(p_s).mul_(1 - beta)
    return beta * t_m + (1 - beta) * s_m, kl, slope


def _dot(a, b):
    """Row by row, [n, V] and [n, V] -> [n], with no block for the products."""
    return torch.einsum("nv,nv->n", a, b)


GRADIENTS = {forward_kl: _forward_kl, reverse_kl: _reverse_kl, jsd: _jsd}


def backward(loss, student, s, teacher, t, tokens, chunk=128):
    """`sdft.backward`: [loss, KL], with the gradient in place, for the losses that are known here.

    Any other loss or head goes the plain way.
    """
    if loss not in GRADIENTS or not _has_plain_head(student):
        return sdft.backward(loss, student, s, teacher, t, tokens)
    w = student.head_weight
    values, slope, slope_w = _slopes(loss, student, w, s.detach(), teacher, t, tokens, chunk)
    if slope_w is not None:
        w.backward(slope_w)
        del slope_w  # before the layers' gradients need the room
    s.backward(slope)
    return values


@torch.no_grad()
def _slopes(loss, student, w, x, teacher, t, tokens, chunk):
    """[loss, KL], d loss / dX [N, D], and d loss / dW [V, D], None where the head is not trained.

    With G = d loss / d logits and logits = X W^T they are G W and G^T X. Three float32 blocks
    [chunk, V] serve all chunks.
    """
    chunk = max(1, min(chunk, math.ceil(len(x) / 3)))
    slope, slope_w = torch.empty_like(x), torch.zeros_like(w) if w.requires_grad else None
    blocks = x.new_empty(3, chunk, len(w), dtype=torch.float32)
    values = torch.zeros(2, device=x.device)
    for rows in (slice(start, start + chunk) for start in range(0, len(x), chunk)):
        logits = teacher.head(t[rows])
        v = min(logits.size(-1), len(w))  # the ids that both know
        log_s, log_t, work = blocks[:, :len(logits), :v]
        torch.log_softmax(work.copy_(logits[:, :v]), -1, out=log_t)
        logits = student.head(x[rows])
        torch.log_softmax(work.copy_(logits[:, :v]), -1, out=log_s)
        del logits
        value, kl, g = GRADIENTS[loss](log_s, log_t, work)
        values += torch.stack((value.sum(), kl.sum())) / tokens
        g = g.mul_(1 / tokens).to(x.dtype)
        slope[rows] = g @ w[:v]
        if slope_w is not None:
            slope_w[:v].addmm_(g.mT, x[rows])
    return values, slope, slope_w


def _has_plain_head(model):
    """Whether logits are X W^T, and not what a fork makes of them."""
    return getattr(model.head, "__func__", None) is plain.GPT.head


# ---------------------------------------------------------------------------------------- generate

@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, eos_id=None,
             generator=None, batch_size=64, rows=None, done=None):
    """`model.generate`: the prompts' completions."""
    n = min(batch_size, len(prompts if rows is None else rows))
    with blocked_weights(model, n):
        return plain.generate(model, prompts, max_new_tokens, temperature, top_p, eos_id,
                              generator, batch_size, rows, done)


@contextlib.contextmanager
def blocked_weights(model, rows):
    """While about `rows` sequences are decoded on a CPU, linears and head multiply by copies of
    their weights in oneDNN's blocked layout.

    A decoding step multiplies every weight by a few rows, which is faster from the copies; making
    them takes as long as three steps. The results are the same up to rounding.
    """
    linears, own_head = [], _has_plain_head(model)
    fast = model.device.type == "cpu" and torch.backends.mkldnn.is_available() and (
        model.norm.weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    try:
        for linear in block_linears(model) if rows and fast else ():
            if type(linear).forward is torch.nn.Linear.forward:  # and not a fork's own
                w = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
                linear.forward = partial(_product, w, linear.bias)
                linears.append(linear)
        if rows and fast and own_head:
            w = torch.ops.mkldnn._reorder_linear_weight(model.head_weight.detach(), rows)
            model.head = partial(_product, w, None)
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)  # the class's own comes back
        if own_head:
            vars(model).pop("head", None)


def _product(w, b, x):
    return torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
