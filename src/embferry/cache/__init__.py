"""Embeddings that are kept by content where several encoders reach them: in a folder, or in a Mooncake store."""
