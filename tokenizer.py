"""A Hugging Face folder's byte-level BPE tokenizer (GPT-2's, Llama 3's, Qwen's).

It turns text into ids and back, and a chat into the ids of a prompt. What the folder says is done
as Hugging Face's tokenizers does it, or refused by name: pieces.py splits a text, bpe.py merges.
"""
import json
import re
from pathlib import Path

import pieces
from bpe import BPE, bytes_to_unicode, to_bytes
from pieces import GPT2_PATTERN, QWEN2_PATTERN

__all__ = ["GPT2_PATTERN", "QWEN2_PATTERN", "bytes_to_unicode"]  # callers find them here too


class Tokenizer:
    """What a folder says, in the order in which a text goes through it.

    prefix, suffix: the ids that a post-processor puts before and after a text; `encode_text` has
    them, `encode` does not. added: {content: id} of the tokens that a text is searched for.
    """

    def __init__(self, bpe, added=(), normalizers=(), steps=(), pattern=None, prefix=(), suffix=(),
                 between=b"", eos=None, chat_template=""):
        """added: as in tokenizer.json; normalizers, steps, pattern: as pieces.py makes them;
        prefix, suffix: ids or tokens; between: the bytes that decoding puts between two tokens."""
        self.bpe, self.normalizers, self.steps, self.between = bpe, normalizers, steps, between
        self.tokens = pieces.AddedTokens(added, bpe.ids, self._normalize)
        self.added, self.chat_template = self.tokens.ids, chat_template
        self.prefix, self.suffix = ([self.added.get(t, bpe.ids.get(t, t)) for t in tokens]
                                    for tokens in (prefix, suffix))
        never = {token["content"] for token in self.tokens.of.values()  # a piece is none of these
                 if not (token["single_word"] or token["normalized"] and normalizers)}
        self.at_once = pattern and bpe.encoding and not (bpe.whole_first and bpe.unmade - never)
        self.eos, self.eos_id = eos, self.added.get(eos, bpe.ids.get(eos))
        token_of = {i: token for token, i in bpe.ids.items()}
        token_of |= self.tokens.text_of
        self.hidden = {i for i, token in token_of.items() if token in self.tokens.special}
        spell = str.encode if between else to_bytes
        self.bytes_of = {i: spell(token) for i, token in token_of.items()}

    def encode_text(self, text):
        """str -> list of ids, with what the tokenizer puts before and after a text (Llama 3's
        begin-of-text)."""
        return [*self.prefix, *self.encode(text), *self.suffix]

    def encode(self, text):
        """str -> list of ids; added tokens in the text become their ids, as in tokenizers."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(0, error.start - 20):error.start + 20]
            raise ValueError(f"a text holds half a surrogate pair, {text[error.start]!r}, which is "
                             f"no character: {around!r}") from None
        ids = []
        for part, found in self.tokens.split(text, normalized=False):
            if found is not None:
                ids.append(found)
                continue
            for piece, found in self.tokens.split(self._normalize(part), normalized=True):
                ids += self._encode_plain(piece) if found is None else [found]
        return ids

    def _normalize(self, text):
        return pieces.normalized(text, self.normalizers)

    def _encode_plain(self, text):
        """The ids of a normalized text without added tokens: by tiktoken alone if that can."""
        bpe = self.bpe
        if self.at_once and not set(text.encode()).intersection(bpe.lacks):
            return [bpe.id_of[rank] for rank in bpe.encoding.encode_ordinary(text)]
        parts = [text]
        for step in self.steps:
            parts = [piece for part in parts for piece in step(part)]
        ids_of = {piece: bpe.encode(piece) for piece in set(parts)}
        return [i for piece in parts for i in ids_of[piece]]

    def decode(self, ids, keep_special=False):
        """ids -> str; special tokens are left out unless asked for, broken UTF-8 becomes U+FFFD."""
        kept = ids if keep_special else [i for i in ids if i not in self.hidden]
        spelled = [self.bytes_of[i] for i in kept if i in self.bytes_of]
        return self.between.join(spelled).decode("utf-8", errors="replace")

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


def load_tokenizer(folder):
    """The Tokenizer of a Hugging Face folder: tokenizer.json, or vocab.json with merges.txt.

    FileNotFoundError when neither is there; ValueError for one that is not byte-level BPE.
    """
    folder = Path(folder)
    config = _json(folder / "tokenizer_config.json", {})
    if (folder / "tokenizer.json").exists():
        parts = _parts(_json(folder / "tokenizer.json"), f"{folder}/tokenizer.json", folder, config)
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


def _parts(spec, where, folder, config, default=None, again=False):
    """The Tokenizer's arguments in what a tokenizer.json says; ValueError for another form."""
    try:
        return _read_parts(spec, where, folder, config, default or {}, again)
    except (AttributeError, KeyError, TypeError) as error:
        said = f"{type(error).__name__}: {error}"
    raise ValueError(f"{where}: a part is missing or of another form ({said})")


