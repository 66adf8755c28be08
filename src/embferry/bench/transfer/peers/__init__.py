"""Other ways to move an embedding, one a file, each run as its own users would, in the way that suits it best."""
