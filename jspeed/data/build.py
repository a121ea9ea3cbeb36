"""From the arguments of a run file's `data` section to a data set."""

from itertools import islice
from pathlib import Path

from jspeed.core.errors import DataError
from jspeed.data.bpe import train_bpe
from jspeed.data.cache import digest
from jspeed.data.corpus import TextCorpus
from jspeed.data.dataset import TextDataset
from jspeed.data.sources import SourceFormat, TokenFiles, resolve_source
from jspeed.data.tokenizer import ByteTokenizer, IdTokenizer, Tokenizer, TokenizerKind
from jspeed.data.tokens import TokenDtype, check_dtype, open_token_files, tokenize_corpus

# More text teaches a tokenizer nothing: of longer corpora an even sample of pieces is taken.
_TRAINING_BYTES = 64 << 20
# Raised whenever the same text and size give another tokenizer.
_TOKENIZER_REVISION = "1"


def build_dataset(
    *,
    source: str | Path = "python-docs",
    format: SourceFormat = "auto",
    text_key: str = "text",
    tokenizer_kind: TokenizerKind = "bpe",
    vocab_size: int = 4096,
    tokenizer_path: str | Path | None = None,
    sequence_length: int = 256,
    validation_fraction: float = 0.05,
    document_mask: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    token_dtype: TokenDtype = "uint16",
    masked: bool = False,
    cache_dir: str | Path,
) -> TextDataset:
    """Returns the data set that a run file's `data` section describes.

    Text is encoded once, each document behind a separator, and kept in `cache_dir` under a key of
    its content; so is a tokenizer that is trained. Token files are memory-mapped where they are.

    Args:
      source: `"python-docs"` (docstrings and help topics of the running Python, no download),
        `"golden"` (a short text that comes with jspeed), a file, or a folder, which is read
        recursively in sorted order.
      format: `"text"`, `"jsonl"` or `"tokens"`; `"auto"` goes by the file names.
      text_key: the key of the text in JSONL objects.
      tokenizer_kind: `"bpe"` trains byte-level BPE on the text; `"byte"` takes the bytes; `"file"`
        reads a `tokenizer.json`. Token files, which have no text to train on, keep their ids under
        `"bpe"`: then only the size of the vocabulary is known, and text can be neither encoded nor
        decoded.
      vocab_size: the number of ids of a `"bpe"` tokenizer. The tokenizer's own `vocab_size` can be
        smaller where the corpus is, and is what the model should be made for.
      tokenizer_path: the file of kind `"file"`.
      sequence_length: tokens per sequence.
      validation_fraction: the share of the sequences that is held out, below 1; spread evenly over
        the corpus.
      document_mask: whether batches have `segment_ids` and `positions`, so that documents do not
        see each other.
      shuffle: whether training sequences come in random order, anew in each epoch.
      seed: of the random order.
      token_dtype: the type of the ids on disk, both in the cache and in raw token files.
      masked: whether tokens are masked that are to be told, as BERT is trained, in place of next
        tokens.
      cache_dir: the folder for cached files; made when missing.

    Raises:
      DataError: if the data are missing, empty, damaged or do not fit the arguments.
      MissingExtraError: if a package of the extra `data` is needed and missing.
    """
    cache = Path(cache_dir).expanduser()
    corpus = resolve_source(source, format=format, text_key=text_key, cache_dir=cache)
    key = corpus.key() if isinstance(corpus, TextCorpus) else ""
    if tokenizer_kind == "bpe" and isinstance(corpus, TextCorpus):
        check_dtype(vocab_size, token_dtype)  # before minutes of training
        tokenizer = _trained_tokenizer(corpus, key, vocab_size, cache)
    else:
        tokenizer = _given_tokenizer(tokenizer_kind, tokenizer_path, vocab_size)
    if isinstance(corpus, TokenFiles):
        stream = open_token_files(corpus.files, dtype=token_dtype, vocab_size=tokenizer.vocab_size)
    else:
        stream = tokenize_corpus(
            corpus, tokenizer, corpus_key=key, dtype=token_dtype, cache_dir=cache
        )
    return TextDataset(
        stream,
        tokenizer,
        name=corpus.name,
        sequence_length=sequence_length,
        validation_fraction=validation_fraction,
        document_mask=document_mask,
        shuffle=shuffle,
        seed=seed,
        masked=masked,
    )


def _trained_tokenizer(corpus: TextCorpus, key: str, vocab_size: int, cache: Path) -> Tokenizer:
    path = cache / f"tokenizer-{digest([_TOKENIZER_REVISION, key, str(vocab_size)])}.json"
    if not path.is_file():
        stride = corpus.size() // _TRAINING_BYTES + 1
        sample = islice(corpus.pieces(), 0, None, stride)
        train_bpe((piece.text for piece in sample), vocab_size=vocab_size).save(path)
    # Read back in either case, so that the first run and later ones have the very same tokenizer.
    return Tokenizer.load(path)


def _given_tokenizer(kind: TokenizerKind, path: str | Path | None, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of a kind that needs no training."""
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        return IdTokenizer(vocab_size)
    if kind != "file":
        raise DataError(f'"data.tokenizer.kind": {kind!r:.40}. Expected "bpe", "byte" or "file".')
    if path is None:
        raise DataError(
            '"data.tokenizer.path": missing. The tokenizer kind "file" needs the path of a '
            "tokenizer.json."
        )
    return Tokenizer.load(Path(path).expanduser())
