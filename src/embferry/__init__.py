"""Resumable transfer of multimodal embeddings for vision-language models served in separate workers."""

__version__ = "0.1.0"
