"""Stand-ins for real tokenizers: chat templates in each family's format, quirks included, and small byte-level BPEs.

The templates are written for these tests. What a model sees of a family's format is exact: headers, markers, line breaks,
the date, how calls and results are written, what is trimmed or quoted, and what is dropped from earlier turns. A compact
variant lists the tools tersely, for models whose context is a few hundred tokens.

    qwen_tokenizer(texts, 600).save_pretrained(folder)   # then subl_jax.chat.tokenizer.load(folder), renderer_for(...)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Literal

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# --- Llama ----------------------------------------------------------------------------------------------------------------

_LLAMA_DATE_31 = "{%- if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}\n"
_LLAMA_DATE_32 = "{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}\n"

_LLAMA_TOOLS = r"""
    {{- 'Given the following functions, please respond with a JSON for a function call with its proper arguments ' }}
    {{- 'that best answers the given prompt.\n\n' }}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
    {{- 'Do not use variables.\n\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}
"""
_LLAMA_TOOLS_COMPACT = r"""
    {{- 'call {"name", "parameters"}:' }}
    {%- for tool in tools %}{{ ' ' + tool.function.name }}({{ tool.function.parameters.properties | join(',') }}){% endfor %}
    {{- '\n' }}
"""

_LLAMA_ABOUT = r"""
{%- if tools is defined and tools is not none %}{{ 'Environment: ipython\n' }}{% endif %}
{{- 'Cutting Knowledge Date: December 2023\n' }}
"""

# The quirks: tools push the first user turn out of the loop; `tool_calls` in a message drops its text; strings can be
# iterated over, so every tool result is quoted; texts are trimmed; two calls in a turn are refused.
_LLAMA = r"""
{%- set first = namespace(system='', user=none) %}
{%- if messages and messages[0].role == 'system' %}
    {%- set first.system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' }}
%ABOUT%
{{- 'Today Date: ' + date_string + '\n\n' + first.system + '<|eot_id|>' }}
{%- if tools is defined and tools is not none %}
    {%- if not messages %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' }}
    %TOOLS%
    {{- messages[0].content | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('tool', 'ipython') %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}
        {%- else %}{{ message.content }}{% endif %}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""

# --- Qwen -----------------------------------------------------------------------------------------------------------------

_QWEN_TOOLS = r"""
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n' }}
    {{- '</tool_call>' }}
"""
_QWEN_TOOLS_COMPACT = r"""
    {{- 'tools:' }}
    {%- for tool in tools %}{{ ' ' + tool.function.name }}({{ tool.function.parameters.properties | join(',') }}){% endfor %}
"""

# The quirks: tools or no system turn bring a system turn of their own (Qwen 2.5); results of one turn share a user turn.
_QWEN = r"""
{%- set opening = messages[0].content if messages[0].role == 'system' else '%DEFAULT%' %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if opening %}{{ opening + '\n\n' }}{% endif %}
    %TOOLS%
    {{- '<|im_end|>\n' }}
{%- elif opening or messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + opening + '<|im_end|>\n' }}
{%- endif %}
%THINKING%
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {{- '<|im_start|>assistant\n' }}
        %THOUGHT%
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if content or not loop.first %}{{ '\n' }}{% endif %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
    {%- elif message.role == 'user' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    %PROMPT%
{%- endif %}
"""

# Qwen 3: thoughts stand only behind the last question, and an empty one only in the last turn.
_THINKING = r"""
{%- set last = namespace(question=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not last.found and message.role == 'user'
        and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set last.found = true %}
        {%- set last.question = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
"""
_THOUGHT = r"""
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > last.question and (loop.last or thought) %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
            {%- set content = content.lstrip('\n') %}
        {%- endif %}
"""
_NO_THINKING_PROMPT = (
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)

QwenVersion = Literal["2.5", "3"]


def llama_template(*, compact: bool = False, version: Literal["3.1", "3.2"] = "3.1") -> str:
    """A Llama template; 3.2 asks for today's date where 3.1 has a fixed one."""
    date = _LLAMA_DATE_31 if version == "3.1" else _LLAMA_DATE_32
    template = _LLAMA.replace("%TOOLS%", _LLAMA_TOOLS_COMPACT if compact else _LLAMA_TOOLS)
    return date + template.replace("%ABOUT%", "" if compact else _LLAMA_ABOUT).strip()


def qwen_template(*, compact: bool = False, version: QwenVersion = "3") -> str:
    """A Qwen template of either version."""
    thinks = version == "3"
    # The compact one spends no context on a system turn that nobody asked for.
    default = "" if thinks or compact else "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    parts = {
        "%DEFAULT%": default,
        "%TOOLS%": _QWEN_TOOLS_COMPACT if compact else _QWEN_TOOLS,
        "%THINKING%": _THINKING if thinks else "",
        "%THOUGHT%": _THOUGHT if thinks else "",
        "%PROMPT%": _NO_THINKING_PROMPT if thinks else "",
    }
    template = _QWEN
    for name, part in parts.items():
        template = template.replace(name, part)
    return template.strip()


# --- Tokenizers -----------------------------------------------------------------------------------------------------------

# The pre-tokenizer that these families took from GPT-4; Llama keeps up to three digits together, Qwen splits them all.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%DIGITS%"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Added tokens that are not special, as in the real ones.
QWEN_ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


# The format's own words, so often that each becomes a token or two: a tiny model's context is short.
_LLAMA_JOINTS = (
    'system\n\n user\n\n assistant\n\n ipython\n\nToday Date: 26 Jul 2024\n\ncall {"name", "parameters"}: x(path) x(path,to)\n'
    '{"name": "x", "parameters": {"path": "x", "to": "x"}}'
)
_QWEN_JOINTS = (
    'system\n user\n assistant\n\n\ntools: x(path) x(path,to)\n{"name": "x", "arguments": {"path": "x", "to": "x"}}\n'
)
_JOINTS_WEIGHT = 100


def _trained(
    texts: Iterable[str], vocab_size: int, digits: str, special: tuple[str, ...], added: tuple[str, ...], joints: str
) -> tokenizers.Tokenizer:
    floor = 256 + len(special) + len(added)
    if vocab_size <= floor:
        raise ValueError(f"vocab_size={vocab_size} leaves no room for words; use more than {floor} (bytes and markers)")
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=not added))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PATTERN.replace("%DIGITS%", digits)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special) - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain(texts, [joints] * _JOINTS_WEIGHT), trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in added])
    return tokenizer


