"""Self-distillation fine-tuning as recovery (§3): the student answers, its healthy teacher scores.

One step, for a batch of prompts x with expert demonstrations c:

    1. rollout   y ~ student(. | x), at a temperature       on-policy: the student's own tokens;
                                                            2 and 3 are at temperature 1
    2. score     p_T(. | x, c, y_<t) and p_S(. | x, y_<t)   the teacher may see the demonstration
    3. update    minimise the mean over tokens t of KL(p_T, p_S), over the whole vocabulary

The teacher is any frozen earlier state of the model. The paper gives neither a formula for the KL
nor its direction, so both directions are here, and the Jensen-Shannon divergence between them.
`recover` is the loop. Without a rollout it is off-policy distillation, a baseline: the teacher
scores the experts' answers. `sft` is the other baseline, without a teacher.

Nothing in this file knows how the student was damaged. Parametrized weights (quantized, masked) are
computed once a step, and the rollout and the update use the same ones.
"""
import contextlib
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_, parametrize
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm


class Prompt(NamedTuple):
    """One prompt as token ids: the student's view, the teacher's view, and the expert's answer."""

    student: list
    teacher: list             # with the demonstration, or the same as the student's
    answer: list | tuple = ()  # what the baselines learn from


class Diverged(Exception):
    """A step whose loss or gradient is not finite; it is raised before the step is taken."""


# -------------------------------------------------------------------------------------- the losses
# student_logits and teacher_logits [N, V], mask [N] bool or float -> 0-d tensor, nats per unmasked
# token. Everything is computed in float32, and no gradient reaches the teacher. The doctests have
# one token and two words: p_T = (1/2, 1/2), p_S = (1/4, 3/4).

def forward_kl(student_logits, teacher_logits, mask):
    """KL(teacher || student) = sum_v p_T (log p_T - log p_S).

    The student must cover all that the teacher finds likely.

    >>> s, t = torch.tensor([[1., 3.]]).log(), torch.tensor([[1., 1.]]).log()
    >>> kl = forward_kl(s, t, torch.ones(1))             # 1/2 ln(2/1) + 1/2 ln(2/3)
    >>> abs(kl.item() - math.log(4 / 3) / 2) < 1e-6
    True
    """
    log_s, log_t = _log_probs(student_logits), _log_probs(teacher_logits.detach())
    return _masked_mean((log_t.exp() * (log_t - log_s)).sum(-1), mask)


def reverse_kl(student_logits, teacher_logits, mask):
    """KL(student || teacher) = sum_v p_S (log p_S - log p_T).

    The student must avoid what the teacher finds unlikely.

    >>> s, t = torch.tensor([[1., 3.]]).log(), torch.tensor([[1., 1.]]).log()
    >>> kl = reverse_kl(s, t, torch.ones(1))             # 1/4 ln(1/2) + 3/4 ln(3/2)
    >>> abs(kl.item() - (0.75 * math.log(3) - math.log(2))) < 1e-6
    True
    """
    log_s, log_t = _log_probs(student_logits), _log_probs(teacher_logits.detach())
    return _masked_mean((log_s.exp() * (log_s - log_t)).sum(-1), mask)


