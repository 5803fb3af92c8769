"""A Hugging Face folder's byte-level BPE tokenizer (GPT-2's, SmolLM2's, Qwen2's), on tiktoken.

It turns text into ids and back, and a chat into the ids of a prompt.
"""
import json
import re
import unicodedata
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# As GPT-2's, but a digit stands alone, and white space before a digit counts as at the end.
DIGITS_PATTERN = (r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
                  r"|\s+(?![^\s\p{N}])|\s+")
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


class Tokenizer:
    """A byte-level BPE vocabulary as a tiktoken Encoding.

    tiktoken merges the pair whose union has the lowest rank. Ranks here are the order of the
    merges, not the ids, so that any byte-level BPE fits: `id_of[rank]` translates. A byte that the
    vocabulary lacks gets a rank of its own and no id. It is dropped after a text was split and
    before the pieces are merged, as Hugging Face's tokenizers drops it.
    """

    def __init__(self, vocab, merges, pattern, added=(), normal_form=None, eos=None,
                 chat_template=""):
        """added: tokenizer.json's added_tokens; a text is searched for them before all else."""
        self.added = {t["content"]: t["id"] for t in added}
        self.hidden = {t["id"] for t in added if t.get("special", True)}
        longest_first = sorted(map(re.escape, self.added), key=len, reverse=True)
        self.any_added = re.compile(f"({'|'.join(longest_first)})") if added else None
        self.pattern, self.normal_form, self.chat_template = pattern, normal_form, chat_template
        self.eos, self.eos_id = eos, self.added.get(eos, vocab.get(eos))
        ids = _ids_in_rank_order(vocab, merges, self.added)
        self.id_of = list(ids.values())
        self.lacks = bytes(token[0] for token, i in ids.items() if i is None)
        self.bytes_of = {i: token for token, i in ids.items() if i is not None}
        self.bytes_of |= {i: token.encode() for token, i in self.added.items()}
        ranks = {token: rank for rank, token in enumerate(ids)}
        self.encoding = tiktoken.Encoding("folder", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens={})

    def encode(self, text):
        """str -> list of ids; special tokens in the text become their ids, as in tokenizers."""
        ids = []
        for part in self.any_added.split(text) if self.any_added else [text]:
            ids += [self.added[part]] if part in self.added else self._encode_plain(part)
        return ids

    def _encode_plain(self, text):
        if self.normal_form:
            text = unicodedata.normalize(self.normal_form, text)
        if not set(text.encode("utf-8", errors="replace")).intersection(self.lacks):
            return [self.id_of[rank] for rank in self.encoding.encode_ordinary(text)]
        ids = []
        for piece in regex.findall(self.pattern, text):
            kept = piece.encode().translate(None, self.lacks)
            if kept:
                ids += [self.id_of[rank] for rank in self.encoding._encode_single_piece(kept)]
        return ids

    def decode(self, ids, keep_special=False):
        """ids -> str; special tokens are left out unless asked for, broken UTF-8 becomes U+FFFD."""
        kept = ids if keep_special else [i for i in ids if i not in self.hidden]
        return b"".join(self.bytes_of.get(i, b"") for i in kept).decode("utf-8", errors="replace")

    def chat(self, messages):
        """[{"role", "content"}, …] -> ids of the prompt for the assistant's next turn.

        ChatML (SmolLM2, Qwen2.5), with the template's own default system message when there is
        none; a model without ChatML tokens gets a plain transcript: `Question: … Answer:`.
        """
        if "<|im_start|>" not in self.added:
            form = {"system": "{}\n\n", "user": "Question: {}\n", "assistant": "Answer: {}\n\n"}
            turns = [form[m["role"]].format(m["content"]) for m in messages]
            return self.encode("".join(turns) + "Answer:")
        default = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'{}]+?)<\|im_end\|>",
                            self.chat_template)
        if messages[0]["role"] != "system" and default:
            messages = [{"role": "system", "content": default[1]}, *messages]
        turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
        return self.encode("".join(turns) + "<|im_start|>assistant\n")

    def answer(self, text):
        """The ids of an assistant's answer to a `chat` prompt, end of turn included."""
        text = text if "<|im_start|>" in self.added else " " + text
        return [*self.encode(text), self.eos_id]


def bytes_to_unicode():
    """The printable characters for the 256 bytes in a byte-level BPE vocabulary, in byte order.

    As in GPT-2: a printable byte stands for itself, the others for U+0100, U+0101, …

    >>> table = bytes_to_unicode()
    >>> table[ord("A")], table[0], table[1], table[ord(" ")] == chr(0x100 + 32)
    ('A', 'Ā', 'ā', True)
    """
    keep = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(256, 512))
    return [chr(b if b in keep else next(shifted)) for b in range(256)]


