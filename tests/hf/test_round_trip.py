"""Every family: loaded, compared with transformers, trained, exported, and read by transformers.

Logits are of the order of 1 to 10 here; 1e-5 beside them is rounding in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jspeed
from jspeed.core.errors import ConfigError
from jspeed.engine import Engine
from jspeed.engine.hf_export import export_checkpoint
from jspeed.models import build_model, model_from_hf

tiny = pytest.importorskip("tests.hf.tiny")
torch = tiny.torch

RATE = 0.05


def engine_of(folder: Path, devices: int = 1, **config: Any) -> Engine:
    model = model_from_hf(folder)
    return jspeed.initialize(
        model=model,
        loss_fn=model.loss_fn,
        config={
            "train_batch_size": 4,
            "gradient_clipping": 0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            **config,
        },
        devices=jax.devices()[:devices],
        report=False,
    )


def batch(name: str) -> dict[str, np.ndarray]:
    ids = tiny.tokens(1)
    if name == "bert":  # told are a third of the tokens
        return {"input_ids": ids, "labels": np.where(np.arange(12) % 3 == 0, ids, -100)}
    return {"input_ids": ids, "labels": np.roll(ids, -1, axis=1)}


def torch_step(model: Any, batch: dict[str, np.ndarray]) -> float:
    """One step of plain SGD on the mean loss; the loss before it."""
    labels = torch.tensor(batch["labels"], dtype=torch.long)
    out = model(torch.tensor(batch["input_ids"], dtype=torch.long)).logits
    loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten())
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(RATE * parameter.grad)
    return loss.item()


@pytest.mark.parametrize("name", tiny.some_quick("gpt2", "llama3", "qwen3", "bert"))
def test_loads_and_exports(name, tmp_path):
    source, model = tiny.saved(tmp_path / "theirs", name, seed=len(name))
    engine = engine_of(source)
    ids = tiny.tokens()
    np.testing.assert_allclose(engine.module(ids), tiny.logits(model, ids), atol=1e-5)
    engine.save_hf_model(tmp_path / "ours")
    assert tiny.contents(tmp_path / "ours") == tiny.contents(source)
    again = tiny.read_back(tmp_path / "ours", name)
    np.testing.assert_array_equal(tiny.logits(again, ids), tiny.logits(model, ids))


@pytest.mark.parametrize("name", tiny.some_quick("gpt2"))
def test_trains_as_torch_does(name, tmp_path):
    source, model = tiny.saved(tmp_path / "theirs", name, seed=len(name))
    engine = engine_of(source)
    losses = engine.train_batch(batch(name))["loss"], torch_step(model, batch(name))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    engine.save_hf_model(tmp_path / "ours")
    again, ids = tiny.read_back(tmp_path / "ours", name), tiny.tokens()
    np.testing.assert_allclose(tiny.logits(again, ids), tiny.logits(model, ids), atol=2e-5)


@pytest.mark.parametrize("name", tiny.some_quick(of=("gpt2", "llama", "bert")))
def test_files_of_several_shards(name, tmp_path):
    source, model = tiny.saved(tmp_path / "theirs", name, seed=3, max_shard_size="20KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    engine = engine_of(source)
    ids = tiny.tokens()
    np.testing.assert_allclose(engine.module(ids), tiny.logits(model, ids), atol=1e-5)
    out = tmp_path / "ours"
    engine.save_hf_model(out, max_shard_size=20_000)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    theirs = json.loads((source / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(theirs["weight_map"])
    assert index["metadata"] == theirs["metadata"]
    # One file is left when fewer are asked for: none of before lies beside it.
    np.testing.assert_array_equal(
        tiny.logits(tiny.read_back(out, name), ids), tiny.logits(model, ids)
    )
    engine.save_hf_model(out)
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("name", tiny.some_quick(of=("gpt2", "qwen3")))
def test_half_precision_files(name, tmp_path):
    """Values of bfloat16 are exact in fp32, so nothing is lost either way."""
    source, _ = tiny.saved(tmp_path / "theirs", name, dtype="bfloat16")
    model = tiny.read_back(source, name)
    assert {dtype for _, dtype in tiny.contents(source).values()} == {"BF16"}
    engine = engine_of(source)
    ids = tiny.tokens()
    np.testing.assert_allclose(engine.module(ids), tiny.logits(model, ids), atol=1e-5)
    engine.save_hf_model(tmp_path / "ours", dtype="bfloat16")
    assert tiny.contents(tmp_path / "ours") == tiny.contents(source)
    for one, other in zip(
        tiny.read_back(tmp_path / "ours", name).parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(one, other)


SCRATCH: dict[str, dict[str, Any]] = {
    "bert": {"activation": "gelu_tanh"},  # and no output bias, which transformers always has
    "gpt2": {"tie_embeddings": False},
    "qwen3": {"kv_heads": 2, "head_dim": 6, "rope_theta": 5e5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRATCH)
def test_models_that_began_here(name, tmp_path):
    section = {"family": name, "layers": 2, "hidden_size": 24, "heads": 4, "sequence_length": 16}
    section |= {"vocab_size": tiny.VOCABULARY, "intermediate_size": 40, **SCRATCH[name]}
    config = jspeed.load_config({"train_batch_size": 4, "model": section}).model
    assert config is not None
    model = build_model(config, vocab_size=tiny.VOCABULARY, platform="cpu")
    optimizer = {"type": "SGD", "params": {"lr": RATE}}
    engine = jspeed.initialize(
        model=model,
        loss_fn=model.loss_fn,
        config={"train_batch_size": 4, "optimizer": optimizer},
        devices=jax.devices()[:1],
        report=False,
    )
    engine.save_hf_model(tmp_path / "ours")
    engine.save_checkpoint(tmp_path / "checkpoints", wait=True)
    export_checkpoint(tmp_path / "checkpoints", tmp_path / "converted", max_shard_size=30_000)
    ids = tiny.tokens()
    for folder in (tmp_path / "ours", tmp_path / "converted"):
        again = tiny.logits(tiny.read_back(folder, name), ids)
        np.testing.assert_allclose(engine.module(ids), again, atol=1e-5)


@pytest.mark.slow
def test_rows_longer_than_the_window(tmp_path):
    source, model = tiny.saved(tmp_path / "theirs", "mistral")
    ours, ids = engine_of(source).module, np.concatenate([tiny.tokens(), tiny.tokens(1)], axis=1)
    np.testing.assert_allclose(ours(ids[:, :16]), tiny.logits(model, ids[:, :16]), atol=1e-5)
    with pytest.raises(ConfigError, match="a sequence of 24 tokens is longer than the model's"):
        ours(ids)


@pytest.mark.slow
def test_tokens_of_two_sentences(tmp_path):
    source, model = tiny.saved(tmp_path / "theirs", "bert", seed=7)
    bert = engine_of(source).module
    ids, kinds = tiny.tokens(), (np.arange(48).reshape(4, 12) % 12 > 6).astype(np.int32)
    ours = bert.hidden(ids, token_type_ids=kinds) @ bert.head()
    with torch.no_grad():
        theirs = model(
            torch.tensor(ids, dtype=torch.long), token_type_ids=torch.tensor(kinds).long()
        ).logits
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)
