"""Differential privacy as pure functions: noise, sampling, accounting (docs/privacy.md)."""
