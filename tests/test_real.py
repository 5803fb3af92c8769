"""The real model, for a few steps: skipped where it cannot be fetched, unless SDFT_REQUIRE_MODEL is
set (as in CI)."""
import json
import os

import pytest
import torch

import checkpoint
import evaluate
import quant
import train
from data import load_tokenizer
from model import GPT, generate


@pytest.fixture(scope="module")
def smollm2():
    try:
        folder = checkpoint.default_model()
    except OSError as error:
        if os.environ.get("SDFT_REQUIRE_MODEL"):
            raise
        pytest.skip(str(error))
    torch.set_num_threads(os.cpu_count())  # conftest says 1, which is for tiny models
    yield folder
    torch.set_num_threads(1)


def test_int4_hurts_and_a_few_steps_of_recovery_help(smollm2, tmp_path):
    argv = ["--degrade", "int4", "--steps", "3", "--lr", "1e-4", "--warmup", "1", "--eval-limit",
            "60", "--cka-samples", "8", "--out", str(tmp_path)]
    assert train.main(argv) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    stages = ("healthy", "degraded", "recovered")
    healthy, degraded, recovered = (results["stages"][stage] for stage in stages)
    assert degraded["perplexity"] > 1.25 * healthy["perplexity"]
    assert degraded["science_phrasing"] < healthy["science_phrasing"]
    assert recovered["perplexity"] < degraded["perplexity"]
    debiased = results["cka"]["tokens"]["degraded"]["linear_debiased"]
    assert len(debiased) == 30 and 0.5 < min(debiased) < max(debiased) < 1

    run = train.prepare(train.parse([*argv[:-1], str(tmp_path / "again")]))
    healthy = evaluate.healthy_of(run.evaluation, run.teachers["base"])
    student = GPT.from_pretrained(tmp_path / "student").eval()
    student = quant.compute_in_(student, getattr(torch, run.config.dtype))
    again = evaluate.measure(run.evaluation, student, healthy)
    assert {metric: again.value(metric) for metric in again.items} == recovered


def test_the_model_is_the_one_it_claims_to_be(smollm2):
    """134,515,008 parameters; and its answer to an easy question, in its own chat template's
    default system message."""
    model, tokenizer = GPT.from_pretrained(smollm2).eval(), load_tokenizer(smollm2)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    question = {"role": "user", "content": "What is the capital of France?"}
    prompt = tokenizer.chat([question])
    answer, = generate(model, [prompt], 16, temperature=0, eos_id=tokenizer.eos_id)
    assert "Paris" in tokenizer.decode(answer)


def test_logits_equal_transformers(smollm2):
    from transformers import AutoModelForCausalLM
    ours = GPT.from_pretrained(smollm2).eval()
    theirs = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    ids = torch.randint(0, 49152, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = ours(ids).log_softmax(-1), theirs(ids).logits.log_softmax(-1)
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


def test_its_gguf_is_the_same_model_as_its_folder(smollm2, tmp_path):
    """Read straight: equal weights and ids."""
    gguf = checkpoint.download(tmp_path)
    straight, folder = GPT.from_pretrained(gguf), GPT.from_pretrained(smollm2)
    weights = dict(folder.named_parameters())
    assert all(torch.equal(w, weights.pop(name)) for name, w in straight.named_parameters())
    assert not weights
    chat = [{"role": "user", "content": "Was kostet das? def f(x): return x ** 2  # 数 🙂"}]
    ids = [load_tokenizer(where).chat(chat) for where in (gguf, smollm2)]
    assert ids[0] == ids[1]
    logits = [model(torch.tensor([ids[0]])) for model in (straight, folder)]
    assert torch.equal(*logits)
