"""The network and everything that works like it.

The test listens on 127.0.0.1:@PORT@ (TCP and UDP), on the abstract Unix name @ABSTRACT@, and on the path @SOCKET@.
"""

from attacks import Attack

REFUSED = frozenset({"exception", "violation"})


def _attack(name: str, says: str, body: str, verdicts=REFUSED) -> Attack:
    lines = "".join(f"    {line}\n" for line in body.strip("\n").splitlines())
    return Attack(name, f'"""{says}"""\nimport socket\n\n\ndef solve(a, b):\n{lines}    return 5\n', verdicts=verdicts)


ATTACKS = (
    _attack(
        "tcp_connect",
        "Connects to a port of this machine.",
        "socket.create_connection(('127.0.0.1', @PORT@), 2).send(b'x')",
    ),
    _attack(
        "tcp_connect_6", "The same by IPv6.", "socket.create_connection(('::ffff:127.0.0.1', @PORT@), 2).send(b'x')"
    ),
    _attack(
        "tcp_fast_open",
        "Connects by sending, past a filter of connect.",
        "socket.socket().sendto(b'x', socket.MSG_FASTOPEN, ('127.0.0.1', @PORT@))",
    ),
    _attack(
        "multipath_tcp",
        "Connects by a protocol that looks like TCP to the other side only.",
        """
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
s.connect(('127.0.0.1', @PORT@))
""",
    ),
    _attack(
        "tcp_listen",
        "Offers a service.",
        """
s = socket.socket()
s.bind(('127.0.0.1', 0))
s.listen()
""",
    ),
    _attack("udp", "Sends a datagram.", "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@))"),
    _attack(
        "name_service",
        "Asks for a name, which would take the question, with a secret in it, to a server.",
        """
socket.getaddrinfo('localhost', 80)
socket.socket(type=socket.SOCK_DGRAM).connect(('127.0.0.1', 53))
""",
    ),
    _attack(
        "unix_path", "Connects to a socket in the file system.", "socket.socket(socket.AF_UNIX).connect('@SOCKET@')"
    ),
    _attack(
        "unix_abstract",
        "Connects to a socket that has no file.",
        "socket.socket(socket.AF_UNIX).connect('\\0@ABSTRACT@')",
    ),
    _attack(
        "unix_abstract_datagram",
        "Sends to a socket that has no file through one end of a pair.",
        r"""
left, right = socket.socketpair(type=socket.SOCK_DGRAM)
left.connect('\0@ABSTRACT@.datagram')
left.send(b'x')
""",
    ),
    _attack(
        "unix_listen",
        "Waits, under a name, for programs that come later.",
        r"""
s = socket.socket(socket.AF_UNIX)
s.bind('\0@MARK@')
s.listen()
""",
    ),
    _attack(
        "netlink",
        "Asks the kernel for its routes.",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).bind((0, 0))",
    ),
    _attack("raw", "Builds packets itself.", "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)"),
    _attack("packet", "Listens to all packets.", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)"),
    _attack(
        "kernel_crypto",
        "Uses the kernel's ciphers, an often attacked corner.",
        "socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)",
    ),
    _attack(
        "virtual_machine",
        "Talks to the machine that this one runs on.",
        "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).connect((2, 1))",
    ),
    _attack(
        "url",
        "Downloads.",
        """
import urllib.request
urllib.request.urlopen('http://127.0.0.1:@PORT@/', timeout=2)
""",
    ),
)
