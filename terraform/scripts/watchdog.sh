#!/usr/bin/env bash
# Run COMMAND once no file like PATTERN was written under FOLDER for QUIET seconds (0: never mind), or LIMIT seconds have passed.
# Usage: watchdog.sh FOLDER PATTERN QUIET LIMIT COMMAND
set -euo pipefail
folder=$1 pattern=$2 quiet=$3 limit=$4 command=$5

written() { # not counting what the watchdog and its like print
  [[ $(find "$folder" -path "$folder/daemons" -prune -o -name "$pattern" -newermt "-$quiet seconds" -print -quit 2>/dev/null) ]]
}

why=''
until [[ $why ]]; do
  sleep "${PERIOD:-60}"
  if ((SECONDS >= limit)); then why="$limit seconds have passed"
  elif ((quiet && SECONDS >= quiet)) && ! written; then why="no $pattern written under $folder for $quiet seconds"; fi
done
echo "$why: $command"
eval "$command"
