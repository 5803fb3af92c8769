"""The command line on a tiny random model: the whole job, its files, what each option does."""
import contextlib
import io
import json
import math

import pytest
import torch
from conftest import GPT2, QWEN2, QWEN3, make_folder
from transformers import AutoModelForCausalLM

import data
import evaluate
import fast
import parallel
import sdft
import train
from damage import damage_
from model import GPT, generate
from quant import compute_in_

pytestmark = pytest.mark.usefixtures("no_picture")  # the first run alone has it
QUICK = ["--steps", "3", "--batch-size", "4", "--micro-batch", "2", "--rollout-tokens", "6",
         "--eval-tokens", "4", "--eval-limit", "6", "--cka-samples", "5", "--group-size", "16",
         "--lr", "1e-3", "--teacher-check", "4", "--keep", "last"]  # the guard: test_guard.py
KINDS = {"llama": {}, "gpt2": GPT2, "qwen2": QWEN2, "qwen3": QWEN3}  # of model folders


def job(folder, out, *more):
    return train.main(["--model", str(folder), "--out", str(out), *QUICK, *map(str, more)])


def results(out):
    return json.loads((out / "results.json").read_text())


def logged(out):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def prepared(folder, out, *more):
    """What `train.prepare` makes of a command line."""
    argv = ["--model", str(folder), "--out", str(out), *QUICK, *map(str, more)]
    return train.prepare(train.parse(argv))


@pytest.fixture(scope="module")
def first_run(folder, tmp_path_factory):
    """The default run: its --out, and what it said on stdout and on stderr."""
    out, said, bars = tmp_path_factory.mktemp("run"), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(bars):
        assert job(folder, out) == 0
    return out, said.getvalue(), bars.getvalue()


@pytest.fixture
def out(first_run):
    return first_run[0]


# ------------------------------------------------------------------------------- the default run

def test_results_hold_what_the_contract_names(out):
    r = results(out)
    metrics = {"science_phrasing", "science_element", "perplexity"}
    assert r["config"]["degrade"] == "int4" and r["config"]["seed"] == 0
    assert set(r["stages"]) == {"healthy", "degraded", "recovered"}
    assert all(set(stage) == metrics for stage in r["stages"].values())
    assert set(r["recovered_fraction"]) == metrics
    assert r["stages"]["degraded"]["perplexity"] != r["stages"]["healthy"]["perplexity"]
    for level in ("tokens", "samples"):
        for stage in ("degraded", "recovered"):
            assert [len(v) for v in r["cka"][level][stage].values()] == [2] * 5
    assert r["kl"]["perplexity"].keys() == {"degraded", "recovered"} and r["along"] == {}
    for stage, items in r["items"].items():
        right = items["science_phrasing"]
        assert r["stages"][stage]["science_phrasing"] == pytest.approx(
            100 * right.count("1") / len(right))
        nats = list(map(float, items["perplexity"].split()))
        assert r["stages"][stage]["perplexity"] == pytest.approx(
            math.exp(sum(nats) / len(nats)), rel=1e-3)
    assert set(r["seconds"]) == {"healthy", "degraded", "asking healthy", "recovered training",
                                "recovered"}
    assert {"text_sha256", "text_tokens", "data_sha256", "eval_examples",
            "context_length"} <= set(r["environment"])
    lines = logged(out)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["loss"] > 0 for line in lines)
    assert (out / "report.png").stat().st_size > 10_000


def test_what_is_done_is_said_as_it_happens_and_what_was_written_at_the_end(first_run):
    """Bars on stderr, each with its stage's name; the report, and then the files, on stdout."""
    out, said, bars = first_run
    for name in ("measure healthy", "measure degraded", "recovered", "measure recovered"):
        assert f"{name}: 100%" in bars
    last = said.splitlines()[-1]
    assert last == f"wrote {out}/results.json, metrics.jsonl, student/, report.png"
    assert "recovered fraction" in said and "A step, shown (recovered)" in said
    assert {path.name for path in out.iterdir()} == {
        "results.json", "metrics.jsonl", "student", "report.png"}


