"""Placeholder until the real one lands."""


class CanaryRunner:
    pass
