"""Rows of buffers, folders, Parquet files, TensorDicts and lists of them, read in order.

Knows what holds rows and how trajectories lie in it; no policies.
"""
