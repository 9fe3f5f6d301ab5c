#!/usr/bin/env bash
# The experiment in miniature with ten times its steps and images of 128 px, 64 tokens each, on one GPU, the rows side
# by side:
#     DATA=... WEIGHTS=... results/one_gpu.sh [OUT]
# The miniature as it was on a CPU, with the rows that are not measured there:
#     BUDGET=100 SIZE=64 WORKERS=0 SEEDS="0 1" ROWS=all DATA=... WEIGHTS=... results/one_gpu.sh [OUT]
# DATA, WEIGHTS, and what else may be set: see results/miniature.sh. A row's log is OUT/log/ROW-SEED (that of stage12 after
# its tokenizer: stage123-SEED). Tables are printed; pictures end in OUT. Repeat it after a stop; a row that failed is
# named, and the others go on.
# These networks are small: a step is thousands of kernels of microseconds. Under NVIDIA's MPS (nvidia-cuda-mps-control
# -d) the kernels of several processes run at the same time; without it they take turns.
set -euo pipefail
export BUDGET=${BUDGET:-1000} SIZE=${SIZE:-128} WORKERS=${WORKERS:-4} CURVES=${CURVES:-0}
export OUT=${1:-runs/one_gpu-$SIZE-$BUDGET} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cd "$(dirname "$0")/.."
: "${DATA:?see the head of results/miniature.sh}" "${WEIGHTS:?see the head of results/miniature.sh}"
case ${ROWS:-main} in  # a line: a tokenizer, then the rows that need it; stage123 runs stage12 first
    main) lines=("stage12 stage123" "vae vae" "vavae vavae" "vfmvae vfmvae") ;;
    all) lines=("stage12 stage123 lora repa12 reg12 text12" "vae vae textvae" "vavae vavae textvavae"
                "vfmvae vfmvae repavfm regvfm") ;;
    *) echo "error: ROWS is main or all, not '$ROWS'" >&2; exit 1 ;;
esac
mkdir -p "$OUT/log"

row() {  # ROW SEED [tokenizer]
    results/miniature.sh "$@" >> "$OUT/log/$1-$2" 2>&1 ||
        { echo "error: the row $1 of seed $2 failed; see $OUT/log/$1-$2" >&2; return 1; }
}
all_of() {  # PID...: waits for them, and fails if one did
    local failed=0
    for pid; do wait "$pid" || failed=1; done
    return $failed
}
line() {  # SEED TOKENIZER ROW...
    local pids=()
    row "$2" "$1" tokenizer || return 1
    while kill -0 "$reference" 2> /dev/null; do sleep 1; done
    [ -f "$OUT/reference.npz" ] || return 1
    for name in "${@:3}"; do
        row "$name" "$1" &
        pids+=($!)
    done
    all_of "${pids[@]}"
}
set -m  # a process group each: a signal to this script must reach all their processes
pids=()
trap 'for pid in "${pids[@]}"; do kill -- "-$pid" 2>/dev/null || true; done; wait; exit 1' INT TERM HUP
{ [ -f "$OUT/reference.npz" ] ||
    python results/judge.py "$DATA/train" --save-stats "$OUT/reference.npz" --size "$SIZE" --workers "$WORKERS" \
        --lite0 "$WEIGHTS/efficientnet-lite0-57934424.pth" > "$OUT/log/reference" 2>&1 ||
    { echo "error: no statistics of the training images; see $OUT/log/reference" >&2; exit 1; }; } &
reference=$!
pids+=($reference)
read -ra seeds <<< "${SEEDS:-0}"
for seed in "${seeds[@]}"; do
    for names in "${lines[@]}"; do
        # shellcheck disable=SC2086  # names
        line "$seed" $names &
        pids+=($!)
    done
done
failed=0
all_of "${pids[@]}" || failed=1
python results/figures.py --results "$OUT" --runs "$OUT/seed${seeds[0]}" --out "$OUT" || failed=1
exit $failed
