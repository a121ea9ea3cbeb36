"""What a folder may be that holds no weights of the model, and what is said then."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jspeed.core.errors import CheckpointError
from jspeed.hf import Folder, Weights
from jspeed.hf.names import NAMES
from jspeed.hf.writing import write_model

SHAPES = {
    "embedding": (5, 4),
    "norm/scale": (4,),
    "blocks/attn/q/kernel": (2, 4, 6),
    "lm_head": (4, 5),
}
TENSORS = {
    "model.embed_tokens.weight": (5, 4),
    "model.norm.weight": (4,),
    "model.layers.0.self_attn.q_proj.weight": (6, 4),
    "model.layers.1.self_attn.q_proj.weight": (6, 4),
    "lm_head.weight": (5, 4),
}
TIED = {path: shape for path, shape in SHAPES.items() if path != "lm_head"}


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in TENSORS.items()}


def opened(folder: Path, tensors: dict[str, np.ndarray], shapes=SHAPES, family="llama") -> Weights:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Weights(Folder(folder), family, shapes)


def test_slices(tmp_path):
    tensors = arrays()
    weights = opened(tmp_path, tensors)
    index = (slice(1, 3), slice(2, 5))
    part = weights.read("blocks/attn/q/kernel", index, layer=1)
    np.testing.assert_array_equal(
        part, tensors["model.layers.1.self_attn.q_proj.weight"].T[1:3, 2:5]
    )
    np.testing.assert_array_equal(
        weights.read("lm_head", index), tensors["lm_head.weight"].T[1:3, 2:5]
    )


def test_bfloat16_without_torch(tmp_path):
    tensors = {name: values.astype(ml_dtypes.bfloat16) for name, values in arrays().items()}
    weights = opened(tmp_path, tensors)
    part = weights.read("norm/scale", (slice(0, 2),))
    assert part.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(part, tensors["model.norm.weight"][:2])


def test_all_that_does_not_fit_is_listed(tmp_path):
    tensors = arrays()
    del tensors["model.norm.weight"]
    tensors["model.layers.2.self_attn.q_proj.weight"] = np.zeros((6, 4), np.float32)
    tensors["model.embed_tokens.weight"] = np.zeros((7, 4), np.float32)
    tensors["lm_head.weight"] = np.zeros((5, 4), np.int8)
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, tensors)
    assert str(caught.value) == (
        f'"{tmp_path}" does not hold the llama model that its config.json describes:\n'
        "  missing: model.norm.weight\n"
        "  unknown: model.layers.2.self_attn.q_proj.weight\n"
        "  model.embed_tokens.weight is [7, 4], expected [5, 4]\n"
        "  lm_head.weight is I8; quantised weights are not read, so take those they were made from"
    )


def test_tied_weights(tmp_path):
    tensors = arrays()
    with pytest.raises(CheckpointError, match=r"holds a lm_head\.weight of its own, different"):
        opened(tmp_path, tensors, TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    opened(tmp_path, tensors, TIED)  # the same twice
    del tensors["model.embed_tokens.weight"]
    weights = opened(tmp_path, tensors, TIED)  # under the other name alone
    whole = weights.read("embedding", (slice(0, 5), slice(0, 4)))
    np.testing.assert_array_equal(whole, tensors["lm_head.weight"])


def test_files_of_the_body_alone_and_buffers(tmp_path):
    tensors = {name.removeprefix("model."): values for name, values in arrays().items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    del tensors["lm_head.weight"]
    opened(tmp_path, tensors, TIED)
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight$"):
        opened(tmp_path, tensors)


def test_old_names_of_bert(tmp_path):
    tensors = {
        "bert.embeddings.LayerNorm.gamma": np.ones(3, np.float32),
        "bert.embeddings.LayerNorm.beta": np.zeros(3, np.float32),
        "bert.pooler.dense.weight": np.zeros((3, 3), np.float32),
        "cls.seq_relationship.bias": np.zeros(2, np.float32),
    }
    weights = opened(tmp_path, tensors, {"ln_embed/scale": (3,), "ln_embed/bias": (3,)}, "bert")
    np.testing.assert_array_equal(weights.read("ln_embed/scale", (slice(0, 3),)), np.ones(3))


def test_no_two_parameters_share_a_name():
    for family, names in NAMES.items():
        theirs = [name for entry in names.entries for name in entry.theirs]
        assert len(set(theirs)) == len(theirs), family
        assert len({entry.ours for entry in names.entries}) == len(names.entries), family


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (["pytorch_model.bin"], 'weights in "pytorch_model.bin", a Python pickle'),
        (["global_step10/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py"],
         "zero_to_fp32.py {folder} OUT --safe_serialization"),
        (["mp_rank_00_model_states.pt"],
         "zero_to_fp32.py {parent} OUT --safe_serialization"),
        (["readme.txt"], 'has neither "model.safetensors" nor'),
        ([], "it holds nothing"),
    ],
)  # fmt: skip
def test_other_folders(files, text, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        Folder(folder)
    assert text.format(folder=folder, parent=tmp_path) in str(caught.value)


def test_damage(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="is damaged, or no safetensors file"):
        Folder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r'index\.json" is damaged'):
        Folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(CheckpointError, match=r'no such file, though "model\.safetensors\.index'):
        Folder(tmp_path)
    save_file({"b": np.zeros(2)}, tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="lacks a, which"):
        Folder(tmp_path)


def test_an_export_that_fails_leaves_what_was_there(tmp_path):
    """The disk is full after the first parameter; nothing half-written stays either."""
    shapes = {"wte": (5, 4), "wpe": (3, 4)}

    def export(value: float, *, full: bool = False) -> None:
        def parameters():
            for path, shape in shapes.items():
                yield path, np.full(shape, value, np.float32)
                if full:
                    raise OSError(28, "No space left on device")

        write_model(
            tmp_path,
            family="gpt2",
            shapes=shapes,
            parameters=parameters(),
            document={"value": value},
            dtype="float32",
        )

    export(1.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["config.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        export(2.0, full=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    export(2.0)
    assert (tmp_path / "model.safetensors").read_bytes() != before["model.safetensors"]
