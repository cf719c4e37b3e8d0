"""Experiments: one short file each, a frozen dataclass of settings and ``run(settings, ...) -> rows``."""
