"""Logs, metrics endpoint and health."""
