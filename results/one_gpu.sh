#!/usr/bin/env bash
# The experiment in miniature with ten times its steps and images of 128 px, 64 tokens each, on one GPU, the rows side
# by side:
#     DATA=... WEIGHTS=... results/one_gpu.sh [OUT]
# DATA, WEIGHTS, and what else may be set: see results/miniature.sh. A row's log is OUT/ROW.log. Tables are printed;
# pictures end in OUT. Repeat it after a stop; a row that failed is named, and the others go on.
set -euo pipefail
export OUT=${1:-runs/one_gpu} BUDGET=${BUDGET:-1000} SIZE=${SIZE:-128} WORKERS=${WORKERS:-4} CURVES=${CURVES:-0}
cd "$(dirname "$0")/.."
: "${DATA:?see the head of results/miniature.sh}" "${WEIGHTS:?see the head of results/miniature.sh}"
mkdir -p "$OUT"
[ -f "$OUT/reference.npz" ] ||
    python results/judge.py "$DATA/train" --save-stats "$OUT/reference.npz" --size "$SIZE" --workers "$WORKERS" \
        --lite0 "$WEIGHTS/efficientnet-lite0-57934424.pth"

measure() {  # ROW...: one after the other
    for row; do
        results/miniature.sh "$row" 0 >> "$OUT/$row.log" 2>&1 ||
            { echo "error: the row $row failed; see $OUT/$row.log" >&2; return 1; }
    done
}
set -m  # a process group each: a signal to this script must reach all their processes
pids=()
trap 'for pid in "${pids[@]}"; do kill -- "-$pid" 2>/dev/null || true; done; exit 1' INT TERM HUP
for rows in "stage12 stage123" vae vavae vfmvae; do
    measure $rows &
    pids+=($!)
done
failed=0
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
python results/figures.py --results "$OUT" --runs "$OUT/seed0" --out "$OUT" || failed=1
exit $failed
