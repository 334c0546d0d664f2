"""Generated C++ kernels for CPUs."""
