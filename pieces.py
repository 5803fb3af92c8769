"""What a tokenizer.json does with a text before byte-pair encoding: it is normalized, searched for
added tokens and split into pieces, as Hugging Face's tokenizers does these.

A normalizer is a function text -> text, a pre-tokenizer a function piece -> pieces. Their patterns
are Oniguruma's; `translated` says them in the syntax of `regex`, or refuses them. Where a table of
characters is needed, it is that of Python or of `regex`: characters that are newer than Unicode 9
may be normalized otherwise than by tokenizers, whose tables are of that version.
"""
import re
import unicodedata
from functools import partial

import regex  # comes with tiktoken

from bpe import bytes_to_unicode

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# As GPT-2's, but a digit stands alone, and white space before a digit counts as at the end.
DIGITS_PATTERN = (r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
                  r"|\s+(?![^\s\p{N}])|\s+")
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
COVERING = QWEN2_PATTERN, LLAMA3_PATTERN  # no character is left out; tiktoken reads them as is

SECONDS = 5  # that one match may take
PUNCTUATION = r"[!-/:-@\[-`{-~\p{P}]"
BYTES = dict(enumerate(bytes_to_unicode()))
MATCHED = {  # pre-tokenizers that split at a pattern: [(pattern, behavior, invert), …]
    "Digits": lambda s: [(r"\p{N}", "Isolated" if s.get("individual_digits") else "Contiguous", 0)],
    "Punctuation": lambda s: [(PUNCTUATION, s.get("behavior", "Isolated"), 0)],
    "Whitespace": lambda s: [(r"\w+|[^\w\s]+", "Removed", 1)],
    "WhitespaceSplit": lambda s: [(r"\s", "Removed", 0)],
    "CharDelimiterSplit": lambda s: [(regex.escape(s["delimiter"]), "Removed", 0)],
    "BertPreTokenizer": lambda s: [(r"\s", "Removed", 0), (PUNCTUATION, "Isolated", 0)]}
SWITCHES = {"add_prefix_space", "use_regex", "trim_offsets", "invert", "individual_digits",
            "strip_left", "strip_right"}  # true or false, wherever they stand


# ---------------------------------------------------------------------------------- splitting

def matches(pattern, text):
    """The (start, end) of a pattern's matches; an empty one right after another does not count.
    TimeoutError for a pattern that tries too many ways, as (a|a)*$ does."""
    at, last = 0, None
    while at <= len(text) and (match := pattern.search(text, at, timeout=SECONDS)):
        start, end = match.span()
        if start == end == last:
            at += 1
        else:
            at = last = end
            yield start, end


def split(pattern, behavior, invert, text):
    """The pieces of a text, where a delimiter is what matches, or with `invert` what does not.

    >>> dash = regex.compile("-")
    >>> for behavior in BEHAVIORS:
    ...     print(behavior, split(dash, behavior, False, "the-final--countdown"))
    Isolated ['the', '-', 'final', '-', '-', 'countdown']
    Removed ['the', 'final', 'countdown']
    Contiguous ['the', '-', 'final', '--', 'countdown']
    MergedWithPrevious ['the-', 'final-', '-', 'countdown']
    MergedWithNext ['the', '-final', '-', '-countdown']
    """
    parts, at = [], 0  # [(piece, is it a delimiter), …]
    for start, end in matches(pattern, text):
        if at < start:
            parts.append((text[at:start], invert))
        parts.append((text[start:end], not invert))
        at = end
    if at < len(text):
        parts.append((text[at:], invert))
    return [piece for piece in BEHAVIORS[behavior](parts) if piece]


def isolated(parts):
    return [piece for piece, _ in parts]


def removed(parts):
    return [piece for piece, delimits in parts if not delimits]


def merged(parts, joins):
    """Each part is joined to the one before where joins(delimits, did the one before)."""
    pieces, before = [], False
    for piece, delimits in parts:
        if pieces and joins(delimits, before):
            pieces[-1].append(piece)
        else:
            pieces.append([piece])
        before = delimits
    return pieces