def jsd(student_logits, teacher_logits, mask, beta=0.5):
    """beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S (GKD, 2306.13649).

    beta -> 0 is the forward end (jsd / beta -> KL(p_T || p_S)), beta -> 1 the reverse end
    (jsd / (1 - beta) -> KL(p_S || p_T)). ValueError unless 0 < beta < 1.

    >>> s, t = torch.tensor([[1., 3.]]).log(), torch.tensor([[1., 1.]]).log()
    >>> round(jsd(s, t, torch.ones(1)).item(), 4)        # m = (3/8, 5/8): 0.0323 / 2 + 0.0354 / 2
    0.0338
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie between 0 and 1, not {beta}: the KLs are its ends")
    log_s, log_t = _log_probs(student_logits), _log_probs(teacher_logits.detach())
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta))
    t_m = (log_t.exp() * (log_t - log_m)).sum(-1)
    s_m = (log_s.exp() * (log_s - log_m)).sum(-1)
    return _masked_mean(beta * t_m + (1 - beta) * s_m, mask)


LOSSES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def _log_probs(logits):
    return F.log_softmax(logits.float(), dim=-1)


def known_to_both(student_logits, teacher_logits):
    """Both [N, V] at the ids that both models know, since one vocabulary may be padded."""
    v = min(student_logits.size(-1), teacher_logits.size(-1))
    return student_logits[:, :v], teacher_logits[:, :v]


def _masked_mean(per_token, mask):
    mask = mask.to(per_token.dtype)
    return (per_token * mask).sum() / mask.sum()


# ----------------------------------------------------------------------------------- the SDFT loop

def score(model, prompts, completions, hidden=False):
    """Hidden states [1, N, D] that predict the completions' N tokens, row after row, unpadded.

    Every completion has at least one token. The states come after the last norm, ready for
    model.head; with hidden=True every block's output comes too, [n_layer, N, D], these last. Rows
    are padded on the right, where a causal model needs no mask.
    """
    rows = [torch.tensor(p + c[:-1]) for p, c in zip(prompts, completions)]
    ids = pad_sequence(rows, batch_first=True).to(model.device)
    layers = model.backbone(ids, hidden=True)[1] if hidden else [model.backbone(ids)]
    spans = [(b, slice(len(p) - 1, len(row))) for b, (p, row) in enumerate(zip(prompts, rows))]
    return torch.stack([torch.cat([h[span] for span in spans]) for h in layers])


def backward(loss, student, s, teacher, t, tokens, chunk=64):
    """[loss, KL] of the student's states s against the teacher's t [N, D]; adds the gradient.

    Loss and KL are sums over the N tokens, divided by `tokens`, the number in the whole batch. The
    KL is forward_kl where that is the loss, else reverse_kl. A chunk of tokens at a time, at most a
    sixth of them, passes through the head and back, so that [N, V] logits never exist at once.
    """
    leaf, values = s.detach().requires_grad_(), torch.zeros(2, device=s.device)
    for rows in torch.arange(len(s), device=s.device).split(min(chunk, math.ceil(len(s) / 6))):
        student_logits = student.head(leaf[rows])
        with torch.no_grad():
            teacher_logits = teacher.head(t[rows])
        both, every = known_to_both(student_logits, teacher_logits), torch.ones_like(rows)
        value = loss(*both, every) * len(rows) / tokens
        value.backward()  # into leaf.grad, and into the head where it is trained
        with torch.no_grad():
            kl = value
            if loss not in (forward_kl, reverse_kl):
                kl = reverse_kl(*both, every) * len(rows) / tokens
            values += torch.stack((value, kl))
    s.backward(leaf.grad)
    return values


def recover(student, teacher, batches, rollout, *, loss=forward_kl, micro_batch=16, stop=None,
            share=list, score=score, backward=backward, **optimization):
    """SDFT: teach the student back from its teacher's view of its own rollouts, in place.

    batches: lists of `Prompt`. rollout(student, prompts) -> completions, lists of ids; None takes
    the experts' answers. loss(student_logits, teacher_logits, mask) is any mean over tokens, like
    LOSSES. stop() is asked after each step, and True ends the training. share(rows) is this
    process's part of the batch. `steps` explains the other arguments.
    """
    teacher.eval().requires_grad_(False)  # the paper's teacher is static
    for batch, update in steps(student, batches, **optimization):
        answers = [p.answer for p in batch]
        if rollout:
            answers = rollout(student, [p.student for p in batch])      # 1. rollout: on-policy
        tokens = sum(map(len, answers))
        line = {"loss": 0.0, "kl": 0.0, "tokens": tokens}
        for prompts, ys in micro_batches(share(batch), share(answers), micro_batch):
            with torch.no_grad():                                       # 2. score
                t = score(teacher, [p.teacher for p in prompts], ys)[-1]
            s = score(student, [p.student for p in prompts], ys)[-1]
            value, kl = backward(loss, student, s, teacher, t, tokens).tolist()
            line["loss"] += value
            line["kl"] += kl
        update(line)                                                    # 3. update
        if stop and stop():
            break
    return student


def sft(model, batches, *, micro_batch=16, stop=None, share=list, score=score, **optimization):
    """Plain supervised fine-tuning, in place: cross-entropy on the experts' answers.

    The model sees the bare prompts. The arguments are those of `recover`.
    """
    for batch, update in steps(model, batches, **optimization):
        answers = [p.answer for p in batch]
        tokens = sum(map(len, answers))
        line = {"loss": 0.0, "tokens": tokens}
        for prompts, ys in micro_batches(share(batch), share(answers), micro_batch):
            logits = model.head(score(model, [p.student for p in prompts], ys)[-1])
            targets = torch.tensor([token for y in ys for token in y], device=logits.device)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") / tokens
            loss.backward()
            line["loss"] += loss.item()
            del logits, loss  # no graph outlives its micro-batch
        update(line)
        if stop and stop():
            break
    return model


def micro_batches(batch, completions, size):
    """[(prompts, completions)] with at most `size` rows each.

    Prompts with a common beginning stand together, each group by length.
    """
    order = []
    for group in alike([p.student for p in batch]):
        order += sorted(group, key=lambda i: len(batch[i].student) + len(completions[i]))
    parts = [order[start:start + size] for start in range(0, len(order), size)]
    return [([batch[i] for i in part], [completions[i] for i in part]) for part in parts]


def alike(prompts, beginning=8):
    """Indices of the prompts in groups: one for each beginning of 8 tokens that several share, one
    for all the others.

    >>> alike([[1, 2, 3], [7], [1, 2, 9], [8]], beginning=2)
    [[0, 2], [1, 3]]
    """
    beginnings, groups = [tuple(p[:beginning]) for p in prompts], {}
    for i, start in enumerate(beginnings):
        groups.setdefault(start if beginnings.count(start) > 1 else (), []).append(i)
    return list(groups.values())


# ---------------------------------------------------------------------------------- the optimizer

BETAS = 0.9, 0.95  # not the usual 0.999, which averages over 1,000 steps: here are 25


def AdamW(groups, **settings):
    """torch's own (1711.05101), in one kernel."""
    return torch.optim.AdamW(groups, fused=True, **settings)


