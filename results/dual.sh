#!/usr/bin/env bash
# VFM-VAE's "dual side" on the built-in shapes: does an aligned generator learn faster, too?  results/dual.sh SEED
#
# On the latents of AlignTok and of VFM-VAE (preset tiny, all stages): LightningDiT alone, with REPA, with REG; how many
# of 480 pictures without guidance the judge (results/t2i.py) calls by the shape asked for. OUT: where the runs go.
# STEPS: of the generator ("200 400 800"). TOKENIZERS: aligntok, vfmvae or both. A command that was stopped is repeated
# and goes on. Figures: OUT/seed SEED/*/*.json.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! [[ ${1-} =~ ^[0-9]+$ ]]; then echo "error: it is results/dual.sh SEED; see its head" >&2; exit 1; fi
out=${OUT:-runs/dual}
mkdir -p "$out"
[ -f "$out/judge.json" ] || python results/t2i.py judge "$out/judge.pt" --json "$out/judge.json"
for name in ${TOKENIZERS:-aligntok vfmvae}; do
    run=$out/seed$1/$name
    case $name in
        aligntok) final=$run/stage3.pt ;;
        vfmvae)   final=$run/patchgan.pt ;;
        *)        echo "error: TOKENIZERS are aligntok and vfmvae, not $name" >&2; exit 1 ;;
    esac
    [ -f "$final" ] || python train_tokenizer.py --preset tiny --model "$name" --stage all --seed "$1" --out "$run"
    for align in none repa reg; do
        flags=(--cache "$run/latents.npy")
        [ $align = none ] || flags+=(--align $align --align-encoder "$run/encoder.pt")
        for steps in ${STEPS:-200 400 800}; do
            dit=$run/$align/dit_step$(printf %08d "$steps").pt drawn=$run/$align-$steps
            [ ! -f "$drawn.json" ] || continue
            [ -f "$dit" ] || python train_dit.py --preset tiny --tokenizer "$final" --seed "$1" --steps "$steps" \
                --out "$run/$align" "${flags[@]}"
            python sample.py --preset tiny --dit "$dit" --tokenizer "$final" --seed "$1" --cfg 1 --steps 15 -n 480 \
                --batch-size 96 --out "$drawn.npz"
            python results/t2i.py classes "$out/judge.pt" "$drawn.npz" --json "$drawn.json"
        done
    done
done