def test_student_loaded_again_gives_the_recovered_numbers_again(folder, out):
    run, found = prepared(folder, out / "again"), results(out)
    healthy = evaluate.healthy_of(run.evaluation, run.teachers["base"])
    student = GPT.from_pretrained(out / "student").eval()
    student = compute_in_(student, getattr(torch, run.config.dtype))
    again = evaluate.measure(run.evaluation, student, healthy)
    assert {m: again.value(m) for m in again.items} == found["stages"]["recovered"]
    assert again.cka == {level: stages["recovered"] for level, stages in found["cka"].items()}


def test_student_loads_in_transformers_and_lies_on_the_grid(out):
    ids = torch.randint(0, 259, (2, 20), generator=torch.Generator().manual_seed(0))
    ours = GPT.from_pretrained(out / "student").eval()
    theirs = AutoModelForCausalLM.from_pretrained(out / "student").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    for name, w in ours.named_parameters():
        if name.endswith("_proj.weight"):
            groups = w.detach().reshape(-1, 16)
            steps = groups / groups.abs().amax(1, keepdim=True) * 7
            torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)


def test_same_seed_same_numbers_other_seed_other_rollouts(folder, out, tmp_path):
    job(folder, tmp_path / "same")
    job(folder, tmp_path / "other", "--seed", "1")
    a, b, c = (results(p) for p in (out, tmp_path / "same", tmp_path / "other"))
    assert a["stages"] == b["stages"] and a["cka"] == b["cka"] and a["step"] == b["step"]
    assert a["stages"]["degraded"] == c["stages"]["degraded"]
    assert a["stages"]["recovered"] != c["stages"]["recovered"]


# ------------------------------------------------------------------------------ plain and fast.py

@pytest.mark.parametrize("kind, options", [
    ("llama", ""), ("llama", "--loss jsd --lora 4"), ("llama", "--cka-weight 1"),
    ("llama", "--recover sdft,kd,sft"), ("gpt2", "--train-embeddings"),
    ("qwen2", "--train-embeddings --loss reverse_kl --micro-batch 4"),
    ("qwen3", "--degrade ffn25,magnitude30,nf4 --cka-weight 1 --lora 4")])
def test_a_plain_run_gives_the_numbers_of_the_default_one(kind, options, tmp_path):
    """All that fast.py does differently is the order of sums."""
    folder, options = make_folder(tmp_path / "model", **KINDS[kind]), options.split()
    for name, more in (("fast", []), ("plain", ["--plain"])):
        assert job(folder, tmp_path / name, "--dtype", "float32", *options, *more) == 0
    a, b = (results(tmp_path / name) for name in ("fast", "plain"))
    assert (a["config"]["plain"], b["config"]["plain"]) == (False, True)
    assert list(a["stages"]) == list(b["stages"]) and list(a["cka"]) == list(b["cka"])
    for stage, values in a["stages"].items():
        assert b["stages"][stage] == pytest.approx(values, rel=1e-4), stage
    for level, stages in a["cka"].items():
        for stage, kinds in stages.items():
            for estimator, values in kinds.items():
                theirs = b["cka"][level][stage][estimator]
                assert theirs == pytest.approx(values, abs=1e-4), (level, stage, estimator)
    fast, plain = logged(tmp_path / "fast"), logged(tmp_path / "plain")
    assert len(fast) == len(plain) == (9 if "--recover" in options else 3)
    for x, y in zip(fast, plain):
        for number in x.keys() - {"seconds"}:
            expected = x[number] if number == "stage" else pytest.approx(x[number], rel=1e-4)
            assert y[number] == expected, (x["stage"], x["step"], number)


def test_only_a_plain_run_does_without_fast(folder, tmp_path, monkeypatch):
    called = []
    for name in ("score", "backward", "generate", "keep_freed_memory"):
        monkeypatch.setattr(fast, name, lambda *_, name=name, **__: called.append(name))

    def chosen(*options):
        run = prepared(folder, tmp_path, *options)
        asked = run.evaluation
        assert (asked.score, asked.generate) == (run.score, run.generate)
        return run.score, run.backward, run.generate
    assert chosen("--plain") == (sdft.score, sdft.backward, generate) and not called
    assert chosen() == (fast.score, fast.backward, fast.generate)
    assert called == ["keep_freed_memory"]


