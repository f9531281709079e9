"""The `wardround` command."""
