#!/bin/bash
# One run on all accelerators of one or several machines, started by torchrun:
#
#   launch/torchrun.sh configs/digits/tdm.yaml engine.strategy=fsdp
#   NODES=2 RDZV=node0:29400 launch/torchrun.sh configs/digits/tdm.yaml engine.strategy=zero2     (on each machine)
#
# PROCESSES: processes a machine, by default one for each accelerator. RESTARTS: how often all processes start again, from
# the newest checkpoint, after one was lost (3). On one machine `distill train ... engine.devices=N` does the same without
# torchrun and without restarts.
#
# Exit codes are those of `distill train`: torchrun itself turns every one into 1 and would start bad input again.
set -e
if [ "${NODES:-1}" -gt 1 ]; then
  where=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "${RDZV:?set RDZV=host:port of the first machine}")
else
  where=(--standalone)
fi
# A store of their own for each start: torchrun's shared one still holds the addresses of the processes that were lost, and
# those that start again would call them (https://github.com/pytorch/pytorch/issues/135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
DISTILL_SHARED=$(mktemp -d)
export DISTILL_SHARED DISTILL_EXIT=$DISTILL_SHARED/exit
trap 'rm -rf "$DISTILL_SHARED"' EXIT
set +e

${PYTHON:-python} -m torch.distributed.run "${where[@]}" --nproc-per-node "${PROCESSES:-gpu}" \
  --max-restarts "${RESTARTS:-3}" -m distill.cli train "$@" --resume-if-exists &
child=$!
trap 'signalled=yes; kill -TERM "$child" 2>/dev/null' TERM USR1  # torchrun passes SIGTERM on
trap 'signalled=yes' INT  # a terminal signals torchrun itself
signalled=yes
while [ -n "$signalled" ]; do  # a signal ends `wait` before the child has ended
  signalled=
  wait "$child"
  found=$?
  [ "$found" -ne 127 ] && code=$found
done
[ -s "$DISTILL_EXIT" ] && code=$(cat "$DISTILL_EXIT")
exit "$code"
