#!/usr/bin/env bash
# On the user's machine, before terraform destroy ends the jump host: warn of results that are not in FOLDER, and wait for a Ctrl-C.
# In the environment: SSH, the command with its options, HOST, USER@ADDRESS of the jump host, FOLDER
set -euo pipefail
ssh=()
eval "ssh=($SSH)"
[[ -d $FOLDER ]] || FOLDER=$(mktemp -d)

if ! there=$("${ssh[@]}" -o BatchMode=yes "$HOST" 'cd /srv/yolov9001/results && find . -type f -printf "%P\t%Ts\n" | sort'); then
  what="the jump host does not answer (stopped?), so nobody knows whether all results were fetched"
else
  missing=$(comm -23 <(echo "$there") <(cd "$FOLDER" && find . -type f -printf '%P\t%Ts\n' | sort) | cut -f 1)
  [[ $missing ]] || exit 0
  what="$(wc -l <<<"$missing") results on the jump host were not fetched, such as $(grep -m 1 '\.pt$' <<<"$missing" || head -n 1 <<<"$missing")"
fi
echo "WARNING: $what."
echo "WARNING: they are lost in ${GRACE:-30} seconds. To keep them press Ctrl-C now; then fetch them: terraform output -raw fetch_results is the command."
sleep "${GRACE:-30}"
