"""Chats, ends of turn and beginnings of text are as transformers makes them of the same folder."""
import json
import random
import re
import time
from functools import partial
from unittest import mock

import pytest
import torch
from conftest import make_folder, tiny
from test_tokenizer import QWEN2_TEMPLATE, SMOLLM2_TEMPLATE, train
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import evaluate
import fast
import model
import prepare
import template
from checkpoint import copy_tokenizer
from data import (
    Example,
    Task,
    check_special_tokens,
    expert_answer,
    same_answer,
    teacher_prompt,
)
from tokenizer import load_tokenizer
from train import main

# --------------------------------------------------------------------------------------------------
# Templates written after those of public models, cut to what a conversation without tools uses:
# name -> (template, bos, eos, whether chat + answer is a whole conversation)

LOOP = "{% for message in messages %}"
MATH = QWEN2_TEMPLATE.replace(
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    r"Please reason step by step, and put your final answer within \\boxed{}. It\'s {{yours}}.")
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and """ \
r"""not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n')""" \
r""".split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + """ \
r"""reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA3 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'""" \
r"""+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    r"{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}")
MISTRAL = r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.tool_calls is defined) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + LOOP +
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    r"{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    r"{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}")
PHI3 = LOOP + (
    r"{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    r"{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    r"{% elif message['role'] == 'assistant' %}"
    r"{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
SMOLLM3 = r"""{%- if enable_thinking is not defined -%}
{%- set enable_thinking = true -%}
{%- endif -%}
{%- set reasoning_mode = "/think" if enable_thinking else "/no_think" -%}
{{- "<|im_start|>system\n## Metadata\n\n" -}}
{%- set today = strftime_now("%d %B %Y") -%}
{{- "Today Date: " ~ today ~ "\nReasoning Mode: " + reasoning_mode + "\n\n" -}}
{%- if messages[0].role == "system" -%}
{%- set custom = messages[0].content.replace("/no_think", "").rstrip() -%}
{{- custom + "\n\n" -}}
{%- endif -%}
{{- "<|im_end|>\n" -}}
{# ───── main loop ───── #}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>" + message.role + "\n"  + content + "<|im_end|>\n" }}
    {%- elif message.role == "assistant" -%}
        {% generation %}
        {%- if reasoning_mode == "/think" -%}
            {{ "<|im_start|>assistant\n" + content.lstrip("\n") + "<|im_end|>\n" }}
        {%- else -%}
            {{ "<|im_start|>assistant\n<think>\n\n</think>\n" + content + "<|im_end|>\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if reasoning_mode == "/think" -%}
        {{ "<|im_start|>assistant\n" }}
    {%- else -%}
        {{ "<|im_start|>assistant\n" + "<think>\n\n</think>\n"  }}
    {%- endif -%}
{%- endif -%}"""
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{{ bos_token }}" + LOOP +
    r"{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    r"{% elif message['role'] == 'assistant' %}"
    r"{{ 'Assistant: ' + message['content'] + eos_token }}"
    r"{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
R1 = (
    "{%- set ns = namespace(is_first=false, system_prompt='') -%}" + LOOP +
    "{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}"
    "{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}" + LOOP +
    "{%- if message['role'] == 'user' -%}{{'<|User|>' + message['content']}}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<|Assistant|>' + content + eos_token}}{%- endif -%}{%- endfor -%}"
    r"{% if add_generation_prompt %}{{'<|Assistant|><think>\n'}}{% endif %}")
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = 'A chat between a curious user and an assistant.' %}{% endif %}"
    "{{ system_message }}{% for message in loop_messages %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'].strip() }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}")
GRANITE = r"""{%- if messages[0]['role'] == 'system' %}
     {%- set system_message = messages[0]['content'] %}
     {%- set loop_messages = messages[1:] %}
 {%- else %}
     {%- set system_message = "Today's Date: " + strftime_now('%B %d, %Y') + ".\nGranite." %}
     {%- if tools and documents %}
         {%- set system_message = system_message + " Tools." %}
     {%- endif %}
     {%- set loop_messages = messages %}
 {%- endif %}
 {{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\n' }}
 {%- for message in loop_messages %}
     {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>'""" \
