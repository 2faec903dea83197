#!/usr/bin/env bash
# Packed folder -> labels: features in several processes, then k-means and nearest centroids.
#
#   bash shells/cluster.sh SHARDS NUM_CENTROIDS OUTPUT [feature options, e.g. --encoder RUN/hf]
#
# NPROC processes (default: one per GPU, else one) divide the shards; on several machines give each
# its own part with `python -m data_pipeline features --task-id I --num-tasks N` instead. Run it
# again and it goes on where it was stopped. Paths are seen from the project's folder.
if [ $# -lt 3 ]; then sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
shards="$1" centroids="$2" output="$3"
shift 3
gpus="$(nvidia-smi -L 2>/dev/null | wc -l || true)"
processes="${NPROC:-$((gpus > 0 ? gpus : 1))}"
torchrun --standalone --nproc_per_node "$processes" -m data_pipeline features \
    "$shards" --output "$output/features" "$@"
python -m data_pipeline cluster "$shards" --num-centroids "$centroids" --output "$output" "$@"
python -m data_pipeline label "$shards" --centroids "$output"
