#!/bin/bash
# The studies of docs/recipes.md on CIFAR-10: finetune, fixres, progressive or soup, over SEEDS="0 1 2".
#   scripts/recipes_cifar10.sh STUDY [RUN_ROOT [words for the data set]]
# Those are data=cifar10 if none are given, which downloads it; of other kinds with preprocess@data.preprocess=small. finetune and
# progressive want LITE0=/path/efficientnet-lite0-57934424.pth. Interrupted however, the same command goes on.
set -euo pipefail
study=$1 root=${2:-runs/recipes} data=("${@:3}")
[[ $# -gt 2 ]] || data=(data=cifar10)
common=(device=cpu threads=1 workers=1 loggers.progress=null run_root="$root" "${data[@]}")
short=(model=nano recipe=search_proxy augment=inception "augment.area=[0.25,1]" epochs=4 evaluate_every.epochs=4)
mkdir -p "$root"
train() { # name, overrides
    local start=$SECONDS
    effnet-train "${common[@]}" name="$1" "${@:2}"
    echo "$1: $((SECONDS - start)) s, of this start"
}
score() { effnet-eval checkpoint="$root/$1" output="$root/$1.json" device=cpu "${@:2}"; } # name, overrides

# Lite0's published weights, fine-tuned at 64 pixels on a fifth of the images, each seen once.
lite=(model=lite0 model.resolution=64 epochs=0.2 batch_size=64 evaluate_every.epochs=0.2)
lite+=("data.preprocess.mean=[0.498039,0.498039,0.498039]" "data.preprocess.std=[0.501961,0.501961,0.501961]")
lite+=(recipe=finetune schedule=cosine schedule.warmup_epochs=0.02 augment=small ema_decay=0.99 model.bn_momentum=0.1)
tuned() { train "tuned-seed$1" "${lite[@]}" seed="$1" init_from="$LITE0"; }
finetune() { # beside the same network from scratch, for as many steps
    tuned "$1"
    train "scratch-seed$1" "${lite[@]}" seed="$1" new_classifier=false schedule.lr_per_256=0.016
}
fixres() { # trained at 24 pixels, tested at more, adapted to more
    train "small-seed$1" "${short[@]}" seed="$1" model.resolution=24
    score "small-seed$1" "resolution=[20,24,28,32,36,40]" picture="$root/small-seed$1.png"
    for size in 28 32 36; do
        train "fixres-$size-seed$1" model=nano recipe=fixres model.resolution=$size seed="$1" init_from="$root/small-seed$1"
        score "fixres-$size-seed$1"
    done
}
progressive() { # beside 48, 56 and 64 pixels
    tuned "$1"
    train "growing-seed$1" "${lite[@]}" seed="$1" init_from="$LITE0" progressive.stages=3 progressive.resolution=48
}
soup() { # one training fine-tuned at four rates, then averaged; 5,000 images choose
    local held=("${short[@]}" model.resolution=32 data.minival=5000) members=()
    train "base-seed$1" "${held[@]}" seed="$1"
    for rate in 0.002 0.004 0.006 0.008; do
        train "member-$rate-seed$1" "${held[@]}" seed="$1" schedule.lr_per_256=$rate epochs=2 init_from="$root/base-seed$1"
        members+=("$root/member-$rate-seed$1")
        score "member-$rate-seed$1"
    done
    for kind in uniform greedy; do
        effnet-export "average=[$(IFS=,; echo "${members[*]}")]" soup=$kind batch_norm=8192 format=effnet_train \
            output="$root/$kind-seed$1.safetensors"
        score "$kind-seed$1.safetensors"
    done
}
case $study in
    finetune | fixres | progressive | soup) for seed in ${SEEDS:-0 1 2}; do "$study" "$seed"; done ;;
    *) echo "STUDY=$study must be finetune, fixres, progressive or soup" >&2; exit 2 ;;
esac
