"""Who may talk to the parts of a cluster, and whether what arrives is what was sent."""
