"""train.py: whole runs of tiny models, KeepBest, the teacher's check, what is measured and told."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import GPT2, QWEN2, QWEN3, make_folder, tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import data
import quant
import sdft
import train
from model import GPT, frozen_copy, generate

TINY = ["--steps", "3", "--batch-size", "4", "--eval-limit", "6", "--eval-tokens", "5",
        "--rollout-tokens", "5", "--teacher-check", "2", "--cka-samples", "6", "--group-size",
        "16", "--calibration", "6"]


def run(folder, out, *options, code=0):
    """results.json of a tiny run."""
    argv = [*map(str, ["--model", folder, "--out", out, *TINY, "--dtype", "float32", *options])]
    assert train.main(argv) == code
    return json.loads((out / "results.json").read_text())


def logged(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def setup_of(folder, tmp_path, *options):
    """(Config, what prepare reads) for a tiny run."""
    argv = ["--model", folder, "--out", tmp_path, *TINY, "--dtype", "float32", *options]
    c, _ = train.parse([*map(str, argv)])
    return c, train.prepare(c)


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("out")
    run(folder, path)
    return path


# -------------------------------------------------------------------------------------- whole runs

def test_results_hold_what_the_contract_names(out):
    results = json.loads((out / "results.json").read_text())
    assert {"config", "environment", "stages", "recovered_fraction", "cka",
            "seconds"} <= results.keys()
    assert list(results["stages"]) == ["healthy", "degraded", "recovered"]
    metrics = {"science_phrasing", "science_element", "perplexity"}
    assert results["recovered_fraction"].keys() == metrics
    for values in results["stages"].values():
        assert values.keys() == metrics and all(map(math.isfinite, values.values()))
    assert set(results["cka"]) == {"tokens", "samples"}
    for kinds in results["cka"]["tokens"].values():
        assert all(len(layers) == 2 for layers in kinds.values())
    hashes = {"model_sha256", "data_sha256", "eval_sha256", "text_sha256"}
    assert all(len(results["environment"][name]) == 12 for name in hashes)
    assert [line["step"] for line in logged(out)] == [0, 1, 2]
    assert {path.name for path in (out / "student").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_the_student_loads_in_transformers_and_lies_on_its_grid(out):
    student = GPT.from_pretrained(out / "student")
    ids = torch.arange(20)[None]
    theirs = AutoModelForCausalLM.from_pretrained(out / "student").eval()(ids).logits
    torch.testing.assert_close(student(ids), theirs, rtol=1e-4, atol=1e-4)
    for linear in quant.block_linears(student):
        w = linear.weight.detach()
        torch.testing.assert_close(quant.fake_quantize(w, 4, 16), w, rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_numbers_and_another_other_rollouts(folder, out, tmp_path):
    again, other = (run(folder, tmp_path / seed, "--seed", seed) for seed in "01")
    first = json.loads((out / "results.json").read_text())
    assert again["stages"] == first["stages"] and again["cka"] == first["cka"]
    assert again["step"] == first["step"] != other["step"]


KINDS = {"llama": {}, "gpt2": GPT2, "qwen2": QWEN2, "qwen3": QWEN3}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ways_in_one_run_equal_the_same_two_alone(kind, dtype, tmp_path):
    """The second begins from the same damage, done anew: masks and grids, biases among the rest."""
    folder = make_folder(tmp_path / "model", **KINDS[kind])
    options = "--degrade", "wanda50,int4", "--dtype", dtype, "--lr", "1e-3", "--recover"
    both = run(folder, tmp_path / "both", *options, "kd,sft")
    for way in ("kd", "sft"):
        alone = run(folder, tmp_path / way, *options, way)
        assert both["stages"][f"recovered_{way}"] == alone["stages"]["recovered"]
        ours, theirs = (load_file(tmp_path / path / "model.safetensors")
                        for path in (f"both/student_{way}", f"{way}/student"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("degrade, counts", [
    ("none", {}), ("int3", {"weights_quantized": 2 * 9216}),
    ("ffn25,magnitude50,nf4", {"neurons": 128, "neurons_removed": 32,
                               "weights_held_at_zero": 7680, "weights_quantized": 15360}),
    ("ffn10,int4", {"neurons": 128, "neurons_removed": 0, "weights_quantized": 2 * 9216})])
def test_damages_compose_and_are_counted(degrade, counts, folder, tmp_path):
    """The rest of a tenth of 64 neurons, rounded to groups of 16, are all of them."""
    results = run(folder, tmp_path, "--degrade", degrade, "--recover", "none")
    assert results["environment"]["damage"] == counts
    assert ("degraded" in results["cka"].get("tokens", {})) == (degrade != "none")


def test_forgetting_measures_four_stages_and_two_teachers(folder, tmp_path):
    results = run(folder, tmp_path, "--forget", "tooluse", "--expert-steps", 2, "--forget-steps",
                  2, "--teacher", "base,healthy", "--lr", "1e-3", "--forget-lr", "1e-2")
    stages = results["stages"]
    assert list(stages) == ["base", "healthy", "degraded", "recovered_base", "recovered_healthy"]
    assert "tooluse_request" in stages["healthy"] and "tooluse samples" in results["cka"]
    assert stages["degraded"]["perplexity"] != stages["healthy"]["perplexity"]
    steps = [line["stage"] for line in logged(tmp_path)]
    assert [steps.count(stage) for stage in ("healthy", "degraded", "recovered_base")] == [2, 2, 3]
    assert {path.name for path in tmp_path.glob("student*")} == {"student_base", "student_healthy"}
    assert results["teacher"].keys() == {"base", "healthy"}


def test_bootstrap_by_a_larger_teacher_then_itself(folder, tmp_path):
    larger = make_folder(tmp_path / "larger", n_layer=3, d_model=48)
    results = run(folder, tmp_path, "--bootstrap", larger, "--expert-steps", 4, "--lr", "1e-2")
    losses = [line["loss"] for line in logged(tmp_path) if line["stage"] == "healthy"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert list(results["stages"]) == ["base", "healthy", "degraded", "recovered"]
    assert results["config"]["degrade"] == "none"


def test_a_damaged_folder_and_any_teacher(folder, out, tmp_path):
    results = run(folder, tmp_path, "--student", out / "student", "--teacher", folder)
    assert results["config"]["degrade"] == "none" and "degraded" in results["cka"]["tokens"]
    assert results["stages"]["degraded"] != results["stages"]["healthy"]


@pytest.mark.parametrize("options", [
    ["--lora", 2], ["--train-embeddings"], ["--recover", "kd", "--loss", "jsd"],
    ["--demo", "quote"], ["--demo", "none", "--loss", "reverse_kl"], ["--no-symmetric"],
    ["--degrade", "ffn20", "--importance", "weight"], ["--micro-batch", 3, "--top-p", 0.5]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_options_go_through_a_whole_run_and_train(options, dtype, folder, tmp_path):
    results = run(folder, tmp_path, *options, "--dtype", dtype, "--lr", "1e-3", "--steps", 8)
    assert len(logged(tmp_path)) == 8
    checks = results["guard"]["recovered"]["checks"]
    assert [check["step"] for check in checks] == [0, 7, 8]
    assert min(check["all"] for check in checks[1:]) < checks[0]["all"]


def test_files_choices_and_further_texts_are_measured(folder, tmp_path):
    rows, choices, text = (tmp_path / name for name in ("q.jsonl", "c.jsonl", "t.txt"))
    rows.write_text("".join(json.dumps({"prompt": f"{i}?", "response": f"{i}."}) + "\n"
                            for i in range(20)))
    choices.write_text(json.dumps({"prompt": "a", "choices": ["b", "cc"], "answer": 1}) + "\n")
    text.write_text("Some words of prose. " * 40)
    results = run(folder, tmp_path / "out", "--data", rows, "--eval", f"{choices},tooluse",
                  "--text", f"python,{text}")
    assert results["stages"]["recovered"].keys() == {
        "q_held_out", "c_all", "tooluse_request", "perplexity", "perplexity_t"}


# --------------------------------------------------------------------------------- one training

def test_what_is_watched_is_never_trained_on_and_the_best_is_kept(folder, tmp_path):
    """The loss on held-out prompts, from outside: the mean over all tokens of their answers."""
    c, setup = setup_of(folder, tmp_path, "--data", "science")
    batches, held_out = setup.lessons["recovery"]
    watched = held_out["science"]
    assert len(watched) == 16
    assert not {tuple(p.student) for p in watched} & {tuple(p.student) for b in batches for p in b}
    student, teacher = tiny(1, vocab_size=259, context_length=1024), setup.teachers["base"]
    total = tokens = 0
    value = train.held_out_loss(c, student, teacher, held_out, sdft.forward_kl)()
    for p in watched:
        s = student(torch.tensor([p.student + p.answer]))[0, len(p.student) - 1:-1]
        t = teacher(torch.tensor([p.teacher + p.answer]))[0, len(p.teacher) - 1:-1]
        total += F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True,
                          reduction="sum").item()
        tokens += len(p.answer)
    assert value["all"] == value["science"] == pytest.approx(total / tokens, rel=1e-4)


def test_the_best_weights_are_kept_and_put_back():
    student, losses = tiny().requires_grad_(True), iter([3.0, 1.0, 2.0, 5.0])
    best = train.KeepBest(student, lambda: {"all": next(losses)}, every=2)
    weights = []
    for _ in range(5):
        with torch.no_grad():
            student.norm.weight += 1
        weights.append(student.norm.weight.detach().clone())
        assert not best()
    best.restore()  # checks the last step, too
    assert [check["step"] for check in best.checks] == [0, 2, 4, 5] and best.kept == 2
    assert torch.equal(student.norm.weight, weights[1])


@pytest.mark.parametrize("far", [math.nan, math.inf, 6.6])
def test_far_above_the_start_ends_the_training(far):
    losses = iter([3.0, 6.4, far])
    best = train.KeepBest(tiny(), lambda: {"all": next(losses)}, every=1)
    assert not best() and best() and "step 2" in best.ended


def test_a_step_is_a_fraction_of_each_matrix(folder, tmp_path):
    """--lr-fraction of the blocks' root mean square on average; a matrix by its own size."""
    _, setup = setup_of(folder, tmp_path)
    weights = torch.cat([linear.weight.flatten() for linear in quant.block_linears(setup.student)])
    rms = weights.square().mean().sqrt().item()
    assert setup.facts["weights_rms"] == pytest.approx(rms, rel=1e-5)
    assert setup.facts["lr"] == pytest.approx(5.2e-4 * rms, rel=1e-5)
    large, vector = torch.full((4, 4), 2 * rms), torch.ones(3)
    assert sdft.rates([large, vector], 1e-3, rms) == pytest.approx([2e-3, 1e-3])
    _, setup = setup_of(folder, tmp_path, "--lora", 2, "--lr-fraction", 1e-4)
    assert setup.facts["lr"] == pytest.approx(1e-3 * rms, rel=1e-5)


