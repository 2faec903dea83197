#!/usr/bin/env bash
# Training over several nodes without containers. The same line on every node, in any order:
#
#   RDZV_ENDPOINT=host0:29500 NUM_NODES=16 bash shells/train_multi_node.sh --list_datasets SHARDS --output OUT
#
#   RDZV_ENDPOINT  host and port where the nodes meet: one of them, reachable from all
#   NUM_NODES      how many nodes take part; MIN:MAX starts with MIN and takes in more on a restart
#   RUN_ID         name of this job, the same on all nodes (default: univit)
#   MAX_RESTARTS   how often a lost process or node is waited for before the job ends (default: 10)
#   SAVE_SECONDS   how long processes may take to save when the job is asked to stop (default: 120)
#   NPROC          processes of this node (default: one per GPU)
#   LOCAL_ADDR     this node's address, where its host name does not resolve on the others
#   NCCL_SOCKET_IFNAME, NCCL_IB_HCA, NCCL_DEBUG, ... are passed on as they are; none is needed on most clusters
#
# OUT must be a folder that all nodes share. A node that comes back joins again; all go on from the last checkpoint.
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
: "${RDZV_ENDPOINT:?host:port where the nodes meet}" "${NUM_NODES:?number of nodes}"
# without it, a node that comes back waits for an address that the others told only once (torch 2.13)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=0
exec torchrun --nnodes "$NUM_NODES" --nproc_per_node "${NPROC:-$((gpus > 0 ? gpus : 1))}" \
    --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "${RUN_ID:-univit}" \
    ${LOCAL_ADDR:+--local_addr "$LOCAL_ADDR"} --max_restarts "${MAX_RESTARTS:-10}" \
    --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown_timeout "${SAVE_SECONDS:-120}" \
    -m training.train_univit "$@"
