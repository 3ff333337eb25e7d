"""Benchmarks: the serial baseline (`serial`) and what is measured against it. A figure is given only with its check."""
