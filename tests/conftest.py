"""A throwaway model folder: a tiny random Llama with a tokenizer of single bytes and ChatML. The tests compute on the CPU."""
import json
import os
from dataclasses import replace

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; what the tests start inherits it

import pytest
import torch

from model import GPT, GPTConfig
from tokenizer import bytes_to_unicode

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_folder(path, context_length=1024, seed=0, padding=0, **changes):
    """A loadable Hugging Face folder; the global random state is left as it was. changes: of the GPTConfig."""
    vocab = {c: i for i, c in enumerate([*SPECIAL, *bytes_to_unicode()])}
    config = replace(GPTConfig("llama", len(vocab) + padding, 2, 32, 4, 2, 8, 64, context_length), **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.1)
    model.save_pretrained(path)
    added = [{"id": i, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for i, t in enumerate(SPECIAL)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": byte_level,
                 "post_processor": None, "decoder": byte_level, "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny"))
