"""Models, tokenizers and rows in forms that the seven files do not read.

    python train.py --model small.gguf                # a GGUF file brings this extra by itself,
    python train.py --model org/name@revision         # and so does a name on the Hugging Face hub
    python train.py --with formats --model FOLDER     # any tokenizer.json, by tokenizers
    python train.py --with formats --data arc.json    # arrays, and the forms of rows in ROWS below

A GGUF file becomes an ordinary folder in the cache, once; nothing later knows that it was special.
A tokenizer that data.py refuses is asked through the library that defines what is right.
"""
import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

import data
import model
from model import GPT, GPTConfig


def attach(parts):
    """Add these forms to the dictionaries of data.py and model.py, and wrap the tokenizer."""
    load, rows = parts["tokenizer"], ROWS | data.ROWS | ROWS
    model.FORMATS |= {r".+\.gguf": gguf, r"[\w.-]+/[\w.-]+(@[\w./-]+)?": hub}
    data.READERS |= {".json": read_array, ".ndjson": data.read_lines}
    data.KEYS |= {*" ".join(ROWS).split(), "input", "system_prompt", "golden_response"}
    data.ROWS.clear()  # the first form that fits is taken, so the forms with more keys come first
    data.ROWS |= rows

    def load_tokenizer(folder):
        try:
            return load(folder)
        except ValueError as error:
            if "--with formats" not in str(error):
                raise
        return AnyTokenizer(Path(folder))
    parts["tokenizer"] = load_tokenizer


# ------------------------------------------------------------------------------------- GGUF files