def steps(model, batches, *, lr=1e-4, weights_rms=0.0, warmup=2, weight_decay=0.0, clip=1.0,
          optimizer=AdamW, log=None, progress="recover", cached=True, reduce=None, memory=None):
    """(batch, update) for each batch: the caller adds up .grad, then calls update(line), once.

    lr, shared out by `rates`, warms up linearly, and decays to 0 over the second half. cached:
    within a step parametrized weights are computed once, with their graph. reduce(parameters, line)
    sums over processes. log(line) gets each step's numbers; progress names the bar, "" for none.
    memory {"step": 0} is what a training knows beside its weights. One that went on to a later step
    and has the "optimizer" state of that step makes this training go on from there.
    """
    memory = {"step": 0} if memory is None else memory
    parameters = [p for p in model.parameters() if p.requires_grad]
    peaks = rates(parameters, lr, weights_rms)
    adam = optimizer([{"params": [p], "lr": peak, "peak": peak}
                      for p, peak in zip(parameters, peaks)],
                     betas=BETAS, weight_decay=weight_decay)
    if "optimizer" in memory:
        adam.load_state_dict(memory.pop("optimizer"))
    memory["state_dict"] = adam.state_dict  # for who saves a training in its middle

    def update(line):
        """Clip the gradient and take a step in place; Diverged if it is not finite."""
        cache.close()  # the weights that were computed for this step are done with
        if reduce:
            reduce(parameters, line)
        norm = full(clip_grad_norm_(parameters, clip)).item()
        part = part_of_peak(memory["step"], warmup, len(batches))
        line = {"step": memory["step"], **line, "lr": lr * part}
        if not math.isfinite(line["loss"] + norm):
            raise Diverged(f"step {line['step']}: the loss or its gradient is not finite "
                           f"(learning rate {line['lr']:.3g})")
        for group in adam.param_groups:
            group["lr"] = group["peak"] * part
        adam.step()
        adam.zero_grad()
        memory["step"] += 1
        line |= {"grad_norm": norm, "seconds": time.perf_counter() - began}
        bar.set_postfix({name: f"{line[name]:.3f}" for name in ("loss", "kl") if name in line}
                        | {"tok/s": f"{line['tokens'] / line['seconds']:.0f}"})
        if log:
            log(line)

    model.train()
    done, n = memory["step"], len(batches)
    bar = tqdm(batches[done:], progress, n, unit="step", initial=done, disable=not progress)
    try:
        for batch in bar:
            began = time.perf_counter()
            with contextlib.ExitStack() as cache:
                if cached:
                    cache.enter_context(once_(model))
                yield batch, update
    finally:
        model.eval()


def part_of_peak(step, warmup, n):
    """The learning rate at one step out of n, as a part of its peak.

    >>> [round(part_of_peak(step, warmup=1, n=6), 2) for step in range(6)]
    [0.5, 1.0, 1, 1, 0.67, 0.33]
    """
    return min((step + 1) / (warmup + 1), 1, 2 * (1 - step / n))


def rates(parameters, lr, weights_rms):
    """Each parameter's peak learning rate, a list.

    A matrix takes lr times its root mean square / weights_rms, and at least a tenth of lr. AdamW
    moves a weight by about the learning rate a step, whatever the weight's size, so small weights
    would be moved the most (the idea of Adafactor, 1804.04235 §8). Vectors take lr; with
    weights_rms 0 all do.
    """
    peaks = []
    for p in parameters:
        size = 1.0
        if weights_rms and p.dim() == 2:
            norm = full(torch.linalg.vector_norm(p.detach(), dtype=torch.float64)).item()
            size = max(norm / math.sqrt(p.numel()) / weights_rms, 0.1)
        peaks.append(lr * size)
    return peaks


def full(norm):
    """A norm as a plain tensor, also where the model is sharded (FSDP2)."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@contextlib.contextmanager
def once_(model):
    """Within the body every parametrized weight is computed once.

    Its gradient goes back through that one computation.
    """
    with parametrize.cached():
        for module in filter(parametrize.is_parametrized, model.modules()):
            for name in module.parametrizations:
                getattr(module, name)  # while gradients are on: before the rollout's no_grad
        yield
