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

    Only these go through the head. All rows pass through the model as one packed batch (see model.py), where the beginning that
    prompts have in common stands once. Rows of a group are padded on the right, where a causal model needs no mask.
    """
    device, ids, groups, wanted, offset = model.embed_tokens.weight.device, [], [], {}, 0
    for group in alike(prompts):
        shared = os.path.commonprefix([prompts[i] for i in group])[:-1]  # each row keeps a token of its prompt
        P = len(shared)
        rows = pad_sequence([torch.tensor(prompts[i][P:] + completions[i][:-1]) for i in group], batch_first=True)
        ids += [torch.tensor(shared, dtype=torch.long), rows.flatten()]
        for b, i in enumerate(group):
            last = offset + b * rows.size(1) + len(prompts[i]) - 1  # of the prompt: it predicts the completion's first token
            wanted[i] = torch.arange(last, last + len(completions[i]))
        groups.append((P, *rows.shape))
        offset += P + rows.numel()
    x = model.backbone(torch.cat(ids)[None].to(device), groups=groups)[0]
    return x[torch.cat([wanted[i] for i in range(len(prompts))]).to(device)]


def alike(prompts, beginning=8):
    """Indices of the prompts in groups: those that begin with the same 8 tokens as another together, and all the others."""
    beginnings, groups = [tuple(p[:beginning]) for p in prompts], {}
    for i, start in enumerate(beginnings):
        groups.setdefault(start if beginnings.count(start) > 1 else (), []).append(i)
    return list(groups.values())


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
    answers (`model.generate` with its settings bound). loss is one of LOSSES' functions. Rows go through the models
    micro_batch at a time. For the other arguments and what is logged see `optimize`.
    """
    teacher.eval().requires_grad_(False)

    def gradients(batch):
        """One step's gradients into .grad; what to log."""
        completions = rollout(student, [p.student for p in batch])
        tokens = sum(map(len, completions))
        total = {"loss": 0.0, "kl": 0.0, "tokens": tokens}
        for prompts, answers in micro_batches(batch, completions, micro_batch):
            with torch.no_grad():
                scored = completion_states(teacher, [p.teacher for p in prompts], answers)
            states = completion_states(student, [p.student for p in prompts], answers)
            part = accumulate(student, states, functools.partial(_logits, teacher, scored), loss, 1 / tokens)
            total["loss"] += part["loss"]
            total["kl"] += part["kl"]
        return total

    return optimize(student, batches, gradients, **optimization)


def micro_batches(batch, completions, size):
    """[(prompts, completions)] of at most `size` rows, those that begin alike or are of like length next to each other."""
    order = [i for group in alike([p.student for p in batch])
             for i in sorted(group, key=lambda i: len(batch[i].student) + len(completions[i]))]
    return [([batch[i] for i in part], [completions[i] for i in part])
            for part in (order[start:start + size] for start in range(0, len(order), size))]


@torch.no_grad()
def _logits(teacher, states, rows):
    return teacher.head(states[rows])


def sft(model, batches, *, micro_batch=8, **optimization):
    """Plain supervised fine-tuning, in place: cross-entropy on the responses. batches: lists of (prompt ids, response ids)."""

    def gradients(batch):
        """One step's gradients into .grad; what to log."""
        tokens, total = sum(len(r) for _, r in batch), 0.0
        for prompts, responses in micro_batches([Prompt(p, p) for p, _ in batch], [r for _, r in batch], micro_batch):
            logits = model.head(completion_states(model, [p.student for p in prompts], responses))
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
