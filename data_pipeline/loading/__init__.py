"""From shards to packed batches: plan, reader, DALI, views, packing, loader."""
