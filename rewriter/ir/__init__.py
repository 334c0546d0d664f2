"""Shared vocabulary: sites, masks, states and kernel specs. Pure data; imports nothing above it."""