def test_right_answers_are_counted_in_both_forms(folder, tmp_path, monkeypatch):
    """A teacher that only repeats what it is shown helps; one that ignores it does not."""
    _, setup = setup_of(folder, tmp_path, "--data", "science", "--teacher-check", 20)
    tokenizer, asked = setup.tokenizer, setup.samples["science"]

    def copying(gpt, prompts, *_, **__):
        texts = [tokenizer.decode(p) for p in prompts]
        shown = [next((e.response for e in asked if e.response in text), "") for text in texts]
        return [tokenizer.encode(text) for text in shown]
    monkeypatch.setitem(train.PARTS, "generate", copying)
    found = train.check_teacher(setup, None, "turn")["science"]
    assert found == {"shown": 100.0, "bare": 0.0, "examples": 20, "helps": True}
    monkeypatch.setitem(train.PARTS, "generate", lambda gpt, prompts, *_, **__: [[]] * 20)
    assert not train.check_teacher(setup, None, "turn")["science"]["helps"]


# ------------------------------------------------------------------------------ what is measured

def test_accuracy_perplexity_and_cka_from_outside(folder, tmp_path):
    _, setup = setup_of(folder, tmp_path, "--data", "science")
    gpt, other = setup.teachers["base"], tiny(2, vocab_size=259, context_length=1024)
    m = train.measure(setup, other, train.states_of(setup, gpt))
    examples = setup.splits["science_phrasing"]
    said = generate(other, [data.student_prompt(setup.tokenizer, e) for e in examples], 5, 0,
                    eos_id=setup.tokenizer.eos_ids)
    right = [float(e.check(setup.tokenizer.read(ids))) for e, ids in zip(examples, said)]
    assert m.items["science_phrasing"].tolist() == right
    nll = [F.cross_entropy(other(torch.tensor([w[:-1]]))[0], torch.tensor(w[1:])).item()
           for w in setup.windows["perplexity"]]
    assert m.value("perplexity") == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert m.cka["samples"]["linear_debiased"][-1] == pytest.approx(m.layers[-1][-1])
    same = train.measure(setup, frozen_copy(gpt, torch.float32), train.states_of(setup, gpt))
    assert all(x == pytest.approx(1) for kinds in same.cka.values() for x in kinds["linear"])


