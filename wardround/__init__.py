"""What a notebook imports; the generated protocol messages are built into the same package."""
