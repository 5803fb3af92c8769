"""What is measured of a model (§4, §5.4), and one run of train.py in words and in a picture.

In this order: accuracy, by answering or by choosing, and perplexity; likeness to the healthy model
(CKA); a step of recovery token by token (§3); the report; report.png.
"""
import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cka
import data
import parallel
import sdft
from files import whole


@dataclass
class Evaluation:
    """What every model of a run is asked, and how it is made to answer."""

    tokenizer: data.Tokenizer
    splits: dict        # metric -> [Example]
    windows: dict       # metric -> [ids], all of one length: text, for perplexity
    sequences: dict     # task -> [ids]: prompts with their answers, for CKA
    eval_tokens: int    # longest answer; 0: that of its split's longest demonstration
    generate: Callable  # model.generate, or a faster one
    score: Callable     # sdft.score, or a faster one


@dataclass
class Measurement:
    """One model's performance, item by item, three of its answers, and its likeness to the healthy
    model."""

    items: dict     # metric -> [n]: 0/1 per example, or nats per token of a text window
    answers: list   # (prompt, answer) of examples of the first split
    cka: dict       # level -> kind -> [n_layer], against the healthy model (empty for itself)
    layers: list    # CKA of each layer with each of the healthy model's
    kl: dict = field(default_factory=dict)  # text's metric -> KL(healthy || model), nats a token

    def value(self, metric):
        """Perplexity, or accuracy in percent.

        >>> Measurement({"task": torch.tensor([1.0, 0, 0, 1])}, [], {}, []).value("task")
        50.0
        """
        mean = self.items[metric].mean().item()
        if metric.startswith("perplexity"):
            return math.exp(mean) if mean < 700 else math.inf  # a model that training broke
        return 100 * mean


@dataclass
class Healthy:
    """What is kept of the healthy model, to compare others with; of each list this process's
    share."""

    states: dict    # task -> hidden states of its sequences, see `states_of`
    windows: dict   # metric -> [the final states [T, D] of a window of text]
    head: Callable  # final states -> logits