def test_the_best_choice_is_the_likeliest_one():
    """Per character after a context, in all without one; from outside, choice by choice."""
    gpt = tiny(3)
    tokenizer = SimpleNamespace(encode=lambda text: [ord(x) % 64 for x in text], added={}, eos_id=5,
                                prefix=[])

    def logp(context, text):
        ids = tokenizer.encode(context) or [5]
        both = torch.tensor([ids + tokenizer.encode(text)])
        logits = gpt(both[:, :-1])[0, len(ids) - 1:].log_softmax(-1)
        return logits.gather(1, both[0, len(ids):, None]).sum().item()
    for pairs in ([("Q: a", " b"), ("Q: a", " cdefg")], [("", "One."), ("", "Two words.")]):
        sums = [logp(*pair) for pair in pairs]
        if pairs[0][0]:
            sums = [s / (len(text) - 1) for s, (_, text) in zip(sums, pairs)]
        for answer in (0, 1):
            e = data.Example("", choices=pairs, answer=answer)
            assert train.chosen(tokenizer, gpt, e, lambda n: None) == float(
                sums[answer] == max(sums))


def test_changes_are_paired_and_a_broken_model_is_infinite():
    def m(*values, metric="task"):
        return train.Measurement({metric: torch.tensor(values)}, [], {}, [])
    assert train.change(m(0.0, 0, 0, 0, 1), m(1.0, 1, 1, 1, 1), "task") == "better"
    assert train.change(m(0.0, 1, 0, 1), m(1.0, 0, 1, 0), "task") == "same"
    nats = m(2.0, 2.1, 2.2, metric="perplexity"), m(3.0, 3.1, 3.2, metric="perplexity")
    assert train.change(*nats, "perplexity") == "worse"
    assert train.recovered_fraction(nats[0], nats[1], nats[0], "perplexity") == pytest.approx(1)
    assert train.recovered_fraction(nats[1], nats[0], nats[0], "perplexity") is None
    assert m(800.0, metric="perplexity").value("perplexity") == math.inf
    assert train.mean_and_noise(torch.tensor([1.0]))[1] == math.inf