def _ids_in_rank_order(vocab, merges, added):
    """{token's bytes: id or None}: the 256 bytes, the merges in order, then the other tokens."""
    byte_of = {c: b for b, c in enumerate(bytes_to_unicode())}
    ids = {bytes([b]): vocab.get(c) for c, b in byte_of.items()}
    for left, right in merges:
        ids.setdefault(bytes(byte_of[c] for c in left + right), vocab[left + right])
    for token, i in sorted(vocab.items(), key=lambda item: item[1]):
        if token not in added and all(c in byte_of for c in token):
            ids.setdefault(bytes(byte_of[c] for c in token), i)
    return ids


def load_tokenizer(folder):
    """The Tokenizer of a Hugging Face folder (tokenizer.json, or vocab.json with merges.txt), or of
    a GGUF file.

    FileNotFoundError when neither is there; ValueError for one that is not byte-level BPE.
    """
    from checkpoint import check_folder, tokenizer_folder
    folder = Path(folder)
    if folder.is_file():
        with tokenizer_folder(folder) as unpacked:
            return load_tokenizer(unpacked)
    if folder.is_dir():
        check_folder(folder)
    config = _json(folder / "tokenizer_config.json", {})
    if (folder / "tokenizer.json").exists():
        parts = _tokenizer_json(folder)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        parts = _vocab_and_merges(folder, config)
    else:
        wanted = "no tokenizer.json, and no vocab.json with merges.txt"
        raise FileNotFoundError(f"{wanted}, in {folder}")
    eos = _end_of_text(config, parts["added"])
    tokenizer = Tokenizer(**parts, eos=eos, chat_template=_chat_template(folder, config))
    if tokenizer.eos_id is None:
        raise ValueError(f"{folder}: the end-of-text token {eos!r} is not in the vocabulary")
    return tokenizer


def _tokenizer_json(folder):
    """The Tokenizer's arguments in a tokenizer.json."""
    spec = _json(folder / "tokenizer.json")
    bpe = spec.get("model") or {}
    other_type = bpe.get("type", "BPE") != "BPE" or bpe.get("byte_fallback")
    if other_type or not {"vocab", "merges"} <= set(bpe):
        raise ValueError(f"{folder}/tokenizer.json: only byte-level BPE tokenizers are supported")
    pattern = _pattern(spec.get("pre_tokenizer"), folder)
    form = (spec.get("normalizer") or {}).get("type")
    if form not in (None, "NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"{folder}/tokenizer.json: the normalizer {form} is not supported")
    merges = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]
    return {"vocab": bpe["vocab"], "merges": merges, "pattern": pattern,
            "added": spec.get("added_tokens", []), "normal_form": form}


def _pattern(spec, folder):
    """The one regular expression that splits as a tokenizer.json's pre_tokenizer does."""
    spec = spec or {"type": "null"}
    steps = spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    kinds, by_regex = [step["type"] for step in steps], steps[-1].get("use_regex", True)
    if steps[-1].get("add_prefix_space"):
        kinds.append("add_prefix_space")
    if kinds == ["ByteLevel"] and by_regex:
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and by_regex:
        return DIGITS_PATTERN
    if kinds == ["Split", "ByteLevel"] and not by_regex and "Regex" in steps[0]["pattern"]:
        return steps[0]["pattern"]["Regex"]
    culprit = " + ".join(kinds)
    raise ValueError(f"{folder}/tokenizer.json: the pre-tokenizer {culprit} is not supported")


def _vocab_and_merges(folder, config):
    """The Tokenizer's arguments in vocab.json and merges.txt, the older form (GPT-2, Qwen2)."""
    vocab = _json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    added = [{**t, "id": int(i)} for i, t in config.get("added_tokens_decoder", {}).items()]
    if not added and "<|endoftext|>" in vocab:
        added = [{"content": "<|endoftext|>", "id": vocab["<|endoftext|>"]}]
    qwen = _json(folder / "config.json", {}).get("model_type") == "qwen2"
    pattern, form = (QWEN2_PATTERN, "NFC") if qwen else (GPT2_PATTERN, None)
    return {"vocab": vocab, "merges": merges, "pattern": pattern, "added": added,
            "normal_form": form}


def _end_of_text(config, added):
    """The token that ends an answer: tokenizer_config.json's, else the one that is usual."""
    eos = config.get("eos_token")
    eos = eos["content"] if isinstance(eos, dict) else eos
    chatml = any(t["content"] == "<|im_end|>" for t in added)
    return eos or ("<|im_end|>" if chatml else "<|endoftext|>")


def _chat_template(folder, config):
    """The chat template's text: chat_template.jinja's, else tokenizer_config.json's, or ""."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        return next((t["template"] for t in template if t["name"] == "default"), "")
    return template


def _json(path, default=None):
    """A JSON file's object; `default` if it is given and the file is missing.

    ValueError for a file of anything else.
    """
    if default is not None and not path.exists():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value
