"""Installs a lock into the virtual environment whose Python runs this, with --project also hstu_lab itself, editable.

Locks are complete, so nothing is resolved (`--no-deps`). torch goes first and by itself, because its CPU build is on no package
index that the rest comes from. It is looked for in TORCH_FIND_LINKS (a folder of wheels), in the find-links that pip or uv are
configured with, and last at TORCH_INDEX_URL. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
TORCH_INDEX_URL = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lock", type=pathlib.Path)
    parser.add_argument("--project", action="store_true")
    arguments = parser.parse_args()
    pins = read_lock(arguments.lock)
    environment = uv_environment()
    if "uv" in pins:
        run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"uv=={pins['uv']}"])
    if "torch" in pins:
        install_torch(pins["torch"], environment)
    # Where Python may not write bytecode, every process would compile torch and vLLM again.
    compiled = ["--compile-bytecode"] if sys.dont_write_bytecode else []
    run(uv("install", "--no-deps", *compiled, "-r", str(arguments.lock)), environment)
    if arguments.project:
        run(uv("install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)), environment)


def read_lock(path: pathlib.Path) -> dict[str, str]:
    """name -> version, of a file of `name==version` lines."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", path.read_text(), re.MULTILINE))


def uv(command: str, *arguments: str) -> list[str]:
    target = ["--python", sys.executable] if command == "install" else []
    return [sys.executable, "-m", "uv", "pip", command, *target, *arguments]


def uv_environment() -> dict[str, str]:
    """This environment, with the index and the find-links that pip is configured with: uv does not read pip's configuration."""
    environment = dict(os.environ)
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    found = {}  # later sections win, as in pip: global, install, then the environment
    for section, key, value in re.findall(r"^(global|install|:env:)\.([a-z-]+)='(.*)'$", listed, re.MULTILINE):
        found[key] = value if section == ":env:" or key not in found else found[key]
    if links := found.get("find-links"):
        environment.setdefault("UV_FIND_LINKS", ",".join(links.replace("\\n", " ").split()))
    if index := found.get("index-url"):
        environment.setdefault("UV_DEFAULT_INDEX", index)
    return environment


def install_torch(version: str, environment: dict[str, str]) -> None:
    """From the first place that has it. Places that are unreachable cost seconds, not minutes."""
    hasty = {**environment, "UV_HTTP_TIMEOUT": "30", "UV_HTTP_CONNECT_TIMEOUT": "5", "UV_HTTP_RETRIES": "1"}
    index = environment.get("TORCH_INDEX_URL") or TORCH_INDEX_URL
    places = []
    if folder := environment.get("TORCH_FIND_LINKS"):
        places.append((folder, ["--no-index", "--find-links", folder], environment))
    elif "+" not in version:
        places.append(("the package index", [], environment))
    else:
        if links := environment.get("UV_FIND_LINKS"):
            places.append((links, ["--no-index"], environment))
        places.append((index, ["--default-index", index], hasty))
    failures = []
    for place, arguments, variables in places:
        print(f"torch {version} from {place}", flush=True)
        done = subprocess.run(
            uv("install", "--no-deps", *arguments, f"torch=={version}"), env=variables, capture_output=True, text=True
        )
        if done.returncode == 0:
            return
        failures.append(f"  {place}:\n{re.sub('(?m)^', '    ', done.stderr.strip())}")
    sys.exit(
        f"torch=={version} was found nowhere:\n" + "\n".join(failures) + "\nSet TORCH_INDEX_URL to an index that has it"
        " or TORCH_FIND_LINKS to a folder that holds its wheel, and run make again."
    )  # fmt: skip


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed with status {done.returncode}; fix what it says above and run make again")


if __name__ == "__main__":
    main()
