"""Two networks that the test has made, and a wire between them that can go silent: the black hole. Needs root."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess

import pytest

from tests.kit.needs import needs
from tests.kit.proxy import Proxy

NEAR, FAR = "10.77.0.1", "10.77.0.2"
_MACS = {NEAR: "02:77:00:00:00:01", FAR: "02:77:00:00:00:02"}
_NOBODY = "02:77:00:00:00:ff"
_CLONE_NEWNET = 0x40000000


def needs_root() -> None:
    """Skips the test where this process may not make a network."""
    needs("ip")
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("making a network needs root")


class Namespace:
    """A network of its own, with a loopback. Its processes are started with `prefix` before their command.

    What listens on its 127.0.0.1 is not there for others; `expose` brings a port of it out, under the same number. It
    ends with the test's process, however that ends, for the process that holds it reads from a pipe.
    """

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        assert self._holder.stdin is not None and self._holder.stdout is not None
        self._holder.stdin.write(b"\n")
        assert self._holder.stdout.read(1) == b"\n", "no network could be made"
        self.pid = self._holder.pid
        self.prefix = ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]
        self._exposed: dict[int, Proxy] = {}
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *command: str) -> None:
        subprocess.run([*self.prefix, *command], check=True)

    def enter(self) -> None:
        """From now on the calling thread makes its sockets in this network."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/proc/{self.pid}/ns/net", "rb") as file:
            if libc.setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def expose(self, port: int) -> Proxy:
        """Brings its 127.0.0.1:port out to ours. What comes over this is not touched by the wire's faults."""
        if port not in self._exposed:
            self._exposed[port] = Proxy(port, raw=True, listen=port, enter=self.enter)
        return self._exposed[port]

    def close(self) -> None:
        for proxy in self._exposed.values():
            proxy.close()
        with self._holder as holder:
            holder.kill()


class Network:
    """`near` and `far`, joined by a wire: 10.77.0.1 and 10.77.0.2. Neither reaches anything else."""

    def __init__(self) -> None:
        needs_root()
        with contextlib.ExitStack() as stack:
            self.near, self.far = Namespace(), Namespace()
            for namespace in (self.near, self.far):
                stack.callback(namespace.close)
            self._lay()
            self._stack = stack.pop_all()

    def _lay(self) -> None:
        one = ["wire", "address", _MACS[NEAR], "netns", str(self.near.pid)]
        other = ["wire", "address", _MACS[FAR], "netns", str(self.far.pid)]
        subprocess.run(["ip", "link", "add", *one, "type", "veth", "peer", "name", *other], check=True)
        for namespace, address in ((self.near, NEAR), (self.far, FAR)):
            namespace.run("ip", "address", "add", f"{address}/30", "dev", "wire")
            namespace.run("ip", "link", "set", "wire", "up")
        self.heal()

    def drop(self, *, outward: bool = True, homeward: bool = True) -> None:
        """What is sent vanishes: no reset, no ICMP, nobody is told. `outward` is from near to far.

        Each packet goes to a hardware address that nobody has. Taking the link down would not do, for the kernel tells
        the senders after a second or two; and a packet filter is what a kernel may lack.
        """
        self._address_packets(_NOBODY if outward else _MACS[FAR], _NOBODY if homeward else _MACS[NEAR])

    def heal(self) -> None:
        self._address_packets(_MACS[FAR], _MACS[NEAR])

    def _address_packets(self, outward: str, homeward: str) -> None:
        """`permanent`: the kernel does not ask who has an address, and so does not notice that nobody answers."""
        for namespace, address, mac in ((self.near, FAR, outward), (self.far, NEAR, homeward)):
            namespace.run("ip", "neighbour", "replace", address, "lladdr", mac, "dev", "wire", "nud", "permanent")

    def close(self) -> None:
        self._stack.close()
