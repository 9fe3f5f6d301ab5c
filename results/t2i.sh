#!/usr/bin/env bash
# Text to image on the built-in shapes, AlignTok beside VAE and VA-VAE:  results/t2i.sh SEED
#
# These have as many images as AlignTok's three stages together (700 batches of 24), and about the same CPU time.
# On the latents of each: the same generator from text; 500 pictures of combinations that it has never seen, without
# and with guidance; what the judge (results/t2i.py) calls them. OUT: where the runs go. STEPS: of the generator ("400
# 800"). TOKENIZERS: some of "aligntok vae vavae". A command that was stopped is repeated and goes on.
# All figures: OUT/judge.json, OUT/seed SEED/TOKENIZER/*.json.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! [[ ${1-} =~ ^[0-9]+$ ]]; then echo "error: it is results/t2i.sh SEED; see its head" >&2; exit 1; fi
out=${OUT:-runs/t2i}
[ -f "$out/data/prompts.txt" ] || python results/t2i.py data "$out/data"
[ -f "$out/judge.json" ] || python results/t2i.py judge "$out/judge.pt" --json "$out/judge.json"
for name in ${TOKENIZERS:-aligntok vae vavae}; do
    run=$out/seed$1/$name
    case $name in
        aligntok) final=$run/stage3.pt flags=(--stage all) ;;
        vae | vavae) final=$run/$name.pt flags=(--model "$name" --batch-size 32 --steps 525) ;;
        *) echo "error: TOKENIZERS are aligntok, vae and vavae, not $name" >&2; exit 1 ;;
    esac
    [ -f "$final" ] || python train_tokenizer.py --preset tiny --seed "$1" --out "$run" "${flags[@]}"
    [ -f "$run/recon.json" ] || python results/t2i.py recon "$out/judge.pt" "$final" --json "$run/recon.json"
    for steps in ${STEPS:-400 800}; do
        dit=$run/dit/dit_step$(printf %08d "$steps").pt
        [ -f "$dit" ] || python train_dit.py --preset tiny --captions --data "$out/data" --tokenizer "$final" \
            --seed "$1" --steps "$steps" --out "$run/dit"
        for cfg in 1 3; do
            drawn=$run/cfg$cfg-$steps
            [ -f "$drawn.json" ] && continue
            python sample.py --preset tiny --dit "$dit" --tokenizer "$final" --seed "$1" --cfg $cfg --steps 15 \
                --prompts "$out/data/prompts.txt" --batch-size 100 --out "$drawn.npz"
            python results/t2i.py score "$out/judge.pt" "$drawn.npz" "$out/data/prompts.txt" --json "$drawn.json"
        done
    done
done
