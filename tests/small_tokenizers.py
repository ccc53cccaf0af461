"""Small real tokenizers of every kind that models have, trained on a few lines."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

KINDS = ("byte-level BPE", "Metaspace BPE", "Unigram", "Unigram with bytes")
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]
LINES = [
    "The patient's name is Ada Long. Chief complaint: back pain. SSN: 912-55-1029.",
    "Zoë Müller, born 1987-05-12, lives at 5 Straße; call +49 151 2345678 or zoe@example.org.",
    "Tool call lookup with arguments name and number returned null, then retried.",
    "0123456789 0 1 2 3 4 5 6 7 8 9 - ( ) [ ] { } : ; , . ! ? * _ ` ~ # / \\ | < > & % + = @ $",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ äöüßéèñç ÄÖÜÉ",
] * 8


@cache
def tokenizer(kind: str, vocab: int = 700) -> Any:
    """A fast tokenizer of ``transformers``."""
    made = _MADE[kind](vocab)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _byte_level(vocab: int) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return made


def _metaspace(vocab: int) -> Tokenizer:
    """As Llama 2's."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    # words must not become one token with the spaces between them, as in the real one
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=vocab + 256, special_tokens=[*SPECIAL, *BYTES], show_progress=False
        ),
    )
    return _bytes_not_special(made)


def _bytes_not_special(made: Tokenizer) -> Tokenizer:
    """The trainer lists the byte tokens as added ones; in real vocabularies they are plain."""
    described = json.loads(made.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(described))


def _unigram(vocab: int, with_bytes: bool = False) -> Tokenizer:
    """As SentencePiece's."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]  # runs of white space as one
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.decoder = (
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        if with_bytes
        else decoders.Metaspace()
    )
    made.train_from_iterator(
        LINES,
        trainers.UnigramTrainer(
            vocab_size=vocab,
            special_tokens=[*SPECIAL, *(BYTES if with_bytes else [])],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    if not with_bytes:
        return made
    described = json.loads(made.to_str())
    described["model"]["byte_fallback"] = True
    return _bytes_not_special(Tokenizer.from_str(json.dumps(described)))


_MADE = {
    "byte-level BPE": _byte_level,
    "Metaspace BPE": _metaspace,
    "Unigram": _unigram,
    "Unigram with bytes": lambda vocab: _unigram(vocab, True),
}
