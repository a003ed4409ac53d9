"""Make tf_checkpoint.npz: checkpoints written by TensorFlow and the authors' own network, with its logits.

    pip install tensorflow-cpu==2.15.1 "numpy<2" plyvel==1.5.1
    CUDA_VISIBLE_DEVICES= python make_tf_checkpoint.py path/to/tensorflow/tpu/models/official/efficientnet

`files/X` is the file X. Weights and images are coarsely rounded so that this one stays small; what is computed is not.
A LevelDB file is there too: TensorFlow's index has the same form, but here it is neither compressed nor long.
"""

import json
import os
import sys
import tempfile
import zlib
from pathlib import Path

os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # the plain kernels, which TensorFlow 1 had

import numpy as np
import plyvel
import tensorflow as tf

v1 = tf.compat.v1
TINY = {"width_coefficient": 0.1, "depth_coefficient": 0.5, "num_classes": 7}
SIZE = (3, 45, 38, 3)  # images: number, height, width, channels; odd and even, where SAME padding differs
VARIANTS = (*(f"efficientnet-b{i}" for i in range(8)), *(f"efficientnet-lite{i}" for i in range(5)))
MOVING_AVERAGE_DECAY = 0.9999  # the default of the authors' main.py


def build(name, images, overrides):
    """Build one of the authors' networks for evaluation."""
    import efficientnet_builder
    from lite import efficientnet_lite_builder

    builder = efficientnet_lite_builder if "lite" in name else efficientnet_builder
    return builder.build_model(images, name, training=False, override_params=overrides)[0]


def values(variable, generator):
    """Draw a variable's values: far from where training begins, and such that activations keep their scale."""
    shape, kind = variable.shape.as_list(), variable.op.name.rsplit("/", 1)[-1]
    if kind in ("gamma", "moving_variance"):
        drawn = generator.uniform(0.5, 1.5, shape)
    elif kind in ("kernel", "depthwise_kernel"):
        fan_in = np.prod(shape[:2]) if kind == "depthwise_kernel" else np.prod(shape[:-1])
        drawn = generator.normal(0, 1.4 / np.sqrt(fan_in), shape)
    else:
        drawn = generator.normal(0, 0.3, shape)
    step = 2.0 ** np.floor(np.log2(drawn.std() + 1e-9) - 2)
    return (np.round(drawn / step) * step).astype(np.float32)


def network(name, folder, images, *, averages):
    """Write a tiny network's checkpoint; return the logits of its raw and of its averaged weights.

    With averages it is a training run's, in two files: moving averages, optimizer slots (of the classifier alone, so
    that it stays small), the step.
    """
    generator = np.random.default_rng(5)
    config = v1.ConfigProto(device_count={"CPU": 2})
    with tf.Graph().as_default(), v1.Session(config=config) as session:
        # Sharded savers write a file for every device.
        places = iter(range(10**6))
        with v1.device(lambda op: f"/cpu:{next(places) % 2}" if averages and op.type == "VarHandleOp" else "/cpu:0"):
            inputs = v1.placeholder(tf.float32, SIZE)
            step = v1.train.get_or_create_global_step()
            logits = build(name, inputs, dict(TINY))
            import utils

            followed = sorted(utils.get_ema_vars(), key=lambda variable: variable.op.name)
            if averages:
                ema = v1.train.ExponentialMovingAverage(MOVING_AVERAGE_DECAY, num_updates=step)
                last = [variable for variable in v1.trainable_variables() if "/dense/" in variable.op.name]
                utils.build_optimizer(0.1).minimize(tf.reduce_sum(logits), step, var_list=last)
                ema.apply(followed)
        session.run(v1.global_variables_initializer())
        raw = {variable: values(variable, generator) for variable in followed}
        for variable, value in raw.items():
            variable.load(value, session)
        found = {"raw": session.run(logits, {inputs: images})}
        if averages:
            session.run(step.assign(350))
            shadows = {variable: values(variable, generator) for variable in followed}
            for variable, value in shadows.items():
                ema.average(variable).load(value, session)
        v1.train.Saver(sharded=averages).save(session, str(folder / name), write_meta_graph=False)
        if averages:
            # As the authors restore for evaluation.
            v1.train.Saver(ema.variables_to_restore(followed)).restore(session, str(folder / name))
            found["ema"] = session.run(logits, {inputs: images})
    return {f"{name}/{key}": value for key, value in found.items()}


