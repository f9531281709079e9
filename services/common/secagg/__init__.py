"""The secure aggregation of docs/protocol.md as pure functions over bytes and numpy arrays.

Not here: transport (rpc), storage (store), time and randomness (arguments).
"""
