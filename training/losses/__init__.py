"""Cluster discrimination: margin softmax over class centres that are sharded over the ranks."""
