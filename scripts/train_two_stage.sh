#!/usr/bin/env bash
# The recipe: Stage 1 through Lighthouse, Stage 2 dense from Stage 1's last checkpoint, and a report.
#
#   scripts/train_two_stage.sh CONFIG.toml OUTPUT_FOLDER [--section.setting value ...]
#
# Settings after the folder go to Stage 1 and Stage 2 takes them over. The lengths are the config's: Stage 1 runs
# training.steps, both stages together lr_scheduler.total_steps. Run the same command again after an interruption: what
# is finished is skipped, what is not goes on from its last checkpoint.
#
#   NPROC=8          processes on this node (default: one per GPU, or one on CPU)
#   DENSE_STEPS=N    also train the same model dense for N steps, to compare with
#   MINUTES="1 1 2"  how long the phases take, where that is known: said at their beginning

set -euo pipefail

if [[ $# -lt 2 || $1 == -* ]]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 2
fi
config=$1 output=$2
shift 2

nproc=${NPROC:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
train=(python -m torch.distributed.run --standalone "--nproc_per_node=$nproc"
    -m torchtitan.experiments.lighthouse.train --job.config_file "$config")
scripts=$(dirname "$0")
read -ra minutes <<<"${MINUTES:-}"
phase=0 phases=$((${DENSE_STEPS:+1} + 2))

# What comes, and how long it takes.
announce() {
    local takes=${minutes[phase]:-}
    phase=$((phase + 1))
    echo
    echo "=== $phase of $phases: $1; ${takes:+about $takes min, }every line of a step says how much time is left ==="
}

announce "Stage 1, training through Lighthouse"
"${train[@]}" --job.dump_folder "$output/stage1" "$@"

announce "Stage 2, the same weights trained on with dense attention"
python "$scripts/resume_dense.py" "$output/stage1" --dump-folder "$output/stage2"

runs=("$output/stage1" "$output/stage2")
if [[ -n ${DENSE_STEPS:-} ]]; then
    announce "for comparison, the same model dense from its first step"
    "${train[@]}" --job.dump_folder "$output/dense" "$@" --lighthouse.no-enable --training.steps "$DENSE_STEPS"
    runs+=("$output/dense")
fi

echo
echo "=== The report, from $output/*/metrics.jsonl ==="
python "$scripts/report.py" "${runs[@]}" --output "$output"
