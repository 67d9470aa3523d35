"""Modules of launch/compare.py."""
