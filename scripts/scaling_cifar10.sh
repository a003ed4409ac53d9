#!/bin/bash
# The study of docs/reproduce.md: nano at 16 pixels, and what 1.8 times its multiply-adds buy in each dimension.
#   scripts/scaling_cifar10.sh [RUN_ROOT [JOBS at once [words for the data set]]]
# Those are data=cifar10 if none are given, which downloads it; or data=folder data.root=/path preprocess@data.preprocess=small.
# Interrupted however, the same command goes on. The factors are the law's: effnet-scale apply, see there.
set -euo pipefail
root=${1:-runs/scaling} jobs=${2:-1} data=("${@:3}")
[[ $# -gt 2 ]] || data=(data=cifar10)
common=(model=nano recipe=search_proxy "${data[@]}" augment=none augment.flip=0.5 epochs=2 schedule.warmup_epochs=0.2
    evaluate_every.epochs=2 device=cpu threads=1 workers=0 run_root="$root" loggers.progress=null)
points() {
    echo "baseline   model.resolution=16"
    echo "depth      model.resolution=16 model.depth=1.0"
    echo "width      model.resolution=16 model.width=0.68"
    echo "resolution model.resolution=32"
    echo "compound   model.resolution=18 model.depth=0.3327 model.width=0.5624"
}
smaller() { # less exact budgets, for curves
    echo "depth-small      model.resolution=16 model.depth=0.6"
    echo "width-small      model.resolution=16 model.width=0.57"
    echo "resolution-small model.resolution=20"
}
list() { # of points on standard input
    while read -r name overrides; do echo "name=$name-seed$1 seed=$1 $overrides"; done
}
for set in points smaller; do
    for seed in 0 1 2; do "$set" | list "$seed"; done
done | xargs -P "$jobs" -L 1 effnet-train "${common[@]}"
