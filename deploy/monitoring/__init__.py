"""Dashboards and alert rules as code; `python -m deploy.monitoring` compiles them into the charts' files.

Not here: the metrics (services/*/metrics.py, docs/metrics.md), the templates that carry the compiled files.
"""
