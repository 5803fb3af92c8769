"""A chat as a model's own template writes it: Jinja, rendered as transformers 5.23 renders it, but
that today is TODAY.

A template is a program that comes with a model. In Jinja's sandbox it cannot reach Python, and here
it can neither run on for ever nor fill the memory. `write` is what the tokenizer calls.
"""
import contextlib
import functools
import itertools
import json
import resource
import sys
import time
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from files import printable, read_text

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TRANSCRIPT = """{% for m in messages %}{% if m.role == "system" %}{{ m.content }}

{% elif m.role == "user" %}Question: {{ m.content }}
{% else %}Answer: {{ m.content }}

{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"""

# What a template that writes today's date is told: with the real one the same command would give
# other numbers tomorrow, and a run that goes on over night other prompts. It is Llama 3.2's own.
TODAY = datetime(2024, 7, 26)

# What a chat may take: lines of Python, seconds, characters, bytes of memory.
STEPS, SECONDS, LONGEST, MEMORY = 1_000_000, 3, 10_000_000, 1 << 28


def write(source, messages, add_generation_prompt, tokens, folder):
    """[{"role", "content"}, …] as the template `source` writes them, a text.

    tokens: {bos_token: "<s>", …}. A template that refuses a system message gets it as the beginning
    of the first user's turn. ValueError, naming the folder, for a template that fails.
    """
    def rendered(messages):
        """The messages as the template writes them."""
        jinja = compiled(source)
        with within(MEMORY), at_most(STEPS):
            text = jinja.render(messages=messages, add_generation_prompt=add_generation_prompt,
                                tools=None, documents=None, **tokens)
        if len(text) > LONGEST:
            raise OverflowError(f"more than {LONGEST} characters")
        text.encode()  # half a surrogate pair is no character
        return text

    try:
        return rendered(messages)
    except Exception as error:  # it is a program: it can fail in every way
        with contextlib.suppress(Exception):
            if [m["role"] for m in messages[:2]] == ["system", "user"]:
                joined = "\n\n".join(m["content"] for m in messages[:2])
                return rendered([{"role": "user", "content": joined}, *messages[2:]])
        said = printable(" ".join(str(error).split()))[:300] or type(error).__name__
        raise ValueError(f"{folder}: its chat template fails on this chat: {said}") from None


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which products and powers are of bounded size, too."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context, operator, left, right):
        """left * right or left ** right; OverflowError for what would fill the memory."""
        sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        sequence = hasattr(left, "__len__") or hasattr(right, "__len__")
        large = sizes[0] * sizes[1] > LONGEST if sequence else max(sizes) > 2 ** 64
        if large or operator == "**" and sizes[1] > 64:
            raise OverflowError(f"the result of a {operator} is too large")
        return super().call_binop(context, operator, left, right)


class Generation(Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's words. Here: just the words."""

    tags = {"generation"}

    def parse(self, parser):
        """The block as a call of `_words`: with a scope of its own, as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_words"), [], [], body).set_lineno(line)

    def _words(self, caller):
        return caller()


@functools.lru_cache
def compiled(source):
    """A template's text as a Jinja template, with what transformers lets a template use.

    What a template takes for now is TODAY. Nothing of it is computed here, not even what is
    constant (`optimized`; for outputs, `finalize`).
    """
    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    jinja = Sandbox(trim_blocks=True, lstrip_blocks=True,
                    extensions=[Generation, LoopControlExtension],
                    optimized=False, finalize=pass_context(lambda _, value: value))
    jinja.filters["tojson"] = tojson
    jinja.globals |= {"raise_exception": raise_exception,
                      "strftime_now": lambda form: TODAY.strftime(form)}
    return jinja.from_string(source)


@contextlib.contextmanager
def within(memory):
    """MemoryError where the body would take so many bytes more; on Linux alone, which says how many
    there are."""
    said, (soft, hard) = Path("/proc/self/statm"), resource.getrlimit(resource.RLIMIT_AS)
    if said.exists():
        have = int(said.read_text().split()[0]) * resource.getpagesize()
        limits = [n for n in (have + memory, soft, hard) if n != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def at_most(steps):
    """OverflowError once the body's calls have run so many lines, or for SECONDS of this thread's
    time: loops in loops need not end."""
    left, before = itertools.count(steps, -1), sys.gettrace()
    until = time.thread_time() + SECONDS

    def trace(frame, event, arg):
        if next(left) < 0:
            raise OverflowError(f"it runs for more than {steps} steps")
        if time.thread_time() > until:
            raise OverflowError(f"it runs for more than {SECONDS} seconds")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def chat_template(folder, config):
    """The text of a folder's chat template, "" if it has none; config: its tokenizer_config.json.

    Files (chat_template.jinja, additional_chat_templates/*.jinja) come before what config says. Of
    several, by name, it is the one named default. ValueError for what is not a template.
    """
    found = config.get("chat_template") or {}
    if isinstance(found, list) and all(isinstance(t, dict) and isinstance(t.get("name"), str)
                                       for t in found):
        found = {t.get("name"): t.get("template") for t in found}
    found = {"default": found} if isinstance(found, str) else found
    if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
        raise ValueError(f"{folder}/tokenizer_config.json: chat_template must be a text, or a list "
                         'of {"name", "template"}')
    file, further = folder / "chat_template.jinja", folder / "additional_chat_templates"
    files = [("default", file)] if file.exists() else []
    files += [(path.name.removesuffix(".jinja"), path) for path in further.glob("*.jinja")]
    if files:
        found = {name: read_text(path) for name, path in files}
    if found and "default" not in found:
        raise ValueError(f"{folder}: none of its chat templates ({', '.join(map(str, found))}) is "
                         "named default")
    return found.get("default", "")


def special_tokens(config):
    """{bos_token: text, eos_token: text, …}: what a template can name; config: what the folder says
    of its tokenizer."""
    named = {name: token for name, token in config.items() if name.endswith("_token")}
    extra = config.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
