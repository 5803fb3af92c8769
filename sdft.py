"""Self-distillation fine-tuning as recovery (§3): the damaged student answers, its healthy teacher scores, token by token.

One step, for a batch of prompts x with expert demonstrations c:

    1. rollout    y ~ student(. | x)                             on-policy: the student's own tokens
    2. score      p_T(. | x, c, y_<t) and p_S(. | x, y_<t)       the teacher may see the demonstration, the student never
    3. update     minimise the mean over tokens t of KL(p_T, p_S), over the whole vocabulary

The teacher is any frozen earlier state of the model. The paper gives no formula for the KL and no direction; both
directions and the Jensen-Shannon divergence between them are here. Nothing in this file knows how the student was damaged:
parametrized weights (quantized, masked) are computed once a step and used by the rollout and the update alike.
"""
import contextlib
import math
import os
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_, parametrize
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import parallel
from cka import linear_cka
from model import exact_weight, linear


class Prompt(NamedTuple):
    """Token ids of one prompt, as the student sees it and as the teacher sees it (with the demonstration, or the same); and the
    expert's answer, which the baselines learn from."""

    student: list
    teacher: list
    answer: list = ()


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


def completion_states(model, prompts, completions, hidden=False):
    """Final hidden states [N, D] at the positions that predict the completions' tokens, row after row, without padding.

    With hidden=True -> (those, every block's output there [n_layer, N, D]).
    Only these go through the head. All rows pass through the model as one packed batch (see model.py), where the beginning that
    prompts have in common stands once. Rows of a group are padded on the right, where a causal model needs no mask.
    """
    device, ids, groups, wanted, offset = model.device, [], [], {}, 0
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
    x = model.backbone(torch.cat(ids)[None].to(device), groups=groups, hidden=hidden)
    rows = torch.cat([wanted[i] for i in range(len(prompts))]).to(device)
    return (x[0][0, rows], torch.stack([h[0, rows] for h in x[1]])) if hidden else x[0, rows]


def alike(prompts, beginning=8):
    """Indices of the prompts in groups: those that begin with the same 8 tokens as another together, and all the others."""
    beginnings, groups = [tuple(p[:beginning]) for p in prompts], {}
    for i, start in enumerate(beginnings):
        groups.setdefault(start if beginnings.count(start) > 1 else (), []).append(i)
    return list(groups.values())


# The same losses with their gradients, worked out: log_s, log_t [n, V], overwritten, and a third block of that size to work in
# -> loss [n], KL [n] and d loss / d logits [n, V]. Each block is passed over less often than under autograd.

def _forward_kl_gradient(log_s, log_t, work):
    """d/dlogits sum_v p_T (log p_T - log p_S) = p_S - p_T."""
    p_t = torch.exp(log_t, out=work)
    kl = _dot(p_t, log_t.sub_(log_s))
    return kl, kl, log_s.exp_().sub_(p_t)


def _reverse_kl_gradient(log_s, log_t, work):
    """d/dlogits sum_v p_S (log p_S - log p_T) = p_S (log p_S - log p_T - KL)."""
    p_s, ratio = torch.exp(log_s, out=work), log_s.sub_(log_t)
    kl = _dot(p_s, ratio)
    return kl, kl, ratio.sub_(kl[:, None]).mul_(p_s)


def _jsd_gradient(log_s, log_t, work, beta=0.5):
    """d/dlogits jsd = (1 - beta) p_S (log p_S - log m - KL(p_S || m)); the derivatives of m cancel."""
    kl = _dot(log_s.exp(), log_s - log_t)  # what is logged beside the loss: KL(p_S || p_T)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta), out=work)
    p_s = log_s.exp()
    t_m, s_m = _dot(log_t.exp(), log_t.sub_(log_m)), _dot(p_s, log_s.sub_(log_m))
    return beta * t_m + (1 - beta) * s_m, kl, log_s.sub_(s_m[:, None]).mul_(p_s).mul_(1 - beta)


def _dot(a, b):
    """Row by row, [n, V] and [n, V] -> [n], with no block for the products."""
    return torch.einsum("nv,nv->n", a, b)


GRADIENTS = {forward_kl: _forward_kl_gradient, reverse_kl: _reverse_kl_gradient, jsd: _jsd_gradient}


