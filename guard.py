"""The guard of a recovery: the teacher is asked before it teaches, the student is watched while it
learns, and the best of its weights are what is kept.

A teacher that answers worse with the demonstration before it than without would teach the damage. A
step size that does not fit a model ruins it without a word. So `check_teacher` counts the teacher's
right answers, and a `Watch` measures the student every few steps on prompts it never trains on.
"""
import time

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

import cka
import evaluate
import parallel
import sdft

# -------------------------------------------------------------------------- before it teaches


@torch.no_grad()
def check_teacher(evaluation, teacher, samples, demo):
    """{task: {"shown": percent, "bare": percent, "examples": n, "helps": bool}}: right greedy
    answers to training prompts, as the teacher will see them and as the student does.

    samples: {task: [Example]}. The demonstration helps if it brings more right answers, by two
    paired standard errors; a teacher that is right nine times in ten needs no help.
    """
    found = {}
    for task, examples in samples.items():
        shown = right_answers(evaluation, teacher, examples, demo)
        bare = shown if demo == "none" else right_answers(evaluation, teacher, examples, "none")
        gain, noise = evaluate.mean_and_noise(shown - bare)
        helps = gain > noise or shown.mean().item() >= 0.9
        found[task] = {"shown": 100 * shown.mean().item(), "bare": 100 * bare.mean().item(),
                       "examples": len(examples), "helps": helps or demo == "none"}
    return found


def right_answers(evaluation, model, examples, demo):
    """[n] of 1 (right) and 0: greedy answers to prompts of this form, see data.DEMOS."""
    answers = evaluate.answers_to(evaluation, model, examples, lambda n: None, demo)
    return torch.tensor([float(e.check(text)) for e, text in zip(examples, answers)])


# ----------------------------------------------------------------------------- while it learns

class Watch:
    """Called after each step, true when it is time to stop; keeps the best weights so far.

    value(): ({name: what is watched, the less the better}, "all" among them; {task: [n] the same,
    prompt by prompt}), measured before the first step and every `every` steps. The best weights
    have the lowest "all" of those where, if strict, no task is worse than where it began, by two
    paired standard errors. It is time to stop when "all" is not finite, or FAR above its start; or,
    with patience, after so many checks without a better one. ended says why, if something went
    wrong. past: the state() of one that this one goes on from.
    """

    FAR = 0.5  # far: above twice the start plus this, in what is watched (nats a token, 1 - CKA)

    def __init__(self, student, value, patience=0, strict=False, every=7, past=None):
        self.student, self.value, self.strict = student, value, strict
        self.patience, self.every, self.steps = patience, every, 0
        self.checks, self.kept, self.ended, self.seconds = [], 0, "", 0.0
        self.weights = [torch.empty_like(p, device="cpu") for p in self.trained()]
        if past:
            self.go_on(past)
        else:
            self.check()

    def __call__(self):
        self.steps += 1
        return self.steps % self.every == 0 and self.check()

    def state(self):
        """What a checkpoint holds of it: no weights where the best are those of now."""
        best = None if self.kept == self.steps else self.weights
        numbers = {name: getattr(self, name) for name in ("steps", "checks", "kept", "seconds")}
        return numbers | {"first": self.first, "weights": best}

    @torch.no_grad()
    def go_on(self, past):
        """Be what the one with this state() was."""
        self.steps, self.checks, self.kept = past["steps"], past["checks"], past["kept"]
        self.first, self.seconds = past["first"], past["seconds"]
        best = past.pop("weights") or self.trained()
        for place, p in zip(self.weights, best):
            place.copy_(p)

    def trained(self):
        """The parameters that training changes; of a sharded student this process's shares."""
        of = [p.detach() for p in self.student.parameters() if p.requires_grad]
        return [p.to_local() if hasattr(p, "to_local") else p for p in of]

    @torch.no_grad()
    def check(self):
        """Measure, and keep the weights if they are the best; true if it is time to stop."""
        began = time.perf_counter()
        parallel.give_back_freed_memory()
        now, prompts = self.value()
        if not self.checks:
            self.first = prompts
        self.checks.append({"step": self.steps, **now})
        start, best = self.checks[0], next(c for c in self.checks if c["step"] == self.kept)
        if self.steps == 0 or now["all"] < best["all"] and not self.worse(prompts):
            self.kept = self.steps
            for place, p in zip(self.weights, self.trained()):
                place.copy_(p)
        if not now["all"] <= 2 * start["all"] + self.FAR:
            self.ended = (f"step {self.steps}: what is watched went from {start['all']:.3g} to "
                          f"{now['all']:.3g}")
        self.seconds += time.perf_counter() - began
        waited = sum(c["step"] > self.kept for c in self.checks)
        return bool(self.ended) or 0 < self.patience <= waited

    def worse(self, prompts):
        """The tasks that forbid these weights, noted in the check too."""
        found = []
        for task, losses in prompts.items():
            rise, noise = evaluate.mean_and_noise(losses - self.first[task])
            if self.strict and rise > noise:
                found.append(task)
        if found:
            self.checks[-1]["worse"] = found
        return found

    @torch.no_grad()
    def restore(self, keep="best"):
        """Put back the best weights, in place; keep "last": only after something went wrong."""
        if self.steps > self.checks[-1]["step"] and not self.ended:
            self.check()
        if keep == "last" and not self.ended:
            self.kept = self.steps
            return
        for p, best in zip(self.trained(), self.weights):
            p.copy_(best)


