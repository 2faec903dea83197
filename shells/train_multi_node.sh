#!/usr/bin/env bash
# Training over several nodes without containers. On every node, with its own NODE_RANK:
#   MASTER_ADDR=host0 NUM_NODES=16 NODE_RANK=3 bash shells/train_multi_node.sh --list_datasets SHARDS --output OUT
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
: "${MASTER_ADDR:?name of the first node}" "${NUM_NODES:?number of nodes}" "${NODE_RANK:?0 on the first node}"
exec torchrun --nnodes "$NUM_NODES" --node_rank "$NODE_RANK" --nproc_per_node "${GPUS:-8}" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" -m training.train_univit "$@"
