"""The hospital node: data, training, policy, ledger and one upload a round."""