def held_out_loss(run, student, lesson):
    """value() for a Watch: the divergence from the teacher as it was at the start (sft, own: the
    cross-entropy), task by task, on all tokens of the experts' answers to the lesson's held-out
    prompts, in nats a token, with neither CKA nor anchor; "all": the mean over all tokens."""
    teacher = run.teachers.get(lesson.teacher) if lesson.how in ("sdft", "kd") else None
    size = run.config.micro_batch
    together = parallel.sharded(student)  # then all processes must take the same steps
    parts = []  # (task, the prompts, their answers, the teacher's states)
    for task, prompts in lesson.held_out.items():
        mine = prompts if together else parallel.share(prompts)
        for start in range(0, len(mine), size):
            part = mine[start:start + size]
            answers = [p.answer for p in part]
            t = None
            if teacher:
                with torch.no_grad():
                    t = run.score(teacher, [p.teacher for p in part], answers)[-1]
            parts.append((task, part, answers, t))

    def value():
        """Now: the losses by task, and prompt by prompt."""
        found = []  # (task, a prompt's loss, its tokens)
        with parametrize.cached():
            for task, part, answers, t in parts:
                s = run.score(student, [p.student for p in part], answers)[-1]
                losses = losses_of(student, s, teacher, t, answers, sdft.LOSSES[lesson.loss])
                found += [(task, loss, len(y)) for loss, y in zip(losses, answers)]
        found = parallel.gather([found])[0] if together else parallel.gather(found)  # as one
        parallel.reshard_(student)
        prompts = {task: torch.tensor([loss for of, loss, _ in found if of == task],
                                      dtype=torch.float64) for task in lesson.held_out}
        means = {task: mean_over_tokens(found, (task,)) for task in prompts}
        all_tasks = {"all": mean_over_tokens(found, prompts)}
        return all_tasks | (means if len(means) > 1 else {}), prompts
    return value


def mean_over_tokens(found, tasks):
    """Mean of [(task, a prompt's loss, its tokens)] over the tokens of these tasks."""
    of = [(loss, tokens) for task, loss, tokens in found if task in tasks]
    return sum(loss * n for loss, n in of) / sum(n for _, n in of)


def losses_of(student, s, teacher, t, answers, loss):
    """[n] losses, a prompt each, of final states s [N, D] of N tokens against the teacher's t;
    without a teacher the cross-entropy of the answers."""
    lengths = [len(y) for y in answers]
    ours = student.head(s).split(lengths)
    if teacher is None:
        targets = [torch.tensor(y, device=s.device) for y in answers]
        return [F.cross_entropy(x.float(), y).item() for x, y in zip(ours, targets)]
    theirs = teacher.head(t).split(lengths)
    every = [torch.ones(n, device=s.device) for n in lengths]
    return [loss(*sdft.known_to_both(x, y), m).item() for x, y, m in zip(ours, theirs, every)]


def distance_by_cka(run, student):
    """value() for a Watch (§6): 1 - CKA with the healthy model, linear and debiased, of the last
    layer, over the last tokens of the calibration sequences."""
    healthy, sequences = run.teachers["healthy"], run.calibration
    dtype = healthy.norm.weight.dtype
    theirs = cka.hidden_states(healthy, sequences, last=True)

    def value():
        model = parallel.plain_copy(student, dtype)
        states = cka.hidden_states(model, sequences, last=True)
        found = cka.sample_level(states, theirs)["linear_debiased"][-1]
        return {"all": 1 - parallel.gather([found])[0]}, {}  # one process says for all
    return value
