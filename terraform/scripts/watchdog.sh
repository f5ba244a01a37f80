#!/usr/bin/env bash
# Run COMMAND once nothing under FOLDER was written for TIME. Usage: watchdog.sh FOLDER '60 minutes' COMMAND
set -euo pipefail
folder=$1 time=$2 command=$3
touch "$folder"
while [[ -n $(find "$folder" -newermt "-$time" -print -quit 2>/dev/null) ]]; do sleep "${PERIOD:-60}"; done
echo "nothing written under $folder for $time: $command"
eval "$command"
