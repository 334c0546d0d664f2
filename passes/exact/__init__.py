"""Rewrites that change no function: the same layers on faster code."""