def llama_tokenizer(
    texts: Iterable[str], vocab_size: int, *, compact: bool = True, version: Literal["3.1", "3.2"] = "3.1"
) -> PreTrainedTokenizerFast:
    """A Llama-like tokenizer trained on `texts`, with its chat template, bos, eos (`<|eot_id|>`) and pad.

    Args:
      texts: training text; the format's own words are added to it.
      vocab_size: total, markers included.
      compact: whether the template lists tools tersely.
      version: 3.2 asks for today's date.
    """
    backend = _trained(texts, vocab_size, "{1,3}", LLAMA_SPECIAL, (), _LLAMA_JOINTS)
    bos = LLAMA_SPECIAL[0]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = llama_template(compact=compact, version=version)
    return fast


def qwen_tokenizer(
    texts: Iterable[str], vocab_size: int, *, compact: bool = True, version: QwenVersion = "3"
) -> PreTrainedTokenizerFast:
    """A Qwen-like tokenizer trained on `texts`, with its chat template, eos (`<|im_end|>`) and pad; no bos.

    Args:
      texts: training text; the format's own words are added to it.
      vocab_size: total, markers included.
      compact: whether the template lists tools tersely.
      version: "3" writes thoughts.
    """
    backend = _trained(texts, vocab_size, "", QWEN_SPECIAL, QWEN_ADDED, _QWEN_JOINTS)
    backend.normalizer = normalizers.NFC()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = qwen_template(compact=compact, version=version)
    return fast
