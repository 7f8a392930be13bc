"""Attention of packed rows, one implementation a module."""