def contiguous(parts):
    return ["".join(run) for run in merged(parts, lambda delimits, before: delimits == before)]


def with_previous(parts):
    return ["".join(p) for p in merged(parts, lambda delimits, before: delimits and not before)]


def with_next(parts):
    turned = merged(reversed(parts), lambda delimits, before: delimits and not before)
    return ["".join(reversed(pieces)) for pieces in reversed(turned)]


BEHAVIORS = {"Isolated": isolated, "Removed": removed, "Contiguous": contiguous,
             "MergedWithPrevious": with_previous, "MergedWithNext": with_next}


def byte_level(add_prefix_space, pattern, text):
    """The pieces of a text, split at a pattern if there is one, in bytes_to_unicode's characters.
    """
    if add_prefix_space and not text.startswith(" "):
        text = " " + text
    pieces = split(pattern, "Isolated", False, text) if pattern else [text]
    return [in_bytes(piece) for piece in pieces]


def in_bytes(text):
    return text.encode().decode("latin-1").translate(BYTES)


def pre_tokenizer(spec, where):
    """(steps, pattern) of a tokenizer.json's "pre_tokenizer": functions piece -> pieces, and the
    one pattern by which tiktoken splits a whole text the same way, or None."""
    spec = spec or {"type": "null"}
    parts = flat(spec, "pretokenizers")
    steps, kinds = [], [part.get("type") for part in parts]
    for part, kind in zip(parts, kinds):
        if kind == "ByteLevel":
            by = compiled(GPT2_PATTERN, where) if part.get("use_regex", True) else None
            steps.append(partial(byte_level, part.get("add_prefix_space", True), by))
        elif kind == "Split":
            steps.append(partial(split, *splitter(part, where)))
        elif kind in MATCHED:
            steps += [partial(split, regex.compile(by, regex.V1), how, bool(invert))
                      for by, how, invert in MATCHED[kind](part)]
        elif kind != "null":
            raise ValueError(f"{where}: the pre-tokenizer {kind} is not supported")
    return steps, one_pattern(parts, kinds)


def splitter(spec, where):
    """(pattern, behavior, invert) of a pre-tokenizer Split."""
    (kind, text), = spec["pattern"].items()
    if spec["behavior"] not in BEHAVIORS:
        raise ValueError(f"{where}: the Split behavior {spec['behavior']} is not supported")
    by = compiled(text, where) if kind == "Regex" else regex.compile(regex.escape(text))
    return by, spec["behavior"], bool(spec.get("invert"))


def one_pattern(parts, kinds):
    """The pattern that does all that these pre-tokenizers do, or None."""
    last = parts[-1]
    if last.get("add_prefix_space", True):
        return None
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and last.get("use_regex", True):
        return DIGITS_PATTERN if parts[0].get("individual_digits") else None
    plain = {"type": "Split", "behavior": "Isolated", "invert": False}
    by = [p for p in COVERING if parts[0] == {**plain, "pattern": {"Regex": p}}]
    return by[0] if by and kinds[1:] == ["ByteLevel"] and not last.get("use_regex", True) else None


def flat(spec, name):
    """The parts of a Sequence, of those within it too; of anything else, itself."""
    if spec.get("type") != "Sequence":
        return [spec]
    return [part for inner in spec[name] for part in flat(inner, name)]


# -------------------------------------------------------------------------------- normalizing

SIMPLE = {
    "Lowercase": lambda text: "".join(c.lower() for c in text),
    "StripAccents": lambda text: regex.sub(r"\p{M}", "", text),
    "ByteLevel": in_bytes} | {form: partial(unicodedata.normalize, form)
                              for form in ("NFC", "NFD", "NFKC", "NFKD")}


def normalizers(spec, where):
    """The steps, functions text -> text, of a tokenizer.json's "normalizer"."""
    return [normalizer(part, where) for part in flat(spec, "normalizers")] if spec else []


