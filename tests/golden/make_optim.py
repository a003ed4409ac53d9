"""Make optim.json: TensorFlow's RMSProp, moving average, learning rates and smoothed loss.

pip install tensorflow-cpu==2.15.1; CUDA_VISIBLE_DEVICES= python make_optim.py

Each function repeats how the authors' model_fn and utils.build_learning_rate call TensorFlow 1.
"""

import json
import math
from pathlib import Path

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1
GRADIENTS = (0.0, 1e-6, 1e-3, 0.03, 1.0, -1.0, 40.0, -0.2)  # scales, one a weight
STEPS = 12
# The last two are made so that the staircase's edges fall on whole steps.
RATES = ((4096, 1281167), (2048, 1281167), (256, 50000), (128, 1433), (96, 1797), (64, 6400), (500, 2500))


def plain(array):
    """Return a float32 array as lists whose numbers round back to the same float32."""
    return np.asarray(array, np.float32).astype(np.float64).tolist()


def rmsprop(weight_decay):
    """Train one vector against given gradients and L2, the rate changing every step; report every state."""
    generator = np.random.default_rng(1)
    gradients = (generator.normal(size=(STEPS, len(GRADIENTS))) * GRADIENTS).astype(np.float32)
    start = generator.normal(size=len(GRADIENTS)).astype(np.float32)
    rates = np.float32([0.256 * (step + 1) / 6 if step < 6 else 0.256 * 0.97 ** (step - 4) for step in range(STEPS)])
    with tf.Graph().as_default(), v1.Session() as session:
        weights = v1.get_variable("weights", initializer=start, use_resource=True)
        gradient, rate = v1.placeholder(tf.float32, start.shape), v1.placeholder(tf.float32, [])
        loss = tf.reduce_sum(gradient * weights) + weight_decay * tf.nn.l2_loss(weights)
        optimizer = v1.train.RMSPropOptimizer(rate, decay=0.9, momentum=0.9, epsilon=0.001)
        train = optimizer.minimize(loss)
        session.run(v1.global_variables_initializer())
        states = {"weights": [], "mean_square": [], "momentum": []}
        for step in range(STEPS):
            session.run(train, {gradient: gradients[step], rate: rates[step]})
            slots = [optimizer.get_slot(weights, name) for name in ("rms", "momentum")]
            for values, state in zip(session.run([weights, *slots]), states.values(), strict=True):
                state.append(plain(values))
    return {
        "weight_decay": weight_decay,
        "start": plain(start),
        "gradients": plain(gradients),
        "rates": plain(rates),
        **states,
    }


def moving_average(decay, first, steps):
    """Follow given values, as model_fn does: after the optimizer has counted the step up from `first`."""
    values = np.random.default_rng(2).normal(size=(steps + 1, 3)).astype(np.float32)
    with tf.Graph().as_default(), v1.Session() as session:
        global_step = v1.get_variable("global_step", initializer=first, trainable=False, use_resource=True)
        variable = v1.get_variable("variable", initializer=values[0], use_resource=True)
        value = v1.placeholder(tf.float32, [3])
        with tf.control_dependencies([variable.assign(value)]):
            train = global_step.assign_add(1)
        average = v1.train.ExponentialMovingAverage(decay=decay, num_updates=global_step)
        with tf.control_dependencies([train]):
            follow = average.apply([variable])
        session.run(v1.global_variables_initializer())
        averages = []
        for now in values[1:]:
            session.run(follow, {value: now})
            averages.append(plain(session.run(average.average(variable))))
    return {"decay": decay, "first": first, "values": plain(values), "averages": averages}


def learning_rates(batch_size, num_images):
    """Ask build_learning_rate at the beginning, around the end of warm-up and around the staircase's edges."""
    steps_per_epoch = num_images / batch_size
    initial = 0.016 * (batch_size / 256.0)
    warmup_steps = int(5 * steps_per_epoch)
    edges = [k * 2.4 * steps_per_epoch for k in (1, 2, 3, 4, 10, 50, 145)]
    around = {math.ceil(edge) + shift for edge in edges for shift in (-1, 0, 1)}
    steps = sorted({0, 1, 2, warmup_steps - 1, warmup_steps, warmup_steps + 1, *around})
    rates = []
    with tf.Graph().as_default(), v1.Session() as session:
        global_step = v1.placeholder(tf.int64, [])
        decayed = v1.train.exponential_decay(initial, global_step, steps_per_epoch * 2.4, 0.97, staircase=True)
        rising = initial * tf.cast(global_step, tf.float32) / tf.cast(warmup_steps, tf.float32)
        rate = tf.cond(global_step < warmup_steps, lambda: rising, lambda: decayed)
        rates = [float(session.run(rate, {global_step: step})) for step in steps]
    return {"batch_size": batch_size, "num_images": num_images, "steps": steps, "rates": rates}


def smoothed_loss(classes, scale):
    """Return the loss, and its gradient with respect to the logits."""
    generator = np.random.default_rng(classes)
    logits = (generator.normal(size=(6, classes)) * scale).astype(np.float32)
    labels = generator.integers(classes, size=6)
    with tf.Graph().as_default(), v1.Session() as session:
        given = tf.constant(logits)
        loss = v1.losses.softmax_cross_entropy(tf.one_hot(labels, classes), given, label_smoothing=0.1)
        value, gradient = session.run([loss, v1.gradients(loss, given)[0]])
    return {"logits": plain(logits), "labels": labels.tolist(), "loss": float(value), "gradient": plain(gradient)}


def main():
    """Write the reference values."""
    golden = {
        "versions": {"tensorflow": tf.__version__, "numpy": np.__version__},
        "rmsprop": [rmsprop(weight_decay) for weight_decay in (0.0, 1e-5, 0.1)],
        "moving_average": [moving_average(*case) for case in ((0.9999, 0, 8), (0.9999, 89_980, 20), (0.5, 0, 12))],
        "learning_rates": [learning_rates(*case) for case in RATES],
        "smoothed_loss": [smoothed_loss(*case) for case in ((2, 1.0), (10, 3.0), (37, 20.0))],
    }
    text = json.dumps(golden)
    Path(__file__).with_name("optim.json").write_text(text + "\n")
    print(len(text), "bytes")


if __name__ == "__main__":
    main()