def test_a_trace_is_the_softmax_on_each_ones_own_prompt(folder, tmp_path):
    _, setup = setup_of(folder, tmp_path)
    student, teacher = tiny(1, vocab_size=259, context_length=1024), setup.teachers["base"]
    prompt, said = sdft.Prompt([70, 71], [72, 70, 71], []), [80, 81, 82]
    row, = train.trace(student, teacher, [prompt], [said], setup.tokenizer)
    s = student(torch.tensor([prompt.student + said]))[0, 1:-1].softmax(-1)
    t = teacher(torch.tensor([prompt.teacher + said]))[0, 2:-1].softmax(-1)
    for n, token in enumerate(row["tokens"]):
        assert token["student"] == pytest.approx(s[n, said[n]].item(), rel=1e-4)
        assert token["teacher"] == pytest.approx(t[n, said[n]].item(), rel=1e-4)
        assert token["kl"] == pytest.approx((t[n] * (t[n] / s[n]).log()).sum().item(), rel=1e-3)
        assert token["favourite"] == setup.tokenizer.decode([t[n].argmax().item()], True)


def test_the_report_tells_all_stages(out):
    results = json.loads((out / "results.json").read_text())
    text = train.report(results)
    for word in ("healthy", "degraded", "recovered", "perplexity", "kept step", "CKA tokens",
                 "KL(teacher || student)", "text_sha256"):
        assert word in text
