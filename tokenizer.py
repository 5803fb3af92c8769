"""A Hugging Face folder's byte-level BPE tokenizer (GPT-2's, Llama 3's, Qwen's).

It turns text into ids and back, and a chat into the ids of a prompt. What the folder says is done
as Hugging Face's tokenizers does it, or refused by name: pieces.py splits a text, bpe.py merges.
"""
import functools
from pathlib import Path

import pieces
import template
from bpe import BPE, bytes_to_unicode, to_bytes
from files import in_file, one_line, read_json, read_text
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
        self.eos_ids = (self.eos_id,)  # of any of which a text ends; an answer ends with eos_id
        self.special_tokens, self.folder = {}, ""  # for the chat template
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
        try:
            return self._ids(text)
        except TimeoutError:
            raise ValueError(f"{self.folder}: a pattern of its tokenizer does not come to an end "
                             f"on a text of {len(text)} characters") from None

    def _ids(self, text):
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


@one_line
def load_tokenizer(folder):
    """The Tokenizer of a Hugging Face folder (tokenizer.json, or vocab.json with merges.txt), or of
    a GGUF file.

    FileNotFoundError when neither is there; ValueError for one that is not byte-level BPE.
    """
    from checkpoint import check_folder, tokenizer_folder
    folder = Path(folder)
    if folder.is_file():
        with tokenizer_folder(folder) as unpacked:
            tokenizer = load_tokenizer(unpacked)
        tokenizer.folder = folder
        return tokenizer
    if folder.is_dir():
        check_folder(folder)
    config = _tokens_named(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").exists():
        parts = _parts(_json(folder / "tokenizer.json"), f"{folder}/tokenizer.json", folder, config)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        parts = _vocab_and_merges(folder, config)
    else:
        wanted = "no tokenizer.json, and no vocab.json with merges.txt"
        raise FileNotFoundError(f"{wanted}, in {folder}")
    config = _said(folder, config, {})
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
    tokenizer.encode_text("A word, 1.")  # what each step needs is there
    return tokenizer


def _parts(spec, where, folder, config, default=None, again=False):
    """The Tokenizer's arguments in what a tokenizer.json says; ValueError for another form."""
    with in_file(where):
        return _read_parts(spec, where, folder, config, default or {}, again)


def _read_parts(spec, where, folder, config, default, again):
    """default, again: as for _added_tokens."""
    model, normalizer = spec.get("model") or {}, spec.get("normalizer") or {}
    splitter = spec.get("pre_tokenizer") or {}
    steps, pattern = pieces.pre_tokenizer(splitter, where)
    bpe = BPE(model, where, pattern)
    both = [*pieces.flat(normalizer, "normalizers"), *pieces.flat(splitter, "pretokenizers")]
    for key, value in ((key, value) for part in both for key, value in part.items()):
        if key in pieces.SWITCHES and type(value) is not bool:
            raise ValueError(f"{where}: {key} must be true or false, not {value!r}")
    if not any(part.get("type") == "ByteLevel" for part in both):
        raise ValueError(f"{where}: only byte-level BPE tokenizers are supported, and neither the "
                         f"pre-tokenizer {splitter.get('type')} nor the normalizer is ByteLevel")
    prefix, suffix = _around(spec.get("post_processor"), where)
    added = _added_tokens(folder, config, spec.get("added_tokens") or [], default, again)
    normalizers = pieces.normalizers(normalizer, where)
    _check_normalized(added, normalizers, where)
    _check_ids(spec.get("added_tokens") or [], pieces.AddedTokens(added, bpe.ids, str).ids, where)
    return {"bpe": bpe, "added": added, "normalizers": normalizers,
            "steps": steps, "pattern": pattern, "prefix": prefix, "suffix": suffix,
            "between": _between(spec.get("decoder"), where)}


def _check_ids(tokens, ids, where):
    """ValueError for an added token of tokenizer.json that says another id than it gets: tokenizers
    goes by the vocabulary's size alone, and the model's weights were trained by what it says."""
    for token in tokens:
        content, said = token.get("content"), token.get("id")
        if content and type(said) is int and said != ids[content]:
            raise ValueError(f"{where}: the added token {content!r} says that its id is {said}, "
                             f"and gets {ids[content]}, in tokenizers, too: the vocabulary before "
                             "it has too many tokens, or too few")


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
    """tokenizer_config.json, with an older folder's special_tokens_map.json, which transformers,
    too, leaves alone in others."""
    older = "added_tokens_decoder" not in config
    return default | config | (_tokens_named(folder / "special_tokens_map.json") if older else {})


def _tokens_named(path):
    """tokenizer_config.json or special_tokens_map.json, {} if it is not there; ValueError where it
    names a token in another form."""
    said = _json(path, {})
    with in_file(path):
        extra = "extra_special_tokens", "additional_special_tokens"
        lists = [said.get(key) or [] for key in extra]
        by_id = said.get("added_tokens_decoder", {})
        lists.append([by_id[key] for key in sorted(by_id, key=int)])
        for tokens in lists:
            for token in tokens.values() if isinstance(tokens, dict) else tokens:
                _token(token)
        for name in NAMES:
            _token("" if said.get(name) is None else said[name])
    return said


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
        later = [token for _, token in by_id]
    else:
        later = [token for token in tokens if token["content"] in names]
        usual = [*filter(None, map(said.get, NAMES)), *(t for t in extra if isinstance(t, str))]
        later += _older_tokens(folder, tokens, usual)
    added = [*map(_token, tokens), *(_special_if(token, names) for token in later)]
    have = {token["content"] for token in added}
    further = [*named, *(_special_if(token, names) for token in extra)]
    added += [token for token in further if token["content"] not in have]
    return added + [_token(token["content"]) for token in further if again]


def _older_tokens(folder, tokens, special):
    """added_tokens.json's, but those whose ids tokenizer.json has. It says no more than their
    contents; those that are `special` elsewhere are special."""
    have = {token.get("id") for token in tokens}
    special = [token["content"] if isinstance(token, dict) else token for token in special]
    ids = _json(folder / "added_tokens.json", {})
    if not all(type(i) is int for i in ids.values()):
        raise ValueError(f"{folder}/added_tokens.json: an id is not a whole number")
    by_id = {i: token for token, i in ids.items()}
    return [_token({"content": by_id[i], "special": by_id[i] in special})
            for i in sorted(by_id) if i not in have]


def _special_if(said, names):
    """An added token that is special if it says so, or has a name; unless it says so, one that is
    special is not normalized."""
    token = _token(said)
    return _token(said, token["special"] or token["content"] in names)


def _token(said, special=None):
    """One added token with all of pieces.FLAGS. One that is only a text is special."""
    token = {"content": said, "special": True} if isinstance(said, str) else dict(said)
    token["special"] = token.get("special", False) if special is None else special
    usual = dict.fromkeys(pieces.FLAGS, False) | {"normalized": not token["special"]}
    token = {"content": token["content"], **{f: token.get(f, usual[f]) for f in pieces.FLAGS}}
    if [type(value) for value in token.values()] != [str] + [bool] * len(pieces.FLAGS):
        raise ValueError(f"a token must have a text as content, and flags true or false: {token}")
    return token


def _vocab_and_merges(folder, config):
    """The Tokenizer's arguments in vocab.json and merges.txt, the older form (GPT-2, Qwen2)."""
    vocab = _json(folder / "vocab.json")
    lines = read_text(folder / "merges.txt").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    model_type = _json(folder / "config.json", {}).get("model_type", "gpt2")
    kind = str(config.get("tokenizer_class") or model_type).removesuffix("Fast")
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
    """A JSON file's object; `default` if it is given and the file is missing."""
    return default if default is not None and not path.exists() else read_json(path)
