"""Reports of load tests and comparisons: HTML pages and terminal tables."""
