"""What is measured, by hand and against plain forwards; a made-up run in words and in a picture."""
import copy
import dataclasses
import json
import math

import pytest
import torch

import cka
import data
import evaluate
import model
import sdft
from cka import KINDS
from data import Example, load_tokenizer
from evaluate import Evaluation, Measurement
from model import GPT


@pytest.fixture
def small(folder):
    """A small model and its tokenizer."""
    return GPT.from_pretrained(folder).eval(), load_tokenizer(folder)


def evaluation_of(tokenizer, **changes):
    """A small Evaluation: two questions, one choice, a text, two tasks' sequences."""
    asked = [Example("Say red.", "red", data.same_answer("red")),
             Example("Say blue.", "blue", bool)]
    choice = Example("", choices=[("ab", " xyz"), ("ab", " zyx")])
    found = dict(
        tokenizer=tokenizer, splits={"asked": asked, "chosen": [choice]},
        windows={"perplexity": [[5 + i, *range(20, 27)] for i in range(5)]},
        sequences={"a": [list(range(20 + i, 40 + 2 * i)) for i in range(5)],
                   "b": [list(range(60 + i, 70 + i)) for i in range(4)]},
        eval_tokens=4, generate=model.generate, score=sdft.score)
    return Evaluation(**found | changes)


# ----------------------------------------------------------------------------------- Performance

def test_measure_asks_everything_and_tells_the_progress_bar(small, monkeypatch):
    student, tokenizer = small
    evaluation, bars = evaluation_of(tokenizer), []

    class Bar(evaluate.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)
    monkeypatch.setattr(evaluate, "tqdm", Bar)

    alone = evaluate.measure(evaluation, student, progress="healthy")
    assert {name: len(x) for name, x in alone.items.items()} == {
        "asked": 2, "chosen": 1, "perplexity": 5}
    assert [prompt for prompt, _ in alone.answers] == ["Say red.", "Say blue."]
    assert alone.items["asked"][1] == bool(alone.answers[1][1]) and alone.cka == {}
    assert (bars[0].total, bars[0].n) == (2 + 1 + 5, 8)

    other = copy.deepcopy(student)
    other.layers[1].mlp.up_proj.weight.data.mul_(-3)
    healthy = evaluate.healthy_of(evaluation, student)
    compared = evaluate.measure(evaluation, other, healthy, progress="degraded")
    assert list(compared.cka) == ["tokens", "samples", "b samples"]
    assert all(len(values) == 2 for kinds in compared.cka.values() for values in kinds.values())
    assert (bars[1].total, bars[1].n) == (8 + 5 + 4, 17)

    quiet = evaluate.measure(evaluation, student, healthy)
    assert alone.kl == {} and quiet.kl == pytest.approx({"perplexity": 0}, abs=1e-6)  # rounding
    kl = []
    for window in evaluation.windows["perplexity"]:
        with torch.no_grad():
            p, q = (m(torch.tensor([window[:-1]]))[0].log_softmax(-1) for m in (student, other))
        kl.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item())
    assert compared.kl == {"perplexity": pytest.approx(sum(kl) / len(kl), rel=1e-4)} and kl[0] > 0
    assert bars[2].disable and torch.equal(quiet.items["perplexity"], alone.items["perplexity"])
    assert all(v == pytest.approx([1, 1]) for kinds in quiet.cka.values() for v in kinds.values())


def test_levels_of_cka_are_those_of_the_estimators(small):
    """Tokens: the mean over the first task's sequences; samples: every task's last tokens."""
    student, tokenizer = small
    evaluation = evaluation_of(tokenizer)
    other = copy.deepcopy(student)
    other.layers[0].mlp.up_proj.weight.data.mul_(-3)
    x, y = (evaluate.states_of(evaluation, m) for m in (other, student))
    likeness, layers = evaluate.compare(x, y)
    a, b = ([cka.hidden_states(m, evaluation.sequences[task]) for m in (other, student)]
            for task in ("a", "b"))
    expected = {"tokens": cka.token_level(*a), "samples": cka.sample_level(*a),
                "b samples": cka.sample_level(*b)}
    assert list(likeness) == list(expected)
    for level, kinds in expected.items():
        assert likeness[level] == {kind: pytest.approx(v) for kind, v in kinds.items()}
    assert layers[1] == pytest.approx(cka.between_layers(*a)[1])


