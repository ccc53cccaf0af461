"""The nano agent's tokenizer: byte-level BPE, every digit a token of its own, a chat template."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lcguard.agents.scenarios.generator import GeneratorConfig, make_record

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|segment|>")
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}{{ ' ' }}{% endif %}"
    "{{ m['content'] }}{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _texts(n_records: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    config = GeneratorConfig(seed=seed)
    for i in range(n_records):
        record = make_record(rng, config, str(i))
        yield record.text
        for q in record.questions:
            yield q.text
            yield " " + q.answer


def train_tokenizer(vocab_size: int, n_records: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """Learns the merges on training records. ``<|segment|>`` is the consumer's placeholder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(n_records, seed), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[2:]),
        model_max_length=4096,
    )
    fast.chat_template = TEMPLATE
    return fast
