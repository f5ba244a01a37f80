#!/usr/bin/env bash
# On an ML server that must end: ask the training to save, give it two minutes to do so and to send it, then end.
# Usage: end_server.sh ENV_FILE
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
# shellcheck source=/dev/null
. "$1"
log 'asks the training to save and end'
if kill -TERM "$(cat "$ROOT/train.pid")"; then sleep "${PATIENCE:-120}"; fi # train.sh then sends the results and ends the machine itself
eval "$END"