r"""+ message['content'] + '<|end_of_text|>\n' }}
     {%- if loop.last and add_generation_prompt %}
         {{- '<|start_of_role|>assistant' }}
         {%- if controls %}
             {{- ' ' + controls | tojson()}}
         {%- endif %}
         {{- '<|end_of_role|>' }}
     {%- endif %}
 {%- endfor %}"""
OLMO2 = (
    "{{ bos_token }}" + LOOP + "{% if message['role'] == 'system' %}"
    r"{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
    r"{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
    r"{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}"
    r"{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    r"{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}")
COMMAND_R = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0]['content'] "
    "+ '<|END_OF_TURN_TOKEN|>' }}{% else %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% set content = message['content'] %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' ~ ('USER' if message['role'] == 'user' else 'CHATBOT') ~ "
    "'_TOKEN|>' ~ content.strip() ~ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}")
ALPACA = (
    "{% macro part(title, text) -%}### {{ title }}:\n{{ text|trim }}\n\n{% endmacro %}" + LOOP +
    "{%- if message.role == 'tool' %}{% continue %}{% endif -%}"
    "{{ part('Response' if message.role == 'assistant' else 'Instruction' if message.role == "
    "'user' else 'System', message.content) }}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}")
JSON = (
    LOOP + "{{ message | tojson }}{{ {'é': ['<b>', 1]} | tojson(indent=2, ensure_ascii=True) }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ pad_token }}{{ image_token }}"
    "{% endfor %}{% if add_generation_prompt %}{% for i in range(9) %}{% if i == 3 %}{% break %}"
    "{% endif %}{{ i }}{% endfor %}{{ unk_token }}{{ undefined_thing }}{% endif %}")
BOS, END = "<s>", "</s>"
TEMPLATES = {
    "ChatML": (template.CHATML, None, "<|im_end|>", True),
    "SmolLM2": (SMOLLM2_TEMPLATE, None, "<|im_end|>", True),
    "Qwen2.5": (QWEN2_TEMPLATE, None, "<|im_end|>", True),
    "Qwen2.5-Math": (MATH, None, "<|im_end|>", True),
    "Qwen3": (QWEN3, None, "<|im_end|>", True),
    "Llama 3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", True),
    "Llama 2": (LLAMA2, BOS, END, True),
    "Mistral": (MISTRAL, BOS, END, True),
    "Gemma": (GEMMA, "<bos>", "<end_of_turn>", True),
    "Phi-3": (PHI3, BOS, "<|endoftext|>", True),
    "SmolLM3": (SMOLLM3, None, "<|im_end|>", True),
    "DeepSeek": (DEEPSEEK, BOS, END, True),
    "DeepSeek-R1": (R1, BOS, END, False),   # the prompt opens a thought, past turns have none
    "Zephyr": (ZEPHYR, BOS, END, True),
    "Vicuna": (VICUNA, BOS, END, True),
    "Granite": (GRANITE, None, "<|end_of_text|>", True),
    "OLMo 2": (OLMO2, "<|endoftext|>", "<|endoftext|>", True),
    "Command R": (COMMAND_R, BOS, "<|END_OF_TURN_TOKEN|>", True),
    "Alpaca": (ALPACA, None, END, False),   # no end of turn at all
    "JSON": (JSON, None, END, False),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<bos>", "<start_of_turn>",
           "<end_of_turn>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|User|>",
           "<|Assistant|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>",
           "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<pad>",
           "<img>"]


@pytest.fixture(scope="session")
def bpe():
    return {kind: train(kind, size=900, special=SPECIAL) for kind in ("qwen2", "llama3")}


@pytest.fixture(scope="session", params=TEMPLATES)
def pair(request, bpe, tmp_path_factory):
    """(transformers' tokenizer, ours) of a folder with that template, and whether it is whole."""
    source, bos, eos, whole = TEMPLATES[request.param]
    folder = tmp_path_factory.mktemp("chat")
    theirs = save(folder, bpe["llama3" if bos else "qwen2"], source, bos, eos)
    if request.param == "Phi-3":  # its turns end with another token than its texts
        ends = [theirs.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|end|>")]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return theirs, load_tokenizer(folder), whole


def save(folder, tokenizer, source, bos=None, eos="<|im_end|>", **more):
    """transformers' tokenizer of a folder that is written with this template."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos,
                            pad_token="<pad>", image_token="<img>", chat_template=source,
                            **more).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def said(role, content):
    return {"role": role, "content": content}


def written(theirs, messages, prompt=True):
    """The ids of transformers' apply_chat_template, on the day that it is here."""
    with mock.patch("transformers.utils.chat_template_utils.datetime") as clock:
        clock.now.return_value = template.TODAY
        return theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True,
                                          return_dict=False)


