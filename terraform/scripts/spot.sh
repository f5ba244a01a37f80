#!/usr/bin/env bash
# On a spot instance: once AWS announces that it takes the machine back, two minutes ahead, ask the training to save and end.
# Usage: spot.sh PID_FILE
set -euo pipefail
imds=${IMDS:-http://169.254.169.254}

announced() {
  local token
  token=$(curl -fsS -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$imds/latest/api/token") &&
    curl -fs -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$imds/latest/meta-data/spot/instance-action"
}

until announced; do sleep "${PERIOD:-5}"; done
echo 'AWS takes this spot instance back'
kill -TERM "$(cat "$1")"
