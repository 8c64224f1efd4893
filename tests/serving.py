"""What the tests of the service share: a real server in a process of its own, on a free loopback port."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

TOKEN = "secret of the tests"
EVENT = {"item": "i5", "action": "click", "timestamp": 1_700_000_000}


class Served:
    """A running `python -m hstu_lab serve`."""

    def __init__(self, process, base):
        self.process, self.base = process, base

    def call(self, path, body=None, *, token=TOKEN, timeout=60, raw=None):
        """(status, headers, parsed JSON or text)."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"})
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, headers, text = answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, headers, text = error.code, error.headers, error.read().decode()
        return status, headers, json.loads(text) if "json" in headers["Content-Type"] else text

    def wait_ready(self, seconds=150):
        """What /ready says once it is green."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, "the server ended"
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                status, _, answer = self.call("/ready")
                if status == 200:
                    return answer
            time.sleep(0.1)
        raise AssertionError(f"not ready within {seconds} s")

    def metric(self, name, **labels):
        """Sum of the samples of that name with those labels."""
        found = 0.0
        for line in self.call("/metrics")[2].splitlines():
            if line.startswith(name) and line[len(name)] in " {" and all(f'{k}="{v}"' in line for k, v in labels.items()):
                found += float(line.rsplit(" ", 1)[1])
        return found


@contextlib.contextmanager
def running(checkpoint, *arguments, strategy="eager", token=TOKEN, environment=None):
    """A server; stopped by SIGTERM, and by SIGKILL if that does not help."""
    command = [sys.executable, "-m", "hstu_lab", "serve", "--checkpoint", str(checkpoint), "--strategy", strategy, "--port", "0"]
    environment = os.environ | (environment or {}) | ({"HSTU_LAB_TOKEN": token} if token else {})
    process = subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        yield Served(process, re.search(r"http://[\d.]+:\d+", line).group())
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def with_child(connection):
    """A process that starts another, tells its id, and waits."""
    connection.send(subprocess.Popen(["sleep", "100"]).pid)
    connection.recv()
