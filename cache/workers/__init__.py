"""Processes that decode series and run recipes straight into extents, so that hostile bytes can only harm their job."""