def _read_parts(spec, where, folder, config, default, again):
    """default, again: as for _added_tokens."""
    model, normalizer = spec.get("model") or {}, spec.get("normalizer") or {}
    splitter = spec.get("pre_tokenizer") or {}
    steps, pattern = pieces.pre_tokenizer(splitter, where)
    bpe = BPE(model, where, pattern)
    both = [*pieces.flat(normalizer, "normalizers"), *pieces.flat(splitter, "pretokenizers")]
    if not any(part.get("type") == "ByteLevel" for part in both):
        raise ValueError(f"{where}: only byte-level BPE tokenizers are supported, and neither the "
                         f"pre-tokenizer {splitter.get('type')} nor the normalizer is ByteLevel")
    prefix, suffix = _around(spec.get("post_processor"), where)
    added = _added_tokens(folder, config, spec.get("added_tokens") or [], default, again)
    normalizers = pieces.normalizers(normalizer, where)
    _check_normalized(added, normalizers, where)
    return {"bpe": bpe, "added": added, "normalizers": normalizers,
            "steps": steps, "pattern": pattern, "prefix": prefix, "suffix": suffix,
            "between": _between(spec.get("decoder"), where)}


def _check_normalized(added, normalizers, where):
    """ValueError for added tokens that tokenizers cannot tell from each other, or from nothing."""
    seen = {"": "nothing"}
    for content in {t["content"]: 0 for t in added if t["normalized"] and t["content"]}:
        text = pieces.normalized(content, normalizers)
        if text in seen:
            raise ValueError(f"{where}: the added token {content!r} is normalized to {text!r}, as "
                             f"{seen[text]!r} is")
        seen[text] = content


def _around(spec, where):
    """The ids that a post-processor puts before a single text, and after it."""
    parts = pieces.flat(spec, "processors") if spec else []
    parts = [part for part in parts if part.get("type") != "ByteLevel"]  # it moves offsets only
    kinds = [part.get("type") for part in parts]
    if kinds in (["BertProcessing"], ["RobertaProcessing"]):
        return [parts[0]["cls"][1]], [parts[0]["sep"][1]]
    if kinds not in ([], ["TemplateProcessing"]):
        raise ValueError(f"{where}: the post-processor {' + '.join(map(str, kinds))} is not "
                         "supported")
    around = [[]]
    for piece in parts[0]["single"] if parts else []:
        if piece.get("Sequence", {}).get("id") == "A":
            around.append([])
        else:
            around[-1] += parts[0]["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    if parts and len(around) != 2:
        raise ValueError(f"{where}: the post-processor's template has the text not just once")
    return around if parts else ([], [])


def _between(spec, where):
    """What decoding puts between two tokens: nothing, or without a decoder a blank."""
    kinds = [part.get("type") for part in pieces.flat(spec, "decoders")] if spec else []
    if not spec:
        return b" "
    if [kind for kind in kinds if kind != "Fuse"] != ["ByteLevel"]:
        raise ValueError(f"{where}: the decoder {' + '.join(map(str, kinds))} is not supported")
    return b""


def _said(folder, config, default):
    """tokenizer_config.json, with an older folder's special_tokens_map.json."""
    older = "added_tokens_decoder" not in config
    return default | config | (_json(folder / "special_tokens_map.json", {}) if older else {})


NAMES = "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"


def _added_tokens(folder, config, tokens, default, again=False):
    """[{"content", and pieces.FLAGS}, …] in the order in which transformers adds them.

    tokens: tokenizer.json's. tokenizer_config.json says more, or in older folders added_tokens.json
    and special_tokens_map.json do: other tokens, and those with a name, as eos_token.
    default: {name: content} of the tokens that a tokenizer has unless the folder says otherwise.
    again: the special ones are added once more, without flags, as transformers does for Qwen2.
    """
    if config.get("split_special_tokens"):
        raise ValueError(f"{folder}/tokenizer_config.json: split_special_tokens is not supported")
    said = _said(folder, config, default)
    extra = said.get("extra_special_tokens") or []
    further, extra = (extra, []) if isinstance(extra, dict) else ({}, extra)
    said, extra = said | further, extra or said.get("additional_special_tokens") or []
    keys = [*NAMES, *(key for key in said if key.endswith("_token") or key in further)]
    named = [said[key] for key in dict.fromkeys(keys) if isinstance(said.get(key), str | dict)]
    named = [_token(token, special=True) for token in named]
    names = {token["content"] for token in named}
    if "added_tokens_decoder" in config:
        by_id = sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))
        later = [_token(token) for _, token in by_id]
    else:
        later = [_token(token) for token in tokens if token["content"] in names]
        usual = [*filter(None, map(said.get, NAMES)), *(t for t in extra if isinstance(t, str))]
        later += _older_tokens(folder, tokens, usual)
    added = [*map(_token, tokens), *(_special_if(token, names) for token in later)]
    have = {token["content"] for token in added}
    further = [*named, *(_special_if(_token(token), names) for token in extra)]
    added += [token for token in further if token["content"] not in have]
    return added + [_token(token["content"]) for token in further if again]


