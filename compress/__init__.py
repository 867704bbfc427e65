"""Makes a model smaller: structured pruning and quantization by recipe, block by block.

`build.build_variant` builds a variant, `runner.py` walks over the decoder blocks of a checkpoint once per step, and
`stream.py` moves the calibration samples along. `steps/` says what a step does to a block, `formats/` has one object
per quantization format, `families.py` the layer names of each model family. The mathematics is in `prune.py`,
`osscar.py`, `quantize.py` and `rounding.py` as pure functions. `reference.py` computes in plain PyTorch what an engine
should compute.
"""
