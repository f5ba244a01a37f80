#!/usr/bin/env bash
# On the user's machine: send what git tracks, and FOLDERS, links followed, to the jump host and prepare the data there.
# Usage: push.sh USER@HOST [FOLDER...], the folders relative to the repository; in the environment NAMES, what prep.sh is told,
#   and where they differ from the default SSH_KEY, a private key file, ROOT and ENV_FILE, places on the jump host
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
jump=$1 root=${ROOT:-/srv/yolov9001} env_file=${ENV_FILE:-/etc/yolov9001.env}
shift
cd "$here/../.."

on_jump() {
  ssh -o BatchMode=yes -o StrictHostKeyChecking=accept-new -o UserKnownHostsFile="\"$here/../.known_hosts\"" -o ConnectTimeout=10 \
    -o ServerAliveInterval=30 ${SSH_KEY:+-i "$SSH_KEY"} "$jump" "$@"
}

files() { # everything to send, separated by NUL
  git ls-files -z | while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done
  local folder
  for folder; do
    [[ -e $folder ]] || die "$folder: no such folder in $PWD; give folders such as runs/train"
    [[ $(find -L "$folder" -type f -print -quit) ]] || die "$folder: holds no file; give folders with data or a run"
    find -L "$folder" -type f -print0
  done
}

send() { files "$@" | tar --null --files-from=- --dereference --hard-dereference -czf - | on_jump "sudo rm -rf $root/repo && sudo mkdir -p $root/repo && sudo tar -xmzf - -C $root/repo --no-same-owner"; }

guard() { # the limit of the boot takes no notice of what arrives, the watchdog does
  on_jump "sudo tee $env_file >/dev/null" <<<"$NAMES" &&
    tar -C "$here/.." -cf - scripts | on_jump "sudo mkdir -p $root && sudo tar -xmf - -C $root --no-same-owner" &&
    on_jump "sudo bash $root/scripts/guard.sh $env_file"
}

(files "$@") >/dev/null # a missing folder is told before anything is sent
retry "${ATTEMPTS:-20}" on_jump true
retry 3 guard
log "sending the repository to $jump"
retry 3 send "$@"
on_jump "sudo bash $root/repo/terraform/scripts/prep.sh $env_file"
