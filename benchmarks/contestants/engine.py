"""jspeed: the engine on one CPU device, stage 0."""

from benchmarks.contestants.common import begin

if __name__ == "__main__":
    task = begin()

    from benchmarks.training import make_batch, make_engine
    from benchmarks.weights import initial_weights

    engine = make_engine(
        task.shape, stage=0, devices=1, weights=initial_weights(task.shape, task.seed)
    )
    batch = make_batch(task.shape, task.seed)
    task.serve(lambda: float(engine.train_batch(batch)["loss"]), "jax", "flax")