def normalizer(spec, where):
    """One step, a function text -> text; ValueError for a kind that is not known."""
    kind = spec.get("type")
    if kind in SIMPLE:
        return SIMPLE[kind]
    if kind == "Prepend":
        return lambda text: spec["prepend"] + text if text else text
    if kind == "Strip":
        ends = [r"\A\s+"] * bool(spec["strip_left"]) + [r"\s+\Z"] * bool(spec["strip_right"])
        return partial(regex.compile("|".join(ends) or r"(?!)").sub, "")
    if kind == "Replace":
        (form, text), = spec["pattern"].items()
        by = compiled(text, where) if form == "Regex" else regex.compile(regex.escape(text))
        return partial(replace, by, spec["content"])
    raise ValueError(f"{where}: the normalizer {kind} is not supported")


def normalized(text, steps):
    for step in steps:
        text = step(text)
    return text


def replace(pattern, content, text):
    parts, at = [], 0
    for start, end in matches(pattern, text):
        parts += [text[at:start], content]
        at = end
    return "".join(parts) + text[at:]


# ------------------------------------------------------------------------------- added tokens

WORD, SPACE = regex.compile(r"\w"), regex.compile(r"\s")
FLAGS = "single_word", "lstrip", "rstrip", "normalized", "special"


class AddedTokens:
    """Tokens that a text is searched for before all else; what is found is one id.

    Those with `normalized` are looked for, themselves normalized, in the normalized text, the
    others before that. Of several that begin at one place the longest is taken. `ids` is {content:
    id}, `of` {id: token}, `text_of` {id: what it is decoded to}, `special` the texts that decoding
    leaves out: a special token that is decoded to another text, normalized, is not left out.
    """

    def __init__(self, tokens, vocab, normalize):
        """tokens: [{"content", and the FLAGS}, …]; of one that comes again the later flags count.

        As in tokenizers, the id is the vocabulary's or, for what is not in there, the next one,
        whatever "id" it has (tokenizer.py refuses one that differs).
        """
        self.ids, self.of, self.text_of = {}, {}, {}
        for token in tokens:
            content = token["content"]
            following = max([len(vocab) - 1, *self.ids.values()]) + 1
            if content:
                i = self.ids[content] = self.ids.get(content, vocab.get(content, following))
                self.of[i] = token
                text = normalize(content) if token["normalized"] else self.text_of.get(i, content)
                self.text_of[i] = text
        self.special = {token["content"] for token in tokens if token["special"]}
        self.finders = [self._finder(False, str), self._finder(True, normalize)]

    def _finder(self, normalized, normalize):
        """(pattern, {what it finds: id}), or None if there is nothing to find."""
        found = {normalize(token["content"]): i for i, token in self.of.items()
                 if token["normalized"] == normalized}
        longest_first = map(re.escape, sorted(found, key=len, reverse=True))
        return (re.compile("|".join(longest_first)), found) if found else None

    def split(self, text, normalized):
        """Yields (a part of the text, None) and (what was found, its id); no part is empty."""
        at, finder = 0, self.finders[normalized]
        for match in finder[0].finditer(text) if finder else ():
            start, end = match.span()
            i = finder[1][match[0]]
            token = self.of[i]
            beside = text[start - 1:start], text[end:end + 1]
            if token["single_word"] and any(map(WORD.match, beside)):
                continue
            while token["lstrip"] and start > at and SPACE.match(text[start - 1]):
                start -= 1
            while token["rstrip"] and SPACE.match(text[end:end + 1]):
                end += 1
            if token["lstrip"]:
                start = max(start, at)
            if at < start:
                yield text[at:start], None
            if start < end:  # not if the token before, by its rstrip, has taken all of it
                yield text[start:end], i
            at = end
        if at < len(text):
            yield text[at:], None


# ----------------------------------------------------------------------- Oniguruma's patterns

