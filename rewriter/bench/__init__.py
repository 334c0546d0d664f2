"""Kernel timings against what a person would use instead, interleaved in one process."""
