"""A tiny Qwen3-VL trained from nothing on coloured shapes that this package draws."""