def tensors():
    """Return tensors of several dtypes and shapes."""
    generator = np.random.default_rng(6)
    normal = generator.normal(size=(2, 3, 4))
    return {
        "float32": tf.constant(normal, tf.float32),
        "float16": tf.constant(normal, tf.float16),
        "bfloat16": tf.cast(tf.constant(normal, tf.float32), tf.bfloat16),
        "float64": tf.constant(normal, tf.float64),
        "int32": tf.constant(generator.integers(-(2**31), 2**31, 5), tf.int32),
        "int64": tf.constant(generator.integers(-(2**63), 2**63 - 1, 5), tf.int64),
        "scalar/int64": tf.constant(2**40, tf.int64),
        "scalar/bfloat16": tf.constant(-1.5, tf.bfloat16),
        "empty": tf.zeros((3, 0, 2)),
        # Longer than what the checksum folds at once, and no multiple of it; zeros, for the sake of this file's size.
        "long": tf.concat([tf.zeros(70_000), tf.constant([1.25, -2.5, 3.0])], 0),
        "text": tf.constant(["not", "read"]),
        "bool": tf.constant([True, False]),
    }


def dtypes(folder):
    """Write a bundle of them, and a variable in slices; return what numpy can hold of them."""
    data = tensors()
    specs = [""] * len(data) + ["4 3 0,2:0,3", "4 3 2,2:0,3"]
    names = [*data, "sliced", "sliced"]
    parts = [tf.zeros((2, 3)), tf.ones((2, 3))]
    tf.raw_ops.SaveV2(
        prefix=str(folder / "dtypes"), tensor_names=names, shape_and_slices=specs, tensors=[*data.values(), *parts]
    )
    readable = {name: tensor for name, tensor in data.items() if name not in ("text", "bool")}
    return {
        f"dtypes/{name}": (tf.cast(tensor, tf.float32) if tensor.dtype == tf.bfloat16 else tensor).numpy()
        for name, tensor in readable.items()
    }


def leveldb(folder):
    """Write one LevelDB table of many compressed blocks; return its keys and values, lengths first."""
    generator = np.random.default_rng(7)
    words = [b"efficientnet", b"blocks", b"kernel", b"a", bytes(range(64))]
    pairs = {}
    for i in range(400):
        size = int(generator.integers(0, 200)) if i % 50 else 5000
        value = b"".join(words[j] for j in generator.integers(0, len(words), size))[:size]
        pairs[f"network/blocks_{i}/value".encode()] = value if i % 3 else generator.bytes(size // 8)
    with tempfile.TemporaryDirectory() as place:
        database = plyvel.DB(place, create_if_missing=True, compression="snappy")
        for key, value in pairs.items():
            database.put(key, value)
        database.compact_range()
        database.close()
        (table,) = Path(place).glob("*.ldb")
        (folder / "table.ldb").write_bytes(table.read_bytes())
    ordered = sorted(pairs.items())
    return {
        "table/lengths": np.array([(len(key), len(value)) for key, value in ordered], np.int32),
        "table/bytes": np.frombuffer(b"".join(key + value for key, value in ordered), np.uint8),
    }


def variables(name):
    """Return the number of a network's variables and a checksum of their names and shapes."""
    with tf.Graph().as_default():
        build(name, v1.placeholder(tf.float32, [1, 64, 64, 3]), None)
        lines = sorted(f"{v.op.name} {v.shape.as_list()}" for v in v1.global_variables())
    return len(lines), zlib.crc32("\n".join(lines).encode())


def main():
    """Write the reference values."""
    sys.path.insert(0, sys.argv[1])
    images = (np.random.default_rng(4).normal(size=SIZE) * 8).round().astype(np.float32) / 8
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        golden = {
            "images": images,
            **network("efficientnet-b0", folder, images, averages=True),
            **network("efficientnet-lite0", folder, images, averages=False),
            **dtypes(folder),
            **leveldb(folder),
        }
        for file in sorted(folder.iterdir()):
            if file.name != "checkpoint":
                golden[f"files/{file.name}"] = np.frombuffer(file.read_bytes(), np.uint8)
    meta = {
        "versions": {"tensorflow": tf.__version__, "numpy": np.__version__, "plyvel": plyvel.__version__},
        "source": "tensorflow/tpu, models/official/efficientnet",
        "tiny": TINY,
        "variables": {name: variables(name) for name in VARIANTS},
    }
    np.savez_compressed(Path(__file__).with_name("tf_checkpoint.npz"), meta=json.dumps(meta), **golden)


if __name__ == "__main__":
    main()
