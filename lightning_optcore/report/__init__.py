"""Reports in HTML: read runs and measurements, compute nothing."""
