#!/usr/bin/env bash
# Serve S3 from a folder: Ceph's gateway, one monitor, one disk of S3_GIBIBYTES. Made at the first start, kept afterwards.
#
#   AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=… serve.sh FOLDER ADDRESS PORT
#
# One disk is one copy: back the folder up, or use an S3 service of your own. The monitor listens on loopback only.
set -euo pipefail
folder=$1 address=$2 port=$3
: "${AWS_ACCESS_KEY_ID:?}" "${AWS_SECRET_ACCESS_KEY:?}"
monitor=${S3_MONITOR_PORT:-3300} old_monitor=${S3_OLD_MONITOR_PORT:-6789}
export CEPH_CONF=$folder/ceph.conf

configure() {
  cat >"$CEPH_CONF" <<CONF
[global]
fsid = $1
mon_host = [v2:127.0.0.1:$monitor,v1:127.0.0.1:$old_monitor]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
auth_allow_insecure_global_id_reclaim = true
run_dir = $folder
admin_socket =
log_file = $folder/\$name.log
mon_cluster_log_file = $folder/cluster.log
mon_data = $folder/mon
osd_data = $folder/osd
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
osd_objectstore = bluestore
bluestore_block_size = $((${S3_GIBIBYTES:-100} << 30))
bluestore_block_db_create = false
bluestore_block_wal_create = false
CONF
}

# Each in the foreground of this script's process group: when one dies, the container ends and is started again.
start() {
  "$@" -f >>"$folder/out.log" 2>&1 &
  children+=($!)
}
children=()
# The gateway first, the monitor last: each needs the ones before it to end in order.
stop() {
  for ((at = ${#children[@]} - 1; at >= 0; at--)); do
    kill "${children[at]}" 2>/dev/null || continue
    for _ in $(seq 50); do kill -0 "${children[at]}" 2>/dev/null || break; sleep 0.2; done
    kill -9 "${children[at]}" 2>/dev/null || true
  done
}
trap 'stop; exit 143' TERM INT

until_ready() {
  for _ in $(seq 600); do
    "$@" >/dev/null 2>&1 && return
    for child in "${children[@]}"; do kill -0 "$child" 2>/dev/null || { tail "$folder/out.log" >&2; exit 1; }; done
    sleep 0.2
  done
  echo "not ready: $*" >&2
  exit 1
}
disk_is_up() { timeout 10 ceph --connect-timeout 5 osd stat | grep -q "1 up"; }

uuid() { cat /proc/sys/kernel/random/uuid; }
if [ ! -e "$folder/made" ]; then
  rm -rf "$folder/mon" "$folder/osd"
  mkdir -p "$folder/mon" "$folder/osd"
  fsid=$(uuid)
  configure "$fsid"
  ceph-authtool --create-keyring "$folder/keys" --gen-key -n mon. --cap mon 'allow *' >/dev/null
  monmaptool --create --clobber --fsid "$fsid" \
    --addv a "[v2:127.0.0.1:$monitor,v1:127.0.0.1:$old_monitor]" "$folder/monitors" >/dev/null
  ceph-mon --mkfs -i a --monmap "$folder/monitors" --keyring "$folder/keys"
  start ceph-mon -i a
  disk=$(uuid)
  ceph --connect-timeout 60 osd new "$disk" >/dev/null
  ceph-osd -i 0 --mkfs --osd-uuid "$disk" --no-mon-config 2>>"$folder/out.log"
  start ceph-osd -i 0
  until_ready disk_is_up
  admin=(radosgw-admin --no-mon-config)
  "${admin[@]}" user create --uid=cdpo --display-name=cdpo >/dev/null 2>>"$folder/out.log"
  # The keys go in by a pipe: on a command line every process could read them.
  "${admin[@]}" metadata get user:cdpo 2>>"$folder/out.log" | python3 -c '
import json, os, sys
user = json.load(sys.stdin)
user["data"]["keys"] = [{"user": "cdpo", "access_key": os.environ["AWS_ACCESS_KEY_ID"],
                         "secret_key": os.environ["AWS_SECRET_ACCESS_KEY"]}]
json.dump(user, sys.stdout)' | "${admin[@]}" metadata put user:cdpo 2>>"$folder/out.log"
  touch "$folder/made"
else
  start ceph-mon -i a
  start ceph-osd -i 0
  until_ready disk_is_up
fi
# The gateway has settings of its own for how it meets the monitor, and does not read them from the file.
start radosgw -n client.rgw --no-mon-config --auth_client_required=none "--ms_mon_client_mode=crc secure" \
  "--rgw-frontends=beast endpoint=$address:$port"
echo "S3 at http://$address:$port"
wait -n || true
echo "a part of the S3 server ended" >&2
stop
exit 1
