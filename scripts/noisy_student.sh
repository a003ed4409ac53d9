#!/bin/bash
# Noisy Student (Xie et al., arXiv 1911.04252): a teacher labels, a student learns from that, and is the next round's teacher.
#   scripts/noisy_student.sh TEACHER UNLABELLED FOLDER "MODEL of each round" PER_CLASS [words for effnet-train]
#   scripts/noisy_student.sh runs/b7-imagenet-efficientnet-seed0 /images runs/noisy "b7 b7 b7" 130000 data=imagenet data.root=/path
# UNLABELLED is a folder of images. Interrupted however, the same command goes on.
set -euo pipefail
[[ $# -ge 5 ]] || { sed -n 2,5p "$0" >&2; exit 2; }
teacher=$1 unlabelled=$2 folder=$3 models=$4 per_class=$5 round=0
shift 5
mkdir -p "$folder"
labelled() { # by this teacher, so many of a class: else effnet-label chooses anew, or refuses another teacher
    grep -qsF "\"teacher\": \"$teacher\"," "$1" && grep -qsF "\"per_class\": $per_class," "$1"
}
for model in $models; do
    round=$((round + 1))
    labels=$folder/labels-$round run=round-$round-$model
    labelled "$labels/manifest.json" ||
        effnet-label checkpoint="$teacher" data.root="$unlabelled" output="$labels" per_class="$per_class"
    effnet-train recipe=noisy_student model="$model" pseudo.labels="$labels" run_root="$folder" name="$run" "$@"
    teacher=$folder/$run
done
echo "the last student: $teacher"
