#!/usr/bin/env bash
# Training on all GPUs of this node, or on 2 CPU processes without one. A lost process is started again, from the last
# checkpoint, MAX_RESTARTS times (default: 3). Arguments go to the trainer:
#   bash shells/train_single_node.sh --list_datasets SHARDS --list_batch_size 64 --output OUT
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=0
exec torchrun --standalone --max_restarts "${MAX_RESTARTS:-3}" --shutdown_timeout 120 --nproc_per_node "$((gpus > 0 ? gpus : 2))" -m training.train_univit "$@"