NAMES = model.GGUF_NAMES | {  # llama.cpp's name: ours
    "position_embd": "embed_positions", "output": "lm_head", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm"}
FIELDS = {  # field of GPTConfig: field of a GGUF file
    "n_layer": "block_count", "d_model": "embedding_length", "n_head": "attention.head_count",
    "n_kv_head": "attention.head_count_kv", "head_dim": "attention.key_length",
    "d_ff": "feed_forward_length", "context_length": "context_length",
    "norm_eps": "attention.layer_norm_epsilon", "rope_theta": "rope.freq_base"}
READ = {*FIELDS.values(), "vocab_size", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.finetuned"}
ONLY = {  # field that changes the arithmetic: the values that are implemented
    "attention.causal": [True], "attention.sliding_window": [0], "expert_count": [0],
    "expert_used_count": [0], "rope.scaling.attn_factor": [1],
    "rope.scaling.type": ["none", "linear"]}


def gguf(name):
    """The folder in the cache that the first call converts a GGUF file into."""
    with open(name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    root = Path(os.environ.get("SDFT_CACHE") or Path.home() / ".cache" / "sdft")
    folder = root / f"gguf-{digest[:16]}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as work:
            try:
                convert(name, Path(work, "model"))
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"{name}: {' '.join(repr(error).split()):.400}") from None
            with contextlib.suppress(OSError):  # another process has just made it
                Path(work, "model").rename(folder)
    return folder


def convert(path, folder):
    """Write what a GGUF file holds as a folder: config.json, float32 weights, tokenizer files."""
    from gguf import GGUFReader, dequantize
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if fields.get("split.count", 0) > 1:
        raise ValueError("it is a part of a model: merge all parts (llama-gguf-split --merge)")
    config, files, state = gguf_config(fields, tensors), gguf_tokenizer(fields), {}
    for name, tensor in tqdm(tensors.items(), desc="dequantize", unit="tensor", disable=None):
        if name == "rope_freqs.weight":  # it is in the configuration
            continue
        w = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if config.model_type in ("llama", "smollm3") and re.search(r"attn_[qk]\.", name):
            pairs = w.view(-1, config.head_dim // 2, 2, *w.shape[1:])
            w = pairs.transpose(1, 2).reshape(w.shape)  # there, RoPE's pairs are neighbours
        name = ".".join(NAMES.get(step, step) for step in name.split("."))
        for part, letter in zip(w.chunk(3) if "attn_qkv" in name else [w], "qkv"):
            state[name.replace("attn_qkv", f"self_attn.{letter}_proj")] = part
    table, head = (state.get(f"{name}.weight") for name in ("embed_tokens", "lm_head"))
    # One matrix may be quantized twice. Two that were trained apart lie sqrt(2) norms apart.
    if head is not None and head.shape == table.shape and (head - table).norm() < head.norm() / 2:
        if tensors["output.weight"].n_bytes > tensors["token_embd.weight"].n_bytes:
            state["embed_tokens.weight"] = head
        del state["lm_head.weight"]
        config.tie_embeddings = True
    with torch.device("meta"):
        gpt = GPT(config)
    gpt.load_state_dict(state, assign=True)
    gpt.save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def gguf_config(fields, tensors):
    """The GPTConfig of a GGUF file, from its fields and from its tensors by name."""
    arch, kind = fields["general.architecture"], fields.get("general.type", "model")
    if arch not in model.ARCHITECTURES or kind != "model":
        raise ValueError(f"it holds a {kind} of the architecture {arch!r}, not a model of one of "
                         f"{', '.join(model.ARCHITECTURES)}")
    own = {key.removeprefix(f"{arch}.").replace("norm_rms", "norm"):
           float(str(numpy.float32(value))) if isinstance(value, float) else value  # 1e-05, not
           for key, value in fields.items() if key.startswith(f"{arch}.")}  # 9.999999747378752e-06
    heads = own["attention.head_count"]
    own = {"attention.head_count_kv": heads, "rope.freq_base": 0.0 if arch == "gpt2" else 1e4,
           "attention.key_length": own["embedding_length"] // heads} | own
    theta, width = own["rope.freq_base"], own["attention.key_length"]
    only = ONLY | dict.fromkeys(("attention.value_length", "rope.dimension_count"), [width])
    for key, value in own.items():
        if key not in READ and value not in only.get(key, ()):
            raise ValueError(f"the field {arch}.{key} ({value!r}) is not implemented")
    factor = 1 if own.get("rope.scaling.type") == "none" else own.get("rope.scaling.factor", 1)
    scaling = {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    if "rope_freqs.weight" in tensors:  # what llama.cpp divides Llama 3's frequencies by
        if scaling:
            raise ValueError("rope_freqs.weight is not implemented together with rope.scaling")
        divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy()).float()
        scaling = {"rope_type": "llama3", "factor": round(divisors.max().item(), 4),
                   "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192}  # Llama 3.1, 3.2 and 3.3 have these
        plain, scaled = (model.rope_frequencies(GPTConfig(
            head_dim=width, rope_theta=theta, rope_scaling=kind)) for kind in ({}, scaling))
        if len(plain) != len(divisors) or not (plain / scaled).allclose(divisors, rtol=1e-4):
            raise ValueError("rope_freqs.weight is implemented only for Llama 3.1 to 3.3")
    return GPTConfig(
        arch, hf={f"{name}_token_id": fields.get(f"tokenizer.ggml.{name}_token_id")
                  for name in ("bos", "eos")},
        vocab_size=int(tensors["token_embd.weight"].shape[1]), rope_scaling=scaling,
        tie_embeddings="output.weight" not in tensors, mlp_bias="blk.0.ffn_up.bias" in tensors,
        qkv_bias=arch == "gpt2" or "blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        no_rope=tuple(range(3, own["block_count"], 4)) if arch == "smollm3" else (),
        **{name: own[field] for name, field in FIELDS.items()})


LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
BY_QWEN2, BY_LLAMA3 = (
    [dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False),
     LEVEL | {"use_regex": False}] for pattern in (data.QWEN2, data.LLAMA3))
STEPS = {  # tokenizer.ggml.pre: pre_tokenizers of a tokenizer.json
    "gpt-2": [LEVEL], "smollm": [dict(type="Digits", individual_digits=True), LEVEL],
    "qwen2": BY_QWEN2, "llama-bpe": BY_LLAMA3, "llama3": BY_LLAMA3, "llama-v3": BY_LLAMA3}
TOKENIZER_ONLY = {"model": ["gpt2"], "pre": STEPS, **dict.fromkeys(
    ("add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces"),
    [None, False])}


def gguf_tokenizer(fields):
    """{name of a tokenizer's file: its content} from a GGUF file's fields."""
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    for key, known in TOKENIZER_ONLY.items():
        if own.get(key) not in known:
            raise ValueError(f"the field tokenizer.ggml.{key} ({own.get(key)!r}) is not "
                             f"implemented, only {[*known]}")
    pre, llama3 = own["pre"], STEPS[own["pre"]] is BY_LLAMA3
    tokens, kinds = own["tokens"], own["token_type"]  # 3: special, 4: added, 5: an unused id
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": tokens[i], "special": kind == 3, **flags}
             for i, kind in enumerate(kinds) if kind in (3, 4)]
    bpe = dict(type="BPE", ignore_merges=llama3, merges=own["merges"],
               vocab={token: i for i, token in enumerate(tokens) if kinds[i] != 5})
    end, begin, before = own["eos_token_id"], own.get("bos_token_id", own["eos_token_id"]), None
    bos, pad = tokens[begin], tokens[own.get("padding_token_id", end)]
    if own.get("add_bos_token", llama3):
        first = {"SpecialToken": {"id": bos, "type_id": 0}}
        text, second = ({"Sequence": {"id": x, "type_id": i}} for i, x in enumerate("AB"))
        before = dict(type="TemplateProcessing", single=[first, text], pair=[first, text, second],
                      special_tokens={bos: {"id": bos, "ids": [begin], "tokens": [bos]}})
    ends = dict.fromkeys([end, own.get("eot_token_id", end), own.get("eom_token_id", end)])
    return {
        "tokenizer.json": dict(
            version="1.0", added_tokens=added, normalizer={"type": "NFC"} if pre == "qwen2" else
            None, pre_tokenizer=dict(type="Sequence", pretokenizers=STEPS[pre]), model=bpe,
            post_processor=before, decoder=LEVEL),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
            chat_template=fields.get("tokenizer.chat_template", ""), bos_token=bos,
            eos_token=tokens[end], pad_token=pad),
        "generation_config.json": {"eos_token_id": [*ends]}}


# ------------------------------------------------------- names on the Hugging Face hub, tokenizers

def hub(name):
    """The folder of org/name or org/name@revision, from the hub's local cache, else fetched."""
    repo, _, revision = name.partition("@")
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", *model.TOKENIZER_FILES]
    for local in (True, False):
        try:
            from huggingface_hub import snapshot_download
            folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted,
                                            local_files_only=local))
            if any(folder.glob("*.safetensors")):
                return folder
            why = "it has no *.safetensors"
        except Exception as error:  # huggingface_hub is not there, or the network does anything
            why = next(iter(str(error).splitlines()), type(error).__name__)
    fetch = f"hf download {repo}" + f" --revision {revision}" * bool(revision)
    raise FileNotFoundError(f"there is no folder {name}, and no such model in the Hugging Face "
                            f"cache or on the hub ({why}): pip install huggingface_hub; `{fetch}`")