@pytest.mark.parametrize("choices", [
    [("abc", " xyz"), ("abc", " longer one")], [("", " longer one"), ("", " xyz")],
    [("ab", " xyz"), ("", " xyz")]])
def test_best_choice_is_the_likeliest_one(choices, small):
    """Checked against plain forwards, where an empty context is the separator of documents; whole
    sentences count in all. The blank before a choice is no character of it."""
    student, tokenizer = small
    example, scores = Example("", choices=choices), []
    tokenizer.added["<|endoftext|>"] = separator = 7
    for context, continuation in example.choices:
        c, t = tokenizer.encode(context) or [separator], tokenizer.encode(continuation)
        with torch.no_grad():
            logp = student(torch.tensor([c + t])).float().log_softmax(-1)[0]
        characters = len(continuation) - 1 if any(context for context, _ in choices) else 1
        scores.append(sum(logp[len(c) + i - 1, t[i]].item() for i in range(len(t))) / characters)
    other = Example("", choices=[("a b c d e", " y"), ("", " zz"), ("x", " w")])
    found = evaluate.choice_scores(student, tokenizer, [other, example], sdft.score)
    assert len(found[0]) == 3 and found[1] == pytest.approx(scores, abs=1e-4)
    evaluation, best = evaluation_of(tokenizer), scores.index(max(scores))
    asked = [dataclasses.replace(e, answer=best) for e in (other, example, other)]
    right = evaluate.chosen_right(evaluation, student, asked, lambda n: None, at_once=2)
    chosen = found[0].index(max(found[0]))
    assert right == [float(chosen == best), 1.0, float(chosen == best)]


def test_recovered_fraction_by_hand():
    def measured(*items):
        items = torch.tensor(items)
        return Measurement({"accuracy": items, "perplexity": items.log()}, [], {}, [])
    fraction = evaluate.recovered_fraction
    healthy, degraded = measured(1., 1, 1, 1, 1), measured(0., 0, 0, 0, 1)
    recovered = measured(1., 1, 1, 0, 0)
    assert fraction(healthy, degraded, recovered, "accuracy") == pytest.approx(0.5)
    healthy, degraded, recovered = measured(10., 10), measured(20., 20), measured(12., 12)
    assert fraction(healthy, degraded, recovered, "perplexity") == pytest.approx(0.8)
    assert fraction(degraded, healthy, recovered, "perplexity") is None  # it got better
    same = measured(1., 0, 1, 1)
    other = measured(1., 0, 0, 1)  # 25 points less, but 25 of noise
    assert fraction(same, other, same, "accuracy") is None


def test_a_broken_model_has_infinite_perplexity():
    broken = Measurement({"perplexity": torch.tensor([800.0])}, [], {}, [])
    assert broken.value("perplexity") == math.inf
    assert evaluate.chart([0.0, math.nan, 1.0], 0.0) == "▁?█"


def test_a_broken_model_is_valid_json():
    """JSON has no word for inf and nan: strict readers refuse what Python would write."""
    broken = {"a": [math.inf, (1.5, -math.inf)], "b": {"c": math.nan, "d": None, "e": "nan"}}
    assert json.loads(evaluate.to_json(broken)) == {
        "a": [None, [1.5, None]], "b": {"c": None, "d": None, "e": "nan"}}


# ---------------------------------------------------------------------------------- A step, shown

def test_trace_is_the_softmax_of_full_forwards_on_each_ones_own_prompt(small):
    """Probabilities and KL from logits of whole sequences; the teacher has three ids more."""
    student, tokenizer = small
    config = copy.copy(student.config)
    config.vocab_size += 3
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher = GPT(config).eval()
    texts = [("The symbol of tin is", "Tin: Sn. Now:"), ("x" * 120, "x")]
    prompts = [sdft.Prompt(tokenizer.encode(a), tokenizer.encode(b)) for a, b in texts]
    completions = [tokenizer.encode(" Sn\n") + [tokenizer.eos_id], list(range(40, 70))]
    shown = evaluate.trace(student, teacher, prompts, completions, tokenizer, sdft.score)
    assert json.loads(json.dumps(shown)) == shown
    assert [s["prompt"] for s in shown] == ["The symbol of tin is", "…" + "x" * 99]
    assert [t["token"] for t in shown[0]["tokens"]] == [" ", "S", "n", "\n", "<|im_end|>"]
    assert len(shown[1]["tokens"]) == 24  # of thirty
    v = student.config.vocab_size
    for prompt, completion, s in zip(prompts, completions, shown):
        for n, t in enumerate(s["tokens"]):
            with torch.no_grad():
                p_s, p_t = (m(torch.tensor([before + completion[:n]]))[0, -1, :v].softmax(-1)
                            for m, before in ((student, prompt.student), (teacher, prompt.teacher)))
            assert t["student"] == pytest.approx(p_s[completion[n]].item(), rel=1e-3)
            assert t["teacher"] == pytest.approx(p_t[completion[n]].item(), rel=1e-3)
            assert t["favourite"] == tokenizer.decode([p_t.argmax().item()], keep_special=True)
            assert t["kl"] == pytest.approx((p_t * (p_t / p_s).log()).sum().item(), rel=1e-3)


