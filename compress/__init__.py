"""Make a model smaller: structured pruning and quantization by recipe, block by block.

`build.build_variant` walks the decoder blocks of a checkpoint once per step of a recipe, with the calibration samples
beside it (`stream.py`); `steps/` says what a step does to a block. The mathematics is in `prune.py`, `osscar.py`,
`quantize.py` and `rounding.py` as pure functions, the file formats in `formats.py` and `bnb.py`, the names of a
family's layers in `families.py`. `reference.py` computes in plain torch what an engine should.
"""
