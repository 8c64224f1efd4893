"""CUTLASS C++ kernels of the projections: sources, a build cache keyed by content, and a loader without torch headers."""
