#!/usr/bin/env bash
# The README's experiment in miniature, one row of it:  DATA=... WEIGHTS=... results/miniature.sh ROW SEED [tokenizer]
#
# ROW, a tokenizer and a generator on its latents:
#   stage1, stage12, stage123 (AlignTok), sp0, sp5, cosine, before, lora (its ablations), vae, vavae (the baselines),
#   margins0 (VA-VAE with a VF loss without margins), wvf1 (the same with ten times its weight), aligntok4800, vae4800,
#   vavae4800, wvf4800 (three times as long);
#   vfmvae (VFM-VAE, the other system: its small decoder, and a PatchGAN in place of the DINO discriminator, whose
#   weights were not at hand. LPIPS has the weight 1 and the GAN, a tenth of its own weight, begins with step 800. With
#   VFM-VAE's own weights and a GAN from the first step it learns nothing in so few steps: results/README.md).
# ROW, a generator alone, on the latents of a row whose tokenizer is trained first:
#   repa12, reg12 (aligned, on stage12), repavfm, regvfm (on vfmvae); text12, textvae, textvavae (from text: "a photo
#   of a goldfish").
#
# DATA: the folder of Tiny ImageNet with train/ and val/. WEIGHTS: a folder with dinov2.pth, vgg16.pth, lpips_heads.pth
# and efficientnet-lite0-57934424.pth. OUT: where the runs go. A command that was stopped is repeated and goes on.
# BUDGET: the steps of all trainings, in per cent; SIZE: of the images, in px; WORKERS: of the loader; BATCH: images of
# a tokenizer's step, a quarter of the generator's; TRAIN: further flags of all trainings, such as --compile.
# Steps below, and in the names of files, are those of BUDGET 100.
# SEED 0 of stage12, vae and vavae also measures the curves: figures against training steps and sampling steps; not with
# CURVES=0.
# With the word tokenizer only that is trained. Once the tokenizers that they begin with are there, rows may run side by
# side; but stage123 runs stage12 first, and stage1 writes where it does.
# All figures of a row end in OUT/seed SEED/ROW.json (without it the row is measured again, where parts are missing);
# results/ holds those of the README. SE-CKNNA against DINOv2 takes half an hour to an hour of one core.
set -euo pipefail
row=${1-} seed=${2-} part=${3-all} base='' tokenizer=yes
cd "$(dirname "$0")/.."
case $row in
    stage1 | stage12 | sp0 | sp5 | cosine | before | lora | vae | vavae | vfmvae) ;;
    margins0 | wvf1 | aligntok4800 | vae4800 | vavae4800 | wvf4800) ;;
    stage123) base=stage12 ;;
    repa12 | reg12 | text12) base=stage12 tokenizer=no ;;
    repavfm | regvfm) base=vfmvae tokenizer=no ;;
    textvae | textvavae) base=${row#text} tokenizer=no ;;
    *) echo "error: no such row: '$row'; the head of results/miniature.sh lists them" >&2; exit 1 ;;
esac
if ! [[ $seed =~ ^[0-9]+$ && -d ${DATA-} && -d ${WEIGHTS-} && $part =~ ^(all|tokenizer)$ ]]; then
    echo "error: it is DATA=FOLDER WEIGHTS=FOLDER results/miniature.sh ROW SEED [tokenizer]; see its head" >&2; exit 1
fi
size=${SIZE:-64} batch=${BATCH:-16} workers=${WORKERS:-0}
n() { echo $(($1 * ${BUDGET:-100} / 100)); }
out=${OUT:-runs/miniature}/seed$seed
runs=$out/$row
if [ -f "$out/$row.json" ]; then echo "$row is complete: $out/$row.json"; exit; fi
if [ "$row" = stage123 ]; then  # its images are those of stage12's generator
    results/miniature.sh stage12 "$seed"
elif [ "$base" ]; then
    results/miniature.sh "$base" "$seed" tokenizer
fi
mkdir -p "$runs"
curves=no
if [ "$seed" = 0 ] && [ "${CURVES:-1}" != 0 ]; then curves=yes; fi

