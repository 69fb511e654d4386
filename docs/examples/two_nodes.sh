#!/bin/sh
# sh two_nodes.sh CONFIG [OPTIONS OF FIT]
# Two nodes of one process each, on this machine: what two machines do.
config=$1
shift
for rank in 0 1; do
    torchrun --nnodes 2 --node-rank "$rank" --nproc-per-node 1 \
        --master-addr 127.0.0.1 --master-port "${PORT:-29500}" \
        -m kd_lightning fit "$config" --trainer.accelerator cpu --trainer.devices 1 \
        --trainer.num_nodes 2 --trainer.strategy ddp "$@" &
done
wait
