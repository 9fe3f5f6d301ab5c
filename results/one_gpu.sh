#!/usr/bin/env bash
# The experiment in miniature with ten times its steps and images of 128 px, 64 tokens each, on one GPU:
#     DATA=... WEIGHTS=... results/one_gpu.sh [OUT]
# DATA, WEIGHTS: see results/miniature.sh. Tables are printed; pictures end in OUT. Repeat it after a stop.
set -euo pipefail
export OUT=${1:-runs/one_gpu} BUDGET=${BUDGET:-1000} SIZE=${SIZE:-128} WORKERS=${WORKERS:-8}
cd "$(dirname "$0")/.."
for row in stage12 stage123 vae vavae; do
    results/miniature.sh $row 0
done
python results/figures.py --results "$OUT" --runs "$OUT/seed0" --out "$OUT"
