"""Which tokens see which: DeepSpeed's `sparse_attention`, and its keys in `model.attention`."""

from jspeed.config.key import mapped, section
from jspeed.config.kinds import Bool, Int, ListOf, Object, choice

_COUNT = Int(0)
_BLOCKS = ListOf(_COUNT)
MODES = ("fixed", "dense", "variable", "bigbird", "bslongformer")

PATTERN_KEYS = (
    mapped("block", Int(1), 16, "tokens along the side of a block; 64 and 128 are fastest on GPUs"),
    mapped("different_layout_per_head", Bool(), False, "each head has random or global blocks of "
           "its own"),
    mapped("num_local_blocks", Int(1), 4, "fixed: blocks of a local window"),
    mapped("num_global_blocks", _COUNT, 1, "fixed: blocks of each window that all see; bigbird: "
           "blocks at the beginning that all see"),
    mapped("attention", choice("bidirectional", "unidirectional"), "bidirectional",
           "whether tokens see what comes after them; decoders never do"),
    mapped("horizontal_global_attention", Bool(), False,
           "fixed, variable: global blocks see all too"),
    mapped("num_different_global_patterns", Int(1), 1,
           "fixed: in how many ways heads choose the global blocks of a window"),
    mapped("num_random_blocks", _COUNT, 0, "variable, bigbird: random blocks of each row"),
    mapped("local_window_blocks", _BLOCKS, [4],
           "variable: blocks of the first windows; the last number goes on to the end"),
    mapped("global_block_indices", _BLOCKS, [0],
           "variable, bslongformer: the blocks that all see, or where ranges of them start"),
    mapped("global_block_end_indices", _BLOCKS, None,
           "variable, bslongformer: behind the end of each range; null: single blocks"),
    mapped("num_sliding_window_blocks", Int(1), 3,
           "bigbird, bslongformer, local_sliding_window: blocks around each one that it sees"),
)  # fmt: skip

SPARSE_ATTENTION_KEYS = section(
    "sparse_attention",
    mapped("", Object(), None, "which blocks of tokens see which, in the model's attention",
           on="set"),
    mapped("mode", choice(*MODES), "fixed", "the pattern"),
    *PATTERN_KEYS,
)  # fmt: skip

MODEL_ATTENTION_KEYS = (
    mapped("kind", choice("dense", *(mode for mode in MODES if mode != "dense"),
                          "local_sliding_window"), None,
           "the pattern of blocks that see each other; null: that of sparse_attention, or dense"),
    *PATTERN_KEYS,
    mapped("seed", _COUNT, 0, "of random blocks, which belong to the model: no run moves them"),
)  # fmt: skip

KEYS_OF_MODE = {
    "dense": ("block",),
    "fixed": ("block", "different_layout_per_head", "num_local_blocks", "num_global_blocks",
              "attention", "horizontal_global_attention", "num_different_global_patterns"),
    "variable": ("block", "different_layout_per_head", "num_random_blocks", "local_window_blocks",
                 "global_block_indices", "global_block_end_indices", "attention",
                 "horizontal_global_attention", "seed"),
    "bigbird": ("block", "different_layout_per_head", "num_random_blocks",
                "num_sliding_window_blocks", "num_global_blocks", "attention", "seed"),
    "bslongformer": ("block", "different_layout_per_head", "num_sliding_window_blocks",
                     "global_block_indices", "global_block_end_indices", "attention"),
    "local_sliding_window": ("block", "num_sliding_window_blocks", "attention"),
}  # fmt: skip
"""Pattern -> the keys that mean something to it. The one of `dense` changes no result."""
