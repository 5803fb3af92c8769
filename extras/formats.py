"""Models, tokenizers and rows in forms that the seven files do not read.

    python train.py --model small.gguf                # a GGUF file brings this extra by itself,
    python train.py --model org/name@revision         # and so does a name on the Hugging Face hub
    python train.py --with formats --model FOLDER     # any tokenizer.json, by tokenizers
    python train.py --with formats --data arc.json    # arrays, and the forms of rows in ROWS below

A GGUF file becomes an ordinary folder in the cache, once; nothing later knows that it was special.
"""
import contextlib
import hashlib
import json
import os
import re
import tempfile
from functools import partial
from pathlib import Path

import torch

import data
import model


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
        try:
            return AnyTokenizer(Path(folder))
        except Exception as error:  # tokenizers and jinja2 have errors of their own
            text = "pip install tokenizers" if isinstance(error, ImportError) else str(error)
            first_line = text.partition("\n")[0]
            raise ValueError(f"{folder}/tokenizer.json: {first_line}") from None
    parts["tokenizer"] = load_tokenizer


# ------------------------------------------- models: names on the Hugging Face hub and GGUF files

def hub(name):
    """The folder of org/name or org/name@revision, from the hub's local cache, else fetched."""
    repo, _, revision = name.partition("@")
    for local in (True, False):
        try:
            from huggingface_hub import snapshot_download
            folder = Path(snapshot_download(
                repo, revision=revision or None, local_files_only=local, ignore_patterns=["*/*"],
                allow_patterns=["config.json", "*.safetensors*", *model.TOKENIZER_FILES]))
            if any(folder.glob("*.safetensors")):
                return folder
            why = "it has no *.safetensors"
        except Exception as error:  # huggingface_hub is not there, or the network does anything
            why = next(iter(str(error).splitlines()), type(error).__name__)
    raise FileNotFoundError(f"there is no folder {name}, and no such model in the Hugging Face "
                            f"cache or on the hub ({why}): pip install huggingface_hub, then "
                            f"`hf download {repo} --revision {revision or 'main'}`")


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
    "attention.causal": [True], "rope.scaling.type": ["none", "linear"],
    "rope.scaling.attn_factor": [1],
    **dict.fromkeys(("attention.sliding_window", "expert_count", "expert_used_count"), [0])}


