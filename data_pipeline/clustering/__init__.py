"""Pseudo-labels: features over shards, FAISS centroids, the nearest centroids of every sample."""
