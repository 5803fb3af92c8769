"""The guard: the step size that fits, the teacher that is asked, the student that is watched; and
that one architecture is every architecture, over whole tiny runs."""
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GPT2, QWEN2, QWEN3, SMOLLM3, make_folder, tiny
from torch.nn.utils import parametrize

import data
import evaluate
import guard
import prepare
import quant
import sdft
import train
from model import GPT, own_copy

pytestmark = pytest.mark.usefixtures("no_picture")
QUICK = ("--steps 6 --batch-size 4 --micro-batch 2 --rollout-tokens 6 --eval-tokens 4 --group-size "
         "16 --eval-limit 6 --cka-samples 5 --teacher-check 4").split()
KINDS = {"llama": {}, "gpt2": GPT2, "qwen2": QWEN2, "qwen3": QWEN3, "smollm3": SMOLLM3}


def job(folder, out, *more):
    return train.main(["--model", str(folder), "--out", str(out), *QUICK, *map(str, more)])


def results(out):
    return json.loads((out / "results.json").read_text())


def prepared(folder, out, *more):
    argv = ["--model", str(folder), "--out", str(out), *QUICK, *map(str, more)]
    return train.prepare(train.parse(argv))


# ------------------------------------------------------------------------------------- step size

def test_the_learning_rate_is_a_fraction_of_the_weights_rms(folder, tmp_path):
    student = GPT.from_pretrained(folder)
    weights = [p for name, p in student.named_parameters() if "layers" in name and p.dim() == 2]
    rms = torch.cat([w.flatten() for w in weights]).double().square().mean().sqrt().item()
    c = train.Config()
    assert prepare.learning_rates(c, student) == pytest.approx(
        {"lr": 5.2e-4 * rms, "forget_lr": 1.56e-3 * rms, "weights_rms": rms})
    lora = prepare.learning_rates(train.Config(lora=4), student)
    assert lora["lr"] == pytest.approx(10 * c.lr_fraction * rms)
    own = prepare.learning_rates(train.Config(lr=1e-3, forget_lr=1e-2), student)
    assert (own["lr"], own["forget_lr"]) == (1e-3, 1e-2)
    run = prepared(folder, tmp_path, "--forget", "tooluse", "--recover", "sdft,kd,sft")
    assert run.expert.lr == run.recoveries[0].lr == run.recoveries[2].lr == run.facts["lr"]
    assert run.forgetting.lr == run.facts["forget_lr"]
    bootstrap = prepared(folder, tmp_path, "--bootstrap", folder)
    assert bootstrap.expert.lr == run.facts["lr"]


def test_a_model_of_smaller_weights_takes_smaller_steps_by_as_much():
    """Everything but the norms a tenth: so is the step."""
    model = tiny()
    before = prepare.learning_rates(train.Config(), model)["lr"]
    for linear in quant.block_linears(model):
        linear.weight.data /= 10
    assert prepare.learning_rates(train.Config(), model)["lr"] == pytest.approx(before / 10)


def test_each_matrix_takes_steps_in_proportion_to_its_size():
    """By hand: root mean squares of 2 and 0.5 where lr is meant for 1; a vector takes lr, and none
    less than a tenth."""
    big, small = torch.tensor([[2.0, -2.0]]), torch.tensor([[0.5], [0.5]])
    vector, zeros = torch.tensor([3.0]), torch.zeros(1, 2)
    found = sdft.rates([big, small, vector, zeros], 0.1, 1.0)
    assert found == pytest.approx([0.2, 0.05, 0.1, 0.01])
    assert sdft.rates([big, small, vector, zeros], 0.1, 0.0) == [0.1] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_moves_each_weight_by_its_matrix_rate(dtype):
    """Adam's first step is the learning rate times the sign of the gradient."""
    model = tiny()
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _, update in sdft.steps(model, [[]], lr=1e-3, weights_rms=0.1, warmup=0, clip=1e9,
                                adam_dtype=dtype, progress=""):
        loss = sum(p.sum() for p in model.parameters())
        loss.backward()
        update({"loss": loss.item(), "tokens": 1})
    for name, p in model.named_parameters():
        rms = before[name].square().mean().sqrt().item() if p.dim() == 2 else 0.1
        assert (before[name] - p).mean().item() == pytest.approx(1e-3 * rms / 0.1, rel=1e-3), name


