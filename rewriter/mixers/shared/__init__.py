"""Pieces that several mixers are built from."""
