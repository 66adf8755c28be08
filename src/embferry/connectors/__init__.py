"""The library under the engines that people run at scale."""
