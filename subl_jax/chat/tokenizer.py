"""The embedded tokenizer: a byte-level BPE trained here, saved as a standard Hugging Face fast tokenizer.

Texts in; a `PreTrainedTokenizerFast` with a prefix-stable chat template for tool calls out. Nothing downstream knows
that it was trained here: a Llama or Qwen tokenizer folder takes the same road through `load`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|end|>"
PAD = "<|pad|>"
SPECIAL = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<tool_call>", "</tool_call>")

# The fixed joints of a JSON call are one token each: a small organism spends its context on the task, not on punctuation.
CALL_JOINTS = ('{"name":"', '","arguments":{"', '"}}')

# A word keeps the space, underscore or dot before it (" old", "_file", ".txt") and every other mark
# splits: "/notes/plan" and "notes-plan" hold the same word tokens, so copying a name is copying tokens.
WORD_PATTERN = r"[ _.]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"

# A compact tool list: names only. The full schemas travel beside the conversation and in the exported dataset.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|assistant|>{% generation %}{{ message.content }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name":"{{ call.function.name }}","arguments":{{ call.function.arguments | tojson(separators=(',', ':')) }}}\
</tool_call>
{%- endfor -%}<|end|>{% endgeneration %}
{%- elif message.role == 'system' -%}
<|system|>{{ message.content }}{% if tools %} tools:\
{% for tool in tools %} {{ tool.function.name }}{% endfor %}{% endif %}<|end|>
{%- else -%}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains the embedded tokenizer.

    Args:
      texts: the training text; evaluation text must not be among it.
      vocab_size: total, special tokens and the 256 bytes included.

    Raises:
      ValueError: the vocabulary cannot even hold the bytes and the special tokens.
    """
    floor = 256 + len(SPECIAL) + len(CALL_JOINTS)
    if vocab_size <= floor:
        raise ValueError(f"vocab_size={vocab_size} leaves no room for words; use more than {floor} (bytes and markers)")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CALL_JOINTS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(joint, normalized=False) for joint in CALL_JOINTS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def load(directory: str | Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer folder from disk; never from a hub, and never with code of its own.

    Raises:
      FileNotFoundError: no tokenizer there.
      ValueError: it carries no chat template, so a conversation could not be rendered.
    """
    if not (Path(directory) / "tokenizer_config.json").exists():
        raise FileNotFoundError(f"no tokenizer in {directory}: tokenizer_config.json is missing")
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer in {directory} has no chat template; add chat_template.jinja to that folder")
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Sixteen hex digits over the vocabulary and the chat template: equal exactly where token ids mean the same."""
    body = "\n".join(f"{token}\t{index}" for token, index in sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{body}\n{tokenizer.chat_template}".encode()).hexdigest()[:16]
