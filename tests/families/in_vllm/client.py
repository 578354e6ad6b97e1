"""Stands in for vLLM's Python, and has `server.py` run the script: client.py SOCKET SCRIPT ..."""

import json
import socket
import sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    with server.makefile("rw") as stream:
        json.dump({"arguments": sys.argv[2:], "stdin": sys.stdin.read()}, stream)
        stream.flush()
        server.shutdown(socket.SHUT_WR)
        answer = json.load(stream)
sys.stdout.write(answer["stdout"])
sys.stderr.write(answer["stderr"])
sys.exit(answer["code"])
