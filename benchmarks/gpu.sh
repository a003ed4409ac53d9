#!/bin/sh
# Check and measure all of it on a GPU, in under 8 minutes: make bench-gpu. Writes into $OUT (benchmarks/results).
# STEPS='compile train' does only these. DEVICE=cpu with WORDS='resolution=32 batch_size=2 rounds=1 seconds=0.01' goes the same way without a GPU.
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
BEGAN=$(date +%s)
MINUTES=${MINUTES:-8}
STEPS=${STEPS:-tests compile kernels train training eval latency}
step() { # name, seconds of eight minutes at most, command; less where less is left, nothing where it is not in STEPS
    name=$1 limit=$(($2 * MINUTES / 8))
    shift 2
    case " $STEPS " in *" $name "*) ;; *) return 0 ;; esac
    left=$((MINUTES * 60 - $(date +%s) + BEGAN))
    [ "$limit" -lt "$left" ] || limit=$left
    echo "== $name, $limit s at most"
    # In the foreground: in a group of its own neither Ctrl-C would reach it, nor who ends the group of this script.
    [ "$limit" -gt 0 ] && timeout --foreground -k 10 "$limit" "$@" || failed="$failed $name"
}
bench() { # name, seconds, words
    job=$1 limit=$2
    shift 2
    step "$job" "$limit" "$PYTHON" -m effnet_train.cli.bench "$job" "$@" device="$DEVICE" ${WORDS:-}
}

modes=eager own=eager
if [ "$DEVICE" = cuda ]; then
    modes=compiled own=fused,graph # reduce-overhead, which has CUDA graphs, would be compiled once more: minutes
    step tests 120 "$PYTHON" -m pytest -v -n 8 --tb=short -m 'gpu and not slow' -p no:benchmark \
        tests/models/fused tests/engine/test_graph.py
    step compile 60 "$PYTHON" benchmarks/kernels.py --variant b0 --compile "$(nproc)"
    step compile 60 "$PYTHON" benchmarks/kernels.py --variant b4 --batch 64 --compile "$(nproc)"
    step kernels 40 "$PYTHON" benchmarks/kernels.py --output "$OUT/kernels-$NAME.json"
fi
bench train 330 'models=[b0,b4]' "modes=[$modes]" "own_modes=[$own]" wait_s=$((230 * MINUTES / 8)) rounds=5 \
    seconds=0.5 output="$OUT/train-$NAME.json"
RUN=$(mktemp -d)
step training 60 "$PYTHON" -m effnet_train.cli.train recipe=demo device="$DEVICE" ${TRAINING:-epochs=5} \
    run_root="$RUN" name=digits data.root="$RUN/data"
[ ! -f "$RUN/digits/summary.json" ] || cp "$RUN/digits/summary.json" "$OUT/training-$NAME.json"
rm -rf "$RUN"
bench eval 60 'models=[b0,b4]' 'modes=[eager]' rounds=5 seconds=0.3 output="$OUT/eval-$NAME.json"
bench latency 30 'modes=[eager]' rounds=20 precision=auto output="$OUT/latency-bench-$NAME.json"
bench train 120 'models=[b6]' 'modes=[eager]' rounds=3 seconds=0.5 output="$OUT/train-large-$NAME.json"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
