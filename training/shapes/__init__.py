"""Trains a tiny Qwen3-VL from random weights on coloured shapes that this package draws."""
