"""The control plane: how the ends of transfers exchange control messages."""
