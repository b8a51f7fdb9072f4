"""A real SLURM on one machine: munged, slurmctld and two slurmd, each "node" with a port and folders of its own.

Needs Debian's `slurm-wlm` and `munge` (`make test-slurm` installs them) and root, as slurmd does. Everything lies below
one folder; nothing of the machine's own configuration is read or written.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

NODES = ("node0", "node1")

_CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CryptoType=crypto/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdTimeout=60
InactiveLimit=0
MailProg=/bin/true
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node0 NodeHostname={host} Port={ports[1]} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=node1 NodeHostname={host} Port={ports[2]} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=work Nodes=node0,node1 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 OverSubscribe=NO
PartitionName=urgent Nodes=node0,node1 MaxTime=INFINITE State=UP PriorityTier=2 OverSubscribe=NO
"""


class Cluster:
    """A running SLURM."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Starts the daemons and waits until both nodes are idle."""
        self.root.chmod(0o755)
        for folder in ("state", *(f"spool.{node}" for node in NODES)):
            (self.root / folder).mkdir()
        (self.root / "slurm.conf").write_text(
            _CONFIG.format(root=self.root, host=socket.gethostname(), ports=_free_ports(3))
        )
        (self.root / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        self._run(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.root}/munge.socket",
            f"--pid-file={self.root}/munged.pid", f"--log-file={self.root}/munged.log",
            f"--seed-file={self.root}/munged.seed",
        )  # fmt: skip
        _wait((self.root / "munge.socket").exists, "munged")
        self._run("slurmctld", "-D")
        for node in NODES:
            self._run("slurmd", "-D", "-N", node)
        _wait(lambda: self.command("sinfo", "--noheader", "--format=%T %D") == "idle 2", "two idle nodes")

    @property
    def environ(self) -> dict[str, str]:
        """In which SLURM's commands talk to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}

    def command(self, *words: str) -> str:
        """What a SLURM command says."""
        done = subprocess.run(words, env=self.environ, capture_output=True, text=True, timeout=1200, check=False)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """State of a job, such as RUNNING."""
        fields = dict(word.partition("=")[::2] for word in self.command("scontrol", "show", "job", job).split())
        return fields.get("JobState", "")

    def stop(self) -> None:
        """Ends everything."""
        self.command("scancel", "--state=RUNNING,PENDING", "--user=root")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def logs(self) -> str:
        """The ends of all logs."""
        logs = [*self.root.glob("*.log"), *self.root.glob("*.out")]
        return "\n".join(f"{log.name}: ...{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def _run(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert program is not None, f"{name} is not installed: run `make test-slurm`"
        with (self.root / f"{name}.{len(self._daemons)}.out").open("wb") as out:
            self._daemons.append(
                subprocess.Popen([program, *arguments], env=self.environ, stdout=out, stderr=subprocess.STDOUT)
            )


def _wait(ready: object, what: str, seconds: float = 900.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"no {what} after {seconds:.0f} s"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
