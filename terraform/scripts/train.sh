#!/usr/bin/env bash
# Train on this host together with the others: in the screen session ddptrain on an ML server, or under SkyPilot.
# Usage: train.sh [ENV_FILE]; without one the same names come from the environment:
#   HOSTS (comma-separated) ADDRESS (own) DATA ROOT REPO, optional RUN PARAMETERS='epochs=300 lr=0.01' JUMP STALL_MINUTES END
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
# shellcheck source=/dev/null
[[ $# -eq 0 ]] || . "$1"
: "${REPO:=$ROOT/store/repo}" "${VENV:=$ROOT/venv}" "${RUN:=train}" "${PARAMETERS:=}" "${JUMP:=}" "${STALL_MINUTES:=0}"
results=$ROOT/results

train() { # the one place that knows the command
  local words=() word
  for word in $PARAMETERS; do words+=(-p "$word"); done
  echo "$BASHPID" >"$ROOT/train.pid"
  exec "$VENV/bin/yolov9001" train --data "$data" --out "$results/$RUN" --hosts "$HOSTS" --address "$ADDRESS" --devices auto --resume "${words[@]}"
}

run() { # install, continue a run that came with the blob, train; `set -e` does not hold in here, its exit code is asked for
  install_python "$VENV" "$REPO" || return
  [[ -d $results/$RUN || ! -d $REPO/runs/$RUN ]] || cp -r "$REPO/runs/$RUN" "$results/$RUN"
  cd "$ROOT"
  log "training on $HOSTS, this is $ADDRESS"
  train
}

case $DATA in
  digits) data=digits ;;
  coco) data=$ROOT/store/data/coco ;;
  *) data=$REPO/$DATA ;;
esac
mkdir -p "$results"
rm -f "$results/exit_code"
(run) 2>&1 | tee -a "$results/train.log" && code=0 || code=$?
echo "$code" >"$results/exit_code"
[[ -z $JUMP ]] || ONCE=1 retry 5 bash "$here/sync.sh" "$results" "http://$JUMP/results/$ADDRESS"
log "training ended with exit code $code"
if ((code == 0 && STALL_MINUTES)); then eval "$END"; fi
exit "$code"
