#!/usr/bin/env bash
# Brings up Slurm with one node on this machine, runs a small comparison through it, and looks at its records.
# Needs root and Debian's packages:  apt-get install slurm-wlm munge
#
#     tests/slurm.sh [PYTHON]
set -euo pipefail
python=${1:-.venv/bin/python}
here=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
work=$(mktemp -d)
host=$(hostname -s)
daemons=()
cleanup() {
  for daemon in "${daemons[@]}"; do kill "$daemon" 2>/dev/null || true; done
  wait
  rm -rf "$work"
}
trap cleanup EXIT

cat > "$work/slurm.conf" <<EOF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=60 State=UP
EOF
mkdir -p "$work/state" "$work/spool" /run/munge
chown munge: /run/munge
[ -f /etc/munge/munge.key ] || mungekey --create
chown munge: /etc/munge/munge.key
if [ ! -S /run/munge/munge.socket.2 ]; then
  setpriv --reuid=munge --regid=munge --clear-groups munged --foreground > "$work/munged.log" 2>&1 &
  daemons+=($!)
  sleep 1
fi
export SLURM_CONF=$work/slurm.conf
slurmctld -D -f "$work/slurm.conf" > /dev/null 2>&1 &
daemons+=($!)
slurmd -D -f "$work/slurm.conf" > /dev/null 2>&1 &
daemons+=($!)
for _ in $(seq 60); do
  sinfo --noheader --format %t 2>/dev/null | grep -q idle && break
  sleep 0.5
done
sinfo || { tail -5 "$work"/slurm*.log; exit 1; }

cd "$work"
OMP_NUM_THREADS=1 "$python" -m stiefel compare "$here/benchmarks/omdsm.py" --methods own unconstrained \
  --depth 2 --epochs 2 --scale relu --lr 0.1 1 --seeds 1 --out "$work/runs" \
  --executor submitit --executor-options timeout_min=5 --jobs 2
"$python" - "$work/runs" <<'EOF'
import sys
from pathlib import Path
from stiefel.compare.records import read_all
records, faults = read_all([Path(sys.argv[1])])
assert not faults, faults
assert len(records) == 8, len(records)
assert {r.status for r in records} <= {"done", "target missed"}, [(r.status, r.reason) for r in records]
jobs = list((Path(sys.argv[1]) / "submitit").glob("*_result.pkl"))
assert len(jobs) == 8, jobs
print(f"{len(records)} runs, each a Slurm job of its own")
EOF
