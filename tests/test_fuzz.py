"""Bad input of every kind ends in one line that names the file, or it is read and used.

Whatever a file says: no traceback, no hang, no more than 2 GB of memory. A case is a good tiny file
with a few random changes, made from the number of the case alone. FUZZ=2000 python -m pytest
tests/test_fuzz.py is the long form; `python tests/test_fuzz.py KIND NUMBER FOLDER` leaves a case's
files in a folder.
"""
import ast
import contextlib
import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from conftest import SPECIAL, make_folder
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

import data
import prepare
import resume
import train
from model import GPT

ROOT = Path(train.__file__).parent
CASES = int(os.environ.get("FUZZ", 170))
SECONDS, BYTES, LINE = 10, 2 << 30, 2000  # that one case may take, and characters that it may say
WORDS = "Hello <|im_end|> wörld, it's 12\n\n \U0001f600\u3000x"
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
            "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


# ------------------------------------------------------------------------------ what is changed

DEEP = 10_000
ODD = ["null", "true", "false", "-1", "0", "1", "2", "0.5", "1e308", "-1e308", "1e999", "NaN",
       "Infinity", str(2 ** 31), str(2 ** 63), str(10 ** 400), "9" * 5000, '"x"', '""', "[]", "{}",
       "[1]", '["x"]', "[[]]", '[null]', '{"x": 1}', '{"content": []}', "[" * DEEP + "]" * DEEP,
       '{"a":' * DEEP + "1" + "}" * DEEP, '"' + "long " * 100_000 + '"', r'"\ud83d"', r'"\u0000"',
       r'"a\nb\u2028c"', '"/etc/passwd"', '"../x"', '"(a+)+$"', '"<|im_end|>"', '" "']


def nodes_of(tree, draw):
    """(parent, key) of a random node: down from the root, as far as chance goes."""
    parent, key = [tree], 0
    while isinstance(parent[key], (dict, list)) and parent[key] and draw.random() < 0.85:
        parent = parent[key]
        key = draw.choice(list(parent)) if isinstance(parent, dict) else draw.randrange(len(parent))
    return parent, key


