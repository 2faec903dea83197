#!/usr/bin/env bash
# One training over several nodes, each in a container. Run on every node with the same arguments but NODE_RANK:
#
#   MASTER_ADDR=host0 NUM_NODES=2 NODE_RANK=0 DATA=/data OUTPUT=/runs/a \
#       bash docker/run_multi_node.sh --list_datasets /data/shards --list_batch_size 64
#
# DATA and OUTPUT are folders that all nodes share; everything after the script's name goes to the trainer.
set -euo pipefail
: "${MASTER_ADDR:?name of the first node}" "${NUM_NODES:?number of nodes}" "${NODE_RANK:?0 on the first node}"
: "${DATA:?folder of the packed data}" "${OUTPUT:?folder of checkpoints and logs}"

exec docker run --rm --gpus all --network host --shm-size "${SHM_SIZE:-32g}" --ulimit memlock=-1 \
    --volume "$DATA:$DATA:ro" --volume "$OUTPUT:$OUTPUT" \
    "${IMAGE:-llava_vit:latest}" \
    torchrun --nnodes "$NUM_NODES" --node_rank "$NODE_RANK" --nproc_per_node "${GPUS:-8}" \
    --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" \
    -m training.train_univit --output "$OUTPUT" "$@"