# --------------------------------------------------------------------------------- a step, shown

def test_a_step_shows_the_first_rollout_and_what_the_student_says_in_the_end(
        folder, tmp_path, monkeypatch):
    """The tokens of the run's own first rollout; at the end, those of the saved student."""
    rollouts, rollout_of = [], train.rollout_of

    def spied(*asked):
        rollout = rollout_of(*asked)

        def spy(student, prompts):
            rollouts.append((prompts, rollout(student, prompts)))
            return rollouts[-1][1]
        return spy
    monkeypatch.setattr(train, "rollout_of", spied)
    assert job(folder, tmp_path, "--dtype", "float32", "--seed", "5", "--lr", "1e-2") == 0
    shown, tokenizer = results(tmp_path)["step"], data.load_tokenizer(folder)
    assert list(shown) == ["recovered"] and set(shown["recovered"]) == {"first", "last"}
    first, last = shown["recovered"]["first"], shown["recovered"]["last"]
    assert len(first) == len(last) == 2  # a question and a text
    student, generator = GPT.from_pretrained(tmp_path / "student"), torch.Generator().manual_seed(5)
    (prompts, begun), c = rollouts[0], train.Config()
    ended = generate(student.eval(), prompts, 6, c.temperature, c.top_p, tokenizer.eos_id,
                     generator)
    for i in range(2):
        assert first[i]["prompt"] == last[i]["prompt"]
        assert tokenizer.decode(prompts[i]).endswith(first[i]["prompt"].removeprefix("…"))
        for trace, completion in ((first[i], begun[i]), (last[i], ended[i])):
            said = [tokenizer.decode([token], keep_special=True) for token in completion]
            assert [t["token"] for t in trace["tokens"]] == said
            for t in trace["tokens"]:
                assert 0 <= t["student"] <= 1 and 0 <= t["teacher"] <= 1 and t["kl"] > -1e-6
    assert first != last


@pytest.mark.parametrize("options, stages", [
    ("--recover kd,sft,none", []),
    ("--batch-size 1 --recover sdft,sft --teacher base,healthy",
     ["recovered_sdft_base", "recovered_sdft_healthy"])])
def test_a_step_is_shown_of_every_recovery_by_sdft(options, stages, folder, tmp_path):
    assert job(folder, tmp_path, *options.split()) == 0
    shown = results(tmp_path)["step"]
    assert list(shown) == stages
    for traces in shown.values():
        assert len(traces["first"]) == len(traces["last"]) == 1  # of one prompt


# ---------------------------------------------------------------------- tasks, damages, training

def test_other_tasks_losses_and_files(folder, tmp_path, capsys):
    words = "red green blue white black pink gold teal gray plum".split()
    rows = [{"prompt": f"Say {w}.", "response": w} for w in words]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    choices = [{"prompt": "One and one is", "choices": ["two", "three"], "answer": 0},
               {"contexts": ["The cat, black,", "The dog, black,"], "continuation": "purrs.",
                "answer": 0}] * 3
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, choices)))
    own = "A text of one's own, to measure perplexity on. "
    (tmp_path / "own.txt").write_text(own * 40)
    assert job(folder, tmp_path / "out", "--data", f"{tmp_path}/words.jsonl,tooluse",
               "--eval", f"{tmp_path}/choices.jsonl", "--text", f"{tmp_path}/own.txt",
               "--loss", "jsd", "--demo", "none", "--no-symmetric", "--degrade", "int2") == 0
    r = results(tmp_path / "out")
    assert set(r["stages"]["healthy"]) == {
        "words_held_out", "tooluse_request", "choices_all", "perplexity"}
    assert r["environment"]["eval_examples"]["choices_all"] == 2  # of six rows two differ
    said = capsys.readouterr().out
    assert "recovered fraction" in said
    assert said.endswith("/results.json, metrics.jsonl, student/\n")  # and no picture


