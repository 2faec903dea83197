#!/usr/bin/env bash
# One training over several nodes, each in a container. The same line on every node, in any order:
#
#   RDZV_ENDPOINT=host0:29500 NUM_NODES=2 DATA=/data OUTPUT=/runs/a \
#       bash docker/run_multi_node.sh --list_datasets /data/shards --list_batch_size 64
#
# DATA and OUTPUT are folders that all nodes share; everything after the script's name goes to the trainer. Further
# variables: those of shells/train_multi_node.sh, and IMAGE, SHM_SIZE (default 32g). `docker stop -t 150` leaves the
# run two minutes to save.
set -euo pipefail
: "${RDZV_ENDPOINT:?host:port where the nodes meet}" "${NUM_NODES:?number of nodes}"
: "${DATA:?folder of the packed data}" "${OUTPUT:?folder of checkpoints and logs}"

passed=(--env "RDZV_ENDPOINT=$RDZV_ENDPOINT" --env "NUM_NODES=$NUM_NODES")
for name in RUN_ID MAX_RESTARTS SAVE_SECONDS NPROC LOCAL_ADDR $(compgen -A variable NCCL_ || true); do
    if [ -n "${!name:-}" ]; then passed+=(--env "$name=${!name}"); fi
done
exec docker run --rm --init --gpus all --network host --shm-size "${SHM_SIZE:-32g}" --ulimit memlock=-1 \
    --user "$(id -u):$(id -g)" "${passed[@]}" --volume "$DATA:$DATA:ro" --volume "$OUTPUT:$OUTPUT" \
    "${IMAGE:-llava_vit:latest}" bash shells/train_multi_node.sh --output "$OUTPUT" "$@"
