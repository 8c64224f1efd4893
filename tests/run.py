"""`make test`: runs the steps named (all by default) and ends with one line, "N passed, N failed, N GPU tests not run here".

A step that collects nothing counts as a failure, so that a lost folder cannot look like success.
"""

import os
import pathlib
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
REPORTS = ROOT / ".build" / "reports"
NBVAL = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=120", "--override-ini=timeout=300"]
STEPS = {
    "style": [["ruff", "check", "."], ["ruff", "format", "--check", "."]],
    "kernels": [["hstu_lab.ops.cutlass"]],
    "unit": [["pytest", "-q", "-m", "not browser and not slow", "tests"]],
    "notebooks": [["pytest", "-q", *NBVAL, "notebooks"]],
    "browser": [["pytest", "-q", "-m", "browser", "tests"]],
}


def main(names: list[str]) -> int:
    if unknown := set(names) - set(STEPS):
        sys.exit(f"unknown step {', '.join(sorted(unknown))}; known: {', '.join(STEPS)}")
    REPORTS.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two busy-waiting kernels on two cores starve each other
    totals = {"passed": 0, "failed": 0, "skipped": 0, "gpu": 0}
    for name in names or STEPS:
        for command in STEPS[name]:
            start = time.monotonic()
            print(f"\n== {name}: {' '.join(command)}", flush=True)
            counts = run(name, command)
            print(f"== {name}: {counts['failed']} failed, {time.monotonic() - start:.0f} s", flush=True)
            totals = {key: totals[key] + counts[key] for key in totals}
    skipped = f", {totals['skipped']} skipped" if totals["skipped"] else ""
    print(f"\n{totals['passed']} passed, {totals['failed']} failed{skipped}, {totals['gpu']} GPU tests not run here")
    return 1 if totals["failed"] else 0


def run(step: str, command: list[str]) -> dict[str, int]:
    report = REPORTS / f"{step}.xml"
    report.unlink(missing_ok=True)
    extra = [f"--junitxml={report}"] if command[0] == "pytest" else []
    status = subprocess.run([sys.executable, "-m", *command, *extra], cwd=ROOT).returncode
    counts = read(report) if report.exists() else {"passed": int(status == 0), "failed": 0, "skipped": 0, "gpu": 0}
    if status and not counts["failed"]:
        counts["failed"] = 1
    return counts


def read(report: pathlib.Path) -> dict[str, int]:
    """Counts of a JUnit report."""
    counts = {"passed": 0, "failed": 0, "skipped": 0, "gpu": 0}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        total, failures, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
        counts["failed"] += failures + errors
        counts["skipped"] += skipped
        counts["passed"] += total - failures - errors - skipped
        counts["gpu"] += sum(int(p.get("value")) for p in suite.iter("property") if p.get("name") == "gpu_tests_left_out")
    return counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
