"""The command line on a tiny random model: the whole job, its files, its errors."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_folder
from transformers import AutoModelForCausalLM

import train
from model import GPT
from quant import compute_in_

ROOT = Path(train.__file__).parent
QUICK = ["--steps", "3", "--batch-size", "4", "--micro-batch", "2", "--max-new-tokens", "6", "--answer-tokens", "4",
         "--eval-limit", "6", "--cka-samples", "5", "--group-size", "16", "--lr", "1e-3"]


def job(folder, out, *more):
    return train.main(["--model", str(folder), "--out", str(out), *QUICK, *more])


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert job(folder, out) == 0
    return out


def test_results_hold_what_the_contract_names(out):
    r = results(out)
    metrics = {"science_phrasing", "science_element", "perplexity"}
    assert r["config"]["degrade"] == "int4" and r["config"]["seed"] == 0
    assert set(r["stages"]) == {"healthy", "degraded", "recovered"}
    assert all(set(stage) == metrics for stage in r["stages"].values()) and set(r["recovered_fraction"]) == metrics
    assert r["stages"]["degraded"]["perplexity"] != r["stages"]["healthy"]["perplexity"]
    for level in ("tokens", "samples"):
        for stage in ("degraded", "recovered"):
            assert [len(v) for v in r["cka"][level][stage].values()] == [2] * 4
    assert set(r["seconds"]) == {"healthy", "degraded", "recovered training", "recovered"}
    assert {"text_sha256", "text_tokens", "data_sha256", "eval_examples", "context_length"} <= set(r["environment"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and all(line["loss"] > 0 for line in lines)
    assert (out / "report.png").stat().st_size > 10_000


def test_student_loaded_again_gives_the_recovered_numbers_again(folder, out):
    run = train.prepare(train.parse(["--model", str(folder), "--out", str(out / "again"), *QUICK]))
    states = train.evaluate.states_of(run, run.models["base"])
    student = compute_in_(GPT.from_pretrained(out / "student").eval(), getattr(torch, run.config.dtype))
    again = train.evaluate.measure(run, student, states)
    assert {m: again.value(m) for m in again.items} == results(out)["stages"]["recovered"]
    assert {level: again.cka[level] for level in again.cka} == {k: v["recovered"] for k, v in results(out)["cka"].items()}


def test_student_loads_in_transformers_and_lies_on_the_grid(out):
    ids = torch.randint(0, 259, (2, 20), generator=torch.Generator().manual_seed(0))
    ours, theirs = GPT.from_pretrained(out / "student").eval(), AutoModelForCausalLM.from_pretrained(out / "student").eval()
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
    assert a["stages"] == b["stages"] and a["cka"] == b["cka"]
    assert a["stages"]["degraded"] == c["stages"]["degraded"] and a["stages"]["recovered"] != c["stages"]["recovered"]


def test_other_tasks_losses_and_files(folder, tmp_path, capsys):
    rows = [{"prompt": f"Say {w}.", "response": w} for w in "red green blue white black pink gold teal gray plum".split()]
    (tmp_path / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    choices = [{"prompt": "One and one is", "choices": ["two", "three"], "answer": 0},
               {"contexts": ["The cat, black,", "The dog, black,"], "continuation": "purrs.", "answer": 0}] * 3
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, choices)))
    (tmp_path / "own.txt").write_text("A text of one's own, to measure perplexity on. " * 40)
    assert job(folder, tmp_path / "out", "--data", f"{tmp_path}/words.jsonl,tooluse", "--eval", f"{tmp_path}/choices.jsonl",
               "--text", f"{tmp_path}/own.txt", "--loss", "jsd", "--no-demo", "--no-symmetric", "--degrade", "int2") == 0
    r = results(tmp_path / "out")
    assert set(r["stages"]["healthy"]) == {"words_held_out", "tooluse_request", "choices_all", "perplexity"}
    assert r["environment"]["eval_examples"]["choices_all"] == 2  # of six rows two differ
    assert "recovered fraction" in capsys.readouterr().out


@pytest.mark.parametrize("damage, counts", [
    ("nf4", {"weights_quantized": 18_432}),
    ("ffn", {"neurons": 128, "neurons_removed": 12}),
    ("wanda2:4,nf4", {"weights_held_at_zero": 9_216, "weights_quantized": 18_432}),
    ("int4,wanda,ffn50", {"neurons": 128, "neurons_removed": 64, "weights_held_at_zero": None, "weights_quantized": 12_288})])
def test_damages_compose_and_are_counted(damage, counts, folder, tmp_path, capsys):
    assert job(folder, tmp_path, "--degrade", damage, "--double-quant") == 0
    found = results(tmp_path)["environment"]["damage"]
    assert found.keys() == counts.keys() and all(found[k] == n for k, n in counts.items() if n)
    assert f"damage {damage}: " in capsys.readouterr().out
    ours, theirs = GPT.from_pretrained(tmp_path / "student"), AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids = torch.arange(3, 23)[None]
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert ours.config.d_ff == 64 - counts.get("neurons_removed", 0) // 2
    if "wanda" in damage:
        w = ours.layers[0].self_attn.q_proj.weight
        assert (w == 0).float().mean() >= (0.5 if "2:4" in damage else 0.28)


@pytest.mark.parametrize("options", [["--train", "lora"], ["--moments", "bfloat16"], ["--checkpointing", "--train-embeddings"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ways_of_training(options, dtype, folder, tmp_path):
    """Each lowers the loss; without a change to what is trained, the first loss is that of every other."""
    assert job(folder, tmp_path, "--steps", "8", "--lr", "1e-2", "--dtype", dtype, *options) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert results(tmp_path)["config"]["dtype"] == dtype and lines[0]["loss"] > 0
    student = GPT.from_pretrained(tmp_path / "student")
    assert (student.embed_tokens.weight != GPT.from_pretrained(folder).embed_tokens.weight).any() == (
        "--train-embeddings" in options or options[0] == "--train" and dtype == "bfloat16")  # LoRA holds the rest in bfloat16


@pytest.mark.parametrize("recover", ["kd", "sft", "none"])
def test_baselines(recover, folder, tmp_path):
    """On the same prompts; fine-tuning lowers its loss, and none leaves the student as it was."""
    assert job(folder, tmp_path, "--recover", recover, "--steps", "8", "--lr", "1e-2", "--data", "science,tooluse,text") == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    stages = results(tmp_path)["stages"]
    if recover == "none":
        assert not lines and stages["recovered"] == stages["degraded"]
    else:
        assert len(lines) == 8 and ("kl" in lines[0]) == (recover == "kd") and stages["recovered"] != stages["degraded"]
        assert recover == "kd" or lines[-1]["loss"] < lines[0]["loss"]


def test_forgetting_measures_four_stages_and_two_teachers(folder, tmp_path):
    """base -> expert (healthy) -> fine-tuned on another task (degraded) -> recovered by each teacher from the same weights."""
    forget = "--degrade", "forget", "--expert-steps", "2", "--forget-steps", "4", "--forget-lr", "1e-2"
    assert job(folder, tmp_path, *forget, "--teacher", "base,healthy") == 0
    r = results(tmp_path)
    assert list(r["stages"]) == ["base", "healthy", "degraded", "recovered_base", "recovered_healthy"]
    assert set(r["stages"]["base"]) == {"science_phrasing", "science_element", "tooluse_request", "perplexity"}
    perplexities = [stage["perplexity"] for stage in r["stages"].values()]
    assert len(set(perplexities)) == 5 and set(r["recovered_fraction"]) == {"recovered_base", "recovered_healthy"}
    assert set(r["cka"]) == {"tokens", "samples", "tooluse samples"}
    assert set(r["cka"]["tooluse samples"]) == set(r["cka_layers"]) == {"degraded", "recovered_base", "recovered_healthy"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = {"healthy": 2, "degraded": 4, "recovered_base": 3, "recovered_healthy": 3}
    assert [line["stage"] for line in lines] == [stage for stage, n in steps.items() for _ in range(n)]
    assert lines[5]["loss"] < lines[2]["loss"]
    for name in ("student_base", "student_healthy"):
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
    assert job(folder, tmp_path / "alone", *forget, "--teacher", "base") == 0
    assert results(tmp_path / "alone")["stages"]["recovered"] == r["stages"]["recovered_base"]  # none disturbs another


def test_an_expert_is_made_with_demonstrations_even_if_recovery_has_none(folder, tmp_path):
    """Without them its teacher, the model itself, would have nothing to teach."""
    assert job(folder, tmp_path, "--degrade", "forget", "--expert-steps", "2", "--no-demo") == 0
    expert = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][:2]
    assert all(line["stage"] == "healthy" and line["grad_norm"] > 0 for line in expert)


def test_several_ways_of_recovery_are_each_as_alone(folder, tmp_path):
    job(folder, tmp_path / "all", "--recover", "sdft,sft,none", "--teacher", "base")
    stages = results(tmp_path / "all")["stages"]
    for how in ("sdft", "sft", "none"):
        job(folder, tmp_path / how, "--recover", how)
        assert results(tmp_path / how)["stages"]["recovered"] == stages[f"recovered_{how}"]


def test_a_damaged_folder_and_any_teacher(folder, tmp_path):
    """--degrade DIR recovers what another run left; --teacher DIR may be of another size, with a padded vocabulary."""
    job(folder, tmp_path / "first", "--recover", "none", "--degrade", "int2")
    other = make_folder(tmp_path / "other", seed=3, d_model=48, head_dim=12, padding=5)
    assert job(folder, tmp_path / "second", "--degrade", str(tmp_path / "first" / "student"), "--teacher", str(other)) == 0
    first, second = results(tmp_path / "first")["stages"], results(tmp_path / "second")["stages"]
    assert second["healthy"] == first["healthy"] and second["degraded"] == first["degraded"] != second["recovered"]
    assert job(folder, tmp_path / "ema", "--degrade", str(tmp_path / "first" / "student"), "--ema", "0.1") == 0
    assert job(folder, tmp_path / "third", "--degrade", f"{tmp_path}/first/student,ffn50") == 0
    assert results(tmp_path / "third")["environment"]["damage"]["neurons_removed"] == 64


def test_bootstrap_by_a_larger_teacher(folder, tmp_path):
    """The larger model teaches off-policy, both with the demonstration; then the student, as it is then, teaches itself."""
    larger = make_folder(tmp_path / "larger", seed=3, d_model=48, head_dim=12, padding=5)
    bootstrap = "--degrade", "none", "--bootstrap", str(larger), "--expert-steps", "2", "--lr", "1e-2"
    assert job(folder, tmp_path / "out", *bootstrap) == 0
    r = results(tmp_path / "out")
    assert list(r["stages"]) == ["base", "healthy", "degraded", "recovered"] and r["stages"]["degraded"] == r["stages"]["healthy"]
    assert r["stages"]["base"] != r["stages"]["healthy"] != r["stages"]["recovered"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["healthy"] * 2 + ["recovered"] * 3
    run = train.prepare(train.parse(["--model", str(folder), "--out", str(tmp_path / "out"), "--bootstrap", str(larger), *QUICK]))
    stage = run.stages[1]
    assert (stage.how, stage.teacher) == ("kd", str(larger)) and all(p.student == p.teacher for b in stage.batches for p in b)
    assert any("expert answered" in run.tokenizer.decode(p.student) for p in stage.batches[0])


def test_future_work_of_section_6(folder, tmp_path):
    """CKA in the loss is logged; stopping ends a recovery early and goes back to the best check."""
    assert job(folder, tmp_path / "cka", "--cka-weight", "1", "--cka-balance") == 0
    lines = [json.loads(line) for line in (tmp_path / "cka" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["cka"] < 1 for line in lines)
    assert job(folder, tmp_path / "stop", "--stop-after", "1", "--steps", "40", "--lr", "3e-2") == 0
    lines = (tmp_path / "stop" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) in range(10, 40, 5)

    run = train.prepare(train.parse(["--model", str(folder), "--out", str(tmp_path / "watch"), "--stop-after", "2", *QUICK]))
    healthy, sequences = run.models["base"], run.calibration
    student = train.trainable_(run.config, run.student, healthy)
    watch = train.evaluate.Watch(student, healthy, sequences, 2, every=2)
    answers, w = [], next(p for name, p in student.named_parameters() if "up_proj" in name)
    kept = w.detach().clone()
    for _ in range(6):
        answers.append(watch())
        if len(answers) >= 2:  # the first check finds the healthy model itself
            w.data += torch.randn(w.shape, generator=torch.Generator().manual_seed(0))
    assert answers == [False] * 5 + [True]
    watch.restore()
    assert torch.equal(w, kept)


def test_text_files_to_measure_only(folder, tmp_path):
    (tmp_path / "other.txt").write_text("Another text, which nothing here is trained on. " * 40)
    assert job(folder, tmp_path / "out", "--eval", f"{tmp_path}/other.txt") == 0
    assert "perplexity_other" in results(tmp_path / "out")["stages"]["healthy"]


def test_what_is_not_trained_is_held_once(folder, tmp_path):
    def shared(*options):
        run = train.prepare(train.parse(["--model", str(folder), "--out", str(tmp_path), *QUICK, *options]))
        train.prune.damage_(run.student, run.config.degrade, [], "weight", 16, True, False)
        student = train.trainable_(run.config, run.student, run.models["base"])
        theirs = {p.data_ptr() for p in run.models["base"].parameters()}
        return [name for name, p in student.named_parameters() if p.data_ptr() in theirs], student
    assert shared("--dtype", "float32")[0] == ["embed_tokens.weight"]
    for dtype in ("float32", "bfloat16"):
        names, student = shared("--train", "lora", "--dtype", dtype)
        assert set(names) == {name for name, p in student.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("choices", [[("abc", " xyz"), ("abc", " longer one")], [("", " longer one"), ("", " xyz")],
                                     [("ab", " xyz"), ("", " xyz")]])
def test_best_choice_is_the_likeliest_one(choices, folder):
    """Checked against plain forwards, where an empty context is the separator of documents; whole sentences count in all."""
    run = train.prepare(train.parse(["--model", str(folder), "--out", str(folder / "out"), *QUICK]))
    example, scores = train.data.Example("", choices=choices), []
    run.tokenizer.added["<|endoftext|>"] = separator = 7
    for context, continuation in example.choices:
        c, t = run.tokenizer.encode(context) or [separator], run.tokenizer.encode(continuation)
        with torch.no_grad():
            logp = run.models["base"](torch.tensor([c + t])).float().log_softmax(-1)[0]
        characters = len(continuation) if any(context for context, _ in choices) else 1
        scores.append(sum(logp[len(c) + i - 1, t[i]].item() for i in range(len(t))) / characters)
    assert train.evaluate.best_choice(run.models["base"], run.tokenizer, example) == scores.index(max(scores))
    assert train.evaluate.choice_scores(run.models["base"], run.tokenizer, example) == pytest.approx(scores, abs=1e-4)


def test_recovered_fraction_by_hand():
    def measured(*items):
        return train.evaluate.Measurement({"accuracy": torch.tensor(items), "perplexity": torch.tensor(items).log()}, [], {}, [])
    healthy, degraded, recovered = measured(1., 1, 1, 1, 1), measured(0., 0, 0, 0, 1), measured(1., 1, 1, 0, 0)
    assert train.evaluate.recovered_fraction(healthy, degraded, recovered, "accuracy") == pytest.approx(0.5)
    healthy, degraded, recovered = measured(10., 10), measured(20., 20), measured(12., 12)
    assert train.evaluate.recovered_fraction(healthy, degraded, recovered, "perplexity") == pytest.approx(0.8)
    assert train.evaluate.recovered_fraction(degraded, healthy, recovered, "perplexity") is None  # it got better
    same = measured(1., 0, 1, 1)
    assert train.evaluate.recovered_fraction(same, measured(1., 0, 0, 1), same, "accuracy") is None  # 25 points, but 25 of noise


def mistakes(tmp_path, folder):
    """(what is wrong, the command line, what the message must say) for each mistake of a user's."""
    def copy_with(name, change):
        copy = make_folder(tmp_path / name)
        change(copy)
        return str(copy)

    def edit_config(**entries):
        def change(path):
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(config | entries))
        return change

    def drop_tensor(path):
        from safetensors.torch import load_file, save_file
        tensors = load_file(path / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, path / "model.safetensors")

    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "perplexity_set.jsonl").write_text("".join(f'{{"prompt": "{i}", "response": "b"}}\n' for i in range(9)))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\nnot json\n')
    (tmp_path / "keys.jsonl").write_text('{"question": "a"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "science.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n')
    (tmp_path / "long.jsonl").write_text("\n".join(
        json.dumps({"prompt": prompt, "choices": ["b", 9999 * "c "], "answer": 0}) for prompt in "ad"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "results.json").write_text('{"config": {}, "stages": {"recovered": {}}}')
    (tmp_path / "a_file").write_text("")
    m = ["--model", str(folder)]
    return [
        (["--model", str(tmp_path / "nowhere")], "nowhere"),
        (["--model", copy_with("missing", drop_tensor)], "model.norm.weight"),
        (["--model", copy_with("shape", edit_config(intermediate_size=96))], "shape"),
        (["--model", copy_with("kind", edit_config(model_type="mamba"))], "mamba"),
        (["--model", copy_with("short", edit_config(max_position_embeddings=64))], "context of 64"),
        (["--model", copy_with("words", edit_config(num_hidden_layers="two"))], "config.json"),
        (["--model", copy_with("list", lambda path: (path / "config.json").write_text("[]"))], "config.json"),
        (["--model", str(make_folder(tmp_path / "few", padding=-1))], "the id 258, but a model of this run knows only 258"),
        (["--model", copy_with("brackets", lambda path: (path / "tokenizer.json").write_text("{}"))], "byte-level BPE"),
        ([*m, "--degrade", "int9"], "int9"),
        ([*m, "--degrade", "ffn5,int4", "--group-size", "9999"], "9999"),
        ([*m, "--eval", f"{tmp_path}/science.jsonl"], "'science'"),
        ([*m, "--eval", f"{tmp_path}/long.jsonl"], "context"),
        ([*m, "--temperature", "nan"], "--temperature"),
        ([*m, "--lr", "inf"], "--lr"),
        ([*m, "--seed", "18446744073709551616"], "--seed"),
        (["--report", str(tmp_path / "foreign")], "not the results of a run"),
        ([*m, "--degrade", "int4,nf4"], "int4 and nf4"),
        ([*m, "--degrade", "wanda2:5"], "5 do not divide the 32"),
        ([*m, "--degrade", "magnitude100"], "magnitude100 would leave nothing"),
        ([*m, "--degrade", "ffn100"], "ffn100 would leave nothing"),
        ([*m, "--group-size", "7"], "group_size 7"),
        ([*m, "--data", "alchemy"], "alchemy"),
        ([*m, "--data", f"{tmp_path}/empty.jsonl"], "empty.jsonl"),
        ([*m, "--data", f"{tmp_path}/bad.jsonl"], "bad.jsonl:2"),
        ([*m, "--data", f"{tmp_path}/keys.jsonl"], "keys.jsonl:1"),
        ([*m, "--text", f"{tmp_path}/latin.txt"], "latin.txt"),
        ([*m, "--text", f"{tmp_path}/a_file"], "a_file"),
        ([*m, "--steps", "0"], "--steps"),
        ([*m, "--temperature", "-1"], "--temperature must be at least 0"),
        ([*m, "--top-p", "0"], "--top-p must be more than 0"),
        ([*m, "--lr", "-1"], "--lr"),
        ([*m, "--group-size", "-16"], "--group-size"),
        ([*m, "--device", "gpu"], "--device gpu"),
        ([*m, "--device", "cuda:99"], "CUDA devices"),
        ([*m, "--device", "cuda:"], "CUDA devices"),
        ([*m, "--cka-samples", "3"], "--cka-samples"),
        ([*m, "--bootstrap", "base"], "--bootstrap"),
        ([*m, "--data", "science", "--eval", "text"], "--eval text"),
        ([*m, "--eval", f"{tmp_path}/perplexity_set.jsonl"], "taken for a perplexity"),
        ([*m, "--train", "lora", "--train-embeddings"], "--train-embeddings"),
        ([*m, "--recover", "kd", "--data", "text", "--text-tokens", "900"], "--text-tokens 900"),
        ([*m, "--shard"], "torchrun"),
        ([*m, "--recover", "sdft,magic"], "magic"),
        ([*m, "--recover", "sdft,sdft"], "twice"),
        ([*m, "--teacher", "base,"], "empty"),
        ([*m, "--degrade", "wanda5:4"], "wanda5:4"),
        ([*m, "--degrade", "wanda2:0"], "wanda2:0"),
        ([*m, "--cka-balance"], "--cka-weight"),
        ([*m, "--stop-after", "1", "--calibration", "3"], "--calibration"),
        ([*m, "--ema", "0.1", "--degrade", "int4,ffn10"], "--ema"),
        ([*m, "--degrade", copy_with("shallow", edit_config(num_hidden_layers=1))], "layers"),
        ([*m, "--ema", "1"], "--ema"),
        ([*m, "--ema", "0.1", "--degrade", "ffn50"], "--ema"),
        ([*m, "--cka-weight", "1", "--teacher", copy_with("deep", edit_config(num_hidden_layers=1))], "layers"),
        ([*m, "--teacher", str(tmp_path / "nowhere")], "nowhere"),
        ([*m, "--degrade", "forget,int9"], "int9"),
        ([*m, "--degrade", str(folder), "--bootstrap", str(folder)], "--bootstrap"),
        ([*m, "--degrade", "forget", "--forget-data", "text", "--forget-steps", "0"], "--forget-steps"),
        ([*m, "--teacher", str(folder), "--model", str(make_folder(tmp_path / "wide", padding=8))], "267"),
        (["--out", f"{tmp_path}/kept", "--model", str(make_folder(tmp_path / "kept" / "student"))], "overwrite"),
        (["--report", str(tmp_path / "missing")], "no results.json"),
        ([*m, "--out", f"{tmp_path}/a_file/out"], "--out"),
    ]


def test_a_mistake_is_one_clear_line_exit_code_2_and_nothing_written(folder, tmp_path, capsys):
    for argv, says in mistakes(tmp_path, folder):
        out = tmp_path / "out"
        assert train.main([*QUICK, "--out", str(out), *argv]) == 2, argv
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and error[0].startswith("error: ") and says in error[0], (argv, error)
        assert not out.exists(), argv


@pytest.mark.parametrize("argv, says", [
    (["--loss", "kl"], "forward_kl"), (["--steps", "x"], "--steps"), (["--stepz", "1"], "stepz")])
def test_a_mistyped_option_is_one_line_too(argv, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(argv)
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and says in error[0]


def test_a_vocabulary_may_lack_bytes(tmp_path):
    folder = make_folder(tmp_path / "lacking")
    spec = json.loads((folder / "tokenizer.json").read_text())
    del spec["model"]["vocab"]["\u0100"]  # which stands for the byte 0
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert job(folder, tmp_path / "out") == 0


def test_a_text_may_have_the_name_of_a_task(folder, tmp_path):
    (tmp_path / "words.jsonl").write_text("".join(f'{{"prompt": "Say {w}.", "response": "{w}"}}\n' for w in "abcdefghij"))
    (tmp_path / "words.txt").write_text("\n\n".join(f"{i}: " + "A text of one's own, to go on with. " * 6 for i in range(20)))
    assert job(folder, tmp_path / "out", "--data", f"{tmp_path}/words.jsonl,{tmp_path}/words.txt") == 0
    assert set(results(tmp_path / "out")["stages"]["healthy"]) == {"words_held_out", "perplexity"}


def test_a_broken_model_has_infinite_perplexity():
    assert train.evaluate.Measurement({"perplexity": torch.tensor([800.0])}, [], {}, []).value("perplexity") == math.inf
    assert train.report.chart([0.0, math.nan, 1.0], 0.0) == "▁?█"


def test_the_chart_of_a_run_that_broke_is_drawn(folder, out):
    broken = results(out)
    broken["cka"]["tokens"] = {"recovered": dict.fromkeys(("linear", "linear_debiased"), [math.nan, 0.5]),
                               "degraded": dict.fromkeys(("linear", "linear_debiased"), [0.5, 1.0])}
    assert "recovered  ?▁" in train.report.text(broken, {"healthy": []})


def test_nothing_happens_on_import_and_help_names_every_field():
    modules = "import cka, data, evaluate, fetch, lora, machine, model, parallel, prune, quant, report, sdft, tokenizer, train"
    quiet = subprocess.run([sys.executable, "-c", modules], cwd=ROOT, capture_output=True, text=True)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    text = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    for field in train.Config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text
