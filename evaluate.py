"""What is measured of a model: accuracy, by answering or by choosing; perplexity; likeness to the healthy model (§4, §5.4)."""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import cka
import data
import parallel
import sdft
from model import generate


@dataclass
class Measurement:
    """One model's performance, item by item, three of its answers, and its likeness to the healthy model."""

    items: dict     # metric name -> [n]: 0/1 per example, or nats per token of a text window
    answers: list   # (prompt, answer) of examples of the first split
    cka: dict       # level -> kind -> [n_layer], against the healthy model (empty for itself)
    layers: list    # CKA of each layer with each of the healthy model's

    def value(self, metric):
        """Perplexity, or accuracy in percent."""
        mean = self.items[metric].mean().item()
        if metric.startswith("perplexity"):
            return math.exp(mean) if mean < 700 else math.inf  # a model that training broke
        return 100 * mean


@torch.no_grad()
def measure(run, model, healthy_states=None):
    """Accuracy on every split, perplexity of every text's windows; and CKA with the healthy model, given its hidden states."""
    items, answers = {}, []
    for name, examples in run.splits.items():
        mine = parallel.share(examples)
        if examples[0].choices:
            items[name] = parallel.gather([float(best_choice(model, run.tokenizer, e) == e.answer) for e in mine])
            continue
        texts = parallel.gather(answer(model, run.tokenizer, mine, answer_tokens(run.config, run.tokenizer, examples)))
        items[name] = [float(e.check(t)) for e, t in zip(examples, texts)]
        answers = answers or [(e.prompt, t) for e, t in zip(examples, texts)]
    for name, windows in run.windows.items():
        mine = parallel.share(windows)
        items[name] = parallel.gather([x for i in range(0, len(mine), 4) for x in nats(model, mine[i:i + 4])])
    likeness, layers = compare(states_of(run, model), healthy_states) if healthy_states is not None else ({}, [])
    items = {metric: torch.tensor(values) for metric, values in items.items()}
    return Measurement(items, answers[:: max(1, len(answers) // 3)][:3], likeness, layers)


def states_of(run, model):
    """{task: hidden states of this process's share of its sequences}; of tasks after the first, only of the last tokens."""
    first = next(iter(run.sequences))
    return {task: cka.hidden_states(model, parallel.share(sequences), last=task != first)
            for task, sequences in run.sequences.items()}


def compare(states, healthy):
    """CKA of two models' hidden states, by task -> {level: {kind: [n_layer]}}, and between all layers, [n_layer, n_layer].

    Levels: the first task's "tokens", those of each sequence, and "samples", their last tokens; the others' "TASK samples".
    """
    likeness = {}
    for i, task in enumerate(states):
        pairs = list(zip(states[task], healthy[task]))
        x, y = zip(*parallel.gather([(x[:, -1:].clone(), y[:, -1:].clone()) for x, y in pairs]))  # a view would send all of it
        if i == 0:
            tokens = parallel.gather([list(cka.token_level([x], [y]).values()) for x, y in pairs if x.size(1) >= 4])
            likeness["tokens"] = dict(zip(cka.KINDS, torch.tensor(tokens, dtype=torch.float64).mean(0).tolist()))
            layers = cka.between_layers(x, y)
        likeness["samples" if i == 0 else f"{task} samples"] = cka.sample_level(x, y)
    return likeness, layers


def spread(items, limit):
    """At most `limit` of the items (0: all), evenly spread over them."""
    n = min(limit, len(items)) if limit else len(items)
    return [items[i * len(items) // n] for i in range(n)]


def answer_tokens(c, tokenizer, examples):
    """How many tokens an answer to these examples may take."""
    return c.answer_tokens or max(len(tokenizer.answer(e.response)) for e in examples)


def answer(model, tokenizer, examples, max_new_tokens):
    """Greedy answers, as text."""
    prompts = [data.student_prompt(tokenizer, e) for e in examples]
    return [tokenizer.decode(ids).strip() for ids in
            generate(model, prompts, max_new_tokens, temperature=0, eos_id=tokenizer.eos_id, batch_size=128)]


def best_choice(model, tokenizer, example):
    """Index of the likeliest (context, continuation) pair."""
    scores = choice_scores(model, tokenizer, example)
    return scores.index(max(scores))


def choice_scores(model, tokenizer, example):
    """Log-likelihood of each continuation after its context, per character, as they may differ in length; of whole sentences,
    which have no context, the sum (BLiMP).

    What separates documents stands for a context that is empty: the first token, too, needs one that predicts it.
    """
    contexts, continuations = zip(*example.choices)
    separator = tokenizer.added.get("<|endoftext|>", tokenizer.eos_id)
    targets = [tokenizer.encode(t) for t in continuations]
    states = sdft.completion_states(model, [tokenizer.encode(t) or [separator] for t in contexts], targets)
    logp = F.log_softmax(model.head(states).float(), -1)
    logp = logp[torch.arange(len(logp)), [i for t in targets for i in t]].split([len(t) for t in targets])
    return [p.sum().item() / (len(text) if any(contexts) else 1) for p, text in zip(logp, continuations)]


def nats(model, windows):
    """Mean negative log-likelihood of each window's tokens after the first, a list."""
    ids = torch.tensor(windows, device=model.device)
    states = model.backbone(ids[:, :-1])  # the logits of one window at a time: [T, V]
    return [F.cross_entropy(model.head(x).float(), row[1:]).item() for x, row in zip(states, ids)]


def cka_sequences(c, tokenizer, tasks, windows):
    """{task: ids of prompt + ground truth (§4.2) of eval examples}; of text windows, where no task has four."""
    found = {}
    for task in tasks:
        examples = [e for e in spread(next(iter(task.eval.values()), []), c.eval_limit) if e.chat and e.response]
        examples = examples[:: max(1, len(examples) // c.cka_samples)][:c.cka_samples]
        if len(examples) >= 4:
            found[task.name] = [data.student_prompt(tokenizer, e) + tokenizer.answer(e.response) for e in examples]
    return found or {"text": windows}


def calibration_sequences(c, tokenizer, tasks):
    """Ids of training examples, with their answers, that activations are taken from; text is read to 128 tokens."""
    examples = data.batches(tasks, 1, c.calibration, c.seed)[0]
    return [data.student_prompt(tokenizer, e, 128) + (tokenizer.answer(e.response) if e.chat else []) for e in examples]


def recovered_fraction(healthy, degraded, recovered, metric):
    """(recovered - degraded) / (healthy - degraded); None where degraded is not worse by two paired standard errors."""
    difference = healthy.items[metric] - degraded.items[metric]
    difference = -difference if metric.startswith("perplexity") else difference  # nats: less is better
    noise = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    if difference.mean().item() <= 2 * noise:
        return None
    h, d, r = (m.value(metric) for m in (healthy, degraded, recovered))
    return (r - d) / (h - d)


class Watch:
    """CKA-guided early stopping (§6), called after each step: true when CKA with the healthy model has not risen for `patience`
    checks, one every `every` steps. It is debiased, of the last layer, over the last tokens of the sequences."""

    def __init__(self, student, healthy, sequences, patience, every=5):
        self.student, self.sequences, self.patience, self.every = student, sequences, patience, every
        self.dtype, self.steps, self.best, self.checks_since, self.kept = healthy.norm.weight.dtype, 0, -math.inf, 0, []
        self.healthy = cka.hidden_states(healthy, sequences, last=True)

    def __call__(self):
        self.steps += 1
        return self.steps % self.every == 0 and self.check()

    @torch.no_grad()
    def check(self):
        """Measure; True if it is time to stop."""
        model = parallel.plain_copy(self.student, self.dtype)
        states = cka.hidden_states(model, self.sequences, last=True)
        value, = parallel.gather([cka.sample_level(states, self.healthy)["linear_debiased"][-1]])[:1]  # one says for all
        self.checks_since += 1
        if value > self.best:
            self.best, self.checks_since = value, 0
            self.kept = [p.detach().clone() for p in self.student.parameters() if p.requires_grad]
        return self.checks_since >= self.patience

    @torch.no_grad()
    def restore(self):
        """The weights of the best check, the last state's among them, in place."""
        self.check()
        for p, best in zip([p for p in self.student.parameters() if p.requires_grad], self.kept):
            p.copy_(best)