# ----------------------------------------------------------------------- the teacher that is asked

def test_right_answers_are_counted_in_both_forms(folder, tmp_path, monkeypatch):
    """A teacher that repeats what it was shown last is right with the demonstration, never bare."""
    run = prepared(folder, tmp_path, "--data", "science,tooluse,text")
    assert {task: len(of) for task, of in run.samples.items()} == {"science": 4, "tooluse": 4}
    seen = []

    def repeat(model, prompts, *args, **options):
        seen.extend(prompts)
        texts = [run.evaluation.tokenizer.decode(ids, keep_special=True) for ids in prompts]
        turns = [text.split("<|im_start|>assistant\n") for text in texts]
        told = [turn[1].split("<|im_end|>")[0] if len(turn) > 2 else "" for turn in turns]
        return [run.evaluation.tokenizer.encode(text) for text in told]
    monkeypatch.setattr(run.evaluation, "generate", repeat)
    found = guard.check_teacher(run.evaluation, run.teachers["base"], run.samples, "turn")
    assert found == {task: {"shown": 100, "bare": 0, "examples": 4, "helps": True}
                     for task in ("science", "tooluse")}
    assert len(seen) == 16
    e = run.samples["science"][0]
    for demo in ("turn", "none"):
        assert data.teacher_prompt(run.evaluation.tokenizer, e, demo) in seen
    quoted = guard.check_teacher(run.evaluation, run.teachers["base"], run.samples, "quote")
    assert not quoted["science"]["helps"] and quoted["science"]["shown"] == 0
    bare = guard.check_teacher(run.evaluation, run.teachers["base"], run.samples, "none")
    assert bare["science"]["helps"]  # there is none that could


def test_each_teacher_is_asked_once_before_it_teaches(folder, tmp_path, capsys):
    assert job(folder, tmp_path, "--recover", "sdft,kd,sft", "--teacher", f"healthy,{folder}") == 0
    asked = results(tmp_path)["teacher"]
    assert set(asked) == {"healthy", str(folder)} and set(asked["healthy"]) == {"science"}
    said = capsys.readouterr().out
    assert said.count("on 4 training prompts of science: as it teaches 0 % right; bare 0 %") == 2
    assert said.count("the demonstration does not help it") == 2
    assert job(folder, tmp_path, "--teacher-check", "0") == 0
    assert results(tmp_path)["teacher"] == {}


def test_forms_of_the_demonstration(folder):
    tokenizer, e = data.load_tokenizer(folder), data.science().train[5]
    texts = {demo: tokenizer.decode(data.teacher_prompt(tokenizer, e, demo)) for demo in data.DEMOS}
    assert [text.count(e.prompt) for text in texts.values()] == [2, 1, 1]
    assert [text.count(e.response) for text in texts.values()] == [1, 1, 0]
    assert all(text.count(e.system) == 1 for text in texts.values())
    assert data.teacher_prompt(tokenizer, e) == data.teacher_prompt(tokenizer, e, "turn")
    odd = data.Example("Fill {prompt}", "with {response} and {x}")
    for demo in ("turn", "quote"):
        assert odd.response in tokenizer.decode(data.teacher_prompt(tokenizer, odd, demo))


# -------------------------------------------------------------------- the student that is watched

class Script:
    """A student of one weight, which is the number of the step, and what is measured of it."""

    def __init__(self, values, **settings):
        self.student = torch.nn.Linear(1, 1, bias=False)
        self.student.weight.data.fill_(0)
        self.values = iter(values)
        self.watch = guard.Watch(self.student, self.value, every=1, **settings)

    def value(self):
        v = next(self.values)
        return v if isinstance(v, tuple) else ({"all": v}, {})

    def steps(self, n):
        """What the watch says after each of n steps."""
        found = []
        for _ in range(n):
            self.student.weight.data += 1
            found.append(self.watch())
        return found

    def kept(self, **how):
        self.watch.restore(**how)
        return self.student.weight.item()


