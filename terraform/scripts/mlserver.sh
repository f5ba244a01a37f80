#!/usr/bin/env bash
# Phase 2, on an ML server, as root: fetch and verify the blob, choose storage, start training in the screen session ddptrain.
# Usage: mlserver.sh ENV_FILE
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
# shellcheck source=/dev/null
. "$1"
url=http://$JUMP/blob

guard() {
  ((STALL_MINUTES)) || return 0
  setsid bash "$here/watchdog.sh" "$ROOT/results" "$STALL_MINUTES minutes" "$END" </dev/null >>"$ROOT/watchdog.log" 2>&1 &
  systemctl stop yolov9001-limit.timer 2>/dev/null || true
}

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

mkdir -p "$ROOT/results"
exec > >(tee -a "$ROOT/results/setup.log") 2>&1
guard
setsid bash "$here/sync.sh" "$ROOT/results" "http://$JUMP/results/$ADDRESS" </dev/null >/dev/null 2>&1 &
if [[ $SPOT == true ]]; then setsid bash "$here/spot.sh" "$ROOT/train.pid" </dev/null >>"$ROOT/results/spot.log" 2>&1 & fi
want aria2c=aria2 screen=screen
python3 -c 'import ensurepip' 2>/dev/null || want venv=python3-venv
get_blob
chown -R "$OWNER" "$ROOT"
runuser -u "$OWNER" -- screen -dmS ddptrain bash "$here/train.sh" "$1"
log "training started; attach with: screen -x ddptrain"
