#!/usr/bin/env bash
# Send every new or changed file of FOLDER to URL, by HTTP PUT, again and again; with ONCE=1 once, failing if a file could not be sent.
# Usage: sync.sh FOLDER URL
set -euo pipefail
folder=$1 url=$2
declare -A sent

changed() { # hidden files are being written
  find "$folder" -type f -not -path '*/.*' -printf '%P\0'
}

encode() { # a name as a part of a URL
  local LC_ALL=C i c
  for ((i = 0; i < ${#1}; i++)); do
    c=${1:i:1}
    if [[ $c == [a-zA-Z0-9/._~-] ]]; then printf %s "$c"; else printf '%%%02X' "$(($(printf %d "'$c") & 255))"; fi
  done
}

send_all() {
  local name state failed=0
  while IFS= read -r -d '' name; do
    state=$(stat -c '%y %s %i' "$folder/$name" 2>/dev/null) || continue
    [[ ${sent[$name]:-} == "$state" ]] && continue
    if curl -fsS -o /dev/null --connect-timeout 10 --retry 2 -T "$folder/$name" "$url/$(encode "$name")"; then sent[$name]=$state; else failed=1; fi
  done < <(changed)
  return "$failed"
}

if [[ ${ONCE:-} ]]; then send_all; exit; fi
while true; do
  send_all || true
  sleep "${PERIOD:-20}"
done
