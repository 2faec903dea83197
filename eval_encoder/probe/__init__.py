"""Attentive, linear and nearest-neighbour probes of frozen encoders."""
