"""Facts and tools that every part of the project shares: models, variants, settings, errors, storage and progress.

Nothing here imports another part. The parts pass data to each other as directories, over HTTP, and as Python objects in
one direction: workloads, distill, compress, serve, loadtest, compare, report.
"""
