"""Models, tokenizers and rows in forms that the seven files do not read.

    python train.py --model small.gguf                # a GGUF file brings this extra by itself,
    python train.py --model org/name@revision         # and so does a name on the Hugging Face hub
    python train.py --with formats --model FOLDER     # any tokenizer.json, by tokenizers
    python train.py --with formats --data arc.json    # arrays, and the forms of rows in ROWS below

A GGUF file is converted into an ordinary folder in the cache, once; from then on nothing knows that
it was special. A tokenizer that data.py refuses is asked through the library that defines it.
"""
import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

import data
import model
from model import GPT, GPTConfig


def attach(parts):
    """Add these forms to the dictionaries of data.py and model.py, and wrap the tokenizer."""
    model.FORMATS |= {r".+\.gguf": gguf, r"[\w.-]+/[\w.-]+(@[\w./-]+)?": hub}
    data.READERS |= {".json": read_array, ".ndjson": data.read_lines}
    data.KEYS |= {*" ".join(ROWS).split(), "input", "system_prompt", "golden_response"}
    rows = ROWS | {form: read for form, read in data.ROWS.items() if form not in ROWS}
    data.ROWS.clear()  # the first form that fits is taken, so that the larger ones come first
    data.ROWS.update(rows)
    load = parts["tokenizer"]

    def load_tokenizer(folder):
        try:
            return load(folder)
        except ValueError as error:
            if "--with formats" not in str(error):
                raise
        return AnyTokenizer(folder)
    parts["tokenizer"] = load_tokenizer


# ------------------------------------------------------------------------------------- GGUF files

