"""What decides a run: the configuration's schema, presets, overrides and command line."""
