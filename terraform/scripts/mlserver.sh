#!/usr/bin/env bash
# Phase 2, on an ML server, as root: install the package while the blob comes, choose storage, start training in the screen session ddptrain.
# Usage: mlserver.sh ENV_FILE
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
# shellcheck source=/dev/null
. "$1"
: "${VENV:=$ROOT/venv}"
url=http://$JUMP/blob

nvme_folder() { # where the DLAMI has mounted the instance store, striped; it may need a while after boot
  lsblk -dno MODEL 2>/dev/null | grep -q 'Instance Storage' || return 1
  retry 10 mountpoint -q /opt/dlami/nvme && echo /opt/dlami/nvme
}

free_mib() { df --output=avail -BM "$1" | tail -n 1 | tr -dc 0-9; }

mount_storage() { # MIB: makes $ROOT/store, on memory, NVMe or the root volume
  local nvme free_nvme=0 memory kind
  mkdir -p "$ROOT/store"
  mountpoint -q "$ROOT/store" && return
  nvme=$(nvme_folder) && free_nvme=$(free_mib "$nvme")
  memory=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
  kind=$(choose_storage "$1" "$memory" "$free_nvme" "$(free_mib "$ROOT")")
  log "storage for $1 MiB: $kind"
  case $kind in
    ram) mount -t tmpfs -o "size=$1m" yolov9001 "$ROOT/store" ;;
    nvme) mkdir -p "$nvme/yolov9001" && mount --bind "$nvme/yolov9001" "$ROOT/store" ;;
  esac
  echo "$kind" >"$ROOT/results/storage.txt"
}

get_blob() {
  local manifest=$ROOT/manifest.sha256 bytes
  retry 10 curl -fsS -o "$manifest" "$url/manifest.sha256"
  retry 3 fetch "$url/blob.bytes" "$ROOT/blob.bytes" "$(sum_of "$manifest" blob.bytes)"
  bytes=$(cat "$ROOT/blob.bytes")
  mount_storage $((bytes * 2 / 1048576 + 64)) # the blob, and what it holds
  fetch "$url/blob.tar" "$ROOT/store/blob.tar" "$(sum_of "$manifest" blob.tar)"
  tar -C "$ROOT/store" -xf "$ROOT/store/blob.tar"
  rm "$ROOT/store/blob.tar"
}

ended() {
  local code=$?
  ((code == 0)) || finish "$code"
  exit "$code"
}

mkdir -p "$ROOT/results"
exec > >(tee -a "$ROOT/results/setup.log") 2>&1
trap ended EXIT
# only a checkpoint counts as life: a run that restarts for ever, or will never get to its next checkpoint, goes on writing to its log
daemon watchdog bash "$here/watchdog.sh" "$ROOT/results" '*.pt' $((STALL_MINUTES * 60)) $((MAX_HOURS * 3600)) "bash $here/end_server.sh $1"
systemctl stop yolov9001-limit.timer 2>/dev/null || true
daemon sync bash "$here/sync.sh" "$ROOT/results" "http://$JUMP/results/$ADDRESS"
[[ $SPOT != true ]] || daemon spot bash "$here/spot.sh" "$ROOT/train.pid"
want aria2c=aria2 screen=screen
want_venv
install_python "$VENV" "$ROOT/repo" & installed=$!
get_blob
wait "$installed" || die 'the package could not be installed, see above'
chown -R "$OWNER" "$ROOT"
runuser -u "$OWNER" -- screen -dmS ddptrain bash "$here/train.sh" "$1"
log "training started; attach with: screen -x ddptrain"
