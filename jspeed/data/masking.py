"""Masked tokens, to be told from the others, as BERT is trained (Devlin et al., 2018, 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jspeed.data.packing import IGNORED_LABEL, Batch

_CHOSEN, _MASKED, _RANDOM = 0.15, 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """Which tokens of a sequence are to be told, and what stands in their place.

    Of all tokens 15% are chosen, and never fewer than one of a sequence; of these 80% become the
    mask, 10% any token of the vocabulary, and 10% stay. The choice is a function of the seed and of
    the sequence's number in the run, so that it does not depend on batches, processes or where a
    run was resumed, and is another one in each epoch.

    Attributes:
      vocab_size: of the tokenizer.
      seed: of the choice.
      separator_id: a token that is never chosen, or None.
      own_mask: the tokenizer's mask, or None: then the mask is the id behind its last one.
    """

    vocab_size: int
    seed: int
    separator_id: int | None = None
    own_mask: int | None = None

    @property
    def mask_id(self) -> int:
        """The id of the mask; where the tokenizer has none, a model's vocabulary is one larger."""
        return self.vocab_size if self.own_mask is None else self.own_mask

    def apply(self, batch: Batch, numbers: Sequence[int]) -> Batch:
        """Returns a batch to be told.

        Args:
          batch: with `input_ids`, int32[batch, sequence_length]; `labels` are replaced, the rest
            stays.
          numbers: of the sequences.

        Returns:
          The batch with chosen tokens of `input_ids` replaced; `labels` are the chosen tokens as
          they were, and -100 elsewhere.
        """
        rows = zip(batch["input_ids"], numbers, strict=True)
        made = [self._row(tokens, number) for tokens, number in rows]
        return {
            **batch,
            "input_ids": np.stack([tokens for tokens, _ in made]),
            "labels": np.stack([labels for _, labels in made]),
        }

    def _row(
        self, tokens: NDArray[np.int32], number: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        random = np.random.default_rng([self.seed, number])
        place, kind = random.random(len(tokens)), random.random(len(tokens))
        others = random.integers(0, self.vocab_size, len(tokens), dtype=np.int32)
        if self.separator_id is not None:
            place[tokens == self.separator_id] = 1.0
        chosen = place <= max(_CHOSEN, place.min())
        chosen &= place < 1.0
        replaced = np.where(kind < _MASKED, np.int32(self.mask_id), tokens)
        replaced = np.where((kind >= _MASKED) & (kind < _MASKED + _RANDOM), others, replaced)
        return (
            np.where(chosen, replaced, tokens).astype(np.int32),
            np.where(chosen, tokens, IGNORED_LABEL).astype(np.int32),
        )
