"""What else could have been used, one a file. Each is run as its own users run it, in the way that is best for it."""
