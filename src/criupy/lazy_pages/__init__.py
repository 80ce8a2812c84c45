"""The destination's daemon, in the place of ``criu lazy-pages``."""
