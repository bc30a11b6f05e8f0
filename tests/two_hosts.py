"""Two machines of one: network namespaces joined by a cable, each with a host name of its own (Linux, root, iproute2).

They share the file system and nothing else. As Debian has it, a machine's own name leads to its loopback, which the
other cannot reach: whoever takes the address of a name for the way to this machine fails.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple

import pytest
from commands import ENVIRONMENT, Result

INTERFACE = "eth0"
ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
# a name of its own and hosts of its own, then the command
_ENTER = 'echo "$1" > /proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


class Host:
    """A machine.

    Args:
        name: its host name
        folder: for its file of hosts
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.namespace = f"kd-{os.getpid()}-{name}"
        self._hosts = folder / f"hosts-of-{name}"
        addresses = {**ADDRESSES, name: "127.0.1.1", "localhost": "127.0.0.1"}
        self._hosts.write_text("".join(f"{address} {other}\n" for other, address in addresses.items()))

    def start(self, log: Path, *command: object) -> "subprocess.Popen[bytes]":
        """Start a command on it, whose output goes to `log`."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", _ENTER, "sh"]
        with log.open("wb") as file:
            whole = [*enter, self.name, self._hosts, *command]
            return subprocess.Popen(list(map(str, whole)), stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT)

    def kill(self) -> None:
        """Kill -9 all that runs on it."""
        while True:
            found = _ip("netns", "pids", self.namespace)
            if found.returncode != 0 or not found.stdout.split():
                return
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


class Job:
    """A command that is given on each of two machines.

    Args:
        hosts: the machines
        folder: for their logs
        command: the same for both
        own: what each is given beside that
    """

    def __init__(self, hosts: Tuple[Host, Host], folder: Path, *command: object, own: Sequence[Sequence] = ((), ())):
        self._hosts = hosts
        self._logs = [folder / f"log-of-{host.name}" for host in hosts]
        self._processes = [host.start(log, *command, *more) for host, log, more in zip(hosts, self._logs, own)]

    @property
    def outputs(self) -> List[str]:
        return [log.read_text() for log in self._logs]

    def wait(self) -> List[Result]:
        """What became of it on each machine."""
        codes = [process.wait(150) for process in self._processes]
        return [Result(code, output) for code, output in zip(codes, self.outputs)]

    def kill_when(self, host: Host, text: str) -> None:
        """Kill -9 all that runs on a machine as soon as the first machine's output has `text`; the other must end."""
        while text not in self.outputs[0]:
            assert self._processes[0].poll() is None, self.outputs
            time.sleep(0.0005)
        host.kill()
        end = time.monotonic() + 150
        for process, log in zip(self._processes, self._logs):
            # before torch 2 its launcher, whose training has ended, waits 5 minutes for the machine that was killed
            while process.poll() is None and "failed (exitcode: " not in log.read_text():
                assert time.monotonic() < end, self.outputs
                time.sleep(0.05)
        for each in self._hosts:
            each.kill()


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Tuple[Host, Host]]:
    """Two machines that reach each other; skips the test where they cannot be made."""
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"two machines need the command {missing[0]} (Debian: iproute2, util-linux)")
    first, second = (Host(name, folder) for name in ADDRESSES)
    try:
        for host in (first, second):
            _need("netns", "add", host.namespace)
        cable = ["link", "add", INTERFACE, "netns", first.namespace, "type", "veth"]
        _need(*cable, "peer", "name", INTERFACE, "netns", second.namespace)
        for host in (first, second):
            _need("-n", host.namespace, "addr", "add", f"{ADDRESSES[host.name]}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _need("-n", host.namespace, "link", "set", interface, "up")
            log = folder / f"log-of-{host.name}"
            if host.start(log, "true").wait(60) != 0:
                pytest.skip(f"two machines cannot be made here: {log.read_text()}")
        yield first, second
    finally:
        for host in (first, second):
            host.kill()
            _ip("netns", "del", host.namespace)


def _ip(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _need(*arguments: str) -> None:
    done = _ip(*arguments)
    if done.returncode != 0:
        pytest.skip(f"two machines cannot be made here: ip {' '.join(arguments)}: {done.stdout.strip()}")
