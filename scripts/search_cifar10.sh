#!/bin/bash
# The study of docs/reproduce.md: three searchers on a narrow space at equal numbers of trials, two seeds each.
#   scripts/search_cifar10.sh [RUN_ROOT [JOBS at once [TRIALS [words for the data set]]]]
# Those are data=cifar10 if none are given, which downloads it. A trial sees 10,000 training images once and is scored on
# 5,000 others. Interrupted however, the same command goes on; a greater number of trials does, too.
set -euo pipefail
root=${1:-runs/search} jobs=${2:-1} trials=${3:-50} data=("${@:4}")
[[ $# -gt 3 ]] || data=(data=cifar10)
common=(space=small model.resolution=32 model.activation=swish reward.target=1e6 round=10 "trials=$trials" "jobs=$jobs"
    data.minival=5000 epochs=0.222 schedule.warmup_epochs=0.03 evaluate_every.epochs=0.222 augment=none augment.flip=0.5
    device=cpu threads=1 workers=0 run_root="$root")
searches=()
for seed in 0 1; do
    for searcher in random ppo evolution; do
        own=(searcher="$searcher")
        case $searcher in # for so few trials; chosen on random rewards with noise, not on these
            evolution) own+=(searcher.population=20 searcher.sample=5) ;;
            ppo) own+=(searcher.lr=0.02 searcher.entropy=0.1) ;;
        esac
        effnet-search run "${common[@]}" "${data[@]}" "${own[@]}" "seed=$seed" "name=$searcher-seed$seed"
        searches+=("$root/$searcher-seed$seed")
    done
done
effnet-search report "search=[$(IFS=,; echo "${searches[*]}")]" output="$root/report"
