#!/usr/bin/env bash
# On the jump host, as root, before the data come: end it once nothing was written under ROOT for STALL_MINUTES, never if that is 0.
# Takes the place of an earlier watchdog and of the limit that was set at boot. Usage: guard.sh ENV_FILE
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null
. "$1"
before=$(cat "$ROOT/watchdog.pid" 2>/dev/null || true)
if grep -qs watchdog.sh "/proc/${before:-none}/cmdline"; then kill "$before"; fi # the number may be another process's after a restart
if ((STALL_MINUTES)); then
  setsid bash "$here/watchdog.sh" "$ROOT" "$STALL_MINUTES minutes" "bash $here/end_cluster.sh $1" </dev/null >>"$ROOT/watchdog.log" 2>&1 &
  echo $! >"$ROOT/watchdog.pid"
fi
systemctl stop yolov9001-limit.timer 2>/dev/null || true