def _older_tokens(folder, tokens, special):
    """added_tokens.json's, but those whose ids tokenizer.json has. It says no more than their
    contents; those that are `special` elsewhere are special."""
    have = {token.get("id") for token in tokens}
    special = [token["content"] if isinstance(token, dict) else token for token in special]
    by_id = {i: token for token, i in _json(folder / "added_tokens.json", {}).items()}
    return [_token({"content": by_id[i], "special": by_id[i] in special})
            for i in sorted(by_id) if i not in have]


def _special_if(token, names):
    return token | {"special": token["special"] or token["content"] in names}


def _token(said, special=None):
    """One added token with all of pieces.FLAGS. One that is only a text is special."""
    token = {"content": said, "special": True} if isinstance(said, str) else dict(said)
    token["special"] = bool(token.get("special") if special is None else special)
    usual = dict.fromkeys(pieces.FLAGS, False) | {"normalized": not token["special"]}
    return {"content": token["content"], **{f: token.get(f, usual[f]) for f in pieces.FLAGS}}


def _vocab_and_merges(folder, config):
    """The Tokenizer's arguments in vocab.json and merges.txt, the older form (GPT-2, Qwen2)."""
    vocab = _json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    model_type = _json(folder / "config.json", {}).get("model_type", "gpt2")
    kind = (config.get("tokenizer_class") or model_type).removesuffix("Fast")
    qwen = kind in ("Qwen2Tokenizer", "qwen2", "qwen3")
    if not qwen and kind not in ("GPT2Tokenizer", "gpt2"):
        raise ValueError(f"{folder}: how {kind} splits a text stands in a tokenizer.json, which is "
                         "missing; write one by AutoTokenizer.from_pretrained(…).save_pretrained(…)"
                         " of transformers")
    end = "<|endoftext|>"
    default = dict.fromkeys(("eos_token", "unk_token", "pad_token" if qwen else "bos_token"), end)
    default = default if end in vocab else {}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "use_regex": not qwen,
                  "add_prefix_space": bool(config.get("add_prefix_space"))}
    spec = {"model": {"vocab": vocab, "merges": merges}, "decoder": byte_level,
            "normalizer": {"type": "NFC"} if qwen else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split] * qwen + [byte_level]}}
    parts = _parts(spec, f"{folder}/vocab.json with merges.txt", folder, config, default, qwen)
    for where, key in (("prefix", "bos_token"), ("suffix", "eos_token")):
        token = _said(folder, config, default).get(key)
        parts[where] = [_token(token)["content"]] if token and config.get(f"add_{key}") else []
    return parts


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