def test_trace_of_a_student_that_is_its_teacher_has_no_kl_and_ends_after_24_tokens(small):
    student, tokenizer = small
    prompts, completions = [sdft.Prompt([5, 6], [5, 6])] * 2, [[7, 8], list(range(3, 33))]
    shown = evaluate.trace(student, student, prompts, completions, tokenizer, sdft.score)
    assert [len(s["tokens"]) for s in shown] == [2, 24]
    for t in shown[0]["tokens"]:
        assert t["student"] == t["teacher"] and t["kl"] == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------ Words and pictures

def token(text, student, teacher, favourite, kl):
    """A token of a trace."""
    return {"token": text, "student": student, "teacher": teacher, "favourite": favourite, "kl": kl}


def made_up(step=True):
    """A run's results with made-up numbers."""
    kinds = dict.fromkeys(KINDS, [0.5, 0.75, 1.0])
    stages = {"healthy": {"task": 50.0, "perplexity": 10.0},
              "degraded": {"task": 20.0, "perplexity": 20.0},
              "recovered": {"task": 41.0, "perplexity": 12.0}}
    environment = {
        "damage": {"weights_quantized": 1234}, "text_tokens": 99, "text_window": 9,
        "text_sha256": "ab", "data_sha256": "cd", "eval_sha256": "ef", "eval_examples": {"task": 7},
        "lr": 1e-4, "weights_rms": 0.2, "peak_memory_gib": 1.5,
        "processor": "abacus", "processes": 1, "threads": 2}
    results = {
        "config": {"degrade": "int4", "forget": "tooluse", "student": "", "seed": 0,
                   "dtype": "float32"},
        "environment": environment, "stages": stages,
        "recovered_fraction": {"task": 0.7, "perplexity": None},
        "change": {"recovered": {"task": "better", "perplexity": "worse"}},
        "guard": {"recovered": {
            "watch": "loss", "steps": 9, "kept": 5, "ended": "", "seconds": 1.0,
            "checks": [{"step": 0, "all": 0.5}, {"step": 5, "all": 0.25}, {"step": 9, "all": 1}]}},
        "teacher": {"healthy": {"task": {"shown": 13.3, "bare": 46.7, "examples": 48,
                                         "helps": False}}},
        "cka": {level: {"degraded": kinds, "recovered": kinds} for level in ("tokens", "samples")},
        "cka_layers": {"recovered": [[1.0, 0.5, 0.2], [0.4, 0.9, 0.3], [0.1, 0.2, 0.8]]},
        "seconds": {"healthy": 30.0, "recovered": 90.0}}
    if step:
        first = [token(" Sn", 0.6, 0.013, " Pb$", 1.25), token("\n", 1.0, 0.994, "\n", 0.25)]
        last = [token(" Sn", 0.9, 0.88, " Sn", 0.5)]
        chat = {"prompt": "user\nWhat is the chemical symbol of tin?\nassistant\n"}
        results["step"] = {"recovered": {"first": [chat | {"tokens": first}],
                                         "last": [chat | {"tokens": last}]}}
    return results


ANSWERS = {stage: [("What is it?", f"It is\n{stage}.")]
           for stage in ("healthy", "degraded", "recovered")}


