"""Triton kernels, generated from the specs as ordinary `@triton.jit` source files.

Nothing here was timed on a GPU yet: the kernels run under Triton's interpreter in tests and are
compiled ahead of time for the shipped targets, where their resources are checked.
"""
