"""Byte-pair encoding as Hugging Face's tokenizers does it: a piece of text -> ids.

The order of the merges decides (Sennrich et al. 2016, arXiv 1508.07909): the pair that is listed
first is joined first, and a token that no merge makes is never made. tiktoken joins whatever two
neighbours give the token of the lowest rank. `one_way` finds where this is the same, as it is in
every vocabulary that was trained; there tiktoken does the work.
"""
import heapq

import tiktoken


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


BYTE_OF = {character: byte for byte, character in enumerate(bytes_to_unicode())}
LATIN = dict.fromkeys(range(256), 0xFFFF) | {ord(c): byte for c, byte in BYTE_OF.items()}


def to_bytes(token):
    """A token's bytes; those of its UTF-8 if it is not written in bytes_to_unicode's characters."""
    try:
        return token.translate(LATIN).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


class BPE:
    """tokenizer.json's "model". Its pieces are written in the characters of bytes_to_unicode.

    ids: {token: id}; lacks: the bytes without an id. `encoding` is tiktoken's, None where it would
    differ; its ranks are the 256 bytes, then the merges in order, and `id_of[rank]` translates.
    ValueError, which begins with `where`, for a model that cannot be done.
    """

    def __init__(self, model, where, pattern=None):
        """pattern: how tiktoken splits a whole text, if it can."""
        _check(model, where)
        self.ids, self.whole_first = model["vocab"], bool(model.get("ignore_merges"))
        self.first = model.get("continuing_subword_prefix") or ""  # before all but the first
        self.last = model.get("end_of_word_suffix") or ""
        self.unknown, self.fuse = self.ids.get(model.get("unk_token")), model.get("fuse_unk")
        self.fallback = model.get("byte_fallback")
        merges = _merges(model["merges"], where)
        self.joined = self._joined(merges, where)
        forms = [(before, after) for before in ("", self.first) for after in ("", self.last)]
        self.lacks = bytes(byte for c, byte in BYTE_OF.items() if not all(
            before + c + after in self.ids for before, after in forms))
        if self.lacks and model.get("unk_token") is not None and self.unknown is None:
            raise ValueError(f"{where}: the unk_token {model['unk_token']!r} is not in the vocab")
        self.encoding = self.id_of = None
        made = None if self.first or self.last else one_way(sorted(merges, key=merges.get))
        if made:
            tokens = [*BYTE_OF, *(token for token in made if len(token) > 1)]
            self.id_of = [self.ids.get(token) for token in tokens]
            self.encoding = tiktoken.Encoding(
                "folder", pat_str=pattern or ".", special_tokens={},
                mergeable_ranks={to_bytes(token): rank for rank, token in enumerate(tokens)})
        self.unmade = {t for t in self.ids if t not in (made or {}) and set(t) <= BYTE_OF.keys()}

    def _joined(self, merges, where):
        """{(left id, right id): (rank, id of the two joined)}."""
        joined = {}
        for (left, right), rank in merges.items():
            both = left + right[len(self.first):]
            for token in (left, right, both):
                if token not in self.ids:
                    raise ValueError(f"{where}: merge {rank} makes {both!r} of {left!r} and "
                                     f"{right!r}, but {token!r} is not in the vocab")
            joined[self.ids[left], self.ids[right]] = rank, self.ids[both]
        return joined

    def encode(self, piece):
        """The ids of one piece, written in the characters of bytes_to_unicode."""
        if self.whole_first and piece in self.ids:
            return [self.ids[piece]]
        known = all(c in self.ids for c in piece)
        if not self.encoding or not known and (self.unknown is not None or self.fallback):
            return self._join(self._symbols(piece))
        kept = bytes(BYTE_OF[c] for c in piece if c in self.ids)
        ranks = self.encoding._encode_single_piece(kept) if kept else []
        return [self.id_of[rank] for rank in ranks]

    def _symbols(self, piece):
        """The ids that a piece begins with: a character's, its bytes' in UTF-8, or unk_token's."""
        ids, unknown = [], []  # an unknown one waits: with fuse_unk, many in a row are one
        for n, c in enumerate(piece):
            token = self.first * (n > 0) + c + self.last * (n == len(piece) - 1)
            spelled = [f"<0x{byte:02X}>" for byte in token.encode()] if self.fallback else []
            if token in self.ids:
                ids += [*unknown, self.ids[token]]
                unknown = []
            elif spelled and all(byte in self.ids for byte in spelled):
                ids += [self.ids[byte] for byte in spelled]
            elif self.unknown is not None:
                ids += [] if self.fuse else unknown
                unknown = [self.unknown]
        return ids + unknown

    def _join(self, ids):
        """Joins neighbours, the pair of the lowest rank first, the leftmost of the same rank."""
        end = len(ids)
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))
        queue = []

        def look(left, right):
            if left >= 0 and right < end and (ids[left], ids[right]) in self.joined:
                rank, both = self.joined[ids[left], ids[right]]
                heapq.heappush(queue, (rank, left, both))

        for n in range(end - 1):
            look(n, n + 1)
        while queue:
            _, left, both = heapq.heappop(queue)
            right = after[left]
            pair = (ids[left], ids[right]) if right < end else None
            if self.joined.get(pair, (0, None))[1] != both:
                continue  # one of the two has been joined since
            ids[left], ids[right] = both, None
            after[left] = after[right]
            if after[right] < end:
                before[after[right]] = left
            look(before[left], left)
            look(left, after[left])
        return [i for i in ids if i is not None]


