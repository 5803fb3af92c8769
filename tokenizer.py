"""A Hugging Face folder's byte-level BPE tokenizer (GPT-2's, SmolLM2's, Qwen2's), on tiktoken.

It turns text into ids and back, and a chat into the ids of a prompt.
"""
import functools
import json
import re
import unicodedata
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

import template

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
        self.eos_ids = (self.eos_id,)  # of any of which a text ends; an answer ends with eos_id
        self.prefix = ()
        self.special_tokens, self.folder = {}, ""  # for the chat template
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

        As the folder's chat template writes it. Without one: ChatML, if the vocabulary has its
        tokens, else a plain transcript, `Question: … Answer:`, both begun as any text is. A
        template that refuses a system message gets it before the first question. ValueError, naming
        the folder, for a template that fails.
        """
        ids = self.encode(self._written(messages, True))
        return ids if self.chat_template else [*self.prefix, *ids]

    def _written(self, messages, add_generation_prompt=False):
        own = template.CHATML if "<|im_start|>" in self.added else template.TRANSCRIPT
        return template.write(self.chat_template or own, messages, add_generation_prompt,
                              self.special_tokens, self.folder)

    def answer(self, text):
        """The ids of an assistant's answer to a `chat` prompt, with exactly one end of turn.

        They are what the template writes after the prompt: it may strip the text, or put something
        before it (Qwen3: an empty thought). They end with the first of eos_ids that it writes, or,
        where it writes none, after the text, with eos_id.
        """
        prompt, turn = self._turn(text)
        ids = self._ids_after(prompt, turn)
        ends = [n for n, i in enumerate(ids) if i in self.eos_ids]
        if ends:
            return ids[:ends[0] + 1]
        said = text if text in turn else text.strip()
        until = turn.rfind(said) + len(said) if said in turn else len(turn)
        return [*self._ids_after(prompt, turn[:until]), self.eos_id]

    def _turn(self, text):
        """(a prompt, what the template writes after it for this answer)."""
        question = {"role": "user", "content": "?"}
        prompt = self._written([question], True)
        whole = self._written([question, {"role": "assistant", "content": text}])
        if whole.startswith(prompt):
            return prompt, whole[len(prompt):]
        at = whole.rfind(text.strip())  # the prompt asks for a thought that a past turn lacks
        return prompt, whole[at:] if at >= 0 else text

    def _ids_after(self, prompt, text):
        """The ids of a text that follows a prompt whose ids are there already."""
        before, both = self.encode(prompt), self.encode(prompt + text)
        return both[len(before):] if both[:len(before)] == before else self.encode(text)

    def read(self, ids):
        """A model's answer to a `chat` prompt as text: without its end, what the template puts
        before each answer, and, if it is a template with thoughts, the thought."""
        text = self.decode(ids[:-1] if ids and ids[-1] in self.eos_ids else ids).strip()
        if "</think>" in self.chat_template:
            text = text.rpartition("</think>")[2]
        return text.removeprefix(self.opening).strip()

    @functools.cached_property
    def opening(self):
        """What the template puts between a prompt and the answer's first word, as text."""
        before, word, _ = self._turn("word")[1].partition("word")
        return self.decode(self.encode(before)).strip() if word else ""


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
    if "added_tokens_decoder" not in config:  # else transformers, too, leaves this file alone
        config |= _json(folder / "special_tokens_map.json", {})
    named = template.special_tokens(config)
    eos = named.get("eos_token") or _usual_end(parts["added"])
    tokenizer = Tokenizer(**parts, eos=eos, chat_template=template.chat_template(folder, config))
    ends = _end_ids(folder, max(tokenizer.bytes_of) + 1)
    if "eos_token" not in named and ends:
        tokenizer.eos, tokenizer.eos_id = tokenizer.decode(ends[:1], keep_special=True), ends[0]
    if tokenizer.eos_id is None:
        raise ValueError(f"{folder}: the end-of-text token {eos!r} is not in the vocabulary")
    tokenizer.eos_ids = tuple(dict.fromkeys([tokenizer.eos_id, *ends]))
    tokenizer.special_tokens, tokenizer.folder = named, folder
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


def _usual_end(added):
    """The token that ends an answer where the folder names none: ChatML's, else GPT-2's."""
    return "<|im_end|>" if any(t["content"] == "<|im_end|>" for t in added) else "<|endoftext|>"


def _end_ids(folder, size):
    """The ids at which generation_config.json, else config.json, ends a text, a list.

    ValueError for one that is not an id: below config.json's vocab_size, or, if it has none, size.
    """
    config = _json(folder / "config.json", {})
    size = config["vocab_size"] if type(config.get("vocab_size")) is int else size
    for name in ("generation_config.json", "config.json"):
        said = _json(folder / name, {}).get("eos_token_id")
        if said is not None:
            ids = said if isinstance(said, list) else [said]
            wrong = [i for i in ids if type(i) is not int or not 0 <= i < size]
            if wrong:
                raise ValueError(f"{folder}/{name}: eos_token_id {wrong[0]!r} is not an id of the "
                                 f"vocabulary, a whole number from 0 to {size - 1}")
            return ids
    return []


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
