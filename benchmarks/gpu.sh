#!/bin/sh
# Check and measure all of it on a GPU, in under 8 minutes: make bench-gpu. Writes into $OUT (benchmarks/results).
# DEVICE=cpu with WORDS='resolution=32 batch_size=2 rounds=1 seconds=0.01' goes the same way without a GPU.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-benchmarks/results}
NAME=${NAME:-$DEVICE}
export PYTHONPATH=$PWD TORCHINDUCTOR_FX_GRAPH_CACHE=1
"$PYTHON" - "$DEVICE" <<'EOF' || exit 2
import importlib.util, sys
packages = ("torch", "torchvision", "timm", "hydra", "omegaconf", "safetensors", "simplejpeg", "sklearn", "tensorboard", "tqdm", "pytest")
missing = [name for name in packages if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing: {', '.join(missing)}: make the environment first (make .venv/.ready), or pip install them")
import torch
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device here: mend the driver, or DEVICE=cpu for a rehearsal")
print("torch", torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
EOF
mkdir -p "$OUT"
failed=""
step() {
    name=$1
    shift
    echo "== $name"
    timeout "${LIMIT:-240}" "$@" || failed="$failed $name"
}
bench() { step "$1" "$PYTHON" -m effnet_train.cli.bench "$@" device="$DEVICE" ${WORDS:-}; }

# Compiling takes longest. It is done beside the tests, and the measurements find it in the cache. A library at a time
# has one variant on the GPU: all six steps, of some 15 GB each, would not leave the tests their memory.
if [ "$DEVICE" = cuda ]; then
    for library in ours timm torchvision; do
        timeout 300 "$PYTHON" -m effnet_train.cli.bench train 'models=[b4,b0]' "libraries=[$library]" \
            'modes=[compiled]' rounds=1 seconds=0.01 memory=false kinds=false ${WORDS:-} >/dev/null 2>&1 &
    done
    step tests "$PYTHON" -m pytest -q -m gpu -p no:xdist tests/models tests/engine/test_graph.py
    wait
fi
bench train 'models=[b0,b4]' rounds=5 seconds=0.5 output="$OUT/train-$NAME.json"
bench train 'models=[b6]' 'modes=[eager]' rounds=3 seconds=0.5 output="$OUT/train-large-$NAME.json"
bench eval 'models=[b0,b4]' 'modes=[eager]' rounds=5 seconds=0.3 output="$OUT/eval-$NAME.json"
bench latency 'modes=[eager]' rounds=20 precision=auto output="$OUT/latency-bench-$NAME.json"
RUN=$(mktemp -d)
step training "$PYTHON" -m effnet_train.cli.train recipe=demo device="$DEVICE" ${TRAINING:-epochs=5} \
    run_root="$RUN" name=digits data.root="$RUN/data" && cp "$RUN/digits/summary.json" "$OUT/training-$NAME.json"
rm -rf "$RUN"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
