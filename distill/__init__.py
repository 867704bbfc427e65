"""Knowledge distillation: trains a student on chosen sections of shortened sequences, in stages, and counts the cost.

`sections` divides sequences into prompt, chain of thought and answer. `supervision` chooses among them, `batches` makes
tensors, and `losses`, `chunked` and `ranking` compare student and teacher. `train` is the trainer, `components` its
saved parts, and `run` makes the student's directory. `items` lets a student read items as tokens of their own:
`item_encoder` has their features, `item_embedding` learns their rows, and `item_checkpoint` puts them into a
vocabulary.
"""
