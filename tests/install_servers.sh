#!/usr/bin/env bash
# The servers that tests talk to, from Debian's packages: PostgreSQL, Ceph's S3 gateway, Chromium, and a clock to move.
# Does nothing where all are there already; a test whose server is missing is skipped by name, and fails in CI.
set -euo pipefail

declare -A packages=(
  [/usr/bin/radosgw]="ceph-mon ceph-osd radosgw ceph-common"
  [/usr/bin/chromium]="chromium"
  [/usr/bin/faketime]="faketime"
)
missing=()
for program in "${!packages[@]}"; do
  [ -x "$program" ] || missing+=(${packages[$program]})
done
compgen -G "/usr/lib/postgresql/*/bin/initdb" >/dev/null || missing+=(postgresql)
if [ ${#missing[@]} -eq 0 ]; then
  echo "all servers for the tests are there"
  exit 0
fi
[ "$(id -u)" = 0 ] || { echo "as root, run: apt-get install ${missing[*]}" >&2; exit 1; }
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
echo "installed: ${missing[*]}"