todo=()
later() { todo+=("$@" then); }
now() {  # all that was put off, in one process
    if [ ${#todo[@]} -gt 0 ]; then python results/parts.py "${todo[@]}"; fi
    todo=()
}
judge=(results/judge.py --lite0 "$WEIGHTS/efficientnet-lite0-57934424.pth" --workers "$workers")
read -ra extra_flags <<< "${TRAIN-}"
shared=(--preset tiny --seed "$seed" --workers "$workers" "${extra_flags[@]}")
images=(--data "$DATA/train" --val "$DATA/val")
flags=("${shared[@]}" "${images[@]}" --vgg16 "$WEIGHTS/vgg16.pth" --lpips-heads "$WEIGHTS/lpips_heads.pth"
       --size "$size" --batch-size "$batch" --decoder small --disc-start "$(n 800)" --lr 1e-3)
encoder=(--encoder "$WEIGHTS/dinov2.pth")
stage1=("${encoder[@]}" --stage 1 --out "$out/aligntok")
stage2=(--stage 2 --encoder-lr 1e-4)
final_figures=(--val-images 1000 --probe-images 8000)

# ---- the tokenizer: 400 + 800 + 400 steps of 16 images, or 1600 from scratch
train() {  # FINAL STEPS FLAGS...: trains up to STEPS and keeps the validation's figures
    if [ ! -f "$runs/tokenizer$2.json" ]; then
        later train_tokenizer.py "${flags[@]}" "${@:3}" --steps "$(n "$2")"
        later validation "$1" "$runs/tokenizer$2.json"
    fi
}
curve() {  # FINAL STEPS PARTS FLAGS...: with the curves, with figures on fewer images on the way
    if [ $curves = yes ]; then
        local i
        for ((i = 1; i < $3; i++)); do
            train "$1" $(($2 * i / $3)) "${@:4}" --val-images 500 --probe-images 2000
        done
    fi
    train "$1" "$2" "${@:4}" "${final_figures[@]}"
}
case $row in
    stage12 | sp0 | sp5 | cosine | before | lora)
        [ -f "$out/aligntok/stage1.pt" ] ||
            later train_tokenizer.py "${flags[@]}" "${stage1[@]}" --steps "$(n 400)" "${final_figures[@]}" ;;
esac
case $row in
    stage1)   final=$out/aligntok/stage1.pt; train "$final" 400 "${stage1[@]}" "${final_figures[@]}" ;;
    stage12)  final=$out/aligntok/stage2.pt; curve "$final" 800 2 "${stage2[@]}" --out "$out/aligntok" ;;
    stage123) final=$out/aligntok/stage3.pt; train "$final" 400 --stage 3 --out "$out/aligntok" "${final_figures[@]}" ;;
    vae)      final=$runs/vae.pt; curve "$final" 1600 4 --model vae --out "$runs" ;;
    vavae)    final=$runs/vavae.pt; curve "$final" 1600 4 --model vavae "${encoder[@]}" --out "$runs" ;;
    vfmvae)   final=$runs/patchgan.pt  # the four stages in its preset's proportion
              vfm=(--model vfmvae "${encoder[@]}" --decoder tiny --dino none --w-p 1 --out "$runs"
                   "${final_figures[@]}")
              for stage in strong:640 weak:640 ssim:160 patchgan:160; do
                  [ -f "$runs/tokenizer1600.json" ] ||
                      later train_tokenizer.py "${flags[@]}" "${vfm[@]}" --stage ${stage%:*} --steps "$(n ${stage#*:})"
              done
              [ -f "$runs/tokenizer1600.json" ] || later validation "$final" "$runs/tokenizer1600.json" ;;
    aligntok4800)
              final=$runs/stage3.pt
              if [ ! -f "$runs/tokenizer1200.json" ]; then
                  later train_tokenizer.py "${flags[@]}" "${stage1[@]}" --steps "$(n 1200)" --out "$runs"
                  later train_tokenizer.py "${flags[@]}" "${stage2[@]}" --steps "$(n 2400)" --out "$runs"
              fi
              train "$final" 1200 --stage 3 --out "$runs" "${final_figures[@]}" ;;
    vae4800)  final=$runs/vae.pt; train "$final" 4800 --model vae --out "$runs" "${final_figures[@]}" ;;
    vavae4800) final=$runs/vavae.pt
              train "$final" 4800 --model vavae "${encoder[@]}" --out "$runs" "${final_figures[@]}" ;;
    margins0 | wvf1 | wvf4800)
              final=$runs/vavae.pt; steps=1600 w_vf=1
              case $row in margins0) w_vf=0.1 ;; wvf4800) steps=4800 ;; esac
              train "$final" $steps --model vavae "${encoder[@]}" --vf-margins 0 0 --w-vf $w_vf --out "$runs" \
                  "${final_figures[@]}" ;;
    sp0 | sp5 | cosine | before | lora)
              case $row in
                  sp0) extra=(--w-sp 0) ;;  sp5) extra=(--w-sp 5) ;;  lora) extra=(--lora 8) ;;
                  cosine) extra=(--sp-loss cosine) ;;  before) extra=(--sp-at encoder) ;;
              esac
              final=$runs/stage2.pt
              train "$final" 800 "${stage2[@]}" "${extra[@]}" --init "$out/aligntok/stage1.pt" --out "$runs" \
                  "${final_figures[@]}" ;;
    *)        case $base in
                  stage12) final=$out/aligntok/stage2.pt ;;  vfmvae) final=$out/vfmvae/patchgan.pt ;;
                  *) final=$out/$base/$base.pt ;;
              esac ;;
esac
now
if [ "$part" = tokenizer ]; then exit; fi