CLASS = r"(?P<name>\\[pP]\{\^?\w+\} | \\[sSdDwWhH])"
# %s: the characters that stand for themselves, in a set or outside.
CHAR = r"(?:\\[ntrfav] | \\x[0-7][0-9a-fA-F] | \\u[0-9a-fA-F]{4} | \\[^\w\s] | %s)"
FREE, MEMBER = CHAR % r"[^\\(\[]", CHAR % r"[^\\\[\]&\-] | &(?!&)"
PART = regex.compile(rf"""  # of a pattern
    {CLASS} | (?P<times>[*+?][+?]? | \{{\d*,?\d*(?<!\{{,?)\}}[+?]?) | (?P<anchor>[.|^$])
  | (?P<set>\[\^?+(?![]:])) | (?P<fold>\(\?-?i:) | (?P<group>\((?!\*)(?:\?(?:[:=!>]|<[=!])|(?!\?)))
  | (?P<end>\)) | (?P<char>{FREE})""", regex.VERBOSE | regex.V1)
IN_SET = regex.compile(rf"""  # a part of […]
    {CLASS} | (?P<range>{MEMBER}-{MEMBER}) | (?P<char>{MEMBER} | (?<=\[\^?)- | -(?=\]))
  | (?P<both>(?<!\[\^?)&&(?![]&])) | (?P<set>\[\^?+(?![]:]))
  | (?P<end>\])""", regex.VERBOSE | regex.V1)
ANCHORS = {"^": r"(?:\A|(?<=\n)(?!\Z))", "$": "(?m:$)"}  # of lines, always
SETS = regex.compile(r"\\.|(?P<set>\[(?:[^][\\]|\\.|(?&set))*\])", regex.DOTALL)
WORD_IN_SET = r"[\w--[\u200c\u200d]]"  # without ² and five others that \w has elsewhere
CLASSES = {  # what Oniguruma means by these, where `regex` means something else
    "w": r"[[\w\u00b2\u00b3\u00b9\u00bc-\u00be]--[\u200c\u200d]]", "h": "[0-9a-fA-F]",
    "Ll": r"[\p{Ll}\u0295]", "Lo": r"[\p{Lo}--\u0295]"}
UNLIKE = {"word", "xdigit", "lower", "lc", "extendedpictographic"}  # properties that differ
CASED = {"lu", "ll", "lt", "upper", "uppercase", "lowercase"}
FOLDED = {"s": "\u017f", "k": "\u212a"}  # what else is an s or a k if case is not looked at
LIGATURES = "ss", "st", "ff", "fi", "fl"  # Oniguruma takes one character for two then
ESCAPED = dict(zip("ntrfav", "\n\t\r\f\a\v"))


def compiled(pattern, where):
    """An Oniguruma pattern for `regex`. ValueError if it is not known to mean the same there."""
    try:
        check_sets(pattern)
        return regex.compile(translated(pattern), regex.V1)
    except (ValueError, IndexError, regex.error) as error:  # an IndexError: one ) too many
        message = f"{where}: the pattern {pattern!r} is not supported: {error}"
    raise ValueError(message)


def translated(pattern):
    r"""A pattern of Oniguruma's in the syntax of `regex` (its version 1).

    >>> translated(r"(?i:'s|'d)|\p{N}{1,3}+| ?[^(\s|[.,])]+$")
    "(?:'[sS\\u017f]|'[dD])|\\p{N}+| ?[^\\x28\\s\\x7c[\\x2e\\x2c]\\x29]+(?m:$)"
    """
    sets, out, before, at = 0, [], "", 0
    folds, behind = [False], [False]  # of each open group: is it without case, or a look behind
    if pattern.startswith("(?i)"):
        folds, at = [True], 4
    while at < len(pattern):
        match = (IN_SET if sets else PART).match(pattern, at)
        if not match:
            raise ValueError(f"what {pattern[at:at + 10]!r} means is not known")
        kind, text, at = match.lastgroup, match[0], match.end()
        literal = ""
        if kind == "name":
            text = named(text, folds[-1], sets)
        elif kind in ("char", "range"):
            literal = character(text) if kind == "char" else ""
            if folds[-1] and (before + literal).lower() in LIGATURES and not sets:
                raise ValueError(f"{before + literal!r} may be one character without (?i)")
            text = member(text, folds[-1], sets) if literal else span(text, folds[-1])
        elif kind in ("fold", "group"):
            folds.append(text == "(?i:" or kind == "group" and folds[-1])
            behind.append(text.startswith("(?<") or behind[-1])
            text = "(?:" if kind == "fold" or text == "(" else text
        elif kind == "end" and not sets:
            folds.pop(), behind.pop()
        elif kind in ("set", "end"):
            sets += 1 if kind == "set" else -1
        elif kind == "times":
            text = times(text, behind[-1])
        out.append(ANCHORS.get(text, text) if kind == "anchor" else text)
        before = literal
    return "".join(out)


