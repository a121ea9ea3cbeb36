"""Fine-tuning of a model in Hugging Face's layout, with the arguments of their training scripts.

    python examples/finetune_hf.py --deepspeed ds_config.json --model_name_or_path DIR \\
        --train_file text.txt --output_dir OUT --max_steps 100 --learning_rate 5e-5

DIR is what `save_pretrained` wrote: config.json, safetensors and tokenizer.json; OUT becomes such a
folder too. "auto" in ds_config.json takes the values of the arguments, as with their Trainer.
Neither torch nor transformers is needed.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")  # where there is no accelerator

import jspeed
from jspeed.config import AutoFacts
from jspeed.data import build_dataset
from jspeed.models import model_from_hf


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed", required=True)
    parser.add_argument("--model_name_or_path", required=True, type=Path)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--warmup_steps", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--per_device_train_batch_size", type=int, default=1)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--bf16", action="store_true")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    model = model_from_hf(given.model_name_or_path)
    facts = AutoFacts(
        hidden_size=model.config.hidden_size,
        total_steps=given.max_steps,
        warmup_steps=given.warmup_steps,
        learning_rate=given.learning_rate,
        compute_dtype="bfloat16" if given.bf16 else "float32",
        micro_batch_size=given.per_device_train_batch_size,
        gradient_accumulation_steps=given.gradient_accumulation_steps,
    )
    config = jspeed.load_config(given.deepspeed).resolve_auto(facts).to_dict()
    engine = jspeed.initialize(model=model, loss_fn=model.loss_fn, config=config, report=False)
    data = build_dataset(
        source=given.train_file,
        tokenizer_kind="file",
        tokenizer_path=given.model_name_or_path / "tokenizer.json",
        sequence_length=given.block_size,
        masked=not model.causal,
        cache_dir=given.output_dir / "cache",
    )
    share = engine.data_share  # of this process, where there are several
    rows = engine.train_batch_size() // share.count
    batches = data.train_iterator(rows, share.index, share.count)
    for step in range(1, given.max_steps + 1):
        loss = float(engine.train_batch(next(batches))["loss"])
        if engine.global_rank == 0 and (step % 10 == 0 or step == given.max_steps):
            print(f"step {step}: loss {loss:.4f}")
    engine.save_hf_model(given.output_dir)
    if engine.global_rank == 0:
        print(f"written to {given.output_dir}")


if __name__ == "__main__":
    main()
