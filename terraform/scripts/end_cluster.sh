#!/usr/bin/env bash
# On the jump host, when all has been silent: terminate ML servers that cannot do it themselves any more, then stop this host.
# Usage: end_cluster.sh ENV_FILE
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/lib.sh"
# shellcheck source=/dev/null
. "$1"
{ tool "$ROOT/boto3" "$here/../locks/boto3.txt" && retry 3 "$ROOT/boto3/bin/python" "$here/terminate.py" "$NAME" "$REGION"; } || log 'could not check for ML servers that hang: look at the EC2 console'
eval "$END"