@torch.no_grad()
def measure(evaluation, model, healthy=None, progress=""):
    """A Measurement: accuracy on every split, perplexity of every text, and likeness, given what is
    kept of the healthy model. progress names a progress bar; without a name there is none."""
    parallel.give_back_freed_memory()
    items, answers, likeness, layers, kl = {}, [], {}, [], {}
    total = items_to_read(evaluation, healthy is not None)
    with tqdm(total=total, desc=progress, unit="item", disable=not progress) as bar:
        for metric, examples in evaluation.splits.items():
            if examples[0].choices:
                items[metric] = chosen_right(evaluation, model, examples, bar.update)
                continue
            texts = answers_to(evaluation, model, examples, bar.update)
            items[metric] = [float(e.check(t)) for e, t in zip(examples, texts)]
            answers = answers or [(e.prompt, t) for e, t in zip(examples, texts)]
        for metric, windows in evaluation.windows.items():
            items[metric], kl[metric] = nats_of(
                model, windows, bar.update, len(evaluation.tokenizer.prefix), healthy, metric)
        if healthy is not None:
            likeness, layers = compare(states_of(evaluation, model, bar.update), healthy.states)
    items = {metric: torch.tensor(values) for metric, values in items.items()}
    shown = answers[:: max(1, len(answers) // 3)][:3]
    return Measurement(items, shown, likeness, layers, kl if healthy else {})


def items_to_read(evaluation, with_cka):
    """How many examples, windows and sequences this process reads: its progress bar's length."""
    groups = [*evaluation.splits.values(), *evaluation.windows.values()]
    if with_cka:
        groups += evaluation.sequences.values()
    return sum(len(parallel.share(group)) for group in groups)


# Performance. Every process reads its share of the examples, and all get all results.

def chosen_right(evaluation, model, examples, done, at_once=8):
    """[1.0 or 0.0, …]: whether each multiple-choice example's likeliest choice is the right one;
    some at once, of about one length."""
    mine, right = parallel.share(examples), {}
    order = sorted(range(len(mine)), key=lambda i: sum(map(len, sum(mine[i].choices, ()))))
    for start in range(0, len(order), at_once):
        group = order[start:start + at_once]
        found = choice_scores(model, evaluation.tokenizer, [mine[i] for i in group],
                              evaluation.score)
        for i, scores in zip(group, found):
            right[i] = float(scores.index(max(scores)) == mine[i].answer)
        done(len(group))
    return parallel.gather([right[i] for i in range(len(mine))])


def answers_to(evaluation, model, examples, done, demo="none"):
    """The model's greedy answers to all these examples, as text; demo: one of data.DEMOS."""
    mine, longest = parallel.share(examples), answer_tokens(evaluation, examples)
    return parallel.gather(
        answer(model, evaluation.tokenizer, mine, longest, evaluation.generate, done, demo))


def nats_of(model, windows, done, prefix=0, healthy=None, metric=""):
    """([mean nats per token of each window of this text], their mean KL(healthy || model))."""
    mine, found = parallel.share(windows), []
    for start in range(0, len(mine), 4):
        part = slice(start, start + 4)
        theirs = (healthy.windows[metric][part], healthy.head) if healthy else ()
        found += nats(model, mine[part], prefix, *theirs)
        done(len(mine[part]))
    nll, kl = zip(*parallel.gather(found))
    return list(nll), sum(kl) / len(kl)


def answer_tokens(evaluation, examples):
    """How many tokens an answer to these examples may take.

    ValueError where no demonstration says it: an end of turn alone would never be a right answer.
    """
    if not evaluation.eval_tokens and not any(e.response for e in examples):
        where = examples[0].where and f"{examples[0].where}: "
        raise ValueError(f"{where}no demonstration says how long an answer may be: give "
                         "--eval-tokens, such as 1024")
    longest = max(len(evaluation.tokenizer.answer(e.response)) for e in examples)
    return evaluation.eval_tokens or longest


def answer(model, tokenizer, examples, max_new_tokens, generate, done=None, demo="none"):
    """Greedy answers, as text; done(n) is called as n of them are ready."""
    prompts = [data.teacher_prompt(tokenizer, e, demo) for e in examples]
    completions = generate(model, prompts, max_new_tokens, temperature=0,
                           eos_id=tokenizer.eos_ids, batch_size=128, done=done)
    return [tokenizer.read(ids) for ids in completions]


def choice_scores(model, tokenizer, examples, score):
    """Log-likelihood of each continuation after its context, a list of numbers an example.

    It is per character of the choice's own text, without the blank put before it, since choices
    differ in length: acc_norm of lm-evaluation-harness. Whole sentences, which have no context, get
    the sum (BLiMP). The first token needs one that predicts it, too: where a context is empty, what
    the tokenizer puts before a text stands for it, or the token that separates documents.
    """
    contexts, continuations = zip(*(pair for e in examples for pair in e.choices))
    separator = tokenizer.added.get("<|endoftext|>", tokenizer.eos_id)
    prompts = [data.begun(tokenizer, tokenizer.encode(t)) or [separator] for t in contexts]
    targets = [tokenizer.encode(t) for t in continuations]
    states = score(model, prompts, targets)[-1]                     # [N, D]
    tokens = torch.tensor([i for t in targets for i in t], device=states.device)
    logp = -F.cross_entropy(model.head(states).float(), tokens, reduction="none")  # [N]
    sums, found = [part.sum().item() for part in logp.split([len(t) for t in targets])], []
    for e in examples:
        mine, sums = sums[:len(e.choices)], sums[len(e.choices):]
        if any(context for context, _ in e.choices):
            mine = [x / len(text.removeprefix(" ")) for x, (_, text) in zip(mine, e.choices)]
        found.append(mine)
    return found


def nats(model, windows, prefix=0, theirs=None, head=None):
    """[(mean negative log-likelihood of a window's tokens after the first, or after its first
    `prefix` tokens, which are not of the text; mean KL(healthy || model) there)], the latter given
    the healthy model's final states of each window and its head, else 0."""
    ids, first = torch.tensor(windows, device=model.device), max(1, prefix)
    states, found = model.backbone(ids[:, :-1]), []
    for x, row, y in zip(states, ids, theirs or [None] * len(ids)):  # a window's logits: [T, V]
        logits = model.head(x[first - 1:]).float()
        kl = 0.0
        if y is not None:
            every = torch.ones(len(logits), device=logits.device)
            both = sdft.known_to_both(logits, head(y[first - 1:]))
            kl = sdft.forward_kl(*both, every).item()
        found.append((F.cross_entropy(logits, row[first:]).item(), kl))
    return found


def change(before, after, metric):
    """"better", "worse" or "same", of two Measurements: by two paired standard errors or not.

    >>> change(*(Measurement({"task": torch.tensor(right)}, [], {}, [])
    ...          for right in ([0.0, 0, 0, 0, 1], [1.0, 1, 1, 1, 1])), "task")
    'better'
    """
    difference = after.items[metric] - before.items[metric]
    if metric.startswith("perplexity"):
        difference = -difference  # nats: less is better
    mean, noise = mean_and_noise(difference)
    if not math.isfinite(mean):
        return "better" if after.items[metric].isfinite().all() else "worse"
    return "better" if mean > noise else "worse" if mean < -noise else "same"


def mean_and_noise(difference):
    """The mean of paired differences [n], and two of its standard errors: inf for fewer than two.

    >>> mean_and_noise(torch.tensor([1.0, 1, 1]))
    (1.0, 0.0)
    """
    n = len(difference)
    noise = 2 * difference.std().item() / math.sqrt(n) if n > 1 else math.inf
    return difference.mean().item(), noise


def recovered_fraction(healthy, degraded, recovered, metric):
    """(recovered - degraded) / (healthy - degraded); None where nothing was lost, or nobody knows.

    Something was lost if degraded is worse than healthy by two paired standard errors. A single
    item has none, so that of one nothing can be said.

    >>> healthy, degraded, recovered = [Measurement({"task": torch.tensor(right)}, [], {}, [])
    ...     for right in ([1.0, 1, 1, 1, 1], [0.0, 0, 0, 0, 1], [1.0, 1, 0, 0, 1])]
    >>> round(recovered_fraction(healthy, degraded, recovered, "task"), 3)  # 100, 20, 60 %
    0.5
    """
    if change(degraded, healthy, metric) != "better":
        return None
    h, d, r = (m.value(metric) for m in (healthy, degraded, recovered))
    return (r - d) / (h - d)


def spread(items, limit):
    """At most `limit` of the items (0: all), evenly spread over them.

    >>> spread(list("abcdefg"), 3)
    ['a', 'c', 'e']
    """
    n = min(limit, len(items)) if limit else len(items)
    return [items[i * len(items) // n] for i in range(n)]


# Likeness to the healthy model.

def cka_sequences(c, tokenizer, tasks, windows):
    """{task: ids of prompt + ground truth (§4.2) of eval examples}, or {"text": windows} where no
    task has four examples."""
    found = {}
    for task in tasks:
        first_split = next(iter(task.eval.values()), [])
        examples = [e for e in spread(first_split, c.eval_limit) if e.chat and e.response]
        examples = examples[:: max(1, len(examples) // c.cka_samples)][:c.cka_samples]
        if len(examples) >= 4:
            found[task.name] = [
                data.student_prompt(tokenizer, e) + tokenizer.answer(e.response) for e in examples]
    return found or {"text": windows}


def calibration_sequences(c, tokenizer, tasks):
    """Ids of training examples with their answers, which activations are taken from; of a text its
    first 128 tokens."""
    found = []
    for e in data.batches(tasks, 1, c.calibration, c.seed)[0]:
        if e.chat:
            ids = data.student_prompt(tokenizer, e) + tokenizer.answer(e.response)
        else:
            ids = data.begun(tokenizer, tokenizer.encode(e.prompt))[:128]
        found.append(ids)
    return found


@torch.no_grad()
def healthy_of(evaluation, model):
    """What is kept of the healthy model."""
    windows = {}
    for metric, of in evaluation.windows.items():
        ids = [torch.tensor([window[:-1]], device=model.device) for window in parallel.share(of)]
        windows[metric] = [model.backbone(x)[0] for x in ids]
    return Healthy(states_of(evaluation, model), windows, model.head)


def states_of(evaluation, model, done=None):
    """{task: hidden states of this process's share of its sequences}; of the first task those of
    all tokens, of the others those of the last tokens."""
    first, found = next(iter(evaluation.sequences)), {}
    for task, sequences in evaluation.sequences.items():
        mine = parallel.share(sequences)
        found[task] = cka.hidden_states(model, mine, last=task != first, done=done)
    return found


def compare(states, healthy):
    """CKA of two models' hidden states, {level: {kind: [n_layer]}}, and [n_layer, n_layer] between
    all layers.

    Levels: the first task's "tokens", those of each sequence (§4.2), and "samples", their last
    tokens (§5.4); the other tasks' "TASK samples".
    """
    first = next(iter(states))
    likeness, layers = {"tokens": over_tokens(states[first], healthy[first])}, []
    for task in states:
        x, y = last_tokens(states[task]), last_tokens(healthy[task])
        likeness["samples" if task == first else f"{task} samples"] = cka.sample_level(x, y)
        if task == first:
            layers = cka.between_layers(x, y)
    return likeness, layers


def over_tokens(states, healthy):
    """{kind: [n_layer]}: the mean of `cka.token_level` over the sequences of all processes, each of
    which reads its own."""
    each = parallel.gather([cka.token_level([x], [y]) for x, y in zip(states, healthy)
                            if x.size(1) >= 4])  # the debiased estimator needs as many
    of_kinds = {kind: [found[kind] for found in each] for kind in cka.KINDS}  # [n, n_layer]
    return {kind: torch.tensor(values, dtype=torch.float64).mean(0).tolist()
            for kind, values in of_kinds.items()}


def last_tokens(states):
    """The last tokens' states, [n_layer, 1, D] each, of all processes' sequences."""
    return parallel.gather([x[:, -1:].clone() for x in states])  # a view would send all of x


# A step, shown (§3): what the student says, token by token, and what its teacher makes of it.

@torch.no_grad()
def trace(student, teacher, prompts, completions, tokenizer, score):
    """[{"prompt": its end, "tokens": [{"token", "student", "teacher", "favourite", "kl"}, …]}, …].

    An entry for each of the prompts (sdft.Prompt), a token for each of its completion's first 24:
    what student and teacher give it, each after its own prompt; the teacher's likeliest token; and
    KL(teacher || student) in nats, over the ids that both know, all the student's among them.
    """
    known = min(student.config.vocab_size, teacher.config.vocab_size)
    shown = []
    for prompt, completion in zip(prompts, completions):
        said = completion[:24]
        end = tokenizer.decode(prompt.student)
        end = end if len(end) <= 100 else "…" + end[-99:]
        log_s = log_probs(student, score(student, [prompt.student], [said])[-1], known)
        log_t = log_probs(teacher, score(teacher, [prompt.teacher], [said])[-1], known)
        shown.append({"prompt": end, "tokens": trace_tokens(said, log_s, log_t, tokenizer)})
    return shown


def log_probs(model, states, known):
    """Final hidden states [N, D] -> log-probabilities [N, known] of the first `known` ids."""
    return F.log_softmax(model.head(states)[:, :known].float(), -1)


def trace_tokens(said, log_s, log_t, tokenizer):
    """The student's tokens, a dictionary each; log_s, log_t [N, V]: the two models' predictions."""
    kl = (log_t.exp() * (log_t - log_s)).sum(-1).tolist()
    favourites, tokens = log_t.argmax(-1).tolist(), []
    for n, token in enumerate(said):
        tokens.append({
            "token": tokenizer.decode([token], keep_special=True),
            "student": log_s[n, token].exp().item(),
            "teacher": log_t[n, token].exp().item(),
            "favourite": tokenizer.decode([favourites[n]], keep_special=True),
            "kl": kl[n]})
    return tokens


# ------------------------------------------------------------------------------- One run in words

def text(results, answers):
    """The run as text: metrics, sample answers {stage: [(prompt, answer)]}, CKA by layer, a step of
    recovery, and what the numbers depend on."""
    width = max(len(stage) for stage in results["stages"]) + 2
    lines = [*metric_lines(results, width), *verdict_lines(results), *teacher_lines(results),
             *answer_lines(answers, width), *cka_lines(results["cka"], width),
             *step_lines(results), *provenance_lines(results)]
    return "\n".join(lines)


def metric_lines(results, width):
    """A line a metric: its value at each stage, and what recovery brought back."""
    stages, fractions = results["stages"], recovered_fractions(results)
    header = "".join(f"{stage:>{width}}" for stage in stages)
    lines = ["", f"{'':24}{header}  recovered fraction"]
    for metric in stages["healthy"]:
        row = "".join(f"{values[metric]:{width}.2f}" for values in stages.values())
        found = [fraction[metric] for fraction in fractions.values()]
        shown = ", ".join(not_damaged(results, metric) if f is None else f"{f:.2f}" for f in found)
        lines.append(f"{metric_title(metric):24}{row}  {shown:>18}")
    for metric, values in results.get("kl", {}).items():
        row = "".join(f"{values.get(stage, 0):{width}.3f}" for stage in stages)
        of = metric.removeprefix("perplexity").replace("_", ", ")
        lines.append(f"{'KL from healthy' + of:24}{row}")
    return lines


def as_text(values):
    """A metric's items [n] as one word or line: a figure an example, right or wrong; of a text the
    nats of each window.

    >>> as_text(torch.tensor([0.0, 1.0])), as_text(torch.tensor([2.5, 3.25]))
    ('01', '2.5000 3.2500')
    """
    if all(v in (0, 1) for v in values.tolist()):
        return "".join(f"{v:.0f}" for v in values.tolist())
    return " ".join(f"{v:.4f}" for v in values.tolist())


def point(m):
    """A Measurement as results.json has it of a model in the middle of its training; CKA of the
    last layer and averaged over layers."""
    likeness = {level: {kind: [v[-1], sum(v) / len(v)] for kind, v in kinds.items()}
                for level, kinds in m.cka.items()}
    return {"values": {metric: m.value(metric) for metric in m.items},
            "items": {metric: as_text(v) for metric, v in m.items.items()},
            "kl": m.kl, "cka": likeness}


def recovered_fractions(results):
    """{stage: {metric: fraction or None}}, of one recovery or several."""
    found = results["recovered_fraction"]
    several = isinstance(next(iter(found.values())), dict)
    return found if several else {"recovered": found}


def not_damaged(results, metric):
    """What is said where there is no recovered fraction: of one example there can be none."""
    one = results["environment"].get("eval_examples", {}).get(metric) == 1
    return "one row: unknown" if one else "not damaged"


def metric_title(metric):
    """A metric with its unit: perplexity has none."""
    return metric if metric.startswith("perplexity") else metric + " %"


def verdict_lines(results):
    """In words, for each recovery: what came back, what did not, what is worse than before, and
    which weights were kept."""
    lines = []
    for stage, found in results["guard"].items():
        if stage not in results["change"]:
            lines.append(f"{stage}: {guard_line(found)}")
    for stage, changes in results["change"].items():
        by = {word: [m for m, change in changes.items() if change == word]
              for word in ("better", "same", "worse")}
        words = {"better": "better than before", "same": "within noise of before",
                 "worse": "WORSE than before the recovery"}
        said = [f"{', '.join(by[word])} {words[word]}" for word in by if by[word]]
        lines.append(f"{stage}: {'; '.join(said)}")
        if stage in results["guard"]:
            lines.append(f"  {guard_line(results['guard'][stage])}")
    return ["", *lines] if lines else []


def guard_line(found):
    """Which weights were kept, by what was watched; and what ended the training, if it did."""
    checks, kept = found["checks"], found["kept"]
    first, last = checks[0], checks[-1]
    what = {"loss": "loss on held-out prompts", "cka": "1 - CKA on training examples"}
    at = next((c for c in checks if c["step"] == kept), last)
    line = (f"kept step {kept} of {found['steps']} ({what[found['watch']]} {first['all']:.3f} → "
            f"{at['all']:.3f})")
    if kept < last["step"] and not found["ended"]:
        line += f", in the end {last['all']:.3f}"
        if last.get("worse"):
            line += f", worse on {', '.join(last['worse'])} than before"
        line += "; no later step was kept: try a smaller --lr" if kept == 0 else ""
    return line + (f"; ended early, {found['ended']}" if found["ended"] else "")


def teacher_lines(results):
    """How often each teacher was right before it taught, as it teaches and bare."""
    lines = []
    for teacher, tasks in results["teacher"].items():
        for task, found in tasks.items():
            lines.append(f"the teacher, {teacher}, on {found['examples']} training prompts of "
                         f"{task}: as it teaches {found['shown']:.0f} % right; "
                         f"bare {found['bare']:.0f} %")
            if not found["helps"]:
                lines.append("  the demonstration does not help it: try another form of --demo, "
                             "or --demo none")
    return ["", *lines] if lines else []


def answer_lines(answers, width):
    """A few questions, and what each stage answered."""
    lines = []
    for i, (prompt, _) in enumerate(answers["healthy"]):
        lines += ["", f"> {prompt}"]
        for stage, given in answers.items():
            lines.append(f"  {stage:{width}}{' '.join(given[i][1].split())}")
    return lines


def cka_lines(levels, width):
    """A bar a layer for each stage and kind of CKA, level by level, and how to read them."""
    lines = []
    for level, stages in levels.items():
        lines += ["", f"CKA with the healthy model over {level}, by layer"]
        for kind in ("linear", "linear_debiased"):
            values = [x for kinds in stages.values() for x in kinds[kind] if not math.isnan(x)]
            least = min(values, default=0)
            for stage, kinds in stages.items():
                v = kinds[kind]
                lines.append(f"  {kind:16}{stage:{width}}{chart(v, least)}"
                             f"  last {v[-1]:.4f}  mean {sum(v) / len(v):.4f}")
    if lines:
        lines += ["", "(A bar is a layer, first to last: ▁ is the lowest value of its kind, █ is "
                  "1: alike up to rotation and",
                  "scale (samples: once z-scored). Trust the debiased rows.)"]
    return lines


def chart(values, least):
    """One character a layer, from ▁ at `least` to █ at 1; ? is not a number.

    >>> chart([0.5, 0.75, 1.0, math.nan], 0.5)
    '▁▅█?'
    """
    bars, found = "▁▂▃▄▅▆▇█", []
    for v in values:
        if math.isnan(v):
            found.append("?")
        else:
            height = int(8 * (v - least) / max(1e-9, 1 - least))
            found.append(bars[min(7, max(0, height))])
    return "".join(found)


def step_lines(results):
    """The first recovery's trace: a table a prompt, on the left before recovery, right after it."""
    header, lines = trace_cell("token", "student", "teacher", "prefers", "KL"), []
    for stage, traces in list(results.get("step", {}).items())[:1]:
        lines += ["", f"A step, shown ({stage}): what the student says, and how likely student and "
                  "teacher find it;", "what the teacher prefers where that is something else; and "
                  "KL(teacher || student) in nats"]
        for first, last in zip(traces["first"], traces["last"]):
            lines += ["", f"> {' '.join(first['prompt'].split())}",
                      side_by_side(f"before recovery: mean KL {mean_kl(first)}",
                                   f"after: mean KL {mean_kl(last)}"),
                      side_by_side(header, header)]
            left, right = ([trace_row(t) for t in trace["tokens"]] for trace in (first, last))
            for row in zip_longest(left, right, fillvalue=""):
                lines.append(side_by_side(*row))
    return lines


def side_by_side(left, right):
    """Two cells of step_lines' tables as one line of at most 100 characters."""
    return f"  {left:48}  {right}".rstrip()


def mean_kl(trace):
    """The mean over a trace's tokens, as text."""
    kl = [t["kl"] for t in trace["tokens"]]
    return f"{sum(kl) / max(1, len(kl)):.2f}"


def trace_row(t):
    """One token of a trace as text."""
    return trace_cell(visible(t["token"]), f"{t['student']:.0%}", f"{t['teacher']:.0%}",
                      preferred(t), f"{t['kl']:.2f}")


def trace_cell(token, student, teacher, prefers, kl):
    """One token of a trace in columns, 48 characters."""
    return f"{token:12.12}{student:>8}{teacher:>8}  {prefers:12.12}{kl:>6}"


def preferred(t):
    """What the teacher would have said in place of this token of a trace, "" if the same."""
    return "" if t["favourite"] == t["token"] else visible(t["favourite"])


def visible(token):
    r"""A token as one word: blanks as dots, what has no glyph escaped.

    >>> print(visible(" is\n"))
    ·is\n
    """
    found = ""
    for c in token:
        found += "·" if c == " " else c if c.isprintable() else repr(c)[1:-1]
    return found


def provenance_lines(results):
    """What was done, with what, on what, and how long it took."""
    config, e, seconds = results["config"], results["environment"], results["seconds"]
    damage = ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in e["damage"].items())
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    peak = e.get("peak_gpu_memory_gib", e["peak_memory_gib"])
    return ["", f"damage {damage_of(config)}: {damage or 'no weight of it by our hand'}",
            f"learning rate {e['lr']:.3g} on average, {e['lr'] / e['weights_rms']:.2g} of the "
            f"weights' root mean square, {e['weights_rms']:.3g}",
            f"perplexity of {e['text_tokens']} tokens in windows of {e['text_window']} "
            f"(text {e['text_sha256']}); train data {e['data_sha256']}; "
            f"eval data {e['eval_sha256']} {e['eval_examples']}",
            *(f"{n} training rows of {task} left out: another file measures the same questions"
              for task, n in e.get("left_out", {}).items()),
            f"seed {config['seed']}; {sum(seconds.values()) / 60:.1f} minutes ({parts}), "
            f"peak memory {peak:.1f} GiB, {config['dtype']}, {e['processor']}, "
            f"{e['processes']} x {e['threads']} threads"]


def damage_of(config):
    """What a run did to its student, in the words of its options.

    >>> damage_of({"student": "", "forget": "tooluse", "degrade": "int4"})
    'forget tooluse, int4'
    """
    words = []
    if config.get("student"):
        words.append(config["student"])
    if config.get("forget"):
        words.append(f"forget {config['forget']}")
    if config["degrade"] not in ("", "none"):
        words.append(config["degrade"])
    return ", ".join(words) or "none"


def to_json(value, **layout):
    """json.dumps, where null stands for what JSON has no word for: the infinities and nan of a
    model that training broke.

    >>> to_json([1.5, math.nan])
    '[1.5, null]'
    """
    return json.dumps(each_leaf(value, finite_or_none), allow_nan=False, **layout)


def finite_or_none(x):
    """x, but None for a number that is not finite."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


def each_leaf(x, change):
    """The same structure of dictionaries and lists, with every leaf changed."""
    if isinstance(x, dict):
        return {key: each_leaf(value, change) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [each_leaf(value, change) for value in x]
    return change(x)


# --------------------------------------------------------------------------- One run in a picture

def draw(results, steps, path):
    """report.png: the recovery curve, CKA by layer and between all layers, and a step, shown.

    steps: the lines of metrics.jsonl. False where there is no matplotlib, and nothing is drawn.
    """
    pyplot = find_pyplot()
    if pyplot is None:
        return False
    rows = step_rows(results)
    height = 0.4 * len(rows)
    figure = pyplot.figure(figsize=(16, 4 + height), layout="constrained")
    panels = figure
    if rows:
        panels, strips = figure.subfigures(2, 1, height_ratios=[4, height])
        draw_step(strips, rows)
    left, middle, right = panels.subplots(1, 3)
    draw_curves(left, [s for s in steps if s["stage"].startswith("recovered")])
    left.set(title=f"Recovery from {damage_of(results['config'])}", xlabel="step", ylim=0)
    draw_cka(middle, results["cka"])
    draw_layers(panels, right, list(results["stages"])[-1], results["cka_layers"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a token may have characters that no font has
        with whole(path) as part:
            figure.savefig(part, format="png", dpi=120)
    pyplot.close(figure)
    return True


def any_terminal():
    """From now on, what a terminal has no character for is printed as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def find_pyplot():
    """matplotlib.pyplot, drawing into files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def draw_curves(axis, steps):
    """Each recovery's KL by step; its loss where it has no KL."""
    for stage in dict.fromkeys(s["stage"] for s in steps):
        mine = [s for s in steps if s["stage"] == stage]
        shown, name = ("kl", "KL") if "kl" in mine[0] else ("loss", "cross-entropy")
        axis.plot([s["step"] + 1 for s in mine], [s[shown] for s in mine], label=f"{stage}: {name}")
    axis.set(ylabel="nats per token")
    if axis.lines:
        axis.legend()


def draw_cka(axis, levels):
    """CKA with the healthy model by layer: a line a stage, dotted over tokens."""
    for level, style in (("tokens", ":"), ("samples", "-")):
        for i, (stage, kinds) in enumerate(levels.get(level, {}).items()):
            values = kinds["linear_debiased"]
            axis.plot(range(1, len(values) + 1), values, style, color=f"C{i}",
                      label=f"{stage}, {level}")
    axis.set(title="CKA with the healthy model (linear, debiased)", xlabel="layer")
    if axis.lines:
        axis.legend()


def draw_layers(figure, axis, stage, layers_of):
    """CKA of every layer of this stage's model with every layer of the healthy one, as colours."""
    if stage not in layers_of:
        return
    layers = layers_of[stage]
    edges = [0.5, len(layers) + 0.5]  # layers are counted from 1
    picture = axis.imshow(layers, origin="lower", vmin=0, vmax=1, extent=edges * 2)
    axis.set(title=f"CKA over samples, {stage} x healthy",
             xlabel="layer of the healthy model", ylabel=f"layer, {stage}")
    figure.colorbar(picture, ax=axis)


def step_rows(results):
    """[(label, tokens)] of the first recovery's trace; a prompt's heading has no tokens."""
    rows = []
    for traces in list(results.get("step", {}).values())[:1]:
        for first, last in zip(traces["first"], traces["last"]):
            rows.append((" ".join(first["prompt"].split()), []))
            rows.append(("before", first["tokens"]))
            rows.append(("after", last["tokens"]))
    return rows


def draw_step(figure, rows):
    """The student's tokens, a strip a row, coloured by KL; below them what the teacher prefers."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    axis = figure.subplots()
    colours = ScalarMappable(Normalize(0, 2, clip=True),  # the same in every run: pictures compare
                             LinearSegmentedColormap.from_list("kl", ["whitesmoke", "tomato"]))
    cells = [strip_cells(tokens) for _, tokens in rows]
    width = max(100, *(sum(len(shown) for shown, _, _ in row) for row in cells)) + 8
    size = min(9, 1600 / width)  # of the font: 16 inches hold `width` characters
    style = {"family": "monospace", "va": "center", "parse_math": False}
    for y, (label, _) in enumerate(rows):
        x = 8
        axis.text(0, y, label, size=9 if not cells[y] else size, **style)
        for (shown, below, kl) in cells[y]:
            axis.broken_barh([(x, len(shown) - 0.3)], (y - 0.45, 0.9), color=colours.to_rgba(kl))
            axis.text(x + 0.2, y - 0.15, shown.rstrip(), size=size, **style)
            axis.text(x + 0.2, y + 0.25, below, size=0.75 * size, color="dimgray", **style)
            x += len(shown)
    axis.set(xlim=(0, width), ylim=(len(rows) - 0.5, -0.5))
    axis.set_axis_off()
    axis.set_title("A step, shown: the student's tokens; below them what the teacher prefers, "
                   "where that differs", fontsize=10, loc="left")
    figure.colorbar(colours, ax=axis, extend="max", label="KL(teacher || student)", pad=0.01,
                    aspect=10)


def strip_cells(tokens):
    """(token, what the teacher prefers, KL) of each, the token padded to its cell's width."""
    cells = []
    for t in tokens:
        shown, below = visible(t["token"])[:12], preferred(t)[:12]
        width = max(len(shown), math.ceil(0.75 * len(below))) + 1
        cells.append((f"{shown:{width}}", below, t["kl"]))
    return cells