WORDS = ["What's {gold}?", "{{ 7 * 7 }} {% if x %}", r"a\nb \\boxed{1}", "def f(x):\n\treturn 1",
         "你好,世界。", "\U0001f469\u200d\U0001f467 ½", "  two  blanks  ", '<b>é</b> & "it"',
         "\n\nlines\r\n", "x", "Au", "<think>\nhm\n</think>\n\nAu"]
SYSTEM = said("system", "Be {brief}, it's late.")


def conversations(seed=0):
    """Conversations of one to three questions, with and without a system message."""
    rng = random.Random(seed)
    for n in (1, 1, 1, 2, 2, 3):
        for system in ([], [SYSTEM]):
            yield [*system, *(said(("user", "assistant")[i % 2], rng.choice(WORDS))
                              for i in range(2 * n - 1))]


def test_a_chat_is_what_transformers_writes(pair):
    theirs, ours, _ = pair
    compared = 0
    for messages in conversations():
        if theirs.chat_template == GEMMA and messages[0] == SYSTEM:
            continue  # it is refused there, and joined here: below
        expected = written(theirs, messages)
        assert ours.chat(messages) == expected, ours.decode(expected, keep_special=True)
        compared += 1
    assert compared >= 6


def test_a_template_is_told_the_same_day_every_day(bpe, tmp_path):
    source = 'Today is {{ strftime_now("%d %B %Y") }}. {{ messages[0].content }}'
    save(tmp_path, bpe["qwen2"], source)
    ours = load_tokenizer(tmp_path)
    assert ours.decode(ours.chat([said("user", "Au?")])) == "Today is 26 July 2024. Au?"


def test_a_chat_with_its_answer_is_the_whole_conversation_up_to_its_end(pair):
    theirs, ours, whole = pair
    question = [said("user", "What is it?")]
    for words in [*WORDS, "gold\n", " a b"]:
        answer = ours.answer(words)
        assert [i for i in answer if i in ours.eos_ids] == answer[-1:]
        ids, together = ours.chat(question) + answer, written(
            theirs, [*question, said("assistant", words)], False)
        # what begins with a line feed, or a blank, may melt with the prompt's last token
        if whole and words == words.lstrip():
            assert ids == together[:len(ids)]
            assert not set(together[len(ids):]) & {theirs.convert_tokens_to_ids("<|im_start|>")}


def test_an_answer_is_read_as_it_was_written(pair):
    theirs, ours, _ = pair
    for words in WORDS[:-1] if theirs.chat_template != JSON else ["x", "Au"]:
        assert words.strip() in ours.read(ours.answer(words))
        assert theirs.chat_template == JSON or ours.read(ours.answer(words)) == words.strip()


def test_an_empty_thought_is_learned_and_a_thought_is_not_the_answer(bpe, tmp_path):
    save(tmp_path, bpe["qwen2"], QWEN3)
    ours = load_tokenizer(tmp_path)
    assert ours.decode(ours.answer("Au")) == "<think>\n\n</think>\n\nAu"
    thought = ours.encode("<think>\nGold? It is Au.\n</think>\n\nAu<|im_end|>")
    assert ours.read(thought) == "Au"
    assert ours.read(ours.encode("<think>\nGold? It is")) == "<think>\nGold? It is"
    demonstration = "<think>\nGold.\n</think>\n\nAu"  # as those of thinking models
    assert same_answer(demonstration)(ours.read(ours.answer(demonstration)))
    assert same_answer(demonstration)(ours.read(ours.answer("Au")))