def check_sets(pattern):
    """ValueError for a set such as [^\\s\\S], of nothing: `regex` takes it for any character."""
    for match in SETS.finditer(pattern):
        names = regex.findall(r"\\[swdh]|\\p\{\^?\w+\}", match["set"] or "", regex.IGNORECASE)
        signs = {(name.lower().replace("^", ""), name[1].isupper() != ("^" in name))
                 for name in names}
        opposite = {name for name, negated in signs if negated}
        if "[^" in match[0] and (len(opposite) > 1 or opposite & {n for n, no in signs if not no}):
            raise ValueError(f"{match[0]} may be a set of nothing")


def character(text):
    """The one character that is written as itself, as \\n, \\x0a or \\u000a, or after a \\."""
    if text[0] != "\\":
        return text
    return chr(int(text[2:], 16)) if text[1] in "xu" else ESCAPED.get(text[1], text[1])


def spelled(c):
    """A character so that it means itself, in a set, too."""
    return c if c.isalnum() or ord(c) > 0x7F or c in " '" else f"\\x{ord(c):02x}"


def member(text, fold, in_set):
    """A character, or without case the set of those that are the same."""
    c = character(text)
    if not fold or not c.isalpha():
        return spelled(c)
    if not c.isascii():
        raise ValueError(f"{c!r} without case")
    same = c.lower() + c.upper() + FOLDED.get(c.lower(), "").encode("unicode_escape").decode()
    return same if in_set else f"[{same}]"


def span(text, fold):
    """A range in a set."""
    first, last = regex.fullmatch(f"({MEMBER})-({MEMBER})", text, regex.VERBOSE).groups()
    if fold and (first, last) != ("0", "9"):
        raise ValueError(f"the range {text!r} without case")
    return f"{spelled(character(first))}-{spelled(character(last))}"


def named(text, fold, in_set):
    """A class of characters, as \\s or \\p{L}."""
    name = text[1:] if len(text) == 2 else text[3:-1].lstrip("^")
    loose = name.lower().replace("_", "") if len(text) > 2 else ""
    if loose in UNLIKE or fold and loose in CASED:
        raise ValueError(f"what {text} means is not known" + " without case" * fold)
    known = CLASSES.get(name.lower() if len(text) == 2 else name)
    if not known:
        return text
    if in_set and name in "wW":
        known = WORD_IN_SET
    negated = (text[1] == "P") != ("^" in text) if len(text) > 2 else name.isupper()
    return f"[^{known}]" if negated else known


def times(text, behind):
    """A quantifier. {1,3}+ is (?:…{1,3})+ in Oniguruma, and {2}? is (?:…{2})?."""
    if behind:
        raise ValueError(f"{text} behind is not done")
    if text[0] != "{" or text[-1] == "}":
        return text
    least, comma, most = text[1:-2].partition(",")
    if text[-1] == "?" and comma:
        return text
    if text[-1] == "+" and least in ("", "0", "1") and most != "0":
        return "+" if least == "1" else "*"
    raise ValueError(f"what {text} means is not known")
