"""Optimizers over optimizers: what trains when, and in which coordinates."""