def gguf(name):
    """The folder in the cache that the first call converts a GGUF file into."""
    with open(name, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    folder = Path(os.environ.get("SDFT_CACHE") or Path.home() / ".cache/sdft", f"gguf-{digest}")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            try:
                convert(name, Path(work, "model"))
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                text = str(error) if type(error) is ValueError else repr(error)
                raise ValueError(f"{name}: {' '.join(text.split()):.400}") from None
            with contextlib.suppress(OSError):  # another process has just made it
                Path(work, "model").rename(folder)
    return folder


def convert(path, folder):
    """Write a GGUF file, in which a Llama's RoPE turns neighbours, as a folder in float32."""
    from gguf import GGUFReader, dequantize
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config, files, state = gguf_config(fields, tensors), gguf_tokenizer(fields), {}
    tensors.pop("rope_freqs.weight", None)  # it is in the configuration
    for name, tensor in tensors.items():
        w = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if config.model_type in ("llama", "smollm3") and re.search(r"attn_[qk]\.", name):
            w = w.view(-1, config.head_dim // 2, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)
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
        gpt = model.GPT(config)
    gpt.load_state_dict(state, assign=True)
    gpt.save_pretrained(folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def gguf_config(fields, tensors):
    """The GPTConfig of a GGUF file, from its fields and from its tensors by name."""
    arch, kind = fields["general.architecture"], fields.get("general.type", "model")
    if arch not in model.ARCHITECTURES or kind != "model" or fields.get("split.count", 0) > 1:
        raise ValueError(f"a {kind} of the architecture {arch!r}, not a whole model (merge parts: "
                         f"llama-gguf-split --merge) of one of {', '.join(model.ARCHITECTURES)}")
    own = {key.removeprefix(f"{arch}.").replace("norm_rms", "norm"):
           float(f"{value:.7g}") if isinstance(value, float) else value  # float32: 1e-05 is
           for key, value in fields.items() if key.startswith(f"{arch}.")}  # 9.99999974e-06
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
        divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy()).float()
        scaling = {"rope_type": "llama3", "factor": round(divisors.max().item(), 4),
                   "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192}  # Llama 3.1, 3.2 and 3.3 have these
        plain, scaled = (model.rope_frequencies(model.GPTConfig(
            head_dim=width, rope_theta=theta, rope_scaling=kind)) for kind in ({}, scaling))
        if factor != 1 or not (plain / scaled).allclose(divisors, rtol=1e-4):
            raise ValueError("rope_freqs.weight is implemented only as Llama 3.1 to 3.3 have it")
    return model.GPTConfig(
        arch, vocab_size=int(tensors["token_embd.weight"].shape[1]), rope_scaling=scaling,
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
TOKENIZER_ONLY = {"model": ["gpt2"], "pre": STEPS, "add_eos_token": [None, False]}


def gguf_tokenizer(fields):
    """{name of a tokenizer's file: its content} from a GGUF file's fields."""
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    for key, known in TOKENIZER_ONLY.items():
        if own.get(key) not in known:
            raise ValueError(f"tokenizer.ggml.{key} is {own.get(key)!r}, not one of {[*known]}")
    pre, llama3 = own["pre"], STEPS[own["pre"]] is BY_LLAMA3
    tokens, kinds = own["tokens"], own["token_type"]  # 3: special, 4: added, 5: an unused id
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    end, begin = own["eos_token_id"], own.get("bos_token_id", own["eos_token_id"])
    bos, pad = tokens[begin], tokens[own.get("padding_token_id", end)]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, second = ({"Sequence": {"id": x, "type_id": i}} for i, x in enumerate("AB"))
    post = dict(type="TemplateProcessing", single=[first, text], pair=[first, text, second],
                special_tokens={bos: {"id": bos, "ids": [begin], "tokens": [bos]}})
    spec = dict(
        version="1.0", normalizer=dict(type="NFC") if pre == "qwen2" else None, decoder=LEVEL,
        pre_tokenizer=dict(type="Sequence", pretokenizers=STEPS[pre]),
        post_processor=post if own.get("add_bos_token", llama3) else None,
        added_tokens=[{"id": i, "content": tokens[i], "special": kind == 3, **flags}
                      for i, kind in enumerate(kinds) if kind in (3, 4)],
        model=dict(type="BPE", ignore_merges=llama3, merges=own["merges"],
                   vocab={token: i for i, token in enumerate(tokens) if kinds[i] != 5}))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
                  chat_template=own.get("tokenizer.chat_template", ""), bos_token=bos,
                  eos_token=tokens[end], pad_token=pad)
    ends = dict.fromkeys([end, own.get("eot_token_id", end), own.get("eom_token_id", end)])
    return {"tokenizer.json": spec, "tokenizer_config.json": config,
            "generation_config.json": {"eos_token_id": [*ends]}}


# ---------------------------------------------------------------------------- tokenizers and rows

class AnyTokenizer(data.Tokenizer):
    """A folder's tokenizer.json by the tokenizers library; all else is as in data.Tokenizer."""

    def __init__(self, folder):
        from tokenizers import AddedToken, Tokenizer
        self.backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend.no_truncation(), self.backend.no_padding()
        config = data.read_json(folder / "tokenizer_config.json")  # it names further tokens
        table = config.get("added_tokens_decoder") or {}
        config |= {} if table else data.read_json(folder / "special_tokens_map.json")
        self.backend.add_tokens([AddedToken(**table[i]) for i in sorted(table, key=int)])
        known = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        usual = [f"{name}_token" for name in "bos eos unk sep pad cls mask".split()]
        named = [config.get(key) for key in [*usual, *config] if key.endswith("_token")]
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        named += extra.values() if isinstance(extra, dict) else extra
        named = [token["content"] if isinstance(token, dict) else token for token in named]
        self.backend.add_special_tokens([t for t in named if isinstance(t, str) and t not in known])
        added = [{"id": i, "content": token.content, "special": token.special}
                 for i, token in self.backend.get_added_tokens_decoder().items()]
        super().__init__(folder, {"model": {"vocab": self.backend.get_vocab()},
                                  "added_tokens": added}, None)
        one = self.backend.encode("a")  # what stands before this text stands before every text
        self.prefix = one.ids[:[*one.special_tokens_mask, 0].index(0)]

    def _ids(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids, keep_special=False):
        return self.backend.decode(ids, skip_special_tokens=not keep_special)


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


def talk(question, answer, row):
    """An Example's arguments from a row with these two keys, each a text or turns of a chat."""
    unread = [x for x in "context passage document history options tools".split() if row.get(x)]
    if unread or row.get("label") is False:
        raise ValueError(f'"{[*unread, "label"][0]}" is not read, and changes what is right')
    asked, said, system = row[question], row[answer], row.get("system") or row.get("system_prompt")
    if question == "instruction" and row.get("input"):  # Alpaca's stands under the instruction
        asked = f"{asked}\n\n{row['input']}"
    return data.conversation({"messages": [
        *([{"role": "system", "content": system}] if system else []),
        *(asked if isinstance(asked, list) else [data.user(asked)]),
        *(said if isinstance(said, list) else [{"role": "assistant", "content": said}])]})


def choosing(row):
    """Multiple choice whose answer is an index, or one of the labels as in ARC's own rows."""
    given, answer = row["choices"], row.get("answerKey", row.get("answer"))
    labels, texts = (given["label"], given["text"]) if isinstance(given, dict) else ([], given)
    if labels and len({*labels}) != len(texts):
        raise ValueError("each choice must have a label of its own")
    if labels and isinstance(answer, str):
        answer = labels.index(answer)
    elif str(answer) in labels:
        raise ValueError(f"{answer} may be an index or a label: write the label as text")
    texts = [data.words(text, "choices").strip() for text in texts]
    prompt = row.get("prompt") or row.get("question", "")
    return data.choosing({"prompt": prompt, "choices": texts, "answer": answer})


def completing(row):
    """One continuation of several contexts, of which one is right."""
    text, contexts = data.words(row["continuation"], "continuation").strip(), row["contexts"]
    checked = data.choosing({"prompt": "-", "choices": contexts, "answer": row["answer"]})
    return checked | {"prompt": contexts[row["answer"]], "response": text,
                      "choices": [(context, f" {text}") for context in contexts]}


def science(row):
    """The paper's Science: reasoning, then <answer>B</answer>; a row to measure has the letter."""
    if "output_text" in row:
        read, letter = talk("messages", "output_text", row), last_answer(row["output_text"])
        if not letter:
            raise ValueError('"output_text" has no <answer>…</answer>')
    else:
        read, letter = talk("prompt", "answer", row), str(row["answer"]).strip()
        if not re.fullmatch("[A-Z]", letter) or not read["system"] or read["earlier"]:
            return read
        read["response"] = ""
    return read | {"check": lambda answer: last_answer(answer) == letter}


def last_answer(text):
    """What stands in the last <answer>…</answer>, without blanks around it; None without one."""
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return answers[-1].strip() if answers else None


def tools(row):
    """The paper's Tools: golden_answer is what counts, golden_response is the demonstration."""
    prompt, shown = data.words(row["prompt"], "prompt"), "\n".join(row.get("golden_response") or [])
    return {"prompt": prompt, "response": shown, "check": same_calls(row["golden_answer"])}


def same_calls(calls):
    """A checker: the same tools are called, in any order, and their inputs, merged into one object,
    are equal; an input that is no JSON object does not count. ValueError for no calls."""
    def merged(inputs):
        one = {}
        for text in inputs:
            with contextlib.suppress(ValueError, RecursionError):
                one |= json.JSONDecoder().raw_decode(text)[0] if text.startswith("{") else {}
        return one
    names = sorted(call["Action"].strip() for call in calls)
    if not names:
        raise ValueError('"golden_answer" has no calls')
    expected = merged(call["Action_Input"].strip() for call in calls)

    def check(answer):
        found = re.findall(r"\bAction:[ \t]*(.*?)[ \t\r]*(?=$|Action Input:)", answer, re.MULTILINE)
        inputs = [part.lstrip() for part in answer.split("Action Input:")[1:]]
        return sorted(found) == names and merged(inputs) == expected
    return check


ROWS = {  # keys of a row: its reader
    "messages output_text": science, "prompt golden_answer": tools,
    "contexts continuation answer": completing, "prompt choices answer": choosing,
    "question choices answer": choosing, "question choices answerKey": choosing,
    **{f"{q} {a}": partial(talk, q, a) for q in ("prompt", "question", "instruction")
       for a in ("response", "completion", "output", "answer")}, "prompt answer": science}