def test_text_tells_metrics_answers_cka_and_provenance():
    lines = evaluate.text(made_up(step=False), ANSWERS).splitlines()
    assert "task %                        50.00      20.00      41.00                0.70" in lines
    assert "perplexity                    10.00      20.00      12.00         not damaged" in lines
    assert "recovered: task better than before; perplexity WORSE than before the recovery" in lines
    assert ("  kept step 5 of 9 (loss on held-out prompts 0.500 → 0.250), in the end 1.000"
            ) in lines
    assert ("the teacher, healthy, on 48 training prompts of task: as it teaches 13 % right; "
            "bare 47 %") in lines
    assert any("the demonstration does not help it" in line for line in lines)
    assert ("learning rate 0.0001 on average, 0.0005 of the weights' root mean square, 0.2"
            ) in lines
    assert "  degraded   It is degraded." in lines
    assert "  linear_debiased recovered  ▁▅█  last 1.0000  mean 0.7500" in lines
    assert sum("A bar is a layer" in line for line in lines) == 1
    assert "damage forget tooluse, int4: 1,234 weights quantized" in lines
    assert not any("A step, shown" in line for line in lines)


def test_of_one_lost_row_nobody_knows_whether_it_was_damage():
    """One item has no standard error; two that are both lost have, and it is 0."""
    def measured(*right):
        return Measurement({"task": torch.tensor(right)}, [], {}, [])
    one = evaluate.recovered_fraction(measured(1.), measured(0.), measured(1.), "task")
    assert one is None
    two = [measured(*right) for right in ([1., 1], [0., 0], [1., 0])]
    assert evaluate.recovered_fraction(*two, "task") == 0.5
    found = made_up(step=False)
    found["recovered_fraction"]["task"] = one
    for n, says in ((1, "one row: unknown"), (2, "not damaged")):
        found["environment"]["eval_examples"] = {"task": n}
        line = next(x for x in evaluate.text(found, ANSWERS).splitlines() if x.startswith("task"))
        assert line.endswith("  " + says)


def test_a_step_is_shown_in_columns_before_recovery_beside_after():
    lines = evaluate.text(made_up(), ANSWERS).splitlines()
    start = lines.index("> user What is the chemical symbol of tin? assistant")
    assert lines[start + 1].split() == "before recovery: mean KL 0.75 after: mean KL 0.50".split()
    assert lines[start + 2].split() == "token student teacher prefers KL".split() * 2
    assert lines[start + 3].split() == "·Sn 60% 1% ·Pb$ 1.25 ·Sn 90% 88% 0.50".split()
    assert lines[start + 4].split() == r"\n 100% 99% 0.25".split()
    assert all(len(line) <= 100 for line in lines[start:start + 5])


@pytest.mark.parametrize("step", [True, False])
def test_the_picture_is_drawn_with_a_step_and_without(step, tmp_path):
    steps = [{"stage": "recovered", "step": i, "kl": 1 / (i + 1)} for i in range(5)]
    assert evaluate.draw(made_up(step), steps, tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_every_recovery_has_a_curve_of_what_it_has():
    """KL of sdft and kd, cross-entropy of sft, whichever came first."""
    sft = [{"stage": "recovered_sft", "step": i, "loss": 2.0} for i in range(3)]
    sdft = [{"stage": "recovered_sdft", "step": i, "loss": 9.0, "kl": 1.0} for i in range(3)]
    pyplot = evaluate.find_pyplot()
    for steps in (sft + sdft, sdft + sft):
        figure, axis = pyplot.subplots()
        evaluate.draw_curves(axis, steps)
        drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
        assert drawn == {"recovered_sft: cross-entropy": [2.0] * 3, "recovered_sdft: KL": [1.0] * 3}
        pyplot.close(figure)


def test_a_run_that_broke_is_shown_and_drawn(tmp_path, recwarn):
    """nan in the bars and in a trace; no CKA and no steps at all; a token that no font has."""
    results = made_up()
    results["cka"]["tokens"] = {"recovered": dict.fromkeys(KINDS, [math.nan, 0.5]),
                                "degraded": dict.fromkeys(KINDS, [0.5, 1.0])}
    broken = token("漢", math.nan, math.nan, "𒀀", math.nan)
    results["step"]["recovered"]["last"][0]["tokens"] = [broken] * 24
    assert "recovered  ?▁" in evaluate.text(results, {"healthy": []})
    evaluate.draw(results, [], tmp_path / "report.png")
    results["cka"], results["cka_layers"] = {}, {}
    assert "A bar is a layer" not in evaluate.text(results, {"healthy": []})
    evaluate.draw(results, [], tmp_path / "report.png")
    assert not recwarn.list


def test_nothing_is_drawn_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "find_pyplot", lambda: None)
    assert not evaluate.draw(made_up(), [], tmp_path / "report.png")
    assert not (tmp_path / "report.png").exists()