def accumulate(student, states, teacher_logits, loss, share, chunk=128, also=None):
    """Backpropagate `loss` through the head W and on from `states` X [N, D], a chunk of tokens at a time; returns [loss, kl].

    With G = d loss / d logits, d loss / dX = G W and d loss / dW = G^T X. teacher_logits(rows) gives the teacher's [n, V] for a
    slice of rows. Logits exist for one chunk only, at most a third of N, in three float32 blocks that all chunks share.
    `share` is what one token weighs in the batch's mean; the values returned are the same weighted sums. also(loss), if given,
    returns a further term, 0-d, and what it is worth, which goes back in the same pass.
    """
    x, w, total = states.detach(), student.head_weight, torch.zeros(2, device=states.device)
    wanted = [states, w] if w.requires_grad else [states]
    grad_x, grad_w = torch.empty_like(x), torch.zeros_like(w) if w.requires_grad else None
    chunk = min(chunk, math.ceil(len(x) / 3))
    with torch.no_grad():
        blocks = x.new_empty(3, chunk, len(w), dtype=torch.float32)
        for rows in (slice(start, start + chunk) for start in range(0, len(x), chunk)):
            logits = teacher_logits(rows)
            v = min(logits.size(-1), len(w))  # a larger teacher's vocabulary may be padded further: compare the ids they share
            log_s, log_t, work = blocks[:, :len(logits), :v]
            torch.log_softmax(work.copy_(logits[:, :v]), -1, out=log_t)
            logits = linear(x[rows], w)
            torch.log_softmax(work.copy_(logits[:, :v]), -1, out=log_s)
            del logits
            value, kl, g = GRADIENTS[loss](log_s, log_t, work)
            total += share * torch.stack((value.sum(), kl.sum()))
            g = g.mul_(share).to(x.dtype)
            grad_x[rows] = g @ w[:v]
            if w.requires_grad:
                grad_w[:v].addmm_(g.mT, x[rows])
    total, gradients = total.cpu(), [grad_x, grad_w][:len(wanted)]
    if also:
        term, worth = also(total[0])
        wanted, gradients = [*wanted, term], [*gradients, torch.full_like(term, float(worth))]
    torch.autograd.backward(wanted, gradients)
    return total


def recover(student, teacher, batches, rollout, *, loss=forward_kl, ema=0.0, cka_weight=0.0, cka_balance=False, micro_batch=8,
            after_step=None, **optimization):
    """SDFT: teach the student back from its teacher's view of its own rollouts; trains in place.

    batches is a list of lists of `Prompt`; rollout(student, prompts) -> completions, lists of ids, is how the student
    answers (`model.generate` with its settings bound); None takes the experts' answers instead: off-policy distillation, a
    baseline. loss is one of LOSSES' functions. With ema > 0 the teacher, in place, follows the student after each step. With
    cka_weight > 0 the loss is KL + cka_weight (1 - CKA) (§6), with cka_balance KL + cka_weight sg(KL / (1 - CKA)) (1 - CKA)
    (CKA-QAD, 2606.05682), where CKA is linear, over the answers' tokens, and averaged over layers. Rows go through the models
    micro_batch at a time. For the other arguments and what is logged see `optimize`. On several processes each must get the
    same completions for the whole batch, and goes on with its share of the rows.
    """
    teacher.eval().requires_grad_(False)

    def gradients(batch):
        """One step's gradients into .grad; what to log."""
        completions = rollout(student, [p.student for p in batch]) if rollout else [p.answer for p in batch]
        tokens = sum(map(len, completions))
        total, likeness, layers = torch.zeros(2), 0.0, cka_weight > 0
        for prompts, answers in micro_batches(parallel.share(batch), parallel.share(completions), micro_batch):
            with torch.no_grad():
                scored = completion_states(teacher, [p.teacher for p in prompts], answers, hidden=layers)
            states, also = completion_states(student, [p.student for p in prompts], answers, hidden=layers), None
            if layers:
                (scored, theirs), (states, ours) = scored, states
            if layers and len(states) > 2:  # of fewer tokens CKA says nothing
                distance, share = 1 - linear_cka(ours, theirs).mean(), len(states) / tokens
                likeness += share * (1 - distance.item())

                def also(kl, distance=distance, share=share):
                    return distance, cka_weight * (kl / (distance.item() + 1e-6) if cka_balance else share)
            total += accumulate(student, states, lambda rows, scored=scored: teacher.head(scored[rows]), loss, 1 / tokens,
                                also=also)
        value, kl = sum(parallel.gather([total])).tolist()
        return {"loss": value, "kl": kl, "tokens": tokens} | ({"cka": sum(parallel.gather([likeness]))} if layers else {})

    after = [step for step in (follow(teacher, student, ema) if ema else None, after_step) if step]
    return optimize(student, batches, gradients, after_step=lambda: any([step() for step in after]), **optimization)


def follow(teacher, student, rate):
    """A function that moves the teacher, in place, towards the student: phi <- rate theta + (1 - rate) phi (Shenfeld et al.).

    phi is kept in float32: in bfloat16 a step of 1 % would round to none. ValueError if the two are not of one shape."""
    phi = {name: p.detach().float() for name, p in teacher.named_parameters()}
    if teacher.config != student.config:
        raise ValueError("a teacher can only follow a student of its own shape")

    @torch.no_grad()
    def step():
        plain = parallel.whole(student)
        for name, p in teacher.named_parameters():
            p.copy_(phi[name].lerp_(exact_weight(plain, name).to(p.device).float(), rate))
    return step


