#!/usr/bin/env bash
# The README's experiment in miniature, one row of it:  DATA=... WEIGHTS=... results/miniature.sh ROW SEED
#
# ROW: stage1, stage12, stage123 (AlignTok), sp0, sp5, cosine, before (its ablations), vae, vavae (the baselines),
# margins0 (VA-VAE with a VF loss without margins), wvf1 (the same with ten times its weight), aligntok4800, vae4800,
# vavae4800, wvf4800 (three times as long).
# DATA: the folder of Tiny ImageNet with train/ and val/. WEIGHTS: a folder with dinov2.pth, vgg16.pth, lpips_heads.pth
# and efficientnet-lite0-57934424.pth. OUT: where the runs go. A command that was stopped is repeated and goes on.
# BUDGET: the steps of all trainings, in per cent; SIZE: of the images, in px; WORKERS: of the loader
# (results/one_gpu.sh sets them). Steps below, and in the names of files, are those of BUDGET 100.
# SEED 0 of stage12, vae and vavae also measures the curves: figures against training steps and sampling steps.
# All figures of a row end in OUT/seed SEED/ROW.json; results/ holds those of the README.
set -euo pipefail
row=${1-} seed=${2-}
cd "$(dirname "$0")/.."
case $row in
    stage1 | stage12 | stage123 | sp0 | sp5 | cosine | before | vae | vavae) ;;
    margins0 | wvf1 | aligntok4800 | vae4800 | vavae4800 | wvf4800) ;;
    *) echo "error: no such row: '$row'; the head of results/miniature.sh lists them" >&2; exit 1 ;;
esac
if ! [[ $seed =~ ^[0-9]+$ && -d ${DATA-} && -d ${WEIGHTS-} ]]; then
    echo "error: it is DATA=FOLDER WEIGHTS=FOLDER results/miniature.sh ROW SEED; see its head" >&2; exit 1
fi
size=${SIZE:-64}
n() { echo $(($1 * ${BUDGET:-100} / 100)); }
out=${OUT:-runs/miniature}/seed$seed
runs=$out/$row
mkdir -p "$runs"

lite0=(--lite0 "$WEIGHTS/efficientnet-lite0-57934424.pth" --workers "${WORKERS:-0}")
flags=(--preset tiny --data "$DATA/train" --val "$DATA/val" --vgg16 "$WEIGHTS/vgg16.pth" --seed "$seed" --size "$size"
       --lpips-heads "$WEIGHTS/lpips_heads.pth" --decoder small --batch-size 16 --disc-start "$(n 800)" --lr 1e-3
       --workers "${WORKERS:-0}")
encoder=(--encoder "$WEIGHTS/dinov2.pth")
stage1=("${encoder[@]}" --stage 1 --out "$out/aligntok")
stage2=(--stage 2 --encoder-lr 1e-4)
final_figures=(--val-images 1000 --probe-images 8000)

# ---- the tokenizer: 400 + 800 + 400 steps of 16 images, or 1600 from scratch
train() {  # FINAL STEPS FLAGS...: trains up to STEPS and keeps the validation's figures
    if [ ! -f "$runs/tokenizer$2.json" ]; then
        python train_tokenizer.py "${flags[@]}" "${@:3}" --steps "$(n "$2")"
        python -c 'import json, sys, torch; c = torch.load(sys.argv[1], weights_only=True)
json.dump(c["validation"] | {"step": c["total_steps"]}, open(sys.argv[2], "w"))' "$1" "$runs/tokenizer$2.json"
    fi
}
curve() {  # FINAL STEPS PARTS FLAGS...: for seed 0 with figures on fewer images on the way
    if [ "$seed" = 0 ]; then
        for ((part = 1; part < $3; part++)); do
            train "$1" $(($2 * part / $3)) "${@:4}" --val-images 500 --probe-images 2000
        done
    fi
    train "$1" "$2" "${@:4}" "${final_figures[@]}"
}
case $row in
    v*ae* | margins0 | wvf* | stage123 | aligntok4800) ;;
    *) python train_tokenizer.py "${flags[@]}" "${stage1[@]}" --steps "$(n 400)" "${final_figures[@]}" ;;  # once
esac
case $row in
    stage1)   final=$out/aligntok/stage1.pt; train "$final" 400 "${stage1[@]}" ;;
    stage12)  final=$out/aligntok/stage2.pt; curve "$final" 800 2 "${stage2[@]}" --out "$out/aligntok" ;;
    stage123) results/miniature.sh stage12 "$seed"  # whose generator it decodes
              final=$out/aligntok/stage3.pt; train "$final" 400 --stage 3 --out "$out/aligntok" "${final_figures[@]}" ;;
    vae)      final=$runs/vae.pt; curve "$final" 1600 4 --model vae --out "$runs" ;;
    vavae)    final=$runs/vavae.pt; curve "$final" 1600 4 --model vavae "${encoder[@]}" --out "$runs" ;;
    aligntok4800)
              python train_tokenizer.py "${flags[@]}" "${stage1[@]}" --steps "$(n 1200)" --out "$runs"
              python train_tokenizer.py "${flags[@]}" "${stage2[@]}" --steps "$(n 2400)" --out "$runs"
              final=$runs/stage3.pt; train "$final" 1200 --stage 3 --out "$runs" "${final_figures[@]}" ;;
    vae4800)  final=$runs/vae.pt; train "$final" 4800 --model vae --out "$runs" "${final_figures[@]}" ;;
    vavae4800) final=$runs/vavae.pt
              train "$final" 4800 --model vavae "${encoder[@]}" --out "$runs" "${final_figures[@]}" ;;
    margins0 | wvf1 | wvf4800)
              final=$runs/vavae.pt; steps=1600 w_vf=1
              case $row in margins0) w_vf=0.1 ;; wvf4800) steps=4800 ;; esac
              train "$final" $steps --model vavae "${encoder[@]}" --vf-margins 0 0 --w-vf $w_vf --out "$runs" \
                  "${final_figures[@]}" ;;
    *)        case $row in
                  sp0) extra=(--w-sp 0) ;;  sp5) extra=(--w-sp 5) ;;
                  cosine) extra=(--sp-loss cosine) ;;  before) extra=(--sp-at encoder) ;;
              esac
              final=$runs/stage2.pt
              train "$final" 800 "${stage2[@]}" "${extra[@]}" --init "$out/aligntok/stage1.pt" --out "$runs" \
                  "${final_figures[@]}" ;;
