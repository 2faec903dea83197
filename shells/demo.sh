#!/usr/bin/env bash
# The whole system on a laptop: clips -> shards -> clusters -> training on 2 ranks -> probe -> export -> report.
#
#   bash shells/demo.sh                  on the embedded motion_shapes set (about ten minutes on 2 cores)
#   bash shells/demo.sh --videos DIR     on your own folder; without labels there is no probe
#   --output DIR                         where everything goes (default: output/demo, or
#                                        output/demo-NAME for a folder NAME of videos)
#
# Run it again and it goes on where it was stopped.
usage() {
    echo "$1" >&2
    echo "usage: bash shells/demo.sh [--videos DIR] [--output DIR]" >&2
    exit 2
}
videos="" truth="" output=""
while [ $# -gt 0 ]; do
    case "$1" in
        # without a value, `shift 2` would move nothing and the loop never end
        --videos | --output) [ -n "${2:-}" ] || usage "$1 needs a value" ;;
    esac
    case "$1" in
        --videos)
            [ -d "$2" ] || usage "--videos $2: no such folder"
            videos="$(realpath "$2")"; shift 2 ;;
        --output) output="$2"; shift 2 ;;
        *) usage "$1: no flag of this command" ;;
    esac
done
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
output="${output:-output/demo${videos:+-$(basename "$videos")}}"
mkdir -p "$output"
started=$SECONDS
model=llava_vit_tiny_ln
ranks=2

step() { printf '\n== %s\n' "$*"; }
train() {
    torchrun --nproc_per_node "$ranks" -m training.train_univit --preset demo --rounds 2 --output "$output/train" "$@"
}

if [ -z "$videos" ]; then
    step "1/4 data and training: clips, shards, clusters, 400 steps on 2 ranks, clusters of the encoder's own, 400 steps"
    train --num_sampled_data 25600
    shards="$output/train/data/motion_shapes/train"
    truth="$output/train/data/motion_shapes/train.csv"
else
    step "1/4 data: packing $videos"
    shards="$output/shards"
    python -m data_pipeline pack "$videos" --output "$shards" \
        --size 112 --gop 64 --budget 98 --full-frames 8
    samples=$(python -m data_pipeline stats "$shards" --json | python -c 'import json, sys; print(json.load(sys.stdin)["samples"])')
    if [ "$samples" -eq 0 ]; then echo "no usable video or image in $videos" >&2; exit 1; fi
    alone=()
    if [ "$samples" -eq 1 ]; then
        echo "one sample: there is nothing to tell it from, so the loss will be zero"
        ranks=1 alone=(--set heads.0.loss.mask_co_positives=false)
    fi
    clusters=$((samples / 2 > 64 ? 64 : samples / 2 > 2 ? samples / 2 : samples > 1 ? 2 : 1))
    labels=$((clusters / 2 > 8 ? 8 : clusters / 2 > 1 ? clusters / 2 : 1))
    batch=$((samples / 2 > 8 ? 8 : samples / 2 > 1 ? samples / 2 : 1))
    python -m data_pipeline cluster "$shards" --num-centroids "$clusters" --output "$output/centroids"
    python -m data_pipeline label "$shards" --centroids "$output/centroids"
    step "   training: twice 50 steps on $ranks rank(s), clustered again in between"
    train --list_datasets "$shards" --list_batch_size "$batch" --num_sampled_data $((50 * ranks * batch)) \
        --set "heads.0.stream.labels_per_step=$labels" "${alone[@]}"
fi
step "2/4 what the encoder sees"
python -m data_pipeline stats "$shards"
python -m data_pipeline view "$shards" --output "$output/contact_sheet.png"

if [ -z "$videos" ]; then
    step "3/4 probe: encoder of either round and untrained, frame and codec input, equal token budget"
    for weight in "$output/train/round_1" "$output/train/round_2" random; do
        for family in llava_vit_sampling llava_vit_codec; do
            torchrun --nproc_per_node 2 eval_encoder/attentive_probe.py --dataset motion_shapes \
                --data_root "$output/train/data" --model_family "$family" --model_name "$model" \
                --model_weight "$weight" --num_frames 2 --K_keep 98 --default_epoch 20 \
                --default_lr_list 0.001 0.003 --num_seeds 3 --save_report "$output/probe"
        done
    done
else
    step "3/4 probe: left out, your videos have no labels"
fi

step "4/4 export: converted, verified, loaded in a fresh process"
python model_factory/convert_llava_vit_packing_to_hf.py "$model" "$output/train/backbone.pt" \
    --output_dir "$output/export"
python - "$output" <<'PY'
import sys

import torch

from model_factory.vit_preview_v0_packing_hf import LlavaViTPackingModel

folders = (f"{sys.argv[1]}/export", f"{sys.argv[1]}/train/hf")
converted, trained = (LlavaViTPackingModel.from_pretrained(f).eval() for f in folders)
rows, grid = torch.randn(98, 768), torch.tensor([[2, 7, 7]])
with torch.no_grad():
    difference = (converted(rows, grid).pooler_output - trained(rows, grid).pooler_output).abs().max()
print(f"fresh process: export and trained encoder differ by {difference:.1e}")
assert difference < 1e-5
PY
python -m eval_encoder.probe.report "$output" --shards "$shards" ${truth:+--truth "$truth"} --seconds $((SECONDS - started))
