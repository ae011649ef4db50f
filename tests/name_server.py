"""A real name server on the loopback network that says what a test wants, over UDP and TCP."""

import socketserver
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

UDP_MAX_BYTES = 512

Addresses = list[str]
Says = Addresses | Callable[[int], Addresses] | None
"""Addresses or CNAMEs (they end in a dot), or what is said the nth time; None says nothing."""


class NameServer:
    """Answers for the names in `zone`; there is no other name."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.zone: dict[str, Says] = {}
        self.asked: Counter[tuple[str, str]] = Counter()
        """How often, by name and kind of record."""

    def answer(self, wire: bytes) -> bytes | None:
        question = dns.message.from_wire(wire)
        name = question.question[0].name.to_text(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(question.question[0].rdtype)
        self.asked[name, kind] += 1
        reply = dns.message.make_response(question, recursion_available=True)
        if name not in self.zone:
            reply.set_rcode(dns.rcode.NXDOMAIN)
            return reply.to_wire()
        says = self.zone[name]
        if says is None:
            return None
        said = says(self.asked[name, kind]) if callable(says) else says
        here = f"{name}."
        for alias in (each for each in said if each.endswith(".")):
            reply.answer.append(dns.rrset.from_text(here, 0, "IN", "CNAME", alias))
            here = alias
        addresses = [each for each in said if each[-1] != "." and (":" in each) == (kind == "AAAA")]
        if addresses:
            reply.answer.append(dns.rrset.from_text(here, 0, "IN", kind, *addresses))
        return reply.to_wire()

    def answer_udp(self, wire: bytes) -> bytes | None:
        whole = self.answer(wire)
        if whole is None or len(whole) <= UDP_MAX_BYTES:
            return whole
        short = dns.message.make_response(dns.message.from_wire(wire))
        short.flags |= dns.flags.TC
        return short.to_wire()


@contextmanager
def serving() -> Iterator[NameServer]:
    class Udp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            wire, socket = self.request
            reply = server.answer_udp(wire)
            if reply is not None:
                socket.sendto(reply, self.client_address)

    class Tcp(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            (length,) = struct.unpack("!H", self.rfile.read(2))
            reply = server.answer(self.rfile.read(length))
            if reply is not None:
                self.wfile.write(struct.pack("!H", len(reply)) + reply)

    udp = socketserver.UDPServer(("127.0.0.1", 0), Udp)
    host, port = udp.server_address[:2]
    tcp = socketserver.TCPServer((str(host), port), Tcp)
    server = NameServer(f"{host!s}:{port}")
    threads = [
        threading.Thread(target=each.serve_forever, args=(0.02,), daemon=True)
        for each in (udp, tcp)
    ]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        for each in (udp, tcp):
            each.shutdown()
            each.server_close()
        for thread in threads:
            thread.join()
