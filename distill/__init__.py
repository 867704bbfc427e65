"""Students by knowledge distillation: chosen sections of shortened sequences, in stages, with the cost counted.

`sections` finds prompt, chain and answer; `supervision` chooses among them and shortens; `batches` lays sequences out;
`losses` and `chunked` compare student and teacher; `train` is the loop; `cost` counts FLOPs; `run` makes a student.
"""
