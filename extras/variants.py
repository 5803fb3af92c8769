"""Further ways of recovery: what §6 proposes, what the neighbours of SDFT do, two more baselines.

    --recover ema     the teacher follows the student: phi <- r theta + (1 - r) phi (2601.19897)
    --recover skip    the loss leaves out the first tokens of each answer (2601.19897: three)
    --recover cka     the loss is KL + w (1 - CKA), CKA linear, averaged over layers (§6); with
                      --cka-balance w is KL / (1 - CKA), held constant (CKA-QAD, 2606.05682)
    --recover stop    SDFT ends once CKA with the teacher has fallen between two checks (§6)
    --recover anchor  fine-tuning on the expert's answers, with w KL(teacher || student) on them,
                      where both see the bare prompt
    --recover own     fine-tuning on the teacher's own greedy answers

Each is a function as in train.WAYS. Most wrap an argument of `sdft.recover` and leave its loop as
it is.
"""
import torch
import torch.nn.functional as F

import cka
import sdft
import train
from model import frozen_copy

OPTIONS = {
    "ema": (0.01, "ema: part of the way to the student that the teacher goes each step"),
    "skip_tokens": (3, "skip: first tokens of each answer that the loss leaves out"),
    "cka_weight": (1.0, "cka: weight of 1 - CKA in the loss"),
    "cka_balance": (False, "cka: that weight times KL / (1 - CKA)"),
    "anchor_weight": (1.0, "anchor: weight of the KL in the loss")}


def attach(parts):
    """Add the ways to --recover."""
    train.WAYS |= {"ema": ema, "skip": skip, "cka": with_cka, "stop": stop_by_cka,
                   "anchor": anchor, "own": own}
    train.FROM_ANSWERS |= {"anchor", "own"}


def ema(student, teacher, batches, rollout, *, stop, memory, **how):
    """SDFT by a teacher that follows the student's weights as they act, on their grid.

    The averages are kept in float32, since a step of 1 % would round to none in bfloat16.
    ValueError unless the two have one shape.
    """
    rate, teacher = train.PARTS["config"].ema, frozen_copy(teacher, teacher.norm.weight.dtype)
    if teacher.config != student.config:
        raise ValueError("--recover ema: a teacher can only follow a student of its own shape")
    phi = memory.setdefault("phi", {n: p.float() for n, p in teacher.named_parameters()})

    @torch.no_grad()
    def follow_and_stop():
        """phi <- rate theta + (1 - rate) phi, and the teacher is phi."""
        for name, theta in student.named_weights():
            phi[name] = phi[name].to(theta.device).lerp(theta.float(), rate)
            teacher.get_parameter(name).copy_(phi[name])
        return stop and stop()

    with torch.no_grad():  # what a training that goes on has left
        for name, p in teacher.named_parameters():
            p.copy_(phi[name])
    return sdft.recover(student, teacher, batches, rollout, stop=follow_and_stop, memory=memory,
                        **how)


def counted(answers, skip):
    """[N] bool: all of the answers' tokens but the first `skip` of each, and always its last.

    >>> counted([[5, 6, 7], [8]], skip=2).tolist()
    [False, False, True, True]
    """
    return torch.tensor([i >= min(skip, len(y) - 1) for y in answers for i in range(len(y))])


def skip(student, teacher, batches, rollout, *, score, backward, **how):
    """SDFT on all tokens of an answer but the first --skip-tokens."""
    n, tokens = train.PARTS["config"].skip_tokens, 0

    def rollout_counted(student, prompts):
        nonlocal tokens
        answers = rollout(student, prompts)
        tokens = int(counted(answers, n).sum())
        return answers

    return sdft.recover(
        student, teacher, batches, rollout_counted,
        score=lambda model, prompts, ys: score(model, prompts, ys)[:, counted(ys, n)],
        backward=lambda loss, student, s, teacher, t, _: backward(
            loss, student, s, teacher, t, tokens), **how)


