#!/usr/bin/env bash
# The README's experiment in miniature, one row of it:  DATA=... WEIGHTS=... results/miniature.sh ROW SEED
#
# ROW: stage1, stage12, stage123 (AlignTok), sp0, sp5, cosine, before (its ablations), vae, vavae (the baselines).
# DATA: the folder of Tiny ImageNet with train/ and val/. WEIGHTS: a folder with dinov2.pth, vgg16.pth, lpips_heads.pth
# and efficientnet-lite0-57934424.pth. OUT: where the runs go. A command that was stopped is repeated and goes on.
# SEED 0 of stage12, vae and vavae also measures the curves: reconstruction, probe and FD against training steps.
set -euo pipefail
row=$1 seed=$2
cd "$(dirname "$0")/.."
out=${OUT:-runs/miniature}/seed$seed
runs=$out/$row
mkdir -p "$runs"

flags=(--preset tiny --data "$DATA/train" --val "$DATA/val" --vgg16 "$WEIGHTS/vgg16.pth" --seed "$seed"
       --lpips-heads "$WEIGHTS/lpips_heads.pth" --batch-size 32 --disc-start 400 --val-images 2000)
encoder=(--encoder "$WEIGHTS/dinov2.pth")
judge=(--features lite0 --lite0 "$WEIGHTS/efficientnet-lite0-57934424.pth" --workers 0)

# ---- the tokenizer: 250 + 400 + 150 steps, or 800 from scratch; validated on the way where there is a curve
train() {  # FINAL FLAGS...: --steps and the rest; keeps the validation's figures
    python train_tokenizer.py "${flags[@]}" "${@:3}" --steps "$2"
    python -c 'import json, sys, torch; c = torch.load(sys.argv[1], weights_only=True)
json.dump(c["validation"] | {"step": c["total_steps"]}, open(sys.argv[2], "w"))' "$1" "$runs/tokenizer$2.json"
}
curve() {  # FINAL STEPS FLAGS...
    if [ "$seed" = 0 ]; then
        for part in 1 2 3; do
            [ -f "$runs/tokenizer$(($2 * part / 4)).json" ] || train "$1" $(($2 * part / 4)) "${@:3}" --probe-images 4000
        done
    fi
    train "$1" "$2" "${@:3}" --probe-images 20000
}
stage1() { python train_tokenizer.py "${flags[@]}" "${encoder[@]}" --stage 1 --steps 250 --lr 5e-4 \
               --probe-images 20000 --out "$out/aligntok"; }
stage2=(400 --stage 2 --lr 1e-4)
case $row in
    stage1)   final=$out/aligntok/stage1.pt
              train "$final" 250 "${encoder[@]}" --stage 1 --lr 5e-4 --out "$out/aligntok" ;;
    stage12)  stage1; final=$out/aligntok/stage2.pt; curve "$final" "${stage2[@]}" --out "$out/aligntok" ;;
    stage123) final=$out/aligntok/stage3.pt; train "$final" 150 --stage 3 --lr 2e-4 --out "$out/aligntok" ;;
    vae)      final=$runs/vae.pt; curve "$final" 800 --model vae --lr 1e-3 --out "$runs" ;;
    vavae)    final=$runs/vavae.pt; curve "$final" 800 --model vavae "${encoder[@]}" --lr 5e-4 --out "$runs" ;;
    *)        case $row in
                  sp0) extra=(--w-sp 0) ;;  sp5) extra=(--w-sp 5) ;;
                  cosine) extra=(--sp-loss cosine) ;;  before) extra=(--sp-at encoder) ;;
                  *) echo "no such row: $row" >&2; exit 1 ;;
              esac
              stage1; final=$runs/stage2.pt
              train "$final" "${stage2[@]}" "${extra[@]}" --init "$out/aligntok/stage1.pt" --out "$runs" ;;
esac
[ -f "$runs/recon.json" ] ||
    python fid.py --recon "$final" "$DATA/val" "${judge[@]}" --metrics rfid --json "$runs/recon.json"

# ---- the generator, the same for all; stage 3 decodes stage 2's
dit=$runs/dit
if [ "$row" = stage123 ]; then dit=$out/stage12/dit; fi
reference=${OUT:-runs/miniature}/reference.npz
[ -f "$reference" ] || python fid.py "$DATA/train" --save-stats "$reference" --size 64 "${judge[@]}"
if [ ! -f "$runs/ceiling.json" ]; then  # the decoder's own: every fourth training image, reconstructed
    python -c 'import sys, numpy as np, torch, train_tokenizer as tt
from model import Tokenizer
view, tokenizer = tt.View(tt.Folder(sys.argv[2]), 64), Tokenizer.load(sys.argv[1])
order = [[(0, i) for i in range(first, first + 400, 4)] for first in range(0, len(view.data), 400)]
loader = tt.batches(view, order, 0, torch.device("cpu"))
with torch.no_grad():
    rows = [tt.to_uint8(tokenizer.decode(tokenizer.encode(x))) for x, _ in loader]
np.savez(sys.argv[3], np.concatenate(rows))' "$final" "$DATA/train" "$runs/ceiling.npz"
    python fid.py "$reference" "$runs/ceiling.npz" "${judge[@]}" --metrics fid --json "$runs/ceiling.json"
    rm -f "$runs/ceiling.npz"
fi
fd() {  # NAME GENERATOR_STEPS IMAGES CFG SAMPLING_STEPS: Frechet distance of samples to the training images
    [ -f "$runs/$1.json" ] && return
    python sample.py --preset tiny --dit "$dit/dit_step$(printf %08d "$2").pt" --tokenizer "$final" -n "$3" --cfg "$4" \
        --steps "$5" --seed "$seed" --out "$runs/$1.npz" --batch-size 250
    python fid.py "$reference" "$runs/$1.npz" "${judge[@]}" --metrics fid --json "$runs/$1.json"
    [ "$1" = guided ] || [ "$1" = plain ] || rm -f "$runs/$1.npz"*
}
for steps in 800 1600 2400; do
    if [ "$row" != stage123 ] && [ ! -f "$dit/done$steps" ]; then
        python train_dit.py --preset tiny --data "$DATA/train" --val "$DATA/val" --tokenizer "$final" --seed "$seed" \
            --steps $steps --save-every 800 --grid-every 800 --out "$dit"
        case $seed$row$steps in 0stage12800|0stage121600|0v*ae800|0v*ae1600) fd "plain$steps" $steps 5000 1 20 ;; esac
        touch "$dit/done$steps"
    fi
done
fd plain 2400 5000 1 20
for cfg in 1.5 2 3; do fd "cfg$cfg" 2400 1000 "$cfg" 20; done
best=$(python -c 'import json, sys
print(min(sys.argv[2:], key=lambda c: json.load(open(f"{sys.argv[1]}/cfg{c}.json"))["figures"][0]["value"]))' "$runs" 1.5 2 3)
echo "$best" > "$runs/best_cfg"
fd guided 2400 5000 "$best" 20
if [ "$seed$row" = 0stage12 ]; then
    for steps in 5 10 50; do fd "steps$steps" 2400 5000 1 $steps; done
fi
