#!/usr/bin/env bash
# The encoder as the eye of a language model: LLaVA's stages, then questions.
#
#   bash shells/lmm_probe.sh --demo [--tower RUN] [--output DIR]
#       everything on a laptop: a set of pictures, clips and questions, a tiny language model, the
#       four recipes and a reader that sees nothing, one table (less than ten minutes on 2 cores).
#       STEPS, TRAIN and VAL in the environment: steps of stage 2, samples, held-out questions.
#       The eye is RUN, or output/demo/train of shells/demo.sh, or an encoder trained for a minute.
#
#   bash shells/lmm_probe.sh RECIPE --model_name_or_path LLM --vision_tower RUN \
#       --align align.json --tune tune.json --image_folder DIR --output DIR [flags for every stage]
#       the published stages of llava15, vitsplit or convllava on all GPUs of this machine under
#       DeepSpeed; crossget continues from what llava15 wrote and takes no --align
script="$(realpath "${BASH_SOURCE[0]}")" # before install.sh changes the folder
usage() {
    echo "$1" >&2
    sed -n '2,13s/^# \{0,1\}//p' "$script" >&2
    exit 2
}
[ $# -gt 0 ] || usage "--demo or a recipe is missing"
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"

step() { printf '\n== %s\n' "$*"; }

published() {
    local recipe="$1" align="" tune="" output="" llm="" common=(); shift
    while [ $# -gt 0 ]; do
        case "$1" in
            --align | --tune | --output | --model_name_or_path)
                [ -n "${2:-}" ] || usage "$1 needs a value" ;;
        esac
        case "$1" in
            --align) align="$2"; shift 2 ;;
            --tune) tune="$2"; shift 2 ;;
            --output) output="$2"; shift 2 ;;
            --model_name_or_path) llm="$2"; shift 2 ;;
            *) common+=("$1"); shift ;;
        esac
    done
    # an empty --output would be the root of the file system
    [ -n "$output" ] || usage "--output DIR is missing"
    [ -n "$llm" ] || usage "--model_name_or_path LLM is missing"
    stage() { # NUMBER ZERO flags
        local number="$1" zero="$2"; shift 2
        step "$recipe, stage $number"
        torchrun --nproc_per_node "${NPROC_PER_NODE:-gpu}" eval_encoder/lmm_probe.py \
            --recipe "$recipe" --stage "$number" --deepspeed "shells/$zero.json" \
            --output_dir "$output/stage_$number" "${common[@]}" "$@"
    }
    case "$recipe" in
        llava15 | vitsplit)
            stage 1 zero2 --model_name_or_path "$llm" --data_path "$align"
            stage 2 zero3 --model_name_or_path "$llm" --data_path "$tune" \
                --pretrain_mm_mlp_adapter "$output/stage_1/mm_projector.bin" ;;
        crossget) stage 1 zero3 --model_name_or_path "$llm" --data_path "$tune" ;;
        convllava)
            stage 1 zero2 --model_name_or_path "$llm" --data_path "$align"
            stage 2 zero3 --model_name_or_path "$output/stage_1" --data_path "$align"
            stage 3 zero3 --model_name_or_path "$output/stage_2" --data_path "$tune" ;;
        *) usage "$recipe: no recipe" ;;
    esac
}

encoder() {
    [ ! -d "$output/encoder/hf" ] || return 0
    python -m data_pipeline pack "$output"/set/clips/train_00[0-7]*.mp4 --output "$output/shards" \
        --size 112 --gop 64 --budget 98 --full-frames 8 --workers 2
    python -m data_pipeline cluster "$output/shards" --num-centroids 64 --output "$output/centroids"
    python -m data_pipeline label "$output/shards" --centroids "$output/centroids"
    torchrun --standalone --nproc_per_node 2 -m training.train_univit --preset demo --list_datasets "$output/shards" \
        --list_batch_size 16 --num_sampled_data 3200 --output "$output/encoder"
}

