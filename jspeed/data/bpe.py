"""Byte-level byte-pair encoding with the package `tokenizers`, trained here or read from a file.

Source: Sennrich et al. 2016, "Neural machine translation of rare words with subword units" (the
pairs); Radford et al. 2019, "Language models are unsupervised multitask learners" (on bytes).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jspeed.core.errors import DataError
from jspeed.data.extras import import_extra
from jspeed.data.tokenizer import Tokenizer, check_range

SEPARATOR = "<|endoftext|>"
# 256 bytes and the separator: with fewer ids some text could not be written.
SMALLEST_VOCABULARY = 257

# What the usual tokenizer files call the end of a document; the first one present is taken.
_KNOWN_SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
# And what they call the mask of masked language models.
_KNOWN_MASKS = ("[MASK]", "<mask>")


class BpeTokenizer(Tokenizer):
    """A tokenizer of the package `tokenizers`, trained here or read from a file.

    Its JSON is an ordinary Hugging Face `tokenizer.json`. The separator's own text inside a text
    (`<|endoftext|>` in trained ones) becomes the separator id, as in corpora that mark their
    documents so.
    """

    def __init__(self, inner: Any, *, origin: str) -> None:
        """Wraps `inner`, a `tokenizers.Tokenizer`; `origin` names it in messages."""
        inner.no_truncation()  # some files carry the limits of the model they were saved with
        inner.no_padding()
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self._inner = inner
        self.vocab_size = max(vocabulary.values(), default=-1) + 1  # ids may have holes
        name = next((name for name in _KNOWN_SEPARATORS if name in vocabulary), None)
        if name is None:
            raise DataError(
                f'"data.tokenizer.path": "{origin}" has no token that separates documents. '
                f"Expected one of {', '.join(_KNOWN_SEPARATORS)}; add the first of them to it as a "
                "special token."
            )
        self.separator_id = vocabulary[name]
        mask = next((name for name in _KNOWN_MASKS if name in vocabulary), None)
        self.mask_id = None if mask is None else vocabulary[mask]

    @classmethod
    def from_json(cls, text: str, *, origin: str) -> "BpeTokenizer":
        """Returns the tokenizer in the text of a `tokenizer.json`.

        Raises:
          DataError: if the text does not describe a tokenizer.
          MissingExtraError: if the package `tokenizers` is not installed.
        """
        tokenizers = import_extra("tokenizers", needed_for=f'reading the tokenizer "{origin}"')
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing narrower
            raise DataError(
                f'"data.tokenizer.path": "{origin}" is not a usable tokenizer.json ({error}).'
            ) from error
        return cls(inner, origin=origin)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        batch = self._inner.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids]
        check_range(ids, self.vocab_size)  # the package would leave them out without a word
        return self._inner.decode(ids, skip_special_tokens=False)

    def to_json(self) -> str:
        return self._inner.to_str()


def train_bpe(texts: Iterator[str], *, vocab_size: int) -> BpeTokenizer:
    """Returns a byte-level BPE tokenizer trained on `texts`; equal texts give an equal tokenizer.

    Args:
      texts: the pieces of the corpus.
      vocab_size: the number of ids, at least 257 (256 bytes and the separator).

    Raises:
      DataError: if `vocab_size` is too small.
      MissingExtraError: if the package `tokenizers` is not installed.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f'"data.tokenizer.vocab_size": {vocab_size} is too small for byte-level BPE. Expected '
            f"at least {SMALLEST_VOCABULARY} (256 bytes and the document separator), or the kind "
            '"byte".'
        )
    needed_for = "training a BPE tokenizer"
    tokenizers = import_extra("tokenizers", needed_for=needed_for)
    parts = {
        name: import_extra(f"tokenizers.{name}", needed_for=needed_for)
        for name in ("models", "pre_tokenizers", "decoders", "trainers")
    }
    inner = tokenizers.Tokenizer(parts["models"].BPE())
    inner.pre_tokenizer = parts["pre_tokenizers"].ByteLevel(add_prefix_space=False)
    inner.decoder = parts["decoders"].ByteLevel()
    trainer = parts["trainers"].BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        # Sorted, since the package returns the bytes in no fixed order and ids follow it.
        initial_alphabet=sorted(parts["pre_tokenizers"].ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return BpeTokenizer(inner, origin="the trained tokenizer")
