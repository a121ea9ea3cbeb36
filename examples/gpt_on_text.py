"""A GPT on text from a run file: what `jspeed train configs/gpt2_tiny.json` does, written out.

    python examples/gpt_on_text.py
    python examples/gpt_on_text.py run.steps=50 zero_optimization.stage=1 model.layers=6

Values of the run file can be replaced on the command line. This loop reads those of the model, the
mesh, training and the data; evaluation and checkpoints in between are what `jspeed train` adds.
"""

import math
import os
import sys
from pathlib import Path

# The run file asks for 8 devices; without an accelerator they are 8 virtual ones.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax

import jspeed
from jspeed.data import build_dataset
from jspeed.models import build_model
from jspeed.nn import language_model_loss

RUN_FILE = Path(__file__).parents[1] / "configs" / "gpt2_tiny.json"


def main(overrides: list[str]) -> None:
    config = jspeed.load_config(RUN_FILE, overrides)
    assert config.model is not None
    assert config.data is not None
    assert config.run is not None

    data = build_dataset(
        source=config.data.source,
        tokenizer_kind=config.data.tokenizer.kind,
        vocab_size=config.data.tokenizer.vocab_size or 4096,
        sequence_length=config.data.sequence_length,
        cache_dir=Path("runs/cache"),
    )
    print(f"{data.tokens:,} tokens of text, {data.tokenizer.vocab_size} different ones")

    # A function of random keys, not a model: the engine creates each parameter where it will live.
    model = build_model(
        config.model, vocab_size=data.tokenizer.vocab_size, platform=jax.default_backend()
    )
    engine = jspeed.initialize(
        model=model, loss_fn=language_model_loss, config=config, report=False
    )
    print(f"ZeRO stage {engine.zero_optimization_stage()} on {engine.world_size} devices")

    batches = data.train_iterator(engine.train_batch_size())
    for step in range(1, config.run.steps + 1):
        loss = float(engine.train_batch(next(batches))["loss"])
        if step % 10 == 0 or step == config.run.steps:
            print(f"step {step}: loss {loss:.4f}")

    total = weight = 0.0
    for batch in data.validation_batches(engine.train_batch_size()):
        part = engine.eval_batch(batch)
        total, weight = total + float(part["total"]), weight + float(part["weight"])
    print(f"validation perplexity {math.exp(total / weight):.1f}")

    # The data's position goes along, so that a resumed run reads on where this one stopped.
    tag = engine.save_checkpoint(
        Path(config.run.dir) / "checkpoints", client_state={"data": batches.state()}, wait=True
    )
    print(f"saved {tag} in {config.run.dir}/checkpoints")


if __name__ == "__main__":
    main(sys.argv[1:])