esac

# ---- Frechet distances: of the held-out images' reconstructions; and to the training images, of reconstructions of
# every fourth of them: what a perfect generator of these latents would reach
[ -f "$runs/recon.json" ] ||
    python results/judge.py --recon "$final" "$DATA/val" "${lite0[@]}" --metrics rfid,psnr,ssim --json "$runs/recon.json"
reference=${OUT:-runs/miniature}/reference.npz
[ -f "$reference" ] ||
    python results/judge.py "$DATA/train" --save-stats "$reference" --size "$size" "${lite0[@]}"
if [ ! -f "$runs/ceiling.json" ]; then
    python -c 'import sys, numpy as np, torch
from baselines import VAE
from data import Crops, ImageFolder, batches, to_uint8
from files import load_tokenizer
data, tokenizer = ImageFolder(sys.argv[2]), load_tokenizer(sys.argv[1], VAE)
order = [[(0, i) for i in range(first, first + 400, 4)] for first in range(0, len(data), 400)]
loader = batches(Crops(data, int(sys.argv[4])), order, 0, torch.device("cpu"))
with torch.no_grad():
    rows = [to_uint8(tokenizer.decode(tokenizer.encode(x))) for x, _ in loader]
np.savez(sys.argv[3], np.concatenate(rows))' "$final" "$DATA/train" "$runs/ceiling.npz" "$size"
    python results/judge.py "$runs/ceiling.npz" --save-stats "$runs/own.npz" "${lite0[@]}"
    python results/judge.py "$reference" "$runs/ceiling.npz" "${lite0[@]}" --metrics fid \
        --json "$runs/ceiling.json"
    rm -f "$runs/ceiling.npz"
fi

# ---- the generator, the same for all; stage 3 decodes stage 2's
dit=$runs/dit
if [ "$row" = stage123 ]; then dit=$out/stage12/dit; fi
fd() {  # NAME GENERATOR_STEPS IMAGES CFG SAMPLING_STEPS: distance of samples to the training images, and to `own`
    [ -f "$runs/$1.json" ] && return
    python sample.py --preset tiny --dit "$dit/dit_step$(printf %08d "$(n "$2")").pt" --tokenizer "$final" -n "$3" --cfg "$4" \
        --steps "$5" --seed "$seed" --out "$runs/$1.npz" --batch-size 250
    case $1 in
        plain*) python results/judge.py "$runs/own.npz" "$runs/$1.npz" "${lite0[@]}" --metrics fid \
                    --json "$runs/own_$1.json" ;;
    esac
    python results/judge.py "$reference" "$runs/$1.npz" "${lite0[@]}" --metrics fid --json "$runs/$1.json"
    [ "$1" = guided ] || [ "$1" = plain ] || rm -f "$runs/$1.npz"*
}
for steps in 400 800 1600; do
    if [ "$row" != stage123 ] && [ ! -f "$dit/done$steps" ]; then
        python train_dit.py --preset tiny --data "$DATA/train" --val "$DATA/val" --tokenizer "$final" --seed "$seed" \
            --steps "$(n $steps)" --save-every "$(n 400)" --grid-every "$(n 400)" --workers "${WORKERS:-0}" --out "$dit"
        case $seed$row$steps in 0stage12400|0stage12800|0v*ae400|0v*ae800) fd "plain$steps" $steps 5000 1 20 ;; esac
        touch "$dit/done$steps"
    fi
done
fd plain 1600 5000 1 20
best=2
fd cfg2 1600 1000 2 20
for cfg in 4 8 16 32; do  # the scale is doubled as long as that helps
    fd "cfg$cfg" 1600 1000 "$cfg" 20
    python -c 'import json, sys
new, best = (json.load(open(f"{sys.argv[1]}/cfg{c}.json"))["figures"][0]["value"] for c in sys.argv[2:])
sys.exit(new >= best)' "$runs" "$cfg" "$best" || break
    best=$cfg
done
fd guided 1600 5000 "$best" 20
if [ "$seed$row" = 0stage12 ]; then
    for steps in 5 10 50; do fd "steps$steps" 1600 5000 1 $steps; done
fi

python -c 'import json, sys; from pathlib import Path
runs, best, row = Path(sys.argv[1]), sys.argv[2], {}
for path in sorted(runs.glob("*.json")):
    content = json.loads(path.read_text())
    row[path.stem] = content if "figures" not in content else {f["metric"]: f["value"] for f in content["figures"]}
(runs.parent / f"{runs.name}.json").write_text(json.dumps(row | {"best_cfg": float(best)}, indent=1))' "$runs" "$best"
