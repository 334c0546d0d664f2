"""A normal form over an untouched graph, which stays the oracle: ways of reading its nodes."""
