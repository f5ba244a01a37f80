#!/usr/bin/env bash
# Phase 1, on the jump host, as root: repository (a .tar.gz from stdin), data set, blob, web server, rendezvous.
# It may be run again: what was downloaded and is right is kept. push.sh holds a lock while it runs.
# Usage: prep.sh ENV_FILE
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
# shellcheck source=/dev/null
. "$1"
: "${VENV:=$ROOT/venv}" "${PORT:=29400}"

receive() {
  rm -rf "$ROOT/repo"
  mkdir -p "$ROOT/repo"
  tar -xmzf - -C "$ROOT/repo" --no-same-owner
}

get_data() {
  mkdir -p "$ROOT/data"
  case $DATA in
    coco) coco "$ROOT/data/coco" || die 'COCO could not be had; run terraform apply again to go on where it broke' ;;
    digits) ;; # embedded in the package
    *) [[ -e $ROOT/repo/$DATA ]] || die "data $DATA: not sent; name its folder in send_folders too, or use coco or digits" ;;
  esac
}

pack() { # code.tar, small, from which a server can install while it downloads blob.tar, the data; and their manifest
  local folder without=() with=(data)
  for folder in $FOLDERS; do
    without+=("--exclude=repo/$folder")
    with+=("repo/$folder")
  done
  mkdir -p "$ROOT/blob"
  cd "$ROOT/blob"
  local tar=(tar --sort=name --owner=0 --group=0 --numeric-owner --anchored --no-wildcards -C "$ROOT")
  "${tar[@]}" "${without[@]}" -cf code.tar.part repo
  "${tar[@]}" -cf blob.tar.part "${with[@]}"
  mv code.tar.part code.tar
  mv blob.tar.part blob.tar
  stat -c %s blob.tar >blob.bytes
  sha256sum blob.tar code.tar blob.bytes >manifest.part
  mv manifest.part manifest.sha256
  log "packed $(cat blob.bytes) bytes"
}

serve() {
  local pid=$ROOT/nginx.pid conf=$ROOT/nginx.conf systemd=false
  [[ -d /run/systemd/system ]] && systemd=true pid=/run/nginx.pid conf=/etc/nginx/nginx.conf
  mkdir -p "$ROOT/results" "$ROOT/incoming"
  chown www-data "$ROOT/results" "$ROOT/incoming"
  nginx_conf "$ROOT" "$ADDRESS:80" "$NETWORK" "$pid" >"$conf"
  nginx -q -t -c "$conf"
  if $systemd; then systemctl enable -q nginx && systemctl restart nginx
  elif [[ -s $pid ]]; then nginx -c "$conf" -s reload
  else nginx -c "$conf"; fi
  curl -fsS --retry 5 --retry-connrefused "http://$ADDRESS/blob/manifest.sha256"
}

ended() { # a failure is no reason to pay for an hour of nothing
  local code=$?
  ((code == 0)) || bash "$here/guard.sh" "$env_file" 10
  exit "$code"
}

env_file=$1
trap ended EXIT
mkdir -p "$ROOT"
receive
want nginx=nginx aria2c=aria2 unzip=unzip curl=curl
want_venv
install_python "$VENV" "$ROOT/repo" & installed=$! # while the data come
get_data
pack
serve
wait "$installed" || die 'the package could not be installed, see above; run terraform apply again'
# shellcheck disable=SC2016
daemon rendezvous bash -c 'while true; do "$@"; sleep 1; done' serve "$VENV/bin/python" "$here/rendezvous.py" serve "$PORT"
retry 10 bash -c "exec 3<>/dev/tcp/$ADDRESS/$PORT" || die "the rendezvous does not answer, see $ROOT/daemons/rendezvous.log"
log "ready: http://$ADDRESS/blob/ is served to $NETWORK"
