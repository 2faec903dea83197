"""The on-disk format: what a sample's bytes mean (schema), how shards are written,
bound and looked at.
"""