NAMES = model.GGUF_NAMES | {  # llama.cpp's name: ours
    "position_embd": "embed_positions", "output": "lm_head", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm"}
FIELDS = {  # field of GPTConfig: field of a GGUF file
    "n_layer": "block_count", "d_model": "embedding_length", "n_head": "attention.head_count",
    "n_kv_head": "attention.head_count_kv", "head_dim": "attention.key_length",
    "d_ff": "feed_forward_length", "context_length": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base"}
READ = {*FIELDS.values(), "vocab_size", "attention.layer_norm_epsilon", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.finetuned"}
ONLY = {  # field that changes the arithmetic: the values that are implemented
    "attention.causal": [True], "attention.sliding_window": [0], "expert_count": [0],
    "expert_used_count": [0], "rope.scaling.attn_factor": [1],
    "rope.scaling.type": ["none", "linear"]}


def gguf(name):
    """The folder in the cache that a GGUF file is converted into by the first call."""
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {name}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    root = Path(os.environ.get("SDFT_CACHE") or Path.home() / ".cache" / "sdft")
    folder = root / f"gguf-{digest[:16]}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as work:
            try:
                convert(path, Path(work) / "model")
            except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
                raise ValueError(f"{path}: {kind}{' '.join(str(error).split()):.400}") from None
            with contextlib.suppress(OSError):  # another process has just made it
                (Path(work) / "model").rename(folder)
    return folder


def convert(path, folder):
    """Write what a GGUF file holds as a folder: config.json, float32 weights, tokenizer files."""
    from gguf import GGUFReader, dequantize
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind, parts = fields.get("general.type", "model"), fields.get("split.count", 0)
    if kind != "model" or parts > 1:
        raise ValueError(f"it is one of {parts} parts: merge them (llama-gguf-split --merge)"
                         if parts > 1 else f"it holds an {kind}, not a model")
    config, files, state = gguf_config(fields, tensors), gguf_tokenizer(fields), {}
    for name, tensor in tqdm(tensors.items(), desc="dequantize", unit="tensor", disable=None):
        if name == "rope_freqs.weight":  # it is in the configuration
            continue
        w = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if not w.isfinite().all():
            raise ValueError(f"tensor {name} is not finite")
        if config.model_type in ("llama", "smollm3") and re.search(r"attn_[qk]\.", name):
            pairs = w.view(-1, config.head_dim // 2, 2, *w.shape[1:])  # RoPE's pairs: neighbours
            w = pairs.transpose(1, 2).reshape(w.shape)                 # there, here half a head apart
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
    arch = fields["general.architecture"]
    if arch not in model.ARCHITECTURES:
        known = ", ".join(model.ARCHITECTURES)
        raise ValueError(f"the architecture {arch!r} is not one of {known}")
    own = {key.removeprefix(f"{arch}."): shortest(value) for key, value in fields.items()
           if key.startswith(f"{arch}.")}
    heads = own["attention.head_count"]
    own = {"attention.head_count_kv": heads, "rope.freq_base": 0.0 if arch == "gpt2" else 1e4,
           "attention.key_length": own["embedding_length"] // heads} | own
    only = ONLY | dict.fromkeys(("attention.value_length", "rope.dimension_count"),
                                [own["attention.key_length"]])
    for key, value in own.items():
        if key not in READ and value not in only.get(key, ()):
            raise ValueError(f"the field {arch}.{key} ({value!r}) is not implemented")
    if arch == "gpt2":
        own["attention.layer_norm_rms_epsilon"] = own["attention.layer_norm_epsilon"]
    ids = {f"{ours}_token_id": fields[f"tokenizer.ggml.{name}_token_id"]
           for ours, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
           if f"tokenizer.ggml.{name}_token_id" in fields}
    config = GPTConfig(
        arch, hf=ids, vocab_size=int(tensors["token_embd.weight"].shape[1]),
        tie_embeddings="output.weight" not in tensors, rope_scaling=gguf_rope(own, tensors),
        qkv_bias={"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"} & tensors.keys() != set(),
        out_bias="blk.0.attn_output.bias" in tensors, mlp_bias="blk.0.ffn_up.bias" in tensors,
        **{name: own[field] for name, field in FIELDS.items()})
    if arch == "smollm3":
        config.no_rope = tuple(range(3, config.n_layer, 4))
    return config


def shortest(value):
    """A float32 as the shortest decimal that it is: 1e-05, not 9.999999747378752e-06."""
    return float(str(numpy.float32(value))) if isinstance(value, float) else value


def gguf_rope(own, tensors):
    """rope_scaling of a config.json. llama.cpp keeps Llama 3's as what it divides frequencies by.
    """
    factor = 1 if own.get("rope.scaling.type") == "none" else own.get("rope.scaling.factor", 1)
    if "rope_freqs.weight" not in tensors:
        return {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    if factor != 1:
        raise ValueError("rope_freqs.weight and rope.scaling are not implemented together")
    divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy()).float()
    llama3 = {"rope_type": "llama3", "factor": shortest(divisors.max().item()),
              "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}  # Llama 3.1, 3.2 and 3.3 have these
    plain, scaled = (model.rope_frequencies(GPTConfig(
        head_dim=own["attention.key_length"], rope_theta=own["rope.freq_base"], rope_scaling=kind))
        for kind in ({}, llama3))
    if len(plain) == len(divisors) and torch.allclose(plain / scaled, divisors, rtol=1e-4):
        return llama3
    return {"rope_type": "longrope", "short_factor": divisors.tolist(),
            "long_factor": divisors.tolist(), "attention_factor": 1.0, "factor": 1.0,
            "original_max_position_embeddings": own["context_length"]}


LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
BY_QWEN2, BY_LLAMA3 = (
    [dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False),
     LEVEL | {"use_regex": False}] for pattern in (data.QWEN2, data.LLAMA3))
STEPS = {  # tokenizer.ggml.pre: pre_tokenizers of a tokenizer.json
    "gpt-2": [LEVEL], "smollm": [dict(type="Digits", individual_digits=True), LEVEL],
    "qwen2": BY_QWEN2, "llama-bpe": BY_LLAMA3, "llama3": BY_LLAMA3, "llama-v3": BY_LLAMA3}
UNLIKE = "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces"


def gguf_tokenizer(fields):
    """{name of a tokenizer's file: its content} from a GGUF file's fields."""
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    kind, pre = own.get("model"), own.get("pre")
    if kind != "gpt2" or pre not in STEPS:
        raise ValueError(f"tokenizer.ggml.model {kind!r} with tokenizer.ggml.pre {pre!r} is not "
                         f"implemented, only gpt2 with {', '.join(STEPS)}")
    for key in UNLIKE:
        if own.get(key):
            raise ValueError(f"the field tokenizer.ggml.{key} is not implemented")
    tokens, kinds = own["tokens"], own["token_type"]  # 3: special, 4: added, 5: an unused id
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = dict(
        version="1.0", truncation=None, padding=None, decoder=LEVEL, post_processor=None,
        added_tokens=[{"id": i, "content": tokens[i], "special": kind == 3, **flags}
                      for i, kind in enumerate(kinds) if kind in (3, 4)],
        normalizer=dict(type="NFC") if pre == "qwen2" else None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=STEPS[pre]),
        model=dict(type="BPE", ignore_merges=STEPS[pre] is BY_LLAMA3, merges=own["merges"],
                   vocab={token: i for i, token in enumerate(tokens) if kinds[i] != 5}))
    end = own["eos_token_id"]
    bos, pad = tokens[own.get("bos_token_id", end)], tokens[own.get("padding_token_id", end)]
    if own.get("add_bos_token", STEPS[pre] is BY_LLAMA3):
        first = {"SpecialToken": {"id": bos, "type_id": 0}}
        text, second = ({"Sequence": {"id": x, "type_id": i}} for i, x in enumerate("AB"))
        known = {bos: {"id": bos, "ids": [own["bos_token_id"]], "tokens": [bos]}}
        spec["post_processor"] = dict(type="TemplateProcessing", single=[first, text],
                                      pair=[first, text, second], special_tokens=known)
    ends = dict.fromkeys([end, own.get("eot_token_id", end), own.get("eom_token_id", end)])
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
        chat_template=fields.get("tokenizer.chat_template", ""), bos_token=bos,
        eos_token=tokens[end], pad_token=pad,
        model_max_length=fields[f"{fields['general.architecture']}.context_length"])
    return {"tokenizer.json": spec, "tokenizer_config.json": config,
            "generation_config.json": {"eos_token_id": [*ends]}}


# ------------------------------------------------------------------ names on the Hugging Face hub

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


# ------------------------------------------------------------------------------------- tokenizers

class AnyTokenizer(data.Tokenizer):
    """A folder's tokenizer.json by the tokenizers library; all else is as in data.Tokenizer."""

    def __init__(self, folder):
        folder = Path(folder)
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
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        usual = [f"{name}_token" for name in "bos eos unk sep pad cls mask".split()]
        named = [config[key] for key in dict.fromkeys([*usual, *config])
                 if key.endswith("_token") and isinstance(config.get(key), str | dict)]
        named += extra.values() if isinstance(extra, dict) else extra
        self.backend.add_tokens([AddedToken(**table[i]) for i in sorted(table, key=int)])
        known = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        for token in (t["content"] if isinstance(t, dict) else t for t in named):
            if token not in known:
                self.backend.add_special_tokens([token])
        added = [{"id": i, "content": token.content, "special": token.special}
                 for i, token in self.backend.get_added_tokens_decoder().items()]
        super().__init__(folder, {"model": {"vocab": self.backend.get_vocab()},
                                  "added_tokens": added}, None)
        one = self.backend.encode("a")  # what stands before it is put before every text
        self.prefix = one.ids[:[*one.special_tokens_mask, 0].index(0)]

    def _ids(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids, keep_special=False):
        """ids -> str, without special tokens unless they are asked for."""
        return self.backend.decode(ids, skip_special_tokens=not keep_special)


# ------------------------------------------------------------------------------------------- rows

def read_array(path):
    """[(where, row)] of a .json file: an array, an object with one list of rows, or lines."""
    text = data.read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise ValueError(f"{path}: not JSON ({error})") from None
        return data.read_lines(path)
    if isinstance(value, dict) and not data.KEYS & value.keys():  # such as {"data": [...]}
        lists = [key for key in value if isinstance(value[key], list)]
        if len(lists) != 1:
            raise ValueError(f"{path}: {len(lists)} lists ({', '.join(lists)}): save the rows of "
                             "each as a file of its own")
        value = value[lists[0]]
    rows = value if isinstance(value, list) else [value]
    if not rows:
        raise ValueError(f"{path}: there are no rows in it")
    return [(f"{path}: element {n}", row) for n, row in enumerate(rows, 1)]


def talk(question, answer):
    """The reader of rows with these keys, each a text or turns of a chat."""
    def read(row):
        unread = [key for key in UNREAD if row.get(key)]
        if unread or row.get("label") is False:
            raise ValueError(f'"{[*unread, "label"][0]}" is not read: put what belongs to the '
                             "question into it, and leave out rows whose answer is bad")
        turns, said = row[question], row[answer]
        turns = turns if isinstance(turns, list) else [data.user(turns)]
        said = said if isinstance(said, list) else [{"role": "assistant", "content": said}]
        system = row.get("system") or row.get("system_prompt")
        system = [{"role": "system", "content": system}] if system else []
        return data.conversation({"messages": [*system, *turns, *said]})
    return read


UNREAD = ("context passage article story paragraph document documents table history options "
          "tools").split()  # keys that would change what is asked


def instructed(row):
    """Alpaca's: the input stands under the instruction."""
    given = f"\n\n{row['input']}" if row.get("input") else ""
    return talk("prompt", "output")({**row, "prompt": row["instruction"] + given})


def choosing(prompt, answer):
    """The reader of multiple choice whose answer is an index, or one of the labels in ARC's rows.
    """
    def read(row):
        choices, right = row["choices"], row[answer]
        texts, labels = (choices["text"], choices["label"]) if isinstance(choices, dict) \
            else (choices, [])
        if labels and (len(labels) != len(texts) or len({*labels}) < len(labels)):
            raise ValueError("each choice must have a label of its own")
        if isinstance(right, str) and right in labels:
            right = labels.index(right)
        elif str(right) in labels and labels[right:right + 1] != [str(right)]:
            raise ValueError(f'"{answer}" {right} is an index and another choice\'s label: write '
                             "the label as text")
        return data.choosing({"prompt": data.words(row[prompt], prompt), "answer": right,
                              "choices": [data.words(text, "text").strip() for text in texts]})
    return read


def completing(row):
    """One continuation of several contexts, of which one is right."""
    checked = data.choosing({**row, "prompt": "-", "choices": row["contexts"]})
    text = data.words(row["continuation"], "continuation").strip()
    return checked | {"prompt": row["contexts"][row["answer"]],
                      "choices": [(context, f" {text}") for context in row["contexts"]]}


def science(row):
    """The paper's Science: reasoning, then <answer>B</answer>. Rows to measure have the letter."""
    if "output_text" in row:
        letter = last_answer(row["output_text"])
        if not letter:
            raise ValueError('"output_text" has no <answer>…</answer>')
        return talk("messages", "output_text")(row) | {"check": same_letter(letter)}
    read = talk("prompt", "answer")(row)
    if re.fullmatch("[A-Z]", read["response"].strip()) and read["system"] and not read["earlier"]:
        return read | {"response": "", "check": same_letter(read["response"].strip())}
    return read


def tools(row):
    """The paper's Tools: golden_answer is what counts, golden_response is the demonstration."""
    texts = [data.words(text, "golden_response") for text in row.get("golden_response") or []]
    return {"prompt": data.words(row["prompt"], "prompt"), "response": "\n".join(texts),
            "check": same_calls(row["golden_answer"])}


ROWS = {  # keys of a row: how it is read
    "messages output_text": science, "prompt golden_answer": tools,
    "contexts continuation answer": completing,
    **{f"{prompt} choices {answer}": choosing(prompt, answer)
       for prompt in ("prompt", "question") for answer in ("answerKey", "answer")},
    **{f"{prompt} {answer}": talk(prompt, answer)
       for prompt in ("prompt", "question") for answer in ("response", "completion")},
    "question answer": talk("question", "answer"), "prompt answer": science,
    "instruction output": instructed}


def last_answer(text):
    """What stands in the last <answer>…</answer>, without blanks around it; None without one.

    >>> last_answer("<answer>A</answer>, no: <answer> B </answer>")
    'B'
    """
    answers = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    return answers[-1].strip() if answers else None


def same_letter(letter):
    """A checker: the last <answer>…</answer> is this letter (the paper's Science)."""
    return lambda answer: last_answer(answer) == letter


def same_calls(calls):
    """A checker: the same tools are called, in any order, and their inputs, merged into one object,
    are equal; an input that is no JSON object does not count (the paper's Tools).

    >>> check = same_calls([{"Action": "find", "Action_Input": '{"city": "Oslo"}'}])
    >>> check('Action: find\\nAction Input: {"city": "Oslo"}'), check("Action: find")
    (True, False)
    """
    names = Counter(call["Action"].strip() for call in calls)
    expected = merged(call["Action_Input"].strip() for call in calls)

    def check(answer):
        found = re.findall(r"\bAction:[ \t]*(.*?)[ \t\r]*(?=$|Action Input:)", answer, re.MULTILINE)
        inputs = [part.lstrip() for part in answer.split("Action Input:")[1:]]
        return Counter(found) == names and merged(inputs) == expected
    return check


def merged(inputs):
    """One object from the JSON objects that these texts begin with."""
    whole = {}
    for text in inputs:
        with contextlib.suppress(ValueError, RecursionError):
            whole |= json.JSONDecoder().raw_decode(text)[0] if text.startswith("{") else {}
    return whole