def test_the_math_template_has_its_default_system_message(bpe, tmp_path):
    """Braces and apostrophes within; its \\n are line feeds."""
    save(tmp_path, bpe["qwen2"], MATH)
    ours = load_tokenizer(tmp_path)
    text = ours.decode(ours.chat([said("user", "1 + 1?")]), keep_special=True)
    assert text == ("<|im_start|>system\nPlease reason step by step, and put your final answer "
                    "within \\boxed{}. It's {{yours}}.<|im_end|>\n<|im_start|>user\n1 + 1?"
                    "<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("where", ["config", "list", "jinja over config", "folder over jinja"])
def test_the_template_is_found_where_transformers_finds_it(where, bpe, tmp_path):
    right, wrong = "{% for m in messages %}right {{ m.content }}{% endfor %}", "wrong"
    save(tmp_path, bpe["qwen2"], wrong)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    file = tmp_path / "chat_template.jinja"
    if where in ("config", "list"):
        file.unlink()
        several = [{"name": "tool_use", "template": wrong}, {"name": "default", "template": right}]
        config["chat_template"] = right if where == "config" else several
    else:
        config["chat_template"] = wrong
        file.write_text(right)
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(wrong)
    if where == "folder over jinja":
        file.write_text(wrong)
        (tmp_path / "additional_chat_templates" / "default.jinja").write_text(right)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours, messages = load_tokenizer(tmp_path), [said("user", "a {b}")]
    assert ours.chat(messages) == written(theirs, messages) == ours.encode("right a {b}")


@pytest.mark.parametrize("value, says", [
    (7, "chat_template must be"), (["a"], "chat_template must be"),
    ([{"name": "default"}], "chat_template must be"), ({"default": 1}, "chat_template must be"),
    ([{"name": "rag", "template": "x"}], "none of its chat templates .rag. is named default")])
def test_what_is_no_template_is_refused(value, says, bpe, tmp_path):
    save(tmp_path, bpe["qwen2"], None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": value}))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + f".*{says}"):
        load_tokenizer(tmp_path)


def test_special_tokens_come_from_the_older_file_too(bpe, tmp_path):
    """special_tokens_map.json, where tokenizer_config.json lists no added_tokens_decoder."""
    save(tmp_path, bpe["qwen2"], "{{ bos_token }}|{{ eos_token }}|{{ cls_token }}", bos="<s>")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {k: v for k, v in config.items() if k != "eos_token"} | {"bos_token": None}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(
        {"bos_token": {"content": "<bos>", "lstrip": False}, "eos_token": "</s>"}))
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert ours.chat([said("user", "")]) == written(theirs, [said("user", "")])
    assert ours.eos_id == theirs.eos_token_id == theirs.convert_tokens_to_ids("</s>")


# --------------------------------------------------------------------------------------------------
# Templates that refuse, fail, do not end, or reach for what is not theirs

def with_template(folder, source):
    """Our tokenizer of a tiny folder with this template."""
    make_folder(folder)
    (folder / "chat_template.jinja").write_text(source)
    return load_tokenizer(folder)


def test_a_system_message_that_is_refused_stands_before_the_first_question(bpe, tmp_path):
    theirs, ours = save(tmp_path, bpe["llama3"], GEMMA, "<bos>", "<end_of_turn>"), None
    ours, rest = load_tokenizer(tmp_path), [said("assistant", "Au"), said("user", "Sure?")]
    joined = said("user", "Be {brief}, it's late.\n\nGold?")
    for more in ([], rest):
        expected = written(theirs, [joined, *more])
        assert ours.chat([SYSTEM, said("user", "Gold?"), *more]) == expected
    with pytest.raises(ValueError, match="Conversation roles must alternate"):
        ours.chat([said("user", "a"), said("user", "b")])


FAILING = {
    "it refuses": ("{{ raise_exception('Only\nstories, please') }}", "Only stories, please"),
    "syntax": ("{% for m in messages %}{{ m.content }", "expected token|unexpected|Unexpected"),
    "undefined": ("{{ messages[0].tools[0].name }}", "tools"),
    "type": ("{{ 1 + messages[0].content }}", "unsupported operand"),
    "its class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "globals": ("{{ raise_exception.__globals__['json'] }}", "unsafe"),
    "a format": ("{{ '{0.__class__.x}'.format(messages) }}", "unsafe|undefined|no attribute"),
    "it changes its input": ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "loops in loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% set x = j %}"
                       "{% endfor %}{% endfor %}", "steps"),
    "a list of its own": ("{% set r = range(9999)|list %}{% for a in r %}{% for b in r %}{% endfor "
                          "%}{% endfor %}", "steps"),
    "it calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "twice itself": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
                     "{% endmacro %}{{ f(60) }}", "steps"),
    "a huge text": ("{{ 'x' * 10**12 }}", "too large"),
    "a huge number": ("{{ 10**(10**10) }}", "too large"),
    "a long answer": ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "characters"),
}


