#!/usr/bin/env bash
# On the jump host, as root, before the data come: end it once nothing was written under ROOT for STALL_MINUTES, or after MAX_HOURS
# and one more for the ML servers to end first. Takes the place of an earlier watchdog and of the limit that was set at boot.
# Usage: guard.sh ENV_FILE [MINUTES], which stand in for STALL_MINUTES after a failure
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
# shellcheck source=/dev/null
. "$1"
minutes=${2:-$STALL_MINUTES}
((STALL_MINUTES)) || minutes=0
mkdir -p "$ROOT"
daemon watchdog bash "$here/watchdog.sh" "$ROOT" '*' $((minutes * 60)) $((MAX_HOURS * 3600 + 3600)) "bash $here/end_cluster.sh $1"
systemctl stop yolov9001-limit.timer 2>/dev/null || true
