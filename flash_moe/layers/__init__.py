"""Layers built on the expert op: the tables of experts, the router, and both in one layer."""
