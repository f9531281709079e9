"""The aggregator: round coordination, model distribution, masked-update submission."""
