"""The system: encode side, language side, and everything that moves an embedding between them."""