@pytest.mark.parametrize("what", FAILING)
def test_a_template_that_fails_is_one_line_that_names_the_folder(what, tmp_path):
    source, says = FAILING[what]
    began, ours = time.perf_counter(), with_template(tmp_path, source)
    for messages in ([said("user", "x")], [said("system", "s"), said("user", "x")]):
        with pytest.raises(ValueError) as caught:
            ours.chat(messages)
        line = str(caught.value)
        assert line.startswith(f"{tmp_path}: its chat template") and "\n" not in line
        assert re.search(says, line) and caught.value.__suppress_context__
    assert time.perf_counter() - began < 60  # it ends


def test_a_long_template_and_a_long_chat_are_written(tmp_path):
    ours = with_template(tmp_path, "{% set x = '{a}' ~ 1 %}" * 3000 + QWEN3)
    turns = [said(("user", "assistant")[i % 2], "abc {}" * 300) for i in range(199)]
    assert len(ours.chat(turns)) > 199 * 1800


def test_a_run_with_such_a_template_ends_in_its_line(tmp_path, capsys):
    with_template(tmp_path / "model", FAILING["it refuses"][0])
    assert main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"),
                 "--group-size", "16"]) == 2
    assert capsys.readouterr().err == (f"error: {tmp_path}/model: its chat template fails on this "
                                       "chat: Only stories, please\n")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# Ends of text

def generation_config(folder, value, name="generation_config.json"):
    path = folder / name
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {"eos_token_id": value}))


@pytest.mark.parametrize("generation, config, expected", [
    (None, None, (2,)), ([2, 0], None, (2, 0)), ([7, 0], 5, (2, 7, 0)), (0, [2, 5], (2, 0)),
    (None, 5, (2, 5)), (None, [5, 6], (2, 5, 6)), ([], 5, (2,)), (2, None, (2,))])
def test_a_text_ends_where_generation_and_tokenizer_say(generation, config, expected, tmp_path):
    """generation_config.json's before config.json's, as transformers; the tokenizer's own always,
    as its Trainer aligns them."""
    make_folder(tmp_path)
    if generation is not None:
        generation_config(tmp_path, generation)
    if config is not None:
        generation_config(tmp_path, config, "config.json")
    ours = load_tokenizer(tmp_path)
    assert (ours.eos_ids, ours.eos_id) == (expected, 2)


def test_without_a_named_token_an_answer_ends_as_generation_does(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).eos == "<|im_end|>"
    generation_config(tmp_path, [0, 9])
    assert load_tokenizer(tmp_path).eos_ids == (0, 9)


@pytest.mark.parametrize("value", [259, -1, True, "2", 2.0, [2, None], [[2]], {"a": 1}])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_that_is_no_id_is_refused_by_its_file(name, value, tmp_path):
    make_folder(tmp_path)
    generation_config(tmp_path, value, name)
    says = f"^{re.escape(str(tmp_path))}/{name}: eos_token_id .* 258"
    with pytest.raises(ValueError, match=says):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("ours", [model.generate, fast.generate])
def test_generation_ends_at_the_first_of_several_ids_as_in_transformers(ours, tmp_path):
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64)
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, initializer_range=0.5)).eval()
    theirs.save_pretrained(tmp_path)
    mine, prompts = model.GPT.from_pretrained(tmp_path), [[5], [9, 3, 4], [11, 2], [40]]

    def greedy(prompt, ends):
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False,
                              eos_token_id=ends, pad_token_id=0)
        return ids[0, len(prompt):].tolist()

    free = [greedy(prompt, [63]) for prompt in prompts]
    ends = [free[0][4], free[1][7], free[2][2]]
    expected = [greedy(prompt, ends) for prompt in prompts]
    assert len({row[-1] for row in expected}) > 1 and min(map(len, expected)) < 20
    for form in (ends, tuple(ends), set(ends)):
        assert ours(mine, prompts, 20, temperature=0, eos_id=form) == expected
    assert ours(mine, prompts, 20, temperature=0, eos_id=ends[0]) == [
        greedy(prompt, ends[:1]) for prompt in prompts]


