"""The commands of ``embferry``, one file per verb."""