def micro_batches(batch, completions, size):
    """[(prompts, completions)] of at most `size` rows, those that begin alike or are of like length next to each other."""
    order = [i for group in alike([p.student for p in batch])
             for i in sorted(group, key=lambda i: len(batch[i].student) + len(completions[i]))]
    return [([batch[i] for i in part], [completions[i] for i in part])
            for part in (order[start:start + size] for start in range(0, len(order), size))]


def sft(model, batches, *, micro_batch=8, **optimization):
    """Plain supervised fine-tuning, in place: cross-entropy on the experts' answers to the bare prompts. batches as `recover`."""

    def gradients(batch):
        """One step's gradients into .grad; what to log."""
        tokens, total, mine = sum(len(p.answer) for p in batch), 0.0, parallel.share(batch)
        for prompts, answers in micro_batches(mine, [p.answer for p in mine], micro_batch):
            logits = model.head(completion_states(model, [p.student for p in prompts], answers))
            targets = torch.tensor([t for answer in answers for t in answer], device=logits.device)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        return {"loss": sum(parallel.gather([total])), "tokens": tokens}

    return optimize(model, batches, gradients, **optimization)


def optimize(model, batches, gradients, *, lr=1e-4, warmup=4, weight_decay=0.0, clip=1.0, moments=torch.float32, log=None,
             after_step=None, progress="recover"):
    """AdamW with gradient clipping, one step a batch, in place; lr warms up linearly and decays to 0 over the second half.

    gradients(batch) accumulates .grad and returns what to log: at least loss and tokens. log(dict) gets that with step, lr,
    grad_norm and seconds; after_step() is called last, and ends the training if it is true; progress names the progress bar, ""
    for none. moments is the type that AdamW's two averages are kept in. Parametrized weights are computed once a step, with
    their graph, and shared by everything in it; a sharded model's are put together for each pass instead.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if moments == torch.float32:
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True)
    else:
        optimizer = CompactAdamW(parameters, dict(lr=lr, betas=BETAS, weight_decay=weight_decay, eps=1e-8, dtype=moments))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warmup + 1), 1, 2 * (1 - step / len(batches))))
    model.train()
    bar = tqdm(batches, desc=progress, unit="step", disable=not progress)
    for step, batch in enumerate(bar):
        began = time.perf_counter()
        with contextlib.nullcontext() if parallel.sharded(model) else once_(model):
            measured = gradients(batch)
        parallel.sum_gradients_(parameters)
        norm = parallel.full(clip_grad_norm_(parameters, clip)).item()
        line = {"step": step, **measured, "lr": schedule.get_last_lr()[0], "grad_norm": norm}
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ended = after_step and after_step()
        line["seconds"] = time.perf_counter() - began
        bar.set_postfix({k: f"{line[k]:.3f}" for k in ("loss", "kl") if k in line} | {
            "tok/s": f"{line['tokens'] / line['seconds']:.0f}"})
        if log:
            log(line)
        if ended:
            break
    model.eval()
    return model


@contextlib.contextmanager
def once_(model):
    """Within the body every parametrized weight is computed once, and its gradient goes back through that one computation."""
    with parametrize.cached():
        for module in filter(parametrize.is_parametrized, model.modules()):
            for name in module.parametrizations:
                getattr(module, name)  # into the cache while gradients are on: before the rollout's no_grad
        yield


BETAS = 0.9, 0.95


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (1711.05101) whose two moments rest in bfloat16, half the memory; one parameter at a time is updated in float32.

    With beta_2 = 0.95 a second moment moves by 5 % a step, which bfloat16 resolves (0.4 %); the usual 0.999 would stand still.
    """

    @torch.no_grad()
    def step(self):
        """Update every parameter that has a gradient, in place."""
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in filter(lambda p: p.grad is not None, group["params"]):
                state, g = self.state[p], p.grad.float()
                t = state["step"] = state.get("step", 0) + 1
                m, v = (state[k].float() if k in state else torch.zeros_like(g) for k in ("m", "v"))
                m.lerp_(g, 1 - b1)                       # m <- b1 m + (1 - b1) g
                v.mul_(b2).addcmul_(g, g, value=1 - b2)  # v <- b2 v + (1 - b2) g^2
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(m / (1 - b1 ** t), (v / (1 - b2 ** t)).sqrt_().add_(group["eps"]), value=-lr)
                state["m"], state["v"] = m.to(group["dtype"]), v.to(group["dtype"])
