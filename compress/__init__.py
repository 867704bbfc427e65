"""Make a model smaller: structured pruning and quantization by recipe, block by block.

`build.build_variant` walks the decoder blocks of a checkpoint once and applies a recipe's
steps to each; the mathematics is in `prune.py` and `quantize.py` as pure functions, the
file format of quantized layers in `formats.py`, the names of a family's layers in `families.py`.
"""
