"""What the three scripts share: the features, the options, the loss."""

import argparse
from pathlib import Path

import jax
import optax
from text import BATCH, CONTEXT

from embax.sparsecore.lib.nn import embedding_spec

AXIS, DIM, HIDDEN = "x", 32, 128


def features(vocabulary):
    """Returns the only feature: a word of a context is a sample with one id."""
    table = embedding_spec.TableSpec(
        name="words",
        vocabulary_size=vocabulary,
        embedding_dim=DIM,
        initializer=jax.nn.initializers.normal(1.0),
        optimizer=embedding_spec.AdagradOptimizerSpec(learning_rate=0.1),
        combiner="sum",
    )
    samples = BATCH * CONTEXT
    return embedding_spec.FeatureSpec(
        name="context", table_spec=table, input_shape=(samples, 1), output_shape=(samples, DIM)
    )


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def main(train, description):
    """Reads the options and trains; says the loss every 100 steps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save", type=Path, help="a new folder for the checkpoint")
    parser.add_argument("--restore", type=Path, help="the folder of one, of any number of devices")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    losses = train(args.devices, args.steps, args.save, args.restore)
    for step in [*range(0, len(losses), 100), len(losses) - 1]:
        print(f"step {step:4d}  loss {losses[step]:.4f}")
