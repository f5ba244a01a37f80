#!/usr/bin/env bash
# Train on this host together with the others: in the screen session ddptrain on an ML server, or under SkyPilot.
# Usage: train.sh [ENV_FILE]; without one the same names come from the environment:
#   HOSTS (comma-separated) ADDRESS (own) DATA ROOT, optional SENT RUN PARAMETERS='epochs=300 lr=0.01' JUMP STALL_MINUTES END
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
# shellcheck source=/dev/null
[[ $# -eq 0 ]] || . "$1"
: "${SENT:=$ROOT/store/repo}" "${VENV:=$ROOT/venv}" "${RUN:=train}" "${PARAMETERS:=}" "${JUMP:=}" "${STALL_MINUTES:=0}"
results=$ROOT/results
# fitted images lie on the fast disk where there is one, not on the root volume
[[ $(cat "$results/storage.txt" 2>/dev/null) != nvme ]] || export XDG_CACHE_HOME=$ROOT/store/cache

batch() { # batch_size and lr where nothing else says them: by all GPUs of the cluster, not by those that happen to be there
  local gpus hosts=${HOSTS//[^,]/} chosen
  [[ $data != digits && " $PARAMETERS" != *' batch_size='* && ! -e $results/$RUN/config.yaml ]] || return 0
  gpus=$(nvidia-smi -L 2>/dev/null | wc -l) || gpus=1
  chosen=$(global_batch $((gpus * (${#hosts} + 1))) "$(images "$data")")
  [[ " $PARAMETERS" != *' lr='* && " $PARAMETERS" != *' optimizer='* ]] || chosen=${chosen% lr=*}
  echo "$chosen"
}

train() { # the one place that knows the command
  local words=() word hosts=$HOSTS
  for word in $(batch) $PARAMETERS; do words+=(-p "$word"); done
  [[ $DATA != coco || -e $results/$RUN/config.yaml ]] || words+=(--config coco)
  if [[ $JUMP && $HOSTS == *,* ]]; then
    # the first of the hosts holds the rendezvous: the jump host, which does not train but outlives those that do
    hosts=$JUMP,$HOSTS
    "$VENV/bin/python" "$here/rendezvous.py" wait "$JUMP" "${PORT:-29400}" "$ADDRESS" "$HOSTS" "${WAIT_MINUTES:-15}" || return
  fi
  echo "$BASHPID" >"$ROOT/train.pid"
  exec "$VENV/bin/yolov9001" train --data "$data" --out "$results/$RUN" --hosts "$hosts" --address "$ADDRESS" --devices auto --resume "${words[@]}"
}

case $DATA in
  digits) data=digits ;;
  coco) data=$ROOT/store/data/coco ;;
  *) data=$SENT/$DATA ;;
esac
mkdir -p "$results"
rm -f "$results/exit_code"
[[ -d $results/$RUN || ! -d $SENT/runs/$RUN ]] || cp -r "$SENT/runs/$RUN" "$results/$RUN" # a run that came with the blob
cd "$ROOT"
trap : INT # Ctrl-C in the session ends the training, then this machine as after a failure
{ log "training on $HOSTS, this is $ADDRESS"; (train); } 2>&1 | tee -ia "$results/train.log" && code=0 || code=$?
log "training ended with exit code $code"
finish "$code"
exit "$code"
