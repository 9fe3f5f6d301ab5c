#!/usr/bin/env bash
# Text to image on the built-in shapes, AlignTok beside the VAE:  results/t2i.sh SEED
#
# Of each tokenizer: the same generator from text, with as many steps; 500 pictures of combinations
# that it has never seen, without and with guidance; what the judge (results/t2i.py) calls them.
# The VAE has as many steps as AlignTok's stages together. OUT: where the runs go. TOKENIZERS: aligntok, vae or
# both. A command that was stopped is repeated and goes on. All figures: OUT/seedSEED/NAME/*.json.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! [[ ${1-} =~ ^[0-9]+$ ]]; then echo "error: it is results/t2i.sh SEED" >&2; exit 1; fi
out=${OUT:-runs/t2i}
[ -f "$out/data/prompts.txt" ] || python results/t2i.py data "$out/data"
[ -f "$out/judge.json" ] || python results/t2i.py judge "$out/judge.pt" --json "$out/judge.json"
for name in ${TOKENIZERS:-aligntok vae}; do
    run=$out/seed$1/$name
    case $name in aligntok) final=$run/stage3.pt ;; vae) final=$run/vae.pt ;; esac
    [ -f "$final" ] || python train_tokenizer.py --preset tiny --model "$name" --seed "$1" --out "$run"
    [ -f "$run/recon.json" ] || python results/t2i.py recon "$out/judge.pt" "$final" --json "$run/recon.json"
    for steps in 400 800; do
        [ -f "$run/cfg3-$steps.json" ] && continue
        python train_dit.py --preset tiny --captions --data "$out/data" --tokenizer "$final" --seed "$1" \
            --steps $steps --out "$run/dit"
        for cfg in 1 3; do
            python sample.py --preset tiny --dit "$run/dit/dit_step00000$steps.pt" --tokenizer "$final" --seed "$1" \
                --prompts "$out/data/prompts.txt" --cfg $cfg --batch-size 100 --out "$run/cfg$cfg-$steps.npz"
            python results/t2i.py score "$out/judge.pt" "$run/cfg$cfg-$steps.npz" "$out/data/prompts.txt" \
                --json "$run/cfg$cfg-$steps.json"
        done
    done
done
