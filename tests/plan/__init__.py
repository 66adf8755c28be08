"""Tests of the plan: how many encoders and language instances, and whether to split."""