def one_way(merges):
    """{token: (rank, left, right)}: how each token is made, if that is always of the same halves.

    merges: [(left, right), …] in order. None if a token might be made before one of its halves
    could be; then the ranks of tokens do not say which pair is joined first. A pair whose
    characters other merges join across its middle, earlier, never stands there to be joined:

    >>> list(one_way([("l", "o"), ("o", "w"), ("l", "ow"), ("lo", "w")]).items())[256:]
    [('lo', (0, 'l', 'o')), ('ow', (1, 'o', 'w')), ('low', (3, 'lo', 'w'))]
    """
    made, late = {c: (-1, "", "") for c in BYTE_OF}, set()
    for rank, (left, right) in enumerate(merges):
        if left + right in made:
            continue
        if left not in made or right not in made:
            late.add(left + right)
        elif _meet(left, right, made):
            made[left + right] = rank, left, right
    return None if late - made.keys() else made


def _meet(left, right, made):
    """Whether the merges so far leave `left` and `right` side by side.

    They do unless a pair across the middle is joined while both its halves are there. The last
    tokens of `left` and the first of `right` are undone, the latest first; `limit` is the rank
    before which the two that are looked at were joined to others.
    """
    limit = len(made) + 1e9
    while True:
        rank, *halves = made.get(left + right, (limit, "", ""))
        if rank < limit and halves == [left, right]:
            return False
        if len(left) == len(right) == 1:
            return True
        if made[left][0] > made[right][0]:
            limit, _, left = made[left]
        else:  # of pairs of the same rank the left one is joined first
            limit, right = made[right][0] + 1, made[right][1]


def _check(model, where):
    """ValueError for a model that is not a BPE, or a BPE by chance."""
    if model.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= set(model):
        raise ValueError(f"{where}: only byte-level BPE tokenizers are supported, not the model "
                         f"{model.get('type')}")
    if model.get("dropout"):
        raise ValueError(f"{where}: a BPE with dropout {model['dropout']} gives other ids each "
                         "time; set it to null")
    if not all(type(i) is int and 0 <= i < 2 ** 31 for i in model["vocab"].values()):
        raise ValueError(f"{where}: the vocab's ids are not numbers from 0")
    if len(set(model["vocab"].values())) < len(model["vocab"]):
        raise ValueError(f"{where}: the vocab gives two tokens the same id")


def _merges(merges, where):
    """{(left, right): rank}; of a pair that is listed twice, the later place counts."""
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    wrong = next((n for n, pair in enumerate(pairs) if len(pair) != 2), None)
    if wrong is not None:
        raise ValueError(f"{where}: merge {wrong} is not two tokens: {merges[wrong]!r}")
    return {pair: rank for rank, pair in enumerate(pairs)}
