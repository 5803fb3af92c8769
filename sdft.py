"""Self-distillation fine-tuning as recovery (§3): the damaged student answers, its healthy teacher scores, token by token.

One step, for a batch of prompts x with expert demonstrations c:

    1. rollout    y ~ student(. | x)                             on-policy: the student's own tokens
    2. score      p_T(. | x, c, y_<t) and p_S(. | x, y_<t)       the teacher may see the demonstration, the student never
    3. update     minimise the mean over tokens t of KL(p_T, p_S), over the whole vocabulary

The teacher is any frozen earlier state of the model. The paper gives no formula for the KL and no direction; both
directions and the Jensen-Shannon divergence between them are here. Nothing in this file knows how the student was damaged:
parametrized weights (quantized, masked) are computed once a step and used by the rollout and the update alike.
"""
import functools
import math
import os
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_, parametrize
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm


class Prompt(NamedTuple):
    """Token ids of one prompt, as the student sees it and as the teacher sees it (with the demonstration, or the same)."""

    student: list
    teacher: list


# The losses: student_logits and teacher_logits [N, V], mask [N] bool or float -> 0-d tensor, nats per unmasked token.
# Everything is computed in float32, and no gradient reaches the teacher.

def forward_kl(student_logits, teacher_logits, mask):
    """KL(teacher || student) = sum_v p_T (log p_T - log p_S): the student must cover all that the teacher finds likely."""
    log_s, log_t = _log_probs(student_logits), _log_probs(teacher_logits.detach())
    return _masked_mean((log_t.exp() * (log_t - log_s)).sum(-1), mask)


def reverse_kl(student_logits, teacher_logits, mask):
    """KL(student || teacher) = sum_v p_S (log p_S - log p_T): the student must avoid what the teacher finds unlikely."""
    log_s, log_t = _log_probs(student_logits), _log_probs(teacher_logits.detach())
    return _masked_mean((log_s.exp() * (log_s - log_t)).sum(-1), mask)


def jsd(student_logits, teacher_logits, mask, beta=0.5):
    """beta KL(p_T || m) + (1 - beta) KL(p_S || m) with m = beta p_T + (1 - beta) p_S, for 0 < beta < 1 (GKD, 2306.13649).

    beta -> 0 is the forward end (jsd / beta -> KL(p_T || p_S)), beta -> 1 the reverse end (jsd / (1 - beta) -> KL(p_S || p_T)).
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, not {beta}: forward_kl and reverse_kl are its ends")
    log_s, log_t = _log_probs(student_logits), _log_probs(teacher_logits.detach())
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta))
    divergence = beta * (log_t.exp() * (log_t - log_m)).sum(-1) + (1 - beta) * (log_s.exp() * (log_s - log_m)).sum(-1)
    return _masked_mean(divergence, mask)


LOSSES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def _log_probs(logits):
    return F.log_softmax(logits.float(), dim=-1)


def _masked_mean(per_token, mask):
    mask = mask.to(per_token.dtype)
    return (per_token * mask).sum() / mask.sum()


def completion_states(model, prompts, completions):
    """Final hidden states [N, D] at the positions that predict the completions' tokens, row after row, without padding.

    Only these go through the head. What all prompts begin with passes through the model once. Rows are padded on the right,
    where a causal model needs no mask.
    """
    device = model.embed_tokens.weight.device
    shared = len(os.path.commonprefix(prompts)[:-1])  # each row keeps a token of its prompt
    rows = [torch.tensor(p[shared:] + c[:-1]) for p, c in zip(prompts, completions)]  # the last token predicts nothing
    x = model.backbone(pad_sequence(rows, batch_first=True).to(device), prefix=prompts[0][:shared])
    return torch.cat([x[b, len(p) - 1:len(p) - 1 + len(c)] for b, (p, c) in enumerate(zip(prompts, completions))])


# The same losses with their gradients, worked out: log_s, log_t [n, V], overwritten -> loss [n], KL [n] and d loss / d logits
# [n, V]. Fewer blocks of the size of the vocabulary are alive than under autograd, and each is passed over less often.

def _forward_kl_gradient(log_s, log_t):
    """d/dlogits sum_v p_T (log p_T - log p_S) = p_S - p_T."""
    p_t = log_t.exp()
    kl = _dot(p_t, log_t.sub_(log_s))
    return kl, kl, log_s.exp_().sub_(p_t)


def _reverse_kl_gradient(log_s, log_t):
    """d/dlogits sum_v p_S (log p_S - log p_T) = p_S (log p_S - log p_T - KL)."""
    p_s, ratio = log_s.exp(), log_s.sub_(log_t)
    kl = _dot(p_s, ratio)
    return kl, kl, ratio.sub_(kl[:, None]).mul_(p_s)


def _jsd_gradient(log_s, log_t, beta=0.5):
    """d/dlogits jsd = (1 - beta) p_S (log p_S - log m - KL(p_S || m)); the derivatives of m cancel."""
    kl = _dot(log_s.exp(), log_s - log_t)  # what is logged beside the loss: KL(p_S || p_T)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta))
    p_s = log_s.exp()
    t_m, s_m = _dot(log_t.exp(), log_t.sub_(log_m)), _dot(p_s, log_s.sub_(log_m))
    return beta * t_m + (1 - beta) * s_m, kl, log_s.sub_(s_m[:, None]).mul_(p_s).mul_(1 - beta)


def _dot(a, b):
    """Row by row, [n, V] and [n, V] -> [n], with no block for the products."""
    return torch.einsum("nv,nv->n", a, b)


GRADIENTS = {forward_kl: _forward_kl_gradient, reverse_kl: _reverse_kl_gradient, jsd: _jsd_gradient}


def accumulate(student, states, teacher_logits, loss, share, chunk=128):
    """Backpropagate `loss` from the head down to `states` [N, D], a chunk of tokens at a time; returns {loss, kl}.

    teacher_logits(rows) gives the teacher's [n, V] for a slice of rows, and may be overwritten. Logits exist for one chunk
    only, at most a third of N, so that all of a chunk's blocks together stay under two [N, V]. `share` is what one token
    weighs in the batch's mean; the values returned are the same weighted sums.
    """
    leaf, total = states.detach().requires_grad_(), torch.zeros(2)
    chunk = min(chunk, math.ceil(len(leaf) / 3))
    for rows in (slice(start, start + chunk) for start in range(0, len(leaf), chunk)):
        total += share * _backward(student.head(leaf[rows]), teacher_logits(rows), loss, share)
    states.backward(leaf.grad)
    return dict(zip(("loss", "kl"), total.tolist()))


def _backward(s, t, loss, share):
    """Backpropagate share * loss from one chunk's logits s [n, V] of the student and t of the teacher; returns loss and KL."""
    v = min(s.size(-1), t.size(-1))  # a larger teacher's vocabulary may be padded further: compare the ids they share
    s, t = s[:, :v], t[:, :v]
    value, kl, gradient = GRADIENTS[loss](_log_probs_(s.detach()), _log_probs_(t))
    s.backward(gradient.mul_(share).to(s.dtype))
    return torch.stack((value.sum(), kl.sum())).cpu()


