"""What a run writes down beside its weights: metrics, speed, consumed samples, report."""