def changed_json(text, draw):
    """A JSON text with one node replaced, taken away, doubled, renamed, wrapped or counted on."""
    tree = [json.loads(text)]
    parent, key = nodes_of(tree[0], draw)
    if isinstance(parent, list) and len(parent) == 1 and draw.random() < 0.5:
        parent, key = nodes_of(tree[0], draw)
    parent = tree if parent[key] is tree[0] else parent
    odd, how = draw.choice(ODD), draw.randrange(8)
    value, marks = parent[key], {}
    if how == 1 and parent is not tree:
        del parent[key]
    elif how == 2 and isinstance(parent, dict):
        parent["@twice"], marks['"@twice"'] = "@odd", json.dumps(key)
    elif how == 3 and isinstance(parent, dict):
        new = draw.choice(["x", "", "content", "a\nb", str(key) + "s", "k" * 9999])
        parent[new] = parent.pop(key)
    elif how == 4:
        parent[key] = draw.choice([[value], {"x": value}, [value, value], str(value)])
    elif how == 5 and type(value) in (int, float):
        parent[key] = draw.choice([value + 1, value - 1, -value, 2 * value, value // 2, [value]])
    elif how == 6 and isinstance(value, list):
        parent[key] = draw.choice([value[::-1], value[1:], value * 2, value + ["@odd"]])
    else:
        parent[key] = "@odd"
    text = json.dumps(tree[0])
    for mark, raw in [*marks.items(), ('"@odd"', odd)]:
        text = text.replace(mark, raw)
    return text


def changed_bytes(raw, draw, within=None):
    """Bytes that are cut, overwritten, put in or taken out; within: of the first so many."""
    end, new = len(raw) if within is None else min(within, len(raw)), bytearray(raw)
    for _ in range(draw.choice([1, 1, 1, 3])):
        at, how = draw.randrange(end) if end else 0, draw.randrange(6)
        size = draw.choice([1, 2, 4, 8])
        if how == 0:
            del new[at:]
        elif how == 1:
            new[at:at + size] = draw.randbytes(size)
        elif how == 2:
            new[at:at + 8] = struct.pack("<Q", draw.choice([0, 1, 2 ** 31, 2 ** 40, 2 ** 63 - 1,
                                                            2 ** 64 - 1, len(raw)]))
        elif how == 3:
            new[at:at] = draw.randbytes(draw.choice([1, 8, 5000]))
        elif how == 4:
            del new[at:at + draw.choice([1, 8, 500])]
        elif end:
            new[at:at + 1] = bytes([new[at] ^ 1 << draw.randrange(8)]) if at < len(new) else b""
    return bytes(new)


def json_file(raw, draw):
    """One to three changes of a JSON file, most of them to what it says."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        try:
            raw = changed_json(raw.decode(), draw).encode()
        except (ValueError, RecursionError):
            return raw
    how = draw.random()
    if how < 0.12:
        return changed_bytes(raw, draw)
    return draw.choice([b"", b"\xff\xfe\0", b"[]", b"\xef\xbb\xbf" + raw, raw[:-1], b"\0" * 9,
                        raw + raw]) if how < 0.2 else raw


def lines_file(raw, draw):
    lines = raw.splitlines()
    n = draw.randrange(len(lines))
    lines[n] = json_file(lines[n], draw)
    if draw.random() < 0.2:
        lines[n:n] = [draw.choice([b"", b"null", b"[1]", b"{}", b"# x", lines[0]])]
    return b"\n".join(lines)


def safetensors_file(raw, draw):
    """Its header says something else, or its bytes are others."""
    size, = struct.unpack("<Q", raw[:8])
    if draw.random() < 0.4:
        return changed_bytes(raw, draw, within=draw.choice([9, 8 + size, len(raw)]))
    head = changed_json(raw[8:8 + size].decode(), draw).encode()
    return struct.pack("<Q", len(head)) + head + raw[8 + size:]


def gguf_file(raw, draw):
    return changed_bytes(raw, draw, within=draw.choice([32, 700, 700, 9000, len(raw)]))


PARTS = """{{ "x" | center(10 ** 10) }}  {{ "%10000000000d" % 1 }}
    {{ "{:>9999999999}".format(1) }}
    {% set n = namespace(x="x" * 999) %}{% for i in range(60) %}
    {% set n.x = n.x ~ n.x %}{% endfor %}
    {% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}
    {% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}  {{ [1] * 10 ** 9 }}  {{ 9 ** 9 ** 9 }}
    {{ (range(99999) | list) * 9999 }}  {{ ("x" * 9999999) | list | join("y" * 999999) }}
    {{ messages.__class__.__mro__ }}  {{ "".__class__.__base__.__subclasses__() }}
    {{ raise_exception.__globals__ }}  {{ self._TemplateReference__context }}  {{ cycler.__init__ }}
    {{ lipsum.__globals__["os"] }}  {% include "/etc/passwd" %}  {% import "os" as os %}{{ os }}
    {{ namespace.__init__.__globals__ }}  {{ messages | map(attribute="__class__") | list }}
    {{ "x" | attr("__class__") }}  {{ messages | tojson(indent=10 ** 9) }}  {{ 1 / 0 }}
    {{ messages[99] }}  {{ nothing.at.all }}  {{ messages.append(1) }}  {% for  {{  {#  {% raw %}
    {% endfor %}  {% set messages = 1 %}  {{ raise_exception("a\\nb") }}
    {{ messages[0].content[0] }}
    {{ "y" | indent(10 ** 9) }}  {{ "x" | format(1) }}  {{ strftime_now("%Y" * 999) }}
    {{ x | zip }}
    {{ lipsum(n=10 ** 6) }}  {{ range(10 ** 9) | sum }}  {{ "a".ljust(10 ** 10) }}  {{ caller() }}
    {{ ("x" * 9999999).replace("x", "y" * 9999) }}  {% generation %}a{% endgeneration %}
    {% break %}
    {{ "x".encode("utf-32") }}  {{ "a" * -1 }}  {{ true + [] }}  {{ "\\ud83d" }}
    {{ messages | batch(0) }}
    {{ "x" | wordwrap(0) }}  {{ 2 ** -1 }}  {{ messages | groupby("role") | list }}""".split("  ")
PARTS = [*filter(None, map(str.strip, PARTS)), "{{ " + "(" * 999 + "1" + ")" * 999 + " }}",
         "{% if 1 %}" * 500 + "{% endif %}" * 500, "{{ " + "-" * 5000 + "1 }}",
         "{{ " + "1 + " * 20_000 + "1 }}", "{{ [" * 99, "{% set x = '" + "z" * 999_999 + "' %}",
         "{{ '" + "z" * 999_999 + "' }}", "{{ x" + ".y" * 5000 + " }}"]


def template_file(raw, draw):
    how, part = draw.random(), draw.choice(PARTS).encode("utf-8", "surrogatepass")
    if how < 0.3:
        return changed_bytes(raw, draw)
    at = draw.choice([0, len(raw), draw.randrange(len(raw))])
    return part if how < 0.5 else raw[:at] + part + raw[at:]


# ---------------------------------------------------------------------------------- who reads it

def read_model(path):
    model = GPT.from_pretrained(path)
    ids = torch.tensor([[5, 6, 7]])[:, :model.config.context_length]
    with torch.no_grad():
        logits = model(ids)
    assert logits.shape == (*ids.shape, model.config.vocab_size)


def read_tokenizer(path):
    tokenizer = data.load_tokenizer(path)
    ids = tokenizer.encode_text(WORDS)
    tokenizer.decode(ids), tokenizer.read(ids)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 1"}]
    tokenizer.chat(chat), tokenizer.answer("Paris")
    assert tokenizer.eos_id in tokenizer.eos_ids and all(type(i) is int for i in tokenizer.eos_ids)
    if path.is_dir() and (path / "as it is").exists():
        with contextlib.suppress(Exception):  # it may refuse what is done here
            theirs = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            plain = "Hello world, it's 12"
            return tokenizer.encode_text(plain), theirs.encode(plain).ids
    return None


def read_both(path):
    read_tokenizer(path)
    read_model(path)


def read_task(path):
    task = data.load_task(str(path))
    examples = [e for of in (task.train, *task.eval.values()) for e in of]
    for e in [*examples, *data.load_task(str(path), measured_only=True).eval["all"]]:
        assert isinstance(e.prompt, str) and isinstance(e.response, str)
        assert e.check is None or e.check(e.response) in (True, False)


class Later:
    """A run as it is when it begins: what `go_on` is given."""

    run = None

    def __call__(self, checkpoint):
        run = copy.copy(Later.run)
        run.checkpoint, run.saves, run.trained, run.training = checkpoint, 0, [], None
        resume.go_on(run, checkpoint.parent)
        student = copy.deepcopy(run.student)
        if run.training:
            resume.resumed(run, student, "recovered")
        for stage in run.trained:
            resume.kept(run, student, stage)


LLAMA, OLDER = "llama", "older"
KINDS = {  # kind -> (what is read, the file within that is changed, how, who reads it)
    "config.json": (LLAMA, "config.json", json_file, read_model),
    "generation_config.json": (LLAMA, "generation_config.json", json_file, read_tokenizer),
    "tokenizer.json": (LLAMA, "tokenizer.json", json_file, read_tokenizer),
    "tokenizer_config.json": (LLAMA, "tokenizer_config.json", json_file, read_tokenizer),
    "chat template": (LLAMA, "chat_template.jinja", template_file, read_tokenizer),
    "safetensors": (LLAMA, "model.safetensors", safetensors_file, read_model),
    "index": ("shards", "model.safetensors.index.json", json_file, read_model),
    "shard": ("shards", "b.safetensors", safetensors_file, read_model),
    "vocab.json": (OLDER, "vocab.json", json_file, read_tokenizer),
    "merges.txt": (OLDER, "merges.txt", changed_bytes, read_tokenizer),
    "added_tokens.json": (OLDER, "added_tokens.json", json_file, read_tokenizer),
    "special_tokens_map.json": (OLDER, "special_tokens_map.json", json_file, read_tokenizer),
    "GGUF": ("tiny.gguf", "", gguf_file, read_both),
    "JSON rows": ("rows.json", "", json_file, read_task),
    "JSONL rows": ("rows.jsonl", "", lines_file, read_task),
    "latest.json": ("out/checkpoint", "latest.json", json_file, Later()),
    "checkpoint": ("out/checkpoint", "1-0.safetensors", safetensors_file, Later()),
    "trained student": ("out/checkpoint", "recovered.safetensors", safetensors_file, Later()),
    "results.json": ("done/checkpoint", "../results.json", json_file, Later())}


# --------------------------------------------------------------------------- good files, to begin

ROWS = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": '{"x": 1}', "id": 3},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                      {"role": "assistant", "content": [{"type": "text", "text": "t"}]}]},
        {"instruction": "i", "input": "j", "output": "o"},
        {"prompt": "d", "golden_answer": [{"Action": "x", "Action_Input": '{"y": 1}'}],
         "golden_response": ["z"]}, {"question": "e", "answer": "f"}]
SIZES = dict(d_model=16, n_layer=2, d_ff=24, head_dim=4, context_length=256)


def write_older(path, good):
    """The tokenizer of a folder in the older form."""
    path.mkdir()
    vocab = json.loads((good / "tokenizer.json").read_text())["model"]["vocab"]
    vocab |= {"he": 259, "Ġw": 260}
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\nh e\nĠ w\n", encoding="utf-8")
    for name, value in {"added_tokens.json": {"<a>": 261, "<b>": 262},
                        "special_tokens_map.json": {"eos_token": SPECIAL[2], "unk_token": {
                            "content": SPECIAL[0], "lstrip": False, "normalized": True}},
                        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}.items():
        (path / name).write_text(json.dumps(value))


def write_gguf(path, good):
    model = GPT.from_pretrained(good)
    c, writer = model.config, GGUFWriter(path, "llama")
    writer.add_context_length(c.context_length), writer.add_embedding_length(c.d_model)
    writer.add_block_count(c.n_layer), writer.add_feed_forward_length(c.d_ff)
    writer.add_head_count(c.n_head), writer.add_head_count_kv(c.n_kv_head)
    writer.add_layer_norm_rms_eps(c.norm_eps), writer.add_rope_freq_base(c.rope_theta)
    vocab = json.loads((good / "tokenizer.json").read_text())["model"]["vocab"] | {"ab": 259}
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("smollm")
    writer.add_token_list(list(vocab)), writer.add_token_merges(["a b"])
    writer.add_token_types([3] * 3 + [1] * (len(vocab) - 3)), writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "layers": "blk",
             "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
             "v_proj": "attn_v", "o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name, p in model.named_parameters():
        steps = [names.get(s, s) for s in name.split(".") if s not in ("self_attn", "mlp")]
        writer.add_tensor(".".join(steps), p.detach().numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()


def write_checkpoint(root, good):
    """What a run leaves that was broken off while it trained, and what one that ended leaves."""
    out = root / "out"
    run = prepare.prepare(train.parse(options(good, out)))
    run.checkpoint, run.identity = out / "checkpoint", resume.identity(run)
    run.machine = resume.machine(run.config)
    run.checkpoint.mkdir(parents=True)
    parameters = [p for p in run.student.parameters() if p.requires_grad]
    memory = {"step": 1, "moments": [{"m": torch.zeros_like(p), "n": 1} for p in parameters]}
    run.lines, run.seconds = [{"stage": "recovered", "loss": 0.5}], {"healthy": 1.5}
    items = {"perplexity": torch.ones(3), "science_element": torch.zeros(2)}
    run.stages = {"healthy": resume.evaluate.Measurement(items, [("a", "b")], {}, [])}
    resume.keep(run, "recovered", run.student)
    run.saves = 0
    generator = torch.Generator().manual_seed(0)
    resume.save(run, resume.snapshot("recovered", run.student, memory, generator, None, {"x": 1}))
    Later.run = run
    (root / "done" / "checkpoint").mkdir(parents=True)
    (root / "done" / "student").mkdir()
    (root / "done" / "student" / "model.safetensors").touch()
    results = {"config": resume.dataclasses.asdict(run.config), "guard": {},
               "environment": run.facts | {"processes": 1}}
    (root / "done" / "results.json").write_text(json.dumps(results))


def options(model, out):
    return ["--model", str(model), "--out", str(out), "--eval-limit", "4", "--eval-tokens", "4",
            "--steps", "2", "--batch-size", "2", "--rollout-tokens", "4", "--cka-samples", "4",
            "--group-size", "4", "--device", "cpu"]


def write_good(root):
    good = make_folder(root / LLAMA, **SIZES | {"context_length": 1024})
    (good / "chat_template.jinja").write_text(TEMPLATE)
    (good / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    config = {"eos_token": "<|im_end|>", "bos_token": {
                  "__type": "AddedToken", "content": SPECIAL[0], "special": True},
              "added_tokens_decoder": {"0": {"content": SPECIAL[0], "special": True}},
              "extra_special_tokens": {}, "chat_template": [{"name": "default", "template": "x"}]}
    (good / "tokenizer_config.json").write_text(json.dumps(config))
    tensors = load_file(good / "model.safetensors")
    shards, names = root / "shards", sorted(tensors)
    shards.mkdir()
    shutil.copy(good / "config.json", shards)
    of = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(names)}
    for file in set(of.values()):
        save_file({k: w for k, w in tensors.items() if of[k] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": 1}, "weight_map": of}))
    write_older(root / OLDER, good)
    write_gguf(root / "tiny.gguf", make_folder(root / "padded", **SIZES, padding=1))
    (root / "rows.json").write_text(json.dumps({"data": ROWS}))
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    write_checkpoint(root, good)
    return root


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_good(tmp_path_factory.mktemp("good"))


def make_case(kind, number, good, folder):
    """Writes a case's files; returns the path that is to be read."""
    what, within, change, _ = KINDS[kind]
    draw = random.Random(f"{kind} {number}")
    target, source = folder / what, good / what
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
        shutil.copytree(source.parent, target.parent, dirs_exist_ok=True,
                        ignore=lambda *_: []) if ".." in within else None
    raw = (source / within if within else source).read_bytes()
    (target / within if within else target).write_bytes(change(raw, draw))
    return target


# ------------------------------------------------------------------------------------- the tests

@contextlib.contextmanager
def limits():
    """Within the body: an alarm after SECONDS, and at most BYTES more of memory."""
    def late(*_):
        raise BaseException("it hangs")  # which nothing takes for a mistake in a file
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def outcome(kind, number, good, folder):
    """(what is wrong with how a case ended, or None; the line that it ended in, or "")."""
    path, began = make_case(kind, number, good, folder), time.monotonic()
    try:
        with limits():
            same = KINDS[kind][3](path)
        if same and same[0] != same[1]:
            return f"{same[0]} instead of tokenizers' {same[1]}", ""
        said = ""
    except (ValueError, OSError, resume.Finished) as error:
        said = str(error)
        if type(error).__name__ in ("UnicodeDecodeError", "UnicodeEncodeError", "JSONDecodeError"):
            return f"{type(error).__name__}: {error}", said
        if re.search("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", said) or len(said) > LINE:
            return f"not one line of text, of {len(said)} characters: {said[:300]!r}", said
        if str(folder) not in said:
            return f"it names no file: {said}", said
        if re.search("MemoryError|memory|allocate", said) and "template" not in said:
            return f"it takes more than {BYTES} bytes: {said}", said
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error!s:.300} at {last_line(error)}", ""
    if time.monotonic() - began > SECONDS:
        return "it takes too long", said
    return None, said


def last_line(error):
    at = error.__traceback__
    lines = []
    while at:
        lines.append(f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}")
        at = at.tb_next
    return " ".join(lines[-6:])


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_line_or_read(kind, good, tmp_path, capsys):
    """Both occur, and what is wrong is told of all cases at once."""
    wrong, refused, cases = [], 0, -(-CASES // len(KINDS))
    for number in range(cases):
        problem, said = outcome(kind, number, good, tmp_path / str(number))
        wrong += [f"{kind} {number}: {problem}"] if problem else []
        refused += bool(said)
        shutil.rmtree(tmp_path / str(number))
    with capsys.disabled() if "FUZZ" in os.environ else contextlib.nullcontext():
        print(f"\n{kind}: {cases} cases, {refused} refused, {len(wrong)} wrong", end=" ")
    assert not wrong, "\n".join(wrong[:40])
    assert refused or kind == "results.json"  # of any other form it is no finished run


def test_the_files_that_all_begins_with_are_read(good):
    for what, _, _, read in KINDS.values():
        done = what.startswith("done")
        with pytest.raises(resume.Finished) if done else contextlib.nullcontext():
            read(good / what)


def test_a_named_token_without_flags_is_found_as_transformers_finds_it(good, tmp_path):
    """It is not normalized: that is so of special tokens, and one with a name is special."""
    shutil.copytree(good / LLAMA, tmp_path / "model")
    config = {"bos_token": SPECIAL[0], "eos_token": "x",
              "tokenizer_class": "PreTrainedTokenizerFast",
              "added_tokens_decoder": {"0": {"content": SPECIAL[0]}}}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    text = f"a{SPECIAL[0]}x b"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")(text).input_ids
    assert data.load_tokenizer(tmp_path / "model").encode(text) == theirs


def test_a_pattern_that_tries_too_many_ways_is_one_line(good, tmp_path, monkeypatch):
    monkeypatch.setattr("pieces.SECONDS", 0.1)
    shutil.copytree(good / LLAMA, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    spec = json.loads(path.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated",
             "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="model: a pattern of its tokenizer does not"):
        data.load_tokenizer(tmp_path / "model").encode("a" * 40 + "!")


RUNS = {  # a file of a good folder or run -> what it says instead
    "llama/config.json": b"[" * DEEP, "llama/tokenizer.json": b'{"model": {"vocab": 3}}',
    "llama/chat_template.jinja": b"{{ 'x' | center(10 ** 10) }}",
    "llama/model.safetensors": b"\xff" * 99, "out/checkpoint/latest.json": b'{"saves": [1]}',
    "out/checkpoint/1-0.safetensors": b"", "rows.jsonl": b'{"prompt": "a", "response": 1}'}


@pytest.mark.parametrize("what", [*RUNS] if CASES > 200 else ["llama/config.json",
                                                              "out/checkpoint/latest.json"])
def test_a_process_ends_in_one_line_and_exit_code_2(what, good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    (tmp_path / what).write_bytes(RUNS[what])
    command = options(tmp_path / LLAMA, tmp_path / "out")
    command += ["--data", str(tmp_path / "rows.jsonl")] if what == "rows.jsonl" else []
    done = subprocess.run([sys.executable, "train.py", *command], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line, = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(tmp_path / what) in line or what == "llama/chat_template.jinja"


def calls_and_imports(path):
    """What a file imports and calls, as it writes it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Call):
            yield ast.unparse(node.func)
            yield from (f"{keyword.arg}=" for keyword in node.keywords)


def test_no_file_is_read_that_could_run_code():
    """No pickle, by whatever name, and nothing that runs a text as Python."""
    banned = re.compile(r"((c?P|p|cloudp)ickle|dill|marshal|shelve|joblib)\b.*|torch\.(load|save)"
                        r"|(numpy|np)\.load|allow_pickle=|eval|exec|compile|os\.system|shell=")
    for path in ROOT.glob("*.py"):
        assert [name for name in calls_and_imports(path) if banned.fullmatch(name)] == []


def test_a_template_reaches_nothing_of_pythons(good, tmp_path):
    """Whatever it asks for, no file of this machine comes into the text, and none is written."""
    (tmp_path / "secret").write_text("the secret")
    shutil.copytree(good / LLAMA, tmp_path / "model")
    names = "cycler lipsum namespace raise_exception self strftime_now joiner messages".split()
    reach = [f"{name}{way}.__builtins__.open('{tmp_path}/secret').read()" for name in names
             for way in (".__globals__", ".__init__.__globals__", "['__init__']['__globals__']")]
    reach += [f"(messages | attr({name!r}))" for name in ("__class__", "append", "mro")]
    for said in reach:
        (tmp_path / "model" / "chat_template.jinja").write_text("{{ " + said + " }}!")
        try:
            tokenizer = data.load_tokenizer(tmp_path / "model")
            text = tokenizer.decode(tokenizer.chat([{"role": "user", "content": "a"}]))
        except ValueError as error:
            text = str(error)
        assert "the secret" not in text and "<class" not in text and "built-in" not in text, said


if __name__ == "__main__":
    where = Path(sys.argv[3])
    write_good(where / "good")
    print(outcome(sys.argv[1], int(sys.argv[2]), where / "good", where / "case"))
