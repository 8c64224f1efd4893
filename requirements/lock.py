"""Resolves the locks anew: `python lock.py` keeps every pin that still fits, `python lock.py --upgrade` takes the newest.

cpu.lock and gpu.lock hold everything a machine needs, test.lock what `make test` adds. Packages that several locks name have one
version where their dependents allow it: test.lock is constrained by cpu.lock, gpu.lock starts from cpu.lock's pins.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from install import ROOT, TORCH_INDEX_URL, uv, uv_environment

TARGET = [
    "--python-version=3.11", "--python-platform=x86_64-manylinux_2_31", "--no-python-downloads",
    "--annotation-style=line", "--custom-compile-command=make lock",
]  # fmt: skip


def main(upgrade: list[str]) -> int:
    os.chdir(ROOT / "requirements")
    environment = uv_environment()
    wheels_only = ["--no-build", *TARGET, *upgrade]
    cpu = ["common.in", "cpu.in", "--output-file=cpu.lock", "--excludes=cpu.left-out.txt", *wheels_only]
    index = ["--index", os.environ.get("TORCH_INDEX_URL") or TORCH_INDEX_URL, "--index-strategy=unsafe-best-match"]
    if not compile(cpu, environment) and not compile([*cpu, *index], environment):
        return 1
    if not compile(["test.in", "--output-file=test.lock", "--constraints=cpu.lock", *wheels_only], environment):
        return 1
    if upgrade or not os.path.exists("gpu.lock"):
        shutil.copy("cpu.lock", "gpu.lock")
    environment.pop("UV_FIND_LINKS", None)  # a folder with torch's CPU wheel would answer for the CUDA one
    gpu = ["common.in", "gpu.in", "--output-file=gpu.lock", "--constraints=test.lock", *TARGET]
    return 0 if compile(gpu, environment) else 1


def compile(arguments: list[str], environment: dict[str, str]) -> bool:
    return subprocess.run(uv("compile", "--quiet", *arguments), env=environment).returncode == 0


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--upgrade"]):
        sys.exit("usage: python requirements/lock.py [--upgrade]")
    sys.exit(main(sys.argv[1:]))
