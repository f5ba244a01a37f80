#!/usr/bin/env bash
# Phase 1, on the jump host, as root: data set, blob, manifest, web server. It may be run again: what is there and right is kept.
# Usage: prep.sh ENV_FILE
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
# shellcheck source=/dev/null
. "$1"

get_data() {
  mkdir -p "$ROOT/data"
  case $DATA in
    coco) coco "$ROOT/data/coco" || die 'COCO could not be had; run terraform apply again to go on where it broke' ;;
    digits) ;; # embedded in the package
    *) [[ -e $ROOT/repo/$DATA ]] || die "data $DATA: not sent; name its folder in send_folders too, or use coco or digits" ;;
  esac
}

pack() { # blob.tar, scripts.tar and their manifest, each replaced whole
  mkdir -p "$ROOT/blob"
  cd "$ROOT/blob"
  tar --sort=name --owner=0 --group=0 --numeric-owner -C "$ROOT" -cf blob.tar.part repo data
  tar -C "$ROOT/repo/terraform" -cf scripts.tar.part scripts
  mv blob.tar.part blob.tar
  mv scripts.tar.part scripts.tar
  stat -c %s blob.tar >blob.bytes
  sha256sum blob.tar scripts.tar blob.bytes >manifest.part
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

mkdir -p "$ROOT"
want nginx=nginx aria2c=aria2 unzip=unzip curl=curl
python3 -c 'import ensurepip' 2>/dev/null || want venv=python3-venv
get_data
pack
serve
log "ready: http://$ADDRESS/blob/ is served to $NETWORK"