def _log_probs_(logits):
    """`_log_probs`, in the logits' own memory where they are float32."""
    logits = logits.float()
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def recover(student, teacher, batches, rollout, *, loss=forward_kl, micro_batch=8, **optimization):
    """SDFT: teach the student back from its teacher's view of its own rollouts; trains in place.

    batches is a list of lists of `Prompt`; rollout(student, prompts) -> completions, lists of ids, is how the student
    answers (`model.generate` with its settings bound). loss is one of LOSSES' functions. Rows of like length go
    through the models together, micro_batch at a time. For the other arguments and what is logged see `optimize`.
    """
    teacher.eval().requires_grad_(False)

    def gradients(batch):
        completions = rollout(student, [p.student for p in batch])
        tokens = sum(map(len, completions))
        total = {"loss": 0.0, "kl": 0.0, "tokens": tokens}
        pairs = sorted(zip(batch, completions), key=lambda pair: len(pair[0].student) + len(pair[1]))
        for start in range(0, len(pairs), micro_batch):
            prompts, answers = zip(*pairs[start:start + micro_batch])
            with torch.no_grad():
                scored = completion_states(teacher, [p.teacher for p in prompts], answers)
            states = completion_states(student, [p.student for p in prompts], answers)
            part = accumulate(student, states, functools.partial(_logits, teacher, scored), loss, 1 / tokens)
            total["loss"] += part["loss"]
            total["kl"] += part["kl"]
        return total

    return optimize(student, batches, gradients, **optimization)


@torch.no_grad()
def _logits(teacher, states, rows):
    return teacher.head(states[rows])


def sft(model, batches, *, micro_batch=8, **optimization):
    """Plain supervised fine-tuning, in place: cross-entropy on the responses. batches: lists of (prompt ids, response ids)."""

    def gradients(batch):
        tokens, total = sum(len(r) for _, r in batch), 0.0
        rows = sorted(batch, key=lambda row: len(row[0]) + len(row[1]))
        for start in range(0, len(rows), micro_batch):
            prompts, responses = zip(*rows[start:start + micro_batch])
            logits = model.head(completion_states(model, prompts, responses))
            targets = torch.tensor([t for r in responses for t in r], device=logits.device)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        return {"loss": total, "tokens": tokens}

    return optimize(model, batches, gradients, **optimization)


def optimize(model, batches, gradients, *, lr=1e-4, warmup=4, weight_decay=0.0, clip=1.0, log=None, progress=True):
    """AdamW with gradient clipping, one step a batch, in place; lr warms up linearly and decays to 0 over the second half.

    gradients(batch) accumulates .grad and returns what to log: at least loss and tokens. log(dict) gets that with step, lr,
    grad_norm and seconds. Parametrized weights are computed once a step, with their graph, and shared by everything in it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warmup + 1), 1, 2 * (1 - step / len(batches))))
    model.train()
    bar = tqdm(batches, desc="recover", unit="step", disable=not progress)
    for step, batch in enumerate(bar):
        began = time.perf_counter()
        with parametrize.cached():
            for module in filter(parametrize.is_parametrized, model.modules()):
                for name in module.parametrizations:
                    getattr(module, name)  # into the cache while gradients are on: before the rollout's no_grad
            measured = gradients(batch)
        norm = clip_grad_norm_(parameters, clip).item()
        line = {"step": step, **measured, "lr": schedule.get_last_lr()[0], "grad_norm": norm}
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        line["seconds"] = time.perf_counter() - began
        bar.set_postfix({k: f"{line[k]:.3f}" for k in ("loss", "kl") if k in line} | {
            "tok/s": f"{line['tokens'] / line['seconds']:.0f}"})
        if log:
            log(line)
    model.eval()
    return model