def test_a_folders_greedy_answers_are_transformers(tmp_path):
    """Nobody names an end here: both read generation_config.json."""
    make_folder(tmp_path, seed=3)
    lm, prompts = model.GPT.from_pretrained(tmp_path), [[5], [9, 3, 4], [11, 2], [40]]
    free = model.generate(lm, prompts, 12, temperature=0)
    generation_config(tmp_path, [2, free[0][3], free[2][6]])
    theirs, ends = LlamaForCausalLM.from_pretrained(tmp_path), load_tokenizer(tmp_path).eos_ids
    given = model.generate(lm, prompts, 12, temperature=0, eos_id=ends)
    assert given != free
    for prompt, completion in zip(prompts, given):
        ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
                              pad_token_id=0)
        assert completion == ids[0, len(prompt):].tolist()


def says(answers):
    """A generate() that records eos_id and gives these texts' ids."""
    def generate(model, prompts, n, temperature, eos_id, batch_size, done):
        generate.eos_id = eos_id
        return answers
    return generate


def test_an_evaluation_ends_at_any_of_the_ids_and_matches(tmp_path):
    make_folder(tmp_path)
    generation_config(tmp_path, [2, 0, 70])
    ours = load_tokenizer(tmp_path)
    generate = says([[*ours.encode("ab"), end] for end in (0, 2, 70)])
    examples = [Example("x", "ab")] * 3
    assert evaluate.answer(None, ours, examples, 9, generate) == ["ab"] * 3
    assert generate.eos_id == (2, 0, 70)


@pytest.mark.parametrize("field, text, token", [
    ("response", "Paris<|im_end|>", "<|im_end|>"), ("response", "<|endoftext|>", "<|endoftext|>"),
    ("prompt", "a<|im_start|>b", "<|im_start|>"), ("system", "<|im_end|>", "<|im_end|>")])
def test_a_special_token_in_the_words_of_a_chat_is_refused(field, text, token, folder):
    ours, fields = load_tokenizer(folder), {"prompt": "Where?", "response": "Paris", "system": ""}
    check_special_tokens(ours, [Example(**fields), Example("<|im_end|>", chat=False)])
    with pytest.raises(ValueError, match=f"^.*the {field}.* contains '{re.escape(token)}'"):
        check_special_tokens(ours, [Example(**fields | {field: text})])


