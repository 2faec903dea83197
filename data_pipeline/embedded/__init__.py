"""Labelled sets that the product makes itself: motion_shapes, brief_events and tempo, as real H.264
clips with their lists.
"""
