#!/bin/sh
# All that docs/performance.md tells of a CPU, measured in about 12 minutes: sh benchmarks/cpu.sh [NAME]
# The machine should do nothing else. NAME ends the files' names in benchmarks/results; WORDS are given to every job.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
NAME=${1:-epyc-2cpu}
OUT=${OUT:-benchmarks/results}
export PYTHONPATH=$PWD
bench() { "$PYTHON" -m effnet_train.cli.bench "$@" ${WORDS:-}; }

"$PYTHON" -m effnet_train.cli.bench startup output="$OUT/startup-$NAME.json"
bench train device=cpu 'models=[b0,b4]' output="$OUT/train-$NAME.json"
bench eval device=cpu 'models=[b0,b4]' output="$OUT/eval-$NAME.json"
bench latency 'modes=[eager,compiled]' output="$OUT/latency-bench-$NAME.json"
"$PYTHON" benchmarks/cpu_ways.py --output "$OUT/cpu_ways-$NAME.json" ${CPU_WAYS:-}
"$PYTHON" benchmarks/all_reduce.py --output "$OUT/all_reduce-$NAME.json" ${ALL_REDUCE:-}
