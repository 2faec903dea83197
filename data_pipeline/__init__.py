"""From raw video to packed batches: codec decomposition, shards, clustering, loading."""