def test_the_best_weights_are_kept_and_put_back():
    script = Script([1.0, 0.5, 0.2, 0.3])
    assert script.steps(3) == [False] * 3
    assert script.kept() == script.watch.kept == 2
    assert [c["step"] for c in script.watch.checks] == [0, 1, 2, 3]
    last = Script([1.0, 0.5, 0.2, 0.3])
    last.steps(3)
    assert last.kept(keep="last") == last.watch.kept == 3


def test_the_first_check_is_before_any_step():
    script = Script([0.5, 0.6, 0.7])
    script.steps(2)
    assert script.kept() == script.watch.kept == 0


def test_the_last_step_is_checked_too():
    script = Script([1.0, 0.5, 0.1])
    script.watch.every = 2
    assert script.steps(3) == [False] * 3
    assert script.kept() == 3


def by_prompt(task, text):
    """What a watch measures: four prompts' losses on each of two tasks."""
    task, text = (torch.tensor(losses, dtype=torch.float64) for losses in (task, text))
    return {"all": torch.cat([task, text]).mean().item()}, {"task": task, "text": text}


def test_no_task_may_be_worse_than_before_if_strict():
    """By two paired standard errors: text rises by 0.1, at each prompt, then by 0.1 ± 0.1."""
    values = [by_prompt([2.0, 2, 2, 2], [0.2, 0.3, 0.4, 0.5]),
              by_prompt([0.5, 0.5, 0.5, 0.5], [0.3, 0.4, 0.5, 0.6]),
              by_prompt([1.0, 1, 1, 1], [0.6, 0.3, 0.4, 0.5]),
              by_prompt([0.2, 0.2, 0.2, 0.2], [0.2, 0.3, 0.5, 0.9])]
    strict, free = Script(values, strict=True), Script(values)
    for script in (strict, free):
        script.steps(2)
    assert (strict.kept(), free.kept()) == (2, 1)
    assert strict.watch.checks[1]["worse"] == ["text"] and "worse" not in free.watch.checks[1]
    strict.steps(1)
    assert strict.kept() == 3  # by 0.125 ± 0.095


@pytest.mark.parametrize("far", [2.51, math.inf, math.nan])
def test_far_above_the_start_ends_the_training(far):
    script = Script([1.0, 2.49, 0.9, far])
    assert script.steps(3) == [False, False, True]
    assert "step 3" in script.watch.ended and "1" in script.watch.ended
    assert script.kept(keep="last") == 2  # then, too


def test_patience_counts_the_checks_without_a_better_one():
    script = Script([1.0, 0.9, 0.95, 0.91, 0.5], patience=2)
    assert script.steps(3) == [False, False, True]
    assert not script.watch.ended


@pytest.mark.parametrize("how", ["sdft", "sft"])
def test_what_is_watched_is_the_loss_on_what_is_never_trained_on(how, folder, tmp_path):
    """Against the loss by hand, of each held-out prompt alone, in float32."""
    run = prepared(folder, tmp_path, "--recover", how, "--dtype", "float32", "--loss", "reverse_kl",
                   "--degrade", "int2")
    student = train.make_degraded(run, train.make_healthy(run))
    lesson = run.recoveries[0]
    trained = {(*p.student, *p.answer) for batch in lesson.batches for p in batch}
    held_out = [p for of in lesson.held_out.values() for p in of]
    assert [len(of) for of in lesson.held_out.values()] == [16, 16]
    assert not trained & {(*p.student, *p.answer) for p in held_out}
    assert any(p.student != p.teacher for p in held_out)
    sums, alone, teacher = {}, {}, run.teachers["healthy"]
    for task, prompts in lesson.held_out.items():
        total, n, losses = 0.0, 0, []
        for p in prompts:
            s = student.head(sdft.score(student, [p.student], [p.answer])[-1])
            t = teacher.head(sdft.score(teacher, [p.teacher], [p.answer])[-1])
            loss = sdft.reverse_kl(s, t, torch.ones(len(s)))
            if how == "sft":
                loss = F.cross_entropy(s, torch.tensor(p.answer))
            total, n = total + loss.item() * len(s), n + len(s)
            losses.append(loss.item())
        sums[task] = total, n
        alone[task] = losses
    found, prompts = guard.held_out_loss(run, student, lesson)()
    total, n = (sum(x) for x in zip(*sums.values()))
    by_hand = {"all": total / n, **{task: total / n for task, (total, n) in sums.items()}}
    assert found == pytest.approx(by_hand, rel=1e-4)
    assert {task: of.tolist() for task, of in prompts.items()} == {
        task: pytest.approx(of, rel=1e-4, abs=1e-6) for task, of in alone.items()}