def test_a_run_on_such_a_row_ends_in_a_line_before_it_trains(folder, tmp_path, capsys):
    rows = [{"prompt": f"{n}?", "response": f"Paris{n}<|im_end|>"} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["--model", str(folder), "--data", str(tmp_path / "rows.jsonl"),
                 "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "the response contains '<|im_end|>'" in error and error.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# Beginnings of text

def begin(tokenizer, *prefix):
    tokenizer.prefix = prefix
    return tokenizer


def test_a_text_begins_with_the_prefix_once_and_a_chat_as_its_template_says(folder):
    plain, ours = load_tokenizer(folder), begin(load_tokenizer(folder), 0)
    text = Example("abcdefgh" * 4, chat=False)
    assert teacher_prompt(plain, text, text_tokens=5) == plain.encode("abcde")
    assert teacher_prompt(ours, text, text_tokens=5) == [0, *plain.encode("abcde")]
    assert expert_answer(ours, text, 5, 3) == expert_answer(plain, text, 5, 3)
    already = Example("<|endoftext|>" + text.prompt, chat=False)
    assert teacher_prompt(ours, already, text_tokens=5) == [0, *plain.encode("abcd")]
    question = [said("user", "x")]
    assert ours.chat(question) == [0, *plain.chat(question)]  # there is no template: it is a text
    ours.chat_template = template.CHATML
    assert ours.chat(question) == plain.chat(question)
    assert ours.answer("x") == plain.answer("x")


def test_a_template_that_writes_bos_writes_it_once(bpe, tmp_path):
    save(tmp_path, bpe["llama3"], LLAMA3, "<|begin_of_text|>", "<|eot_id|>")
    ours = load_tokenizer(tmp_path)
    bos = ours.added["<|begin_of_text|>"]
    assert begin(ours, bos).chat([said("user", "x")]).count(bos) == 1


def test_windows_begin_with_the_prefix_which_is_not_scored(folder):
    ours, texts = load_tokenizer(folder), {"perplexity": "The quick brown fox. " * 30}
    bare = prepare.windows_of(ours, texts, 1024)["perplexity"]
    assert bare == prepare.data.text_windows(ours, texts["perplexity"])
    lm = tiny(vocab_size=259, context_length=256)
    for prefix in ((0,), (0, 1)):
        windows = prepare.windows_of(begin(ours, *prefix), texts, 256)["perplexity"]
        assert all(w[:len(prefix)] == list(prefix) and len(w) <= 256 for w in windows)
        assert [w[len(prefix):] for w in windows] == bare
        logp = lm(torch.tensor(windows)).log_softmax(-1)
        expected = [-torch.stack([row[n - 1, w[n]] for n in range(len(prefix), len(w))]).mean()
                    for row, w in zip(logp, windows)]
        found, _ = evaluate.nats_of(lm, windows, lambda n: None, len(prefix))
        torch.testing.assert_close(torch.tensor(found), torch.stack(expected))


def test_contexts_begin_with_the_prefix_which_also_stands_for_an_empty_one(folder):
    ours, asked = begin(load_tokenizer(folder), 1, 2), []

    def score(lm, prompts, targets):
        asked.append(prompts)
        return torch.zeros(1, sum(map(len, targets)), 32)

    lm = tiny(vocab_size=259)
    for contexts in (("ab", "c"), ("", "")):
        example = Example("", choices=[(context, " x") for context in contexts])
        evaluate.choice_scores(lm, ours, [example], score)
    assert asked[0] == [[1, 2, *ours.encode("ab")], [1, 2, *ours.encode("c")]]
    assert asked[1] == [[1, 2], [1, 2]]


def test_calibration_texts_begin_with_the_prefix(folder):
    ours = begin(load_tokenizer(folder), 0)
    task = Task("text", [Example("abc" * 100, chat=False)], {})
    c = partial(dict, calibration=2, seed=0)
    found = evaluate.calibration_sequences(type("C", (), c()), ours, [task])
    assert found == [[0, *ours.encode("abc" * 100)][:128]] * 2


def test_a_whole_run_with_a_prefix_several_ends_and_a_template(tmp_path):
    """From a folder to a student, which is a folder of the same chats."""
    ours = with_template(tmp_path / "model", QWEN3)
    generation_config(tmp_path / "model", [2, 0])
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    (tmp_path / "model" / "additional_chat_templates" / "rag.jinja").write_text("no")
    command = (f"--model {tmp_path}/model --out {tmp_path}/out --steps 1 --batch-size 2 "
               "--rollout-tokens 4 --eval-tokens 3 --eval-limit 4 --cka-samples 4 --group-size 16 "
               "--teacher-check 2 --recover sdft,sft")
    assert main(command.split()) == 0
    for student in ("student_sdft", "student_sft"):
        saved = load_tokenizer(tmp_path / "out" / student)
        assert saved.eos_ids == (2, 0) and saved.chat_template == QWEN3
        assert saved.chat([SYSTEM, said("user", "x")]) == ours.chat([SYSTEM, said("user", "x")])
        assert (tmp_path / "out" / student / "additional_chat_templates" / "rag.jinja").exists()


def test_a_student_has_no_file_of_the_tokenizer_that_was_there_before(folder, tmp_path):
    """The second run into the same --out is of another model."""
    with_template(tmp_path / "model", QWEN3)
    generation_config(tmp_path / "model", [2, 0])
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    (tmp_path / "student").mkdir()
    for source in (tmp_path / "model", folder):
        copy_tokenizer(source, tmp_path / "student")
    wanted = {path.name: path.read_text() for path in folder.glob("*token*")}
    assert {p.name: p.read_text() for p in (tmp_path / "student").iterdir()} == wanted
    copy_tokenizer(tmp_path / "model", tmp_path / "model")  # onto itself: all of it stays
    assert (tmp_path / "model" / "additional_chat_templates").exists()
