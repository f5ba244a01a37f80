#!/usr/bin/env bash
# On the user's machine: send what git tracks, and FOLDERS, links followed, to the jump host and prepare the data there.
# Usage: push.sh USER@HOST [FOLDER...], the folders relative to the repository; in the environment SSH, the command with its options,
#   NAMES, what prep.sh is told, and where they differ from the default ROOT and ENV_FILE, places on the jump host
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
jump=$1 root=${ROOT:-/srv/yolov9001} env_file=${ENV_FILE:-/etc/yolov9001.env}
shift
cd "$here/../.."
ssh=()
eval "ssh=($SSH)" # its quotes are those of a shell

on_jump() { "${ssh[@]}" -o BatchMode=yes "$jump" "$@"; }

files() { # everything to send, separated by NUL
  git ls-files -z | while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done
  local folder
  for folder; do
    [[ -e $folder ]] || die "$folder: no such folder in $PWD; give folders such as runs/train"
    [[ $(find -L "$folder" -type f -print -quit) ]] || die "$folder: holds no file; give folders with data or a run"
    find -L "$folder" -type f -print0
  done
}

guard() { # the limit of the boot takes no notice of what arrives, the watchdog does
  on_jump "sudo tee $env_file >/dev/null" <<<"$NAMES" &&
    tar -C "$here/.." -cf - scripts locks | on_jump "sudo mkdir -p $root && sudo tar -xmf - -C $root --no-same-owner" &&
    on_jump "sudo bash $root/scripts/guard.sh $env_file"
}

prepare() { # one prep at a time: that of an apply whose connection broke may still be at work in the same folders
  files "$@" | tar --null --files-from=- --dereference --hard-dereference -czf - |
    on_jump "sudo flock --close --wait 3600 $root/prep.lock bash $root/scripts/prep.sh $env_file"
}

(files "$@") >/dev/null # a missing folder is told before anything is sent
retry "${ATTEMPTS:-20}" on_jump true
retry 3 guard
log "sending the repository to $jump and preparing there; where another prep is at work, after it"
prepare "$@"
