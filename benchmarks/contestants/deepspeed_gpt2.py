"""DeepSpeed on the CPU: stage 0, Hugging Face's GPT-2. Runs in an environment of its own."""

import os
import random

from benchmarks.contestants.common import begin

if __name__ == "__main__":
    task = begin()
    # DeepSpeed starts torch.distributed even for one process.
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(random.randint(20_000, 60_000)),
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_SIZE="1",
        DS_ACCELERATOR="cpu",
    )

    import deepspeed
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from benchmarks.shapes import CLIPPING, LEARNING_RATE, WEIGHT_DECAY, tokens
    from benchmarks.weights import initial_weights

    torch.set_num_threads(task.threads)
    shape = task.shape
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=shape.sequence,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager" if "eager" in task.options else "sdpa",  # pyright: ignore[reportCallIssue]
            use_cache=False,
        )
    )
    names = {
        "wte": "transformer.wte.weight",
        "wpe": "transformer.wpe.weight",
        "ln_f/scale": "transformer.ln_f.weight",
        "ln_f/bias": "transformer.ln_f.bias",
    }
    rooms = {"attn/qkv": "attn.c_attn", "attn/proj": "attn.c_proj"}
    rooms |= {"mlp/fc": "mlp.c_fc", "mlp/proj": "mlp.c_proj", "ln_1": "ln_1", "ln_2": "ln_2"}
    target = dict(model.named_parameters())
    with torch.no_grad():
        for path, array in initial_weights(shape, task.seed).items():
            if path in names:
                target.pop(names[path]).copy_(torch.from_numpy(array))
                continue
            room, kind = path.removeprefix("blocks/").rsplit("/", 1)
            suffix = "bias" if kind == "bias" else "weight"
            for layer, part in enumerate(array):
                name = f"transformer.h.{layer}.{rooms[room]}.{suffix}"
                parameter = target.pop(name)
                parameter.copy_(torch.from_numpy(part).reshape(parameter.shape))
    assert not target, f"not set: {sorted(target)}"
    model.train()
    optimizer = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    if "torch_adam" in task.options:
        optimizer["torch_adam"] = True
    engine, chosen, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_batch_size": shape.batch,
            "optimizer": {"type": "AdamW", "params": optimizer},
            "gradient_clipping": CLIPPING,
            "zero_optimization": {"stage": 0},
        },
        dist_init_required=True,
    )
    rows = torch.from_numpy(tokens(shape, task.seed)).long()
    inputs, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def step() -> float:
        # Labels are shifted already, as the other contestants have them.
        loss = engine(input_ids=inputs, labels=labels, shift_labels=labels).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    task.serve(step, "deepspeed", "torch", "transformers", optimizer=type(chosen).__name__)