def test_the_kept_weights_are_those_of_the_check_and_are_in_the_report(folder, tmp_path, capsys):
    """The student on disk has the held-out loss that the report names."""
    assert job(folder, tmp_path, "--steps", "10", "--lr", "3e-2", "--dtype", "float32",
               "--degrade", "int2") == 0
    found, said = results(tmp_path)["guard"]["recovered"], capsys.readouterr().out
    checks = {c["step"]: c["all"] for c in found["checks"]}
    assert sorted(checks) == [0, 7, 10] and found["ended"] == ""
    assert f"kept step {found['kept']} of 10" in said
    run = prepared(folder, tmp_path / "again", "--dtype", "float32", "--degrade", "int2")
    run.teachers["healthy"] = run.teachers["base"]
    saved = GPT.from_pretrained(tmp_path / "student")
    value = guard.held_out_loss(run, saved, run.recoveries[0])()[0]["all"]
    assert value == pytest.approx(checks[found["kept"]], rel=1e-4)


@pytest.mark.parametrize("kept, says", [
    (10, "kept step 10 of 10 (loss on held-out prompts 1.000 → 0.400)"),
    (5, "kept step 5 of 10 (loss on held-out prompts 1.000 → 0.500), in the end 0.400, worse on b "
     "than before"),
    (0, "kept step 0 of 10 (loss on held-out prompts 1.000 → 1.000), in the end 0.400, worse on b "
     "than before; no later step was kept: try a smaller --lr")])
def test_the_line_that_says_what_was_kept_and_why(kept, says):
    checks = [{"step": 0, "all": 1, "a": 1, "b": 1}, {"step": 5, "all": 0.5, "a": 0.4, "b": 1},
              {"step": 10, "all": 0.4, "a": 0.1, "b": 1.1, "worse": ["b"]}]
    found = {"watch": "loss", "steps": 10, "checks": checks, "kept": kept, "ended": ""}
    assert evaluate.guard_line(found) == says
    del checks[-1]["worse"]
    assert "worse on" not in evaluate.guard_line(found)


@pytest.mark.parametrize("recover", ["sdft", "kd", "sft"])
def test_a_step_size_far_too_large_ends_in_one_line_with_the_weights_as_they_were(
        recover, folder, tmp_path, capsys):
    assert job(folder, tmp_path / "out", "--lr", "1e9", "--recover", recover) == 1
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in shown.err
    said = "step 1", "1e+09", "try a tenth of it by --lr", "prompts from"
    assert all(word in lines[0] for word in said)
    assert "ended early" in shown.out
    job(folder, tmp_path / "none", "--recover", "none")
    ours, damaged = (GPT.from_pretrained(tmp_path / name / "student") for name in ("out", "none"))
    for (name, p), q in zip(ours.named_parameters(), damaged.parameters()):
        assert torch.equal(p, q), name
    found = results(tmp_path / "out")
    assert found["stages"]["recovered"] == found["stages"]["degraded"]
    assert found["guard"]["recovered"]["kept"] == 0 and found["guard"]["recovered"]["ended"]


def test_a_forgetting_that_breaks_ends_in_one_line(folder, tmp_path, capsys):
    assert job(folder, tmp_path, "--forget", "tooluse", "--forget-lr", "1e9") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "--forget-lr" in lines[0]
    assert not (tmp_path / "results.json").exists()


