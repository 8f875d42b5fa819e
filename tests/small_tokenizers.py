"""Tokenizers made from scratch, without the hub."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "the cat sat on the mat",
    "héllo wörld, the dog",
    "user asks and assistant answers",
    "def main(): return 0",
] * 5
PLAIN = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<end>' }}{% endgeneration %}{% else %}{{ m['content'] + '<end>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<user>' + tools | tojson + '<end>' }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{{ m['content'] }}"
    "{% for call in m['tool_calls'] %}{{ call['function'] | tojson }}{% endfor %}{{ '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
MARKED_TOOLS = (
    "{% if tools %}{{ '<user>' + tools | tojson + '<end>' }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% for call in m['tool_calls'] %}{{ call['function'] | tojson }}{% endfor %}"
    "{{ '<end>' }}{% endgeneration %}{% else %}{{ m['content'] + '<end>' }}{% endif %}{% endfor %}"
)
TOOLS_AT_THE_LAST = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% if loop.last %}{{ tools | tojson }}{% endif %}"
    "{{ '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
LAST_ONLY = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + (m['content'] if loop.last else '') + '<end>' }}{% endfor %}"
)


def byte_pairs(folder: Path, template: str | None = PLAIN, first: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 entries with an end of text, saved in `folder`; `first`: it begins texts with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["</s>", "<s>", "<user>", "<assistant>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if first:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
    made.chat_template = template
    made.save_pretrained(folder)
    return made


def words(path: Path) -> Tokenizer:
    """Whole words, as a tokenizer.json alone, that takes no others; texts are cut at three tokens if it may."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(LINES, trainers.WordLevelTrainer(show_progress=False))
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path))
    return tokenizer
