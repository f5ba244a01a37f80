# shellcheck shell=bash
# What the scripts of both phases share; sourced, never run.

log() { printf '%s %s: %s\n' "$(date -u +%FT%TZ)" "${0##*/}" "$*" >&2; }
die() { log "$*"; exit 1; }

retry() { # TIMES COMMAND...: until it succeeds; waits 1, 2, 4 ... at most 30 s in between
  local times=$1 attempt pause=1
  shift
  for ((attempt = 1; attempt <= times; attempt++)); do
    if "$@"; then return 0; fi
    ((attempt < times)) && sleep "$pause"
    pause=$((pause * 2 > 30 ? 30 : pause * 2))
  done
  log "gave up after $times attempts: $*"
  return 1
}

want() { # COMMAND=PACKAGE...: installs the packages of the commands that are missing
  local pair missing=()
  for pair; do command -v "${pair%=*}" >/dev/null || missing+=("${pair#*=}"); done
  ((${#missing[@]})) || return 0
  log "installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  retry 5 apt-get -qq -o DPkg::Lock::Timeout=300 update
  retry 5 apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}"
}

verified() { # FILE SHA256
  sha256sum --check --status <<<"$2  $1" 2>/dev/null
}

fetch() { # URL FILE SHA256: parallel ranged download, resumed where it broke; a corrupted file is refused and fetched again
  local url=$1 file=$2 sum=$3 attempt
  for attempt in 1 2 3 4; do
    if [[ -f $file && ! -f $file.aria2 ]]; then
      if verified "$file" "$sum"; then log "$file: SHA-256 is right"; return 0; fi
      log "$file: refused, its SHA-256 is not $sum"
      rm -f "$file"
      sleep "$attempt"
    fi
    log "$url: download, attempt $attempt"
    aria2c --quiet --continue=true --auto-file-renaming=false --file-allocation=none --split=16 --max-connection-per-server=16 \
      --min-split-size=16M --max-tries=5 --retry-wait=2 --connect-timeout=20 --dir="$(dirname "$file")" --out="$(basename "$file")" "$url" ||
      sleep "$attempt"
  done
  if [[ ! -f $file.aria2 ]] && verified "$file" "$sum"; then return 0; fi
  log "$url: no copy with SHA-256 $sum after $attempt attempts"
  return 1
}

sum_of() { # MANIFEST NAME: the SHA-256 of one file in it
  awk -v name="$2" '$2 == name {print $1; found = 1} END {exit !found}' "$1"
}

coco() { # FOLDER: COCO 2017 from $COCO_URL, checked against $COCO_SUMS, laid out as `yolov9001 train --data` wants it
  local folder=$1 url=${COCO_URL:-http://images.cocodataset.org} sums=${COCO_SUMS:-${BASH_SOURCE[0]%/*}/coco.sha256} sum path split
  [[ -f $folder/complete ]] && return
  mkdir -p "$folder/zips" "$folder/annotations" "$folder/images"
  while read -r sum path; do fetch "$url/$path" "$folder/zips/${path##*/}" "$sum" || return; done <"$sums"
  for split in train val; do
    unzip -q -o -j "$folder/zips/${split}2017.zip" "${split}2017/*" -d "$folder/images/$split" || return
    unzip -p "$folder/zips/annotations_trainval2017.zip" "annotations/instances_${split}2017.json" >"$folder/annotations/instances_$split.json" || return
  done
  rm -r "$folder/zips"
  touch "$folder/complete"
}

choose_storage() { # NEED MEMORY NVME ROOT, all MiB, the last two what is free: prints ram, nvme or root
  local need=$1 memory=$2 nvme=$3 root=$4 headroom
  headroom=$((memory / 4 > 8192 ? memory / 4 : 8192)) # what training itself needs
  if ((need + headroom <= memory)); then echo ram
  elif ((need <= nvme)); then echo nvme
  elif ((need + 4096 <= root)); then echo root
  else
    log "data need $need MiB; of $memory MiB memory $headroom are kept for training, NVMe has $nvme, the root volume $root: raise root_gib"
    return 1
  fi
}

nginx_conf() { # ROOT ADDRESS:PORT NETWORK PIDFILE: serves ROOT/blob, takes results by PUT, both to NETWORK only
  cat <<CONF
user www-data;
worker_processes auto;
pid $4;
error_log $1/nginx.log warn;
events { worker_connections 4096; }
http {
  default_type application/octet-stream;
  sendfile on;
  sendfile_max_chunk 4m;
  tcp_nopush on;
  aio threads;
  access_log off;
  client_max_body_size 0;
  client_body_temp_path $1/incoming;
  server {
    listen $2 backlog=1024;
    allow $3;
    deny all;
    location /blob/ { root $1; }
    location /results/ {
      root $1;
      dav_methods PUT;
      create_full_put_path on;
      dav_access user:rw group:r all:r;
    }
  }
}
CONF
}

tool() { # VENV PACKAGE: a virtual environment of its own for one tool
  [[ -d $1 ]] || { python3 -m venv "$1.part" && mv "$1.part" "$1"; } || return
  retry 3 "$1/bin/python" -m pip install -q "$2"
}

install_python() { # VENV REPO: the package and its dependencies, by uv; nothing to do where they are installed
  [[ -x $1/bin/yolov9001 ]] && return
  tool "$1.uv" 'uv>=0.8,<1' || return
  "$1.uv/bin/python" -m uv venv -q --clear --python "${PYTHON:-python3}" "$1" || return
  retry 3 "$1.uv/bin/python" -m uv pip install --python "$1/bin/python" -e "$2"
}
