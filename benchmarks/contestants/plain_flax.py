"""A GPT-2 of Flax's own layers under a plain optax loop: what one writes without jspeed."""

from benchmarks.contestants.common import begin

if __name__ == "__main__":
    task = begin()

    from benchmarks.flax_gpt2 import FlaxGPT2, mean_loss
    from benchmarks.plain import PlainLoop
    from benchmarks.training import make_batch
    from benchmarks.weights import initial_weights

    model = FlaxGPT2.with_weights(task.shape, initial_weights(task.shape, task.seed))
    loop = PlainLoop(model, mean_loss)
    batch = make_batch(task.shape, task.seed)
    task.serve(lambda: float(loop.train_batch(batch)), "jax", "flax", "optax")