# ---- Frechet distances: of the held-out images' reconstructions; and to the training images, of reconstructions of
# every fourth of them: what a perfect generator of these latents would reach
reference=${OUT:-runs/miniature}/reference.npz
[ -f "$reference" ] || later "${judge[@]}" "$DATA/train" --save-stats "$reference" --size "$size"
if [ $tokenizer = yes ]; then
    [ -f "$runs/recon.json" ] ||
        later "${judge[@]}" --recon "$final" "$DATA/val" --metrics rfid,psnr,ssim --json "$runs/recon.json"
    if [ ! -f "$runs/ceiling.json" ]; then
        later ceiling "$final" "$DATA/train" "$runs/ceiling.npz" "$size" "$workers"
        later "${judge[@]}" "$runs/ceiling.npz" --save-stats "$runs/own.npz"
        later "${judge[@]}" "$reference" "$runs/ceiling.npz" --metrics fid --json "$runs/ceiling.json"
    fi
fi
now
rm -f "$runs/ceiling.npz"

# ---- the generator, the same for all but the aligned and those from text; stage 3 decodes stage 2's
dit=$runs/dit
if [ "$row" = stage123 ]; then dit=$out/stage12/dit; fi
prompts=() aligned=()
case $row in
    repa* | reg*)
        align=${row%12}
        aligned=(--align "${align%vfm}" --align-encoder "$WEIGHTS/dinov2.pth") ;;
    text*)
        captions=${OUT:-runs/miniature}/captions
        if [ ! -f "$captions/prompts.txt" ]; then later captions "$DATA/train" "$captions"; fi
        prompts=(--words "$captions/prompts.txt" --prompts "$captions/prompts.txt")
        images=(--captions --data "$captions" --words "$captions/prompts.txt") ;;
esac
generator=("${shared[@]}" "${images[@]}" --tokenizer "$final" --batch-size $((4 * batch)) --save-every "$(n 400)"
           --grid-every "$(n 400)" "${aligned[@]}" --out "$dit")
own=$runs/own.npz  # of a generator alone: there once its tokenizer's row has got so far
if [ $tokenizer = no ]; then own=$out/$base/own.npz; fi
fd() {  # NAME GENERATOR_STEPS IMAGES CFG SAMPLING_STEPS: distance of samples to the training images, and to `own`
    [ ! -f "$runs/$1.json" ] || return 0
    later sample.py --preset tiny --dit "$dit/dit_step$(printf %08d "$(n "$2")").pt" --tokenizer "$final" -n "$3" \
        --cfg "$4" --steps "$5" --seed "$seed" --out "$runs/$1.npz" --batch-size 250 "${prompts[@]}"
    if [[ $1 = plain* && -f $own ]]; then
        later "${judge[@]}" "$own" "$runs/$1.npz" --metrics fid --json "$runs/own_$1.json"
    fi
    later "${judge[@]}" "$reference" "$runs/$1.npz" --metrics fid --json "$runs/$1.json"
}
on_the_way=no
case $row in
    stage12 | vfmvae | repa* | reg*) on_the_way=yes ;;
    vae | vavae) on_the_way=$curves ;;
esac
if [ "$row" != stage123 ] && [ $on_the_way = yes ]; then
    for steps in 400 800; do
        [ -f "$runs/plain$steps.json" ] || later train_dit.py "${generator[@]}" --steps "$(n $steps)"
        fd plain$steps $steps 5000 1 20
    done
fi
if [ "$row" != stage123 ] && [ ! -f "$dit/done1600" ]; then
    later train_dit.py "${generator[@]}" --steps "$(n 1600)"
fi
fd plain 1600 5000 1 20
best=none
case $row in
    repa* | reg*) now ;;
    text*) fd cfg4 1600 5000 4 20; now ;;
    *)
        best=2
        fd cfg2 1600 1000 2 20
        for cfg in 4 8 16 32; do  # the scale is doubled as long as that helps
            fd "cfg$cfg" 1600 1000 "$cfg" 20
            now
            status=0
            python results/parts.py better "$runs" "cfg$cfg" "cfg$best" || status=$?
            if [ $status = 3 ]; then break; elif [ $status != 0 ]; then exit $status; fi
            best=$cfg
        done
        fd guided 1600 5000 "$best" 20
        if [ $curves$row = yesstage12 ]; then
            for steps in 5 10 50; do fd "steps$steps" 1600 5000 1 $steps; done
        fi
        now ;;
esac
touch "$dit/done1600"

# ---- SE-CKNNA of the latents, against the encoder and against the judge; stage 3 has those of stage 2
if [ $tokenizer = yes ] && [ "$row" != stage123 ]; then
    [ -f "$runs/cknna.json" ] ||
        later fid.py --cknna "$final" "$DATA/val" --reference "$WEIGHTS/dinov2.pth" --workers "$workers" \
            --json "$runs/cknna.json"
    [ -f "$runs/cknna_judge.json" ] ||
        later "${judge[@]}" --cknna "$final" "$DATA/val" --json "$runs/cknna_judge.json"
fi
# where rows run side by side, its tokenizer's `own` may have come after the generator's distances
if [[ -f $own && -f $runs/plain.npz && ! -f $runs/own_plain.json ]]; then
    later "${judge[@]}" "$own" "$runs/plain.npz" --metrics fid --json "$runs/own_plain.json"
fi
now
rm -rf "$runs"/{cfg,steps,plain400,plain800}*.npz*
python results/parts.py row "$runs" "$best"
