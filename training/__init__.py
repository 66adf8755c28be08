"""How the default model was made. Not part of the installed package."""