def with_cka(student, teacher, batches, rollout, *, score, backward, **how):
    """SDFT with --cka-weight times 1 - CKA of all blocks' outputs in the loss.

    CKA is linear and biased, over the answers' tokens of a micro-batch, which counts by its tokens;
    another size of micro-batch is another loss. What is logged is the loss without it.
    """
    c, states = train.PARTS["config"], {}

    def score_all_layers(model, prompts, ys):
        states[model is student] = score(model, prompts, ys, True)  # [n_layer, N, D]
        return states[model is student]

    def backward_with_cka(loss, student, s, teacher, t, tokens):
        ours, theirs = states[True], states[False]
        leaf = ours.detach().requires_grad_()
        values = backward(loss, student, leaf[-1], teacher, t, tokens)
        if leaf.size(1) > 2:  # of one or two tokens CKA says nothing
            likeness = cka.linear_cka(leaf, theirs).mean()
            scale = leaf.size(1) / tokens
            if c.cka_balance:
                scale = values[0] / (1 - likeness.detach() + 1e-6)
            (c.cka_weight * scale * (1 - likeness)).backward()
        ours.backward(leaf.grad)
        states.clear()
        return values

    return sdft.recover(student, teacher, batches, rollout, score=score_all_layers,
                        backward=backward_with_cka, **how)


def stop_by_cka(student, teacher, batches, rollout, *, stop, every=7, **how):
    """SDFT that ends once CKA with the teacher (last layer, debiased) has fallen between checks.

    CKA is over the last tokens of the first batches' bare prompts with the experts' answers.
    """
    sequences = [p.student + p.answer for batch in batches[:4] for p in batch]
    dtype = teacher.norm.weight.dtype
    theirs, steps, last = cka.hidden_states(teacher, sequences, last=True), 0, -1.0

    def stop_or_fallen():
        nonlocal steps, last
        steps, before = steps + 1, last
        if steps % every == 0:
            ours = cka.hidden_states(train.PARTS["copy"](student, dtype), sequences, last=True)
            last = cka.sample_level(ours, theirs)["linear_debiased"][-1]
        return (stop and stop()) or last < before

    return sdft.recover(student, teacher, batches, rollout, stop=stop_or_fallen, **how)


def anchor(student, teacher, batches, rollout, *, loss, backward, score, share, micro_batch, stop,
           **optimization):
    """Plain fine-tuning with --anchor-weight times KL(teacher || student), both bare."""
    weight = train.PARTS["config"].anchor_weight
    for batch, update in sdft.steps(student, batches, **optimization):
        answers = [p.answer for p in batch]
        tokens = sum(map(len, answers))
        line = {"loss": 0.0, "tokens": tokens}
        for prompts, ys in sdft.micro_batches(share(batch), share(answers), micro_batch):
            bare = [p.student for p in prompts]
            logits = student.head(score(student, bare, ys)[-1])
            with torch.no_grad():
                held = teacher.head(score(teacher, bare, ys)[-1])
            targets = torch.tensor([i for y in ys for i in y], device=logits.device)
            kl = sdft.forward_kl(*sdft.known_to_both(logits, held), torch.ones_like(targets))
            nll = F.cross_entropy(logits.float(), targets, reduction="sum")
            total = (nll + weight * kl * len(targets)) / tokens
            total.backward()
            line["loss"] += total.item()
            del logits, held, kl, nll, total  # no graph outlives its micro-batch
        update(line)
        if stop and stop():
            break
    return student


def own(student, teacher, batches, rollout, *, loss, backward, **how):
    """Plain fine-tuning on the teacher's own greedy answers, the demonstration before it."""
    parts, tokenizer = train.PARTS, train.PARTS["tokenizer"]
    c = parts["config"]
    ends = tokenizer(train.model.resolve(c.model)).eos_ids
    answered = []
    for batch in batches:
        mine = parts["generate"](teacher, [p.teacher for p in parts["share"](batch)],
                                 c.rollout_tokens, 0, eos_id=ends)
        answered.append([p._replace(answer=y) for p, y in zip(batch, parts["gather"](mine))])
    return sdft.sft(student, answered, **how)