@pytest.mark.parametrize("damage, counts", [
    ("nf4", {"weights_quantized": 18_432}),
    ("ffn", {"neurons": 128, "neurons_removed": 12}),
    ("wanda2:4,nf4", {"weights_held_at_zero": 9_216, "weights_quantized": 18_432}),
    ("ffn50,wanda,mxfp4", {"neurons": 128, "neurons_removed": 64, "weights_held_at_zero": None,
                           "weights_quantized": 12_288}),
    ("wanda,nvfp4", {"weights_held_at_zero": None, "weights_quantized": 18_432}),
    ("int4,wanda,ffn50", {"neurons": 128, "neurons_removed": 64, "weights_held_at_zero": None,
                          "weights_quantized": 12_288})])
def test_damages_compose_and_are_counted(damage, counts, folder, tmp_path, capsys):
    assert job(folder, tmp_path, "--degrade", damage, "--double-quant") == 0
    found = results(tmp_path)["environment"]["damage"]
    assert found.keys() == counts.keys() and all(found[k] == n for k, n in counts.items() if n)
    said, bars = capsys.readouterr()
    assert f"damage {damage}: " in said and ("calibrate: 100%" in bars) == (damage != "nf4")
    ours = GPT.from_pretrained(tmp_path / "student")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids = torch.arange(3, 23)[None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert ours.config.d_ff == 64 - counts.get("neurons_removed", 0) // 2
    if "wanda" in damage:
        w = ours.layers[0].self_attn.q_proj.weight
        assert (w == 0).float().mean() >= (0.5 if "2:4" in damage else 0.28)


@pytest.mark.parametrize("options", [
    ["--lora", "16"], ["--adam-dtype", "bfloat16"],
    ["--gradient-checkpointing", "--train-embeddings"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ways_of_training(options, dtype, folder, tmp_path):
    """What is trained changes, and nothing else: embeddings only where they are asked for."""
    more = "--steps", "8", "--lr", "1e-2", "--dtype", dtype, *options
    assert job(folder, tmp_path, *more) == 0
    assert results(tmp_path)["config"]["dtype"] == dtype and logged(tmp_path)[0]["loss"] > 0
    before, after = GPT.from_pretrained(folder), GPT.from_pretrained(tmp_path / "student")
    changed = (after.embed_tokens.weight != before.embed_tokens.weight).any()
    rounded = "--lora" in options and dtype == "bfloat16"  # LoRA holds the rest in bfloat16
    assert changed == ("--train-embeddings" in options or rounded)


# --------------------------------------------------------------------- teachers, ways, histories

@pytest.mark.parametrize("options", ["--lora 2", "--train-embeddings"])
def test_half_of_the_way_is_the_mean_of_both_ends(options, folder, tmp_path, monkeypatch):
    """Of the weights, not of LoRA's two factors."""
    found = []
    monkeypatch.setattr(train, "measure_along", lambda run, student, *_: found.append(
        parallel.plain_copy(student, torch.float32).state_dict()))
    assert job(folder, tmp_path, *options.split(), "--degrade", "none", "--dtype", "float32",
               "--lr", "0.1", "--interpolate", "0.5") == 0
    (half,), start = found, GPT.from_pretrained(folder).state_dict()
    end = GPT.from_pretrained(tmp_path / "student").state_dict()
    for name, w in half.items():
        torch.testing.assert_close(w, (start[name] + end[name]) / 2, rtol=1e-4, atol=1e-5)
    assert any((end[name] - w).abs().max() > 0.01 for name, w in half.items())


@pytest.mark.parametrize("options", ["--lora 2", "--degrade none --recover sft --anchor 0.5"])
def test_a_recovery_is_measured_on_its_way_and_between_its_two_ends(options, folder, tmp_path):
    """Which changes nothing of it. Halfway of the way is a model of its own."""
    assert job(folder, tmp_path / "a", *options.split(), "--steps", "5", "--measure-every", "2",
               "--interpolate", ".0001,.5,.9999") == 0
    assert job(folder, tmp_path / "b", *options.split(), "--steps", "5") == 0
    a, b = results(tmp_path / "a"), results(tmp_path / "b")
    assert a["stages"] == b["stages"] and a["cka"] == b["cka"]
    points = a["along"]["recovered"]
    assert [(p["step"], p["part"]) for p in points] == [
        (2, None), (4, None), (5, 0.0001), (5, 0.5), (5, 0.9999), (5, None)]
    assert points[-1]["values"] == a["stages"]["recovered"]
    assert points[-1]["items"] == a["items"]["recovered"]
    assert points[-1]["kl"]["perplexity"] == a["kl"]["perplexity"]["recovered"]
    last = a["cka"]["tokens"]["recovered"]["linear"]
    assert points[-1]["cka"]["tokens"]["linear"] == [last[-1], sum(last) / len(last)]
    kl = [p["kl"]["perplexity"] for p in points]
    assert kl[2] == pytest.approx(a["kl"]["perplexity"].get("degraded", 0), abs=1e-5)
    assert kl[4] == pytest.approx(kl[5], rel=1e-2) and len(set(kl)) == 6
    assert 0 < points[0]["seconds"] < points[1]["seconds"] < points[-1]["seconds"]


def test_own_answers_are_what_the_teacher_says_with_the_demonstration_before_it(folder, tmp_path):
    run = prepared(folder, tmp_path, "--recover", "own")
    lesson, = run.recoveries
    teacher = run.teachers["base"]
    tokens = []
    for batch in lesson.batches:
        said = generate(teacher, [p.teacher for p in batch], 6, temperature=0,
                        eos_id=run.evaluation.tokenizer.eos_ids)
        assert train.own_answers(run, teacher, batch) == said != [p.answer for p in batch]
        tokens.append(sum(map(len, said)))
    assert job(folder, tmp_path, "--recover", "own", "--lr", "1e-2") == 0
    lines = logged(tmp_path)
    assert [line["tokens"] for line in lines] == tokens and lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("recover", ["kd", "sft", "none"])
def test_baselines(recover, folder, tmp_path):
    """On the same prompts; fine-tuning lowers its loss, and none leaves the student as it was."""
    assert job(folder, tmp_path, "--recover", recover, "--steps", "8", "--lr", "1e-2",
               "--data", "science,tooluse,text") == 0
    lines, stages = logged(tmp_path), results(tmp_path)["stages"]
    if recover == "none":
        assert not lines and stages["recovered"] == stages["degraded"]
    else:
        assert len(lines) == 8 and ("kl" in lines[0]) == (recover == "kd")
        assert stages["recovered"] != stages["degraded"]
        assert recover == "kd" or lines[-1]["loss"] < lines[0]["loss"]


FORGET = "--forget", "tooluse", "--expert-steps", "2", "--forget-steps", "4", "--forget-lr", "1e-2"


def test_forgetting_measures_four_stages_and_two_teachers(folder, tmp_path):
    """base -> expert (healthy) -> fine-tuned on another task (degraded) -> recovered by each
    teacher from the same weights."""
    assert job(folder, tmp_path, *FORGET, "--teacher", "base,healthy") == 0
    r, recovered = results(tmp_path), {"recovered_base", "recovered_healthy"}
    assert list(r["stages"]) == [
        "base", "healthy", "degraded", "recovered_base", "recovered_healthy"]
    assert set(r["stages"]["base"]) == {
        "science_phrasing", "science_element", "tooluse_request", "perplexity"}
    perplexities = [stage["perplexity"] for stage in r["stages"].values()]
    assert len(set(perplexities)) == 5 and set(r["recovered_fraction"]) == recovered
    assert set(r["cka"]) == {"tokens", "samples", "tooluse samples"}
    assert set(r["cka"]["tooluse samples"]) == set(r["cka_layers"]) == {"degraded", *recovered}
    lines = logged(tmp_path)
    steps = {"healthy": 2, "degraded": 4, "recovered_base": 3, "recovered_healthy": 3}
    assert [line["stage"] for line in lines] == [
        stage for stage, n in steps.items() for _ in range(n)]
    assert lines[5]["loss"] < lines[2]["loss"]
    for name in ("student_base", "student_healthy"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert job(folder, tmp_path / "alone", *FORGET, "--teacher", "base") == 0
    alone = results(tmp_path / "alone")["stages"]
    assert alone["recovered"] == r["stages"]["recovered_base"]  # none disturbs another


def test_forgetting_is_the_only_damage_unless_another_is_asked_for(folder, tmp_path, capsys):
    assert job(folder, tmp_path / "alone", *FORGET, "--recover", "none") == 0
    assert "damage forget tooluse: no weight of it by our hand" in capsys.readouterr().out
    assert job(folder, tmp_path / "both", *FORGET, "--recover", "none", "--degrade", "int4") == 0
    assert "damage forget tooluse, int4: 18,432 weights quantized" in capsys.readouterr().out
    alone, both = results(tmp_path / "alone"), results(tmp_path / "both")
    assert (alone["config"]["degrade"], alone["environment"]["damage"]) == ("none", {})
    assert both["environment"]["damage"] == {"weights_quantized": 18_432}
    assert logged(tmp_path / "alone")[0]["loss"] == logged(tmp_path / "both")[0]["loss"]
    assert alone["stages"]["healthy"] == both["stages"]["healthy"]
    assert alone["stages"]["degraded"] != both["stages"]["degraded"]


def test_an_expert_is_made_with_demonstrations_even_if_recovery_has_none(folder, tmp_path):
    """Without them its teacher, the model itself, would have nothing to teach."""
    assert job(folder, tmp_path, *FORGET, "--demo", "none") == 0
    expert = logged(tmp_path)[:2]
    assert all(line["stage"] == "healthy" and line["grad_norm"] > 0 for line in expert)


def test_several_ways_of_recovery_are_each_as_alone(folder, tmp_path):
    job(folder, tmp_path / "all", "--recover", "sdft,sft,none", "--teacher", "base")
    stages = results(tmp_path / "all")["stages"]
    for how in ("sdft", "sft", "none"):
        job(folder, tmp_path / how, "--recover", how)
        assert results(tmp_path / how)["stages"]["recovered"] == stages[f"recovered_{how}"]


def test_a_damaged_folder_and_any_teacher(folder, tmp_path):
    """--student DIR recovers what another run left; --teacher DIR may be of another size, with a
    padded vocabulary."""
    job(folder, tmp_path / "first", "--recover", "none", "--degrade", "int2")
    other = make_folder(tmp_path / "other", seed=3, d_model=48, head_dim=12, padding=5)
    damaged = "--student", tmp_path / "first" / "student"
    assert job(folder, tmp_path / "second", *damaged, "--teacher", other) == 0
    first, second = (results(tmp_path / name) for name in ("first", "second"))
    assert (second["config"]["degrade"], second["environment"]["damage"]) == ("none", {})
    first, second = first["stages"], second["stages"]
    assert second["healthy"] == first["healthy"]
    assert second["degraded"] == first["degraded"] != second["recovered"]
    assert job(folder, tmp_path / "ema", *damaged, "--ema", "0.1") == 0
    assert job(folder, tmp_path / "third", *damaged, "--degrade", "ffn50") == 0
    assert results(tmp_path / "third")["environment"]["damage"]["neurons_removed"] == 64


def test_bootstrap_by_a_larger_teacher(folder, tmp_path):
    """The larger model teaches off-policy, both with the demonstration; then the student, as it is
    then, teaches itself."""
    larger = make_folder(tmp_path / "larger", seed=3, d_model=48, head_dim=12, padding=5)
    bootstrap = "--bootstrap", larger, "--expert-steps", "2", "--lr", "1e-2"
    assert job(folder, tmp_path / "out", *bootstrap, "--degrade", "none") == 0
    stages = results(tmp_path / "out")["stages"]
    assert list(stages) == ["base", "healthy", "degraded", "recovered"]
    assert stages["degraded"] == stages["healthy"]
    assert stages["base"] != stages["healthy"] != stages["recovered"]
    assert [line["stage"] for line in logged(tmp_path / "out")] == (
        ["healthy"] * 2 + ["recovered"] * 3)
    run = prepared(folder, tmp_path / "out", *bootstrap)
    assert run.config.degrade == "none"
    lesson, decode = run.expert, run.evaluation.tokenizer.decode
    assert (lesson.stage, lesson.how, lesson.teacher) == ("healthy", "kd", str(larger))
    assert all(p.student == p.teacher for batch in lesson.batches for p in batch)
    asked = decode(lesson.batches[0][0].student)
    assert asked.count("\nuser\n") == 2 and asked.count("\nassistant\n") == 2  # an earlier turn


def test_future_work_of_section_6(folder, tmp_path):
    """CKA in the loss is logged; stopping by it ends a recovery early, and goes back."""
    assert job(folder, tmp_path / "cka", "--cka-weight", "1", "--cka-balance") == 0
    assert all(0 < line["cka"] < 1 for line in logged(tmp_path / "cka"))
    assert job(folder, tmp_path / "stop", "--watch", "cka", "--patience", "1", "--steps", "40",
               "--lr", "3e-2", "--keep", "best") == 0
    assert len(logged(tmp_path / "stop")) in range(7, 40, 7)
    guard = results(tmp_path / "stop")["guard"]["recovered"]
    assert guard["watch"] == "cka" and guard["kept"] < guard["checks"][-1]["step"]


# ------------------------------------------------------------------------------ texts and models

def test_text_files_to_measure_only(folder, out, tmp_path):
    """The first of --text is `perplexity`; a further one has its file's name in its metric."""
    (tmp_path / "other.txt").write_text("Another text, which nothing here is trained on. " * 40)
    assert job(folder, tmp_path / "out", "--text", f"python,{tmp_path}/other.txt") == 0
    healthy, alone = (results(p)["stages"]["healthy"] for p in (tmp_path / "out", out))
    assert healthy["perplexity_other"] != healthy["perplexity"] == alone["perplexity"]
    windows, turned = (
        prepared(folder, tmp_path / "turned", "--text", texts).evaluation.windows
        for texts in (f"python,{tmp_path}/other.txt", f"{tmp_path}/other.txt,python"))
    assert turned["perplexity"] == windows["perplexity_other"]
    assert turned["perplexity_python"] == windows["perplexity"]


def test_what_is_not_trained_is_held_once(folder, tmp_path):
    def shared(*options):
        run = prepared(folder, tmp_path, *options)
        damage_(run.student, run.config, [])
        student = train.trainable_(run.config, run.student, run.teachers["base"])
        theirs = {p.data_ptr() for p in run.teachers["base"].parameters()}
        return [name for name, p in student.named_parameters() if p.data_ptr() in theirs], student
    assert shared("--dtype", "float32")[0] == ["embed_tokens.weight"]
    for dtype in ("float32", "bfloat16"):
        names, student = shared("--lora", "16", "--dtype", dtype)
        assert set(names) == {name for name, p in student.named_parameters()
                              if not p.requires_grad}


def test_a_vocabulary_may_lack_bytes(tmp_path):
    folder = make_folder(tmp_path / "lacking")
    spec = json.loads((folder / "tokenizer.json").read_text())
    del spec["model"]["vocab"]["\u0100"]  # which stands for the byte 0
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert job(folder, tmp_path / "out") == 0


def test_a_text_may_have_the_name_of_a_task(folder, tmp_path):
    rows = [{"prompt": f"Say {w}.", "response": w} for w in "abcdefghij"]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paragraphs = [f"{i}: " + "A text of one's own, to go on with. " * 6 for i in range(20)]
    (tmp_path / "words.txt").write_text("\n\n".join(paragraphs))
    both = f"{tmp_path}/words.jsonl,{tmp_path}/words.txt"
    assert job(folder, tmp_path / "out", "--data", both) == 0
    assert set(results(tmp_path / "out")["stages"]["healthy"]) == {"words_held_out", "perplexity"}



@pytest.mark.parametrize("ours, theirs", [(8, 0), (0, 8)])
def test_a_student_whose_vocabulary_is_padded_otherwise_is_measured_and_taught(
        ours, theirs, tmp_path, monkeypatch):
    """Its losses, and KL(healthy || student), compare the ids that both know."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "student", padding=ours)
    make_folder(tmp_path / "model", padding=theirs)
    assert train.main([*"--model model --student student --recover sft,kd --anchor 1 --steps 2 "
                       "--batch-size 4 --eval-limit 4 --eval-tokens 4 --cka-samples 4 "
                       "--group-size 16 --teacher-check 0".split()]) == 0
    kl = json.loads((tmp_path / "out" / "results.json").read_text())["kl"]["perplexity"]
    assert all(0 <= value < 1 for value in kl.values())
