#!/usr/bin/env bash
# What a GPU computes and how fast, in about four minutes on one: results/gpu.sh FOLDER
# No data and no weights are needed. Without a GPU: DEVICE=cpu results/gpu.sh FOLDER
# Not in it: VFM-VAE and MMDiT compiled,  python test_smoke.py --device cuda others
set -uo pipefail
folder=$(realpath -m "${1:?results/gpu.sh FOLDER}")
device=${DEVICE:-cuda}
cd "$(dirname "$0")/.."
mkdir -p "$folder"
python test_smoke.py --device "$device" --out "$folder" compare sampler waits compiled fake scripts 2>&1 | tee "$folder/test_gpu.log"
tests=$?
if [ "$device" = cuda ]; then
    timeout 110 python bench.py --device cuda --rounds 1 --out "$folder" 2>&1 | tee "$folder/bench.log"
else
    python bench.py --rows frechet loading --rounds 1 --out "$folder" 2>&1 | tee "$folder/bench.log"
fi
exit $tests
