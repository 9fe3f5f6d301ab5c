#!/usr/bin/env bash
# What a GPU computes and how fast, in four minutes on one: results/gpu.sh FOLDER
# No data and no weights are needed. Without a GPU: DEVICE=cpu results/gpu.sh FOLDER
# The checks of test_gpu.py run side by side, as they are not timed; beside them bench.py compiles its largest rows, two
# at a time, as the card's memory allows. Then bench.py measures, alone, as far as it comes in 110 s (BENCH_SECONDS),
# and names the rows that it did not reach.
# Not in it, as their compilation takes minutes more:  python test_smoke.py --device cuda compiled
set -uo pipefail
folder=$(realpath -m "${1:?results/gpu.sh FOLDER}")
device=${DEVICE:-cuda}
if [ "$device" = cuda ]; then threads=4 seconds=130; else threads=1 seconds=900; fi
cd "$(dirname "$0")/.."
mkdir -p "$folder"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
failed=0 pids=() warm=()
trap 'kill "${pids[@]}" "${warm[@]}" 2>/dev/null; exit 1' INT TERM HUP
for checks in "compare sampler waits fake" scripts compiled-{lightningdit,mmdit}; do
    # shellcheck disable=SC2086  # words
    python test_smoke.py --device "$device" --out "$folder" --seconds "$seconds" $checks > "$folder/${checks%% *}.log" 2>&1 &
    pids+=($!)
done
if [ "$device" = cuda ]; then
    : > "$folder/compile.log"
    for rows in "xl 64:vit-l 3" "vit-l 2:vit-l 1"; do
        timeout 100 python bench.py --device cuda --compile-only --rows "${rows%:*}" "${rows#*:}" \
            >> "$folder/compile.log" 2>&1 &
        warm+=($!)
    done
fi
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
for pid in "${warm[@]}"; do wait "$pid" || true; done  # what is not compiled is compiled later
grep -hE '^(PASS|FAIL|SKIP) ' "$folder"/{compare,scripts,compiled-*}.log
echo "checks: ${SECONDS} s"
if [ "$device" = cuda ]; then
    began=$SECONDS limit=${BENCH_SECONDS:-110}
    timeout -s INT -k 9 "$limit" python bench.py --device cuda --rounds 1 --out "$folder" 2>&1 | tee "$folder/bench.log"
else
    python bench.py --rows frechet loading --rounds 1 --out "$folder" 2>&1 | tee "$folder/bench.log"
fi
status=${PIPESTATUS[0]}
case $status in  # 124: its time was over, as with 137, unless something else killed it
    0 | 124) ;; 137) [ $((SECONDS - ${began:-SECONDS})) -ge "${limit:-1}" ] || failed=1 ;; *) failed=1 ;;
esac
if grep -q Traceback "$folder/bench.log"; then failed=1; fi
echo "all: ${SECONDS} s"
exit $failed