class AnyTokenizer(data.Tokenizer):
    """A folder's tokenizer.json by the tokenizers library; all else is as in data.Tokenizer."""

    def __init__(self, folder):
        try:
            from tokenizers import AddedToken, Tokenizer
            self.backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except ImportError:
            raise ValueError(f"{folder}: to read its tokenizer, pip install tokenizers") from None
        except Exception as error:  # the library has no error of its own
            raise ValueError(f"{folder}/tokenizer.json: {error}") from None
        self.backend.no_truncation(), self.backend.no_padding()
        # The folder's other files name further tokens, which transformers adds in this order.
        config = data.read_json(folder / "tokenizer_config.json")
        table = config.get("added_tokens_decoder") or {}
        config |= {} if table else data.read_json(folder / "special_tokens_map.json")
        self.backend.add_tokens([AddedToken(**table[i]) for i in sorted(table, key=int)])
        known = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        usual = [f"{name}_token" for name in "bos eos unk sep pad cls mask".split()]
        named = [config.get(key) for key in [*usual, *config] if key.endswith("_token")]
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named += extra.values() if isinstance(extra, dict) else extra
        named = [token["content"] if isinstance(token, dict) else token for token in named]
        self.backend.add_special_tokens(
            [token for token in named if isinstance(token, str) and token not in known])
        added = [{"id": i, "content": token.content, "special": token.special}
                 for i, token in self.backend.get_added_tokens_decoder().items()]
        vocab = self.backend.get_vocab()
        super().__init__(folder, {"model": {"vocab": vocab}, "added_tokens": added}, None)
        one = self.backend.encode("a")  # what stands before this text stands before every text
        self.prefix = one.ids[:[*one.special_tokens_mask, 0].index(0)]

    def _ids(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids, keep_special=False):
        """ids -> str; special tokens are left out unless asked for."""
        return self.backend.decode(ids, skip_special_tokens=not keep_special)


# ------------------------------------------------------------------------------------------- rows

