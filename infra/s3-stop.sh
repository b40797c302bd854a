#!/usr/bin/env bash
# Stop just the processes that s3-start.sh started in DATA_DIR, by pid file.  --wipe also deletes DATA_DIR's contents made by it.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: s3-stop.sh DATA_DIR [--wipe]" >&2; exit 2; }
D=$(realpath -m "$1"); rc=0
alive(){ # running (not a zombie) and really ours: its command line names DATA_DIR
  [ -r "/proc/$1/stat" ] && grep -qzF -- "$D" "/proc/$1/cmdline" 2>/dev/null && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; }
for n in client.rgw osd.0 mon.a weed; do
  f="$D/run/$n.pid"; [ -e "$f" ] || continue
  pid=$(tr -dc 0-9 < "$f")
  if [ -n "$pid" ] && alive "$pid"; then
    kill -TERM "$pid" 2>/dev/null
    g=${S3_STOP_GRACE:-15}; [ "$n" = weed ] && g=${S3_STOP_GRACE:-2}   # weed 4.48 idles 15 s in its own graceful stop
    for _ in $(seq $((g*10))); do alive "$pid" || break; sleep 0.1; done
    if alive "$pid"; then [ "$n" = weed ] || echo "[s3-stop] $n ($pid) ignored TERM for $g s: KILL" >&2; kill -KILL "$pid"; sleep 0.5; alive "$pid" && { echo "[s3-stop] $n ($pid) still alive" >&2; rc=1; continue; }; fi
    echo "[s3-stop] stopped $n ($pid)" >&2
  fi
  rm -f "$f"
done
if [ -e "$D/run/sockdir" ]; then s=$(cat "$D/run/sockdir"); case $s in */s3it.??????) rm -rf -- "$s";; esac; rm -f "$D/run/sockdir"; fi
if [ "${2:-}" = --wipe ] && [ $rc = 0 ]; then rm -rf -- "$D"/{data,mon,osd,run,log,s3.json,s3.env,req.txt,ceph.conf,ceph.state,keyring,monmap}; rmdir "$D" 2>/dev/null; fi
exit $rc
