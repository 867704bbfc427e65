"""What every part agrees on: model arguments, variant directories, result files, errors.

`workloads`, `compress`, `serve`, `loadtest` and `compare` talk to each other only
through directories, HTTP and the types in this package. Nothing here imports them.
"""
