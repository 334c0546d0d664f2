"""Channel mixers: what the projections of an MLP block are rewritten to."""