def read_array(path):
    """[(where, row)] of a .json file: an array, an object with one list of rows, or lines."""
    text = data.read_text(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise ValueError(f"{path}: not JSON ({error})") from None
        return data.read_lines(path)
    if isinstance(rows, dict):  # {"data": [...]}, or one row
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 and not data.KEYS & rows.keys() else [rows]
    return [(f"{path}: element {n}", row) for n, row in enumerate(rows, 1)]


UNREAD = ("context passage article story paragraph document documents table history options tools"
          ).split()  # keys that would change what is asked


def talk(row, question, answer):
    """An Example's arguments from a row with these two keys, each a text or turns of a chat."""
    unread = [key for key in UNREAD if row.get(key)] + ["label"] * (row.get("label") is False)
    if unread:
        raise ValueError(f'"{unread[0]}" is not read, and it changes what the right answer is')
    asked, said, system = row[question], row[answer], row.get("system") or row.get("system_prompt")
    if question == "instruction" and row.get("input"):  # Alpaca's stands under the instruction
        asked = f"{asked}\n\n{row['input']}"
    return data.conversation({"messages": [
        *([{"role": "system", "content": system}] if system else []),
        *(asked if isinstance(asked, list) else [data.user(asked)]),
        *(said if isinstance(said, list) else [{"role": "assistant", "content": said}])]})


def choosing(row):
    """Multiple choice whose answer is an index, or one of the labels as in ARC's own rows."""
    choices, answer = row["choices"], row.get("answerKey", row.get("answer"))
    labels = choices["label"] if isinstance(choices, dict) else []
    texts = choices["text"] if isinstance(choices, dict) else choices
    if labels and len({*labels}) != len(texts):
        raise ValueError("each choice must have a label of its own")
    if str(answer) in labels and labels.index(str(answer)) != answer:
        if not isinstance(answer, str):
            raise ValueError(f"{answer} is an index and another choice's label: write it as text")
        answer = labels.index(answer)
    texts = [data.words(text, "choices").strip() for text in texts]
    prompt = row["prompt"] if "prompt" in row else row["question"]
    return data.choosing({"prompt": prompt, "choices": texts, "answer": answer}) | {
        "response": texts[answer]}


def completing(row):
    """One continuation of several contexts, of which one is right."""
    text, contexts = data.words(row["continuation"], "continuation").strip(), row["contexts"]
    checked = data.choosing({"prompt": "-", "choices": contexts, "answer": row["answer"]})
    return checked | {"prompt": contexts[row["answer"]], "response": text,
                      "choices": [(context, f" {text}") for context in contexts]}


def science(row):
    """The paper's Science: reasoning, then <answer>B</answer>; a row to measure has the letter."""
    if "output_text" in row:
        read, letter = talk(row, "messages", "output_text"), last_answer(row["output_text"])
        if not letter:
            raise ValueError('"output_text" has no <answer>…</answer>')
    else:
        read = talk(row, "prompt", "answer")
        letter = read["response"].strip()
        if not re.fullmatch("[A-Z]", letter) or not read["system"] or read["earlier"]:
            return read
        read["response"] = ""
    return read | {"check": lambda answer: last_answer(answer) == letter}


def tools(row):
    """The paper's Tools: golden_answer is what counts, golden_response is the demonstration."""
    texts = [data.words(text, "golden_response") for text in row.get("golden_response") or []]
    return {"prompt": data.words(row["prompt"], "prompt"), "response": "\n".join(texts),
            "check": same_calls(row["golden_answer"])}


ROWS = {  # keys of a row: its reader
    "messages output_text": science, "prompt golden_answer": tools,
    "contexts continuation answer": completing,
    **{f"{prompt} choices {answer}": choosing
       for prompt in ("prompt", "question") for answer in ("answerKey", "answer")},
    **{f"{question} {answer}": partial(talk, question=question, answer=answer)
       for question in ("prompt", "question", "instruction")
       for answer in ("response", "completion", "output", "answer")},
    "prompt answer": science}


def last_answer(text):
    """What stands in the last <answer>…</answer>, without blanks around it; None without one."""
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return answers[-1].strip() if answers else None


def same_calls(calls):
    """A checker: the same tools are called, in any order, and their inputs, merged into one object,
    are equal; an input that is no JSON object does not count.

    >>> check = same_calls([{"Action": "find", "Action_Input": '{"city": "Oslo"}'}])
    >>> check('Action: find\\nAction Input: {"city": "Oslo"}'), check("Action: find")
    (True, False)
    """
    def merged(inputs):
        one = {}
        for text in inputs:
            with contextlib.suppress(ValueError, RecursionError):
                one |= json.JSONDecoder().raw_decode(text)[0] if text.startswith("{") else {}
        return one
    names = Counter(call["Action"].strip() for call in calls)
    expected = merged(call["Action_Input"].strip() for call in calls)

    def check(answer):
        found = re.findall(r"\bAction:[ \t]*(.*?)[ \t\r]*(?=$|Action Input:)", answer, re.MULTILINE)
        inputs = [part.lstrip() for part in answer.split("Action Input:")[1:]]
        return Counter(found) == names and merged(inputs) == expected
    return check
