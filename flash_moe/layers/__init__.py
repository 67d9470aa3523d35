"""Layers over the expert op: tables, router, and the two together."""
