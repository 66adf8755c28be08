"""The training of the default model. This is not part of the installed package."""