def test_few_examples_are_watched_though_they_are_trained_on():
    task = data.Task("few", [data.Example(str(n), str(n)) for n in range(3)], {})
    left, held_out = data.hold_out(task, 16)
    assert left.train == task.train and held_out == [task.train[0]]
    task.train = [data.Example(str(n), str(n)) for n in range(100)]
    left, held_out = data.hold_out(task, 16)
    assert len(held_out) == 12 and len(left.train) == 88
    assert not {e.prompt for e in left.train} & {e.prompt for e in held_out}
    one = data.Task("one", [data.Example("the same")] * 9, {})
    assert data.hold_out(one, 16)[0].train == one.train  # or nothing would be left


def test_every_text_of_the_real_task_has_something_to_continue_with(folder):
    """At most half of a text is its prompt: what is left is the expert's answer."""
    tokenizer = data.load_tokenizer(folder)
    for e in data.load_task("text").train[:50]:
        ids = tokenizer.encode(e.prompt)
        for n in (16, 48, 10_000):
            prompt = data.student_prompt(tokenizer, e, n)
            assert prompt + data.expert_answer(tokenizer, e, n) == ids
            assert len(prompt) == min(n, len(ids) // 2)


def test_tasks_of_one_name_are_all_watched(folder, tmp_path):
    (tmp_path / "science.txt").write_text("\n\n".join(f"Text {n}. " * 60 for n in range(20)))
    run = prepared(folder, tmp_path / "out", "--data", f"science,{tmp_path}/science.txt")
    watched, = (lesson.held_out for lesson in run.recoveries)
    assert len(watched["science"]) == 16 + 2


# ------------------------------------------------------------------------------- the architectures

@pytest.mark.parametrize("number, degrade", [*enumerate(["nf4", "ffn20,int4", "wanda30"])])
@pytest.mark.parametrize("kind", KINDS)
def test_three_recoveries_of_one_damage(kind, number, degrade, tmp_path):
    """Each as if alone, on every architecture: biases in bfloat16 once ended in a traceback. All
    pairs of architecture, damage and type."""
    dtype = ["bfloat16", "float32"][([*KINDS].index(kind) + number) % 2]
    model = make_folder(tmp_path / kind, **KINDS[kind])
    common = "--degrade", degrade, "--dtype", dtype, "--steps", "2", "--keep", "last"
    assert job(model, tmp_path / "all", *common, "--recover", "sdft,kd,sft") == 0
    stages = results(tmp_path / "all")["stages"]
    assert job(model, tmp_path / "kd", *common, "--recover", "kd") == 0
    assert results(tmp_path / "kd")["stages"]["recovered"] == stages["recovered_kd"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_shares_nothing_with_its_original(kind):
    """No class, no parameter, no buffer; a parametrization of the one does not reach the other."""
    model = tiny(**KINDS[kind])
    quant.quantize_(model, "nf4")
    ours = own_copy(model)
    for (name, a), b in zip(model.named_modules(), ours.modules()):
        assert a is not b
        if parametrize.is_parametrized(a):
            assert type(a) is not type(b) and type(a).__bases__ == type(b).__bases__, name
    theirs = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not theirs & {t.data_ptr() for t in (*ours.parameters(), *ours.buffers())}
    ids = torch.arange(6)[None]
    before = model(ids)
    assert torch.equal(ours(ids), before)
    with torch.no_grad(), parametrize.cached():
        assert torch.equal(model(ids), before)
        ours.stored("layers.0.self_attn.q_proj.weight").mul_(2)
        assert not torch.equal(ours(ids), before)  # not the original's, out of the cache
    quant.compute_in_(ours, torch.bfloat16)
    assert torch.equal(model(ids), before)
    quant.bake_(ours)
    assert torch.equal(model(ids), before)
    assert torch.equal(own_copy(model)(ids), before)


def test_deepcopy_alone_would_share_the_class():
    """If torch ever mends this, own_copy can go."""
    model = tiny(**QWEN2)
    quant.quantize_(model, "nf4")
    linear = model.layers[0].self_attn.q_proj
    assert type(copy.deepcopy(model).layers[0].self_attn.q_proj) is type(linear)
