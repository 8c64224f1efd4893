"""Fill the build cache: `python -m hstu_lab.ops.cutlass`. Takes a minute or two once, then nothing."""

from __future__ import annotations

import sys
import time

from hstu_lab import environment
from hstu_lab.ops.cutlass.build import KERNELS, ToolchainMissing, build_all


def main() -> int:
    start = time.monotonic()
    print(f"{2 * len(KERNELS)} CUTLASS kernels for sm_80 and sm_90a in {environment.kernel_folder()}", file=sys.stderr)
    try:
        build_all()
    except ToolchainMissing as error:
        print(error, file=sys.stderr)
        return 1
    print(f"ready after {time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
