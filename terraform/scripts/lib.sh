# shellcheck shell=bash
# What the scripts of both phases share; sourced, never run.

LIB=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

log() { printf '%s %s: %s\n' "$(date -u +%FT%TZ)" "${0##*/}" "$*" >&2; }
die() { log "$*"; exit 1; }

daemon() { # NAME COMMAND...: in the background for good, in the place of an earlier one of that name
  local folder=$ROOT/daemons name=$1 before
  shift
  mkdir -p "$folder"
  before=$(cat "$folder/$name.pid" 2>/dev/null || true)
  if grep -qs "$ROOT" "/proc/${before:-none}/cmdline"; then kill -- "-$before"; fi # the number may be another process's after a restart
  setsid "$@" </dev/null >>"$folder/$name.log" 2>&1 &
  echo $! >"$folder/$name.pid"
}

finish() { # CODE: send the results, then end this machine, after a failure only in ten minutes: somebody may look at it
  echo "$1" >"$ROOT/results/exit_code"
  [[ -z ${JUMP:-} ]] || ONCE=1 retry 5 bash "$LIB/sync.sh" "$ROOT/results" "http://$JUMP/results/$ADDRESS" || true
  ((STALL_MINUTES)) || return 0
  if (($1 && $1 != 143)); then # 143: it was asked to end
    log "failed with exit code $1: this machine ends in ten minutes, or $STALL_MINUTES after: sudo touch $ROOT/keep"
    sleep "${GRACE:-600}" || true # Ctrl-C: now
    [[ ! -e $ROOT/keep ]] || return 0
  fi
  eval "$END"
}

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

want_venv() { python3 -c 'import ensurepip' 2>/dev/null || want venv=python3-venv; }

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
  local folder=$1 url=${COCO_URL:-http://images.cocodataset.org} sums=${COCO_SUMS:-$LIB/coco.sha256} sum path split
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

images() { # FOLDER or data.yaml: how many there are
  local folder=$1
  [[ -d $folder ]] || folder=$(dirname "$folder")
  find -L "$folder" -type f \( -iname '*.jpg' -o -iname '*.jpeg' -o -iname '*.png' -o -iname '*.bmp' -o -iname '*.webp' \) | wc -l
}

global_batch() { # GPUS IMAGES: images a step of all GPUs together and the peak learning rate, as parameters of the training
  # 64 a GPU keep it busy. More than 256 a step, or than a 16th of the images, are too few steps to learn from; 16 is the recipe's own.
  # AdamW's rate of 0.004 at 16 grows with the square root of the batch (arXiv 2205.10287), at most to twice: that is what was tried.
  awk -v gpus="$1" -v images="$2" 'BEGIN {
    for (batch = 16; batch * 2 <= 64 * gpus && batch * 2 <= 256 && batch * 2 <= images / 16; batch *= 2);
    rate = 0.004 * sqrt(batch / 16)
    printf "batch_size=%d lr=%.4g\n", batch, rate < 0.008 ? rate : 0.008
  }'
}

tool() { # VENV LOCK: a virtual environment of its own for one tool, of the versions in LOCK and no other
  [[ -d $1 ]] || { python3 -m venv "$1.part" && mv "$1.part" "$1"; } || return
  retry 3 "$1/bin/python" -m pip install -q --require-hashes -r "$2"
}

install_python() { # VENV REPO: the package, and what it needs in the versions of locks/yolov9001.txt; nothing to do where it is installed
  [[ -x $1/bin/yolov9001 ]] && return
  local locks=$LIB/../locks
  tool "$1.uv" "$locks/uv.txt" || return
  "$1.uv/bin/python" -m uv venv -q --clear --python "${PYTHON:-3.12}" "$1" || return
  retry 3 "$1.uv/bin/python" -m uv pip install -q --python "$1/bin/python" --require-hashes -r "$locks/yolov9001.txt" || return
  "$1.uv/bin/python" -m uv pip install -q --python "$1/bin/python" --no-deps --no-build-isolation -e "$2" # setuptools is in the lock
}
