"""In place of ssh: `enter.py SOCKET HOST COMMAND...`, by the listener of `hosts.Hosts`.

A process cannot enter the namespaces of a host beside its own; whoever made both can.
"""

import json
import socket
import sys

with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(sys.argv[1])
    request = json.dumps([sys.argv[2], " ".join(sys.argv[3:])]).encode()
    socket.send_fds(connection, [request], [0, 1, 2])
    connection.shutdown(socket.SHUT_WR)
    sys.exit(int(connection.recv(16) or 255))