demo() {
    local tower="" output="output/lmm_demo" started=$SECONDS
    while [ $# -gt 0 ]; do
        case "$1" in
            --tower | --output) [ -n "${2:-}" ] || usage "$1 needs a value" ;;
        esac
        case "$1" in
            --tower) tower="$2"; shift 2 ;;
            --output) output="$2"; shift 2 ;;
            *) usage "$1: no flag of the demo" ;;
        esac
    done
    mkdir -p "$output"
    step "1/4 pictures, clips, questions and a tiny language model that cannot speak yet"
    python -m eval_encoder.lmm.demo.question_set --output "$output/set" --num_train "${TRAIN:-2000}" --num_val "${VAL:-384}"
    python -m eval_encoder.lmm.demo.tiny "$output/set/align.json" "$output/set/tune.json" \
        --output "$output/language_model" --layers 3 --width 96 --convnext "$output/convnext"
    [ -n "$tower" ] || [ ! -d output/demo/train/hf ] || tower=output/demo/train/hf
    if [ -z "$tower" ]; then
        step "   an encoder, trained for a minute on some of the clips"
        encoder > "$output/encoder.log" 2>&1 || { tail -5 "$output/encoder.log" >&2; exit 1; }
        tower="$output/encoder/hf"
    fi

    one() { # NAME recipe stage flags
        local name="$1" recipe="$2" number="$3" from=$SECONDS; shift 3
        if [ -f "$output/$name/record.json" ]; then return; fi
        python eval_encoder/lmm_probe.py --recipe "$recipe" --stage "$number" --image_folder "$output/set" \
            --output_dir "$output/$name" --num_frames 2 --gradient_checkpointing False --save_strategy no \
            --disable_tqdm True --logging_steps 20 --per_device_train_batch_size 16 --global_batch_size 16 \
            --adam_beta2 0.98 "$@" > "$output/$name.log" 2>&1 || { tail -5 "$output/$name.log" >&2; return 1; }
        echo "$name: $((SECONDS - from)) s"
        echo "$((SECONDS - from))" > "$output/$name/seconds"
    }
    ours=(--model_name_or_path "$output/language_model" --vision_tower "$tower" --mm_vision_select_layer -1)
    align=(--data_path "$output/set/align.json" --learning_rate 1e-3)
    tune=(--data_path "$output/set/tune.json" --learning_rate 1e-3 --max_steps "${STEPS:-420}")
    cache=(--feature_cache "$output/features")
    conv=(--mm_vision_resolution 128 --video_size 128)
    first() {
        one llava15_align llava15 1 "${ours[@]}" "${align[@]}" "${cache[@]}"
        one llava15 llava15 2 "${ours[@]}" "${tune[@]}" "${cache[@]}" \
            --pretrain_mm_mlp_adapter "$output/llava15_align/mm_projector.bin"
        one crossget crossget 1 --model_name_or_path "$output/llava15" "${tune[@]}" --data_fraction 1 \
            --mm_reduction_r 8 --max_steps "$((${STEPS:-420} / 2))"
        one blind llava15 2 "${ours[@]}" "${tune[@]}" --blind
    }
    second() {
        one vitsplit_align vitsplit 1 "${ours[@]}" "${align[@]}" "${cache[@]}"
        one vitsplit vitsplit 2 "${ours[@]}" "${tune[@]}" "${cache[@]}" \
            --pretrain_mm_mlp_adapter "$output/vitsplit_align/mm_projector.bin"
        one convllava_1 convllava 1 --model_name_or_path "$output/language_model" \
            --vision_tower "$output/convnext" --vision_add_five_stage 1 --vision_five_stage_width 256 \
            "${align[@]}" "${conv[@]}"
        one convllava_2 convllava 2 --model_name_or_path "$output/convllava_1" "${align[@]}" "${conv[@]}"
        one convllava convllava 3 --model_name_or_path "$output/convllava_2" "${tune[@]}" "${conv[@]}"
    }
    step "2/4 training, two recipes side by side"
    second & second_pid=$!
    first
    wait "$second_pid"

    step "3/4 held-out questions"
    ask() {
        local name blind
        for name in "$@"; do
            blind=(); [ "$name" != blind ] || blind=(--blind)
            python eval_encoder/lmm_eval.py --model "$output/$name" --questions "$output/set/questions.jsonl" \
                --answers "$output/$name/answers.jsonl" --image_folder "$output/set" --batch_size 32 \
                --max_new_tokens 4 "${blind[@]}" 2> "$output/$name.eval.log"
        done
    }
    ask vitsplit convllava & second_pid=$!
    ask blind llava15 crossget
    wait "$second_pid"

    step "4/4 the table"
    all() { local sum=0 part; for part in "$@"; do sum=$((sum + $(cat "$output/$part/seconds"))); done; echo "$sum"; }
    python -m eval_encoder.lmm.scoring.table blind="$output/blind" llava15="$output/llava15" vitsplit="$output/vitsplit" \
        crossget="$output/crossget" convllava="$output/convllava" --labels "$output/set/answers.jsonl" \
        --seconds llava15="$(all llava15_align llava15)" vitsplit="$(all vitsplit_align vitsplit)" \
        crossget="$(all llava15_align llava15 crossget)" convllava="$(all convllava_1 convllava_2 convllava)" \
        blind="$(all blind)" --output "$output/table.md"
    echo "$((SECONDS - started)) s in all; the table is in $output/table.md"
}

if [ "$1" = --demo ]; then shift; demo "$@"; else published "$@"; fi
